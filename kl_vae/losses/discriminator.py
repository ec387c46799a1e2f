"""The patch discriminator of the adversarial loss, and the losses on its logits.

B batch, C channels, H and W the image's height and width, h and w those of the logits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class ActNorm(nn.Module):
    """scale * (x + loc), [B, C, H, W] -> same (Kingma & Dhariwal 2018, section 3.1).

    The first training batch sets loc = -mean and scale = 1 / (std + 1e-6) for each channel, so that
    it leaves with mean 0 and variance 1; from then on both are trained as any parameter. Mean and
    standard deviation (unbiased) are over the batches of all ranks, so that the ranks stay equal:
    all of them must run this batch. A first batch that is not finite, or has one value per channel,
    changes nothing; the next one counts as the first.

    Args:
        channels: C.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        # a copy of the buffer on the host: no wait for the device per step
        self._known_initialized = False
        self.register_load_state_dict_post_hook(_forget_initialized)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self._known_initialized:
            self._known_initialized = bool(self.initialized.item()) or self._initialize(x)
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> bool:
        """Set loc and scale from a batch; return False if its statistics are not finite."""
        values = x.float().transpose(0, 1).flatten(1)  # [C, B * H * W]
        count = values.new_tensor([values.shape[1]])
        sums = _sum_over_ranks(torch.cat((values.sum(dim=1), count)))  # [C + 1], the count last
        mean = sums[:-1] / sums[-1]
        deviations = _sum_over_ranks((values - mean[:, None]).square().sum(dim=1))
        std = (deviations / (sums[-1] - 1.0)).sqrt()
        # the same on every rank, for these are sums over all
        if not (mean + std).isfinite().all():
            return False
        self.loc.copy_(-mean.view_as(self.loc))
        self.scale.copy_(1.0 / (std.view_as(self.scale) + 1e-6))
        self.initialized.fill_(1)
        return True


def _forget_initialized(module: ActNorm, incompatible_keys: object) -> None:
    module._known_initialized = False


def _sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum over all ranks, computed in place; a single process keeps its values."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


DiscNorm = Literal["batch", "act", "group", "none"]
DiscLoss = Literal["hinge", "vanilla", "non_saturating"]
DISC_NORMS = get_args(DiscNorm)
DISC_LOSSES = get_args(DiscLoss)

_MOST_GROUPS = 32


class PatchDiscriminator(nn.Module):
    """Classifies each patch of an image as real or not (Isola et al. 2017, section 3.2.2).

    `n_layers` convolutions of stride 2, one of stride 1 and one to the logits, all 4 x 4. Between
    them, but not after the first, `norm`: `batch` and `act` have the published modules and names
    of parameters, so that published state dicts load. Under `batch` the ranks' statistics differ;
    `group` normalises each image by itself, so it suits small batches and any number of ranks.

    Args:
        in_channels: C of the images.
        n_layers: convolutions of stride 2; 3 sees patches of 70 x 70 pixels.
        ndf: channels after the first convolution; they double up to 8 * ndf.
        norm: `batch`, `act` (see `ActNorm`), `group` or `none`.

    Raises:
        ValueError: an impossible value; the key of the lossconfig, the value and the fix.
    """

    def __init__(
        self, in_channels: int = 3, n_layers: int = 3, ndf: int = 64, norm: DiscNorm = "batch"
    ) -> None:
        super().__init__()
        for key, value in (
            ("disc_in_channels", in_channels),
            ("disc_num_layers", n_layers),
            ("disc_ndf", ndf),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}={value!r}: must be a whole number, 1 or more")
        _check_choice("disc_norm", norm, DISC_NORMS)
        self.in_channels = in_channels
        self.n_layers = n_layers

        channels = [ndf * min(2**n, 8) for n in range(n_layers + 1)]
        layers = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), _activation()]
        for n, (before, after) in enumerate(pairwise(channels), start=1):
            stride = 2 if n < n_layers else 1
            bias = norm != "batch"  # batch norm would take it away again
            layers += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=bias),
                _normalization(norm, after),
                _activation(),
            ]
        layers.append(nn.Conv2d(channels[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self._initialize()

    def _initialize(self) -> None:
        """Draw the published initial weights; the biases of convolutions keep torch's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    @property
    def minimum_size(self) -> int:
        """The smallest height and width, in pixels, that gives a logit: 3 * 2 ** n_layers."""
        # each convolution of stride 2 halves, rounding down; the two of stride 1 take one each
        size: int = 3 * 2**self.n_layers
        return size

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, 1, h, w], positive where a patch looks real.

        Raises:
            ValueError: the images have another number of channels, or are too small.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"disc_in_channels={self.in_channels}: cannot take {list(x.shape)}; give images "
                f"[B, {self.in_channels}, H, W], or set disc_in_channels to their channels"
            )
        height, width = x.shape[2:]
        if min(height, width) < self.minimum_size:
            raise ValueError(
                f"disc_num_layers={self.n_layers}: images of {height} x {width} pixels give no "
                f"logit; take fewer disc_num_layers, or crops of {self.minimum_size} pixels or more"
            )
        logits: Tensor = self.main(x)
        return logits


class RealAndFake(nn.Module):
    """Both passes of a discriminator in one call, as DistributedDataParallel needs it."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Images, each [B, C, H, W] -> their logits, each [B, 1, h, w]."""
        return self.discriminator(real), self.discriminator(fake)


def _activation() -> nn.Module:
    return nn.LeakyReLU(0.2, inplace=True)


def _normalization(norm: DiscNorm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "act":
        return ActNorm(channels)
    if norm == "group":
        groups = max(n for n in range(1, _MOST_GROUPS + 1) if channels % n == 0)
        return nn.GroupNorm(groups, channels, eps=1e-6)
    return nn.Identity()  # keeps the indices of the layers behind it


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the `choices`."""
    if value not in choices:
        raise ValueError(f"{key}={value!r}: choose one of {', '.join(choices)}")


def discriminator_loss(real: Tensor, fake: Tensor, kind: DiscLoss) -> Tensor:
    """Return the scalar that the discriminator minimises, float32.

    `hinge` is that of Lim & Ye (2017); `vanilla` and `non_saturating` are both the cross entropy
    of Goodfellow et al. (2014, eq. 1). Either is halved, as published.

    Args:
        real: logits of images, any shape.
        fake: logits of reconstructions, any shape.
        kind: `hinge`, `vanilla` or `non_saturating`.

    Raises:
        ValueError: another kind.
    """
    _check_choice("disc_loss", kind, DISC_LOSSES)
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: DiscLoss) -> Tensor:
    """Return the scalar that the autoencoder minimises, float32.

    -mean(fake) for `hinge` and, as published, for `vanilla`; for `non_saturating`
    -mean(log sigmoid(fake)) (Goodfellow et al. 2014, section 3).

    Args:
        fake: logits of reconstructions, any shape.
        kind: `hinge`, `vanilla` or `non_saturating`.

    Raises:
        ValueError: another kind.
    """
    _check_choice("disc_loss", kind, DISC_LOSSES)
    fake = fake.float()
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


def lecam(
    real: Tensor, fake: Tensor, average_real: Tensor | float, average_fake: Tensor | float
) -> Tensor:
    """Return the LeCam regularisation (Tseng et al. 2021, eq. 4), a float32 scalar.

    In the form of its authors' code, which penalises only real logits above the running average of
    the fake ones and fake logits below that of the real ones.

    Args:
        real: logits of images, any shape.
        fake: logits of reconstructions, any shape.
        average_real: running average of the mean real logit, a scalar.
        average_fake: running average of the mean fake logit, a scalar.
    """
    above = F.relu(real.float() - average_fake)
    below = F.relu(average_real - fake.float())
    return above.square().mean() + below.square().mean()
