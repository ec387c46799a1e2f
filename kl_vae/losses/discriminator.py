"""Patch discriminator of the adversarial loss, and losses on its logits.

Shapes: B batch, C channels, H and W image height and width, h and w height and width of the logits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class ActNorm(nn.Module):
    """Affine layer scale * (x + loc), [B, C, H, W] -> [B, C, H, W], with data-dependent init.

    See Kingma & Dhariwal (2018), section 3.1. The first training batch sets loc = -mean and
    scale = 1 / (std + 1e-6) for each channel, so that its output has mean 0 and variance 1;
    afterwards both are ordinary parameters. Mean and (unbiased) standard deviation are computed
    over all ranks, which must all run this batch, so that their parameters stay equal. A batch that
    is not finite, or has only one value per channel, is skipped, and the next one is used instead.

    Args:
        channels: number of channels C.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        # host copy of the buffer, which avoids a device synchronisation per step
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
        count = values.new_full((1,), values.shape[1])
        sums = _sum_over_ranks(torch.cat((values.sum(dim=1), count)))  # [C + 1], the count last
        mean = sums[:-1] / sums[-1]
        deviations = _sum_over_ranks((values - mean[:, None]).square().sum(dim=1))
        std = (deviations / (sums[-1] - 1.0)).sqrt()
        # equal on all ranks, since the sums are over all ranks
        if (~(mean + std).isfinite()).any():
            return False
        self.loc.copy_(-mean.view_as(self.loc))
        self.scale.copy_(1.0 / (std.view_as(self.scale) + 1e-6))
        self.initialized.fill_(1)
        return True


def _forget_initialized(module: ActNorm, incompatible_keys: object) -> None:
    module._known_initialized = False


def _sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks in place, and return it; a no-op in a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


DiscNorm = Literal["batch", "act", "group", "none"]
DiscLoss = Literal["hinge", "vanilla", "non_saturating"]
DISC_NORMS = get_args(DiscNorm)
DISC_LOSSES = get_args(DiscLoss)

_MOST_GROUPS = 32


class PatchDiscriminator(nn.Module):
    """PatchGAN classifier of image patches as real or fake (Isola et al. 2017, section 3.2.2).

    It has `n_layers` convolutions of stride 2, one of stride 1 and one to the logits, all 4 x 4.
    All but the first and last are followed by `norm`. `batch` and `act` use the published modules
    and parameter names, so that published state dicts load. With `batch`, statistics differ between
    ranks; `group` normalises each image separately, which suits small batches and any number of
    ranks.

    Args:
        in_channels: number of image channels C.
        n_layers: number of convolutions of stride 2; 3 gives patches of 70 x 70 pixels.
        ndf: channels after the first convolution; they double up to 8 * ndf.
        norm: `batch`, `act` (see `ActNorm`), `group` or `none`.

    Raises:
        ValueError: an argument is invalid; the message names the key of the lossconfig.
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
                raise ValueError(f"{key}={value!r}: must be an integer of at least 1")
        _check_choice("disc_norm", norm, DISC_NORMS)
        self.in_channels = in_channels
        self.n_layers = n_layers

        channels = [ndf * min(2**n, 8) for n in range(n_layers + 1)]
        layers = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), _activation()]
        for n, (before, after) in enumerate(pairwise(channels), start=1):
            stride = 2 if n < n_layers else 1
            bias = norm != "batch"  # batch norm would cancel it
            layers += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=bias),
                _normalization(norm, after),
                _activation(),
            ]
        layers.append(nn.Conv2d(channels[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self._initialize()

    def _initialize(self) -> None:
        """Initialise weights as published; convolution biases keep the PyTorch default."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    @property
    def minimum_size(self) -> int:
        """Minimum height and width in pixels, 3 * 2 ** n_layers."""
        # stride 2 halves the size, rounding down; both convolutions of stride 1 reduce it by one
        size: int = 3 * 2**self.n_layers
        return size

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, 1, h, w] of images [B, C, H, W], positive for patches judged real.

        Raises:
            ValueError: the images have a wrong number of channels, or are too small.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"disc_in_channels={self.in_channels}: got shape {list(x.shape)}; give images "
                f"[B, {self.in_channels}, H, W], or set disc_in_channels to their channels"
            )
        height, width = x.shape[2:]
        if min(height, width) < self.minimum_size:
            raise ValueError(
                f"disc_num_layers={self.n_layers}: images of {height} x {width} pixels are too "
                f"small; reduce disc_num_layers, or use crops of at least {self.minimum_size} "
                "pixels"
            )
        logits: Tensor = self.main(x)
        return logits


class RealAndFake(nn.Module):
    """Wrapper that runs both discriminator passes in one call, for DistributedDataParallel."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits, [B, 1, h, w] each, of real and fake images, [B, C, H, W] each."""
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
    return nn.Identity()  # keeps the indices of later layers


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the `choices`."""
    if value not in choices:
        raise ValueError(f"{key}={value!r}: choose one of {', '.join(choices)}")


def discriminator_loss(real: Tensor, fake: Tensor, kind: DiscLoss) -> Tensor:
    """Compute the discriminator loss, a float32 scalar.

    `hinge` is the loss of Lim & Ye (2017); `vanilla` and `non_saturating` both use the cross
    entropy of Goodfellow et al. (2014, eq. 1). All are halved, as published.

    Args:
        real: logits of images, any shape.
        fake: logits of reconstructions, any shape.
        kind: `hinge`, `vanilla` or `non_saturating`.

    Raises:
        ValueError: the kind is unknown.
    """
    _check_choice("disc_loss", kind, DISC_LOSSES)
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: DiscLoss) -> Tensor:
    """Compute the adversarial loss of the autoencoder, a float32 scalar.

    -mean(fake) for `hinge` and, as published, for `vanilla`; for `non_saturating`
    -mean(log sigmoid(fake)) (Goodfellow et al. 2014, section 3).

    Args:
        fake: logits of reconstructions, any shape.
        kind: `hinge`, `vanilla` or `non_saturating`.

    Raises:
        ValueError: the kind is unknown.
    """
    _check_choice("disc_loss", kind, DISC_LOSSES)
    fake = fake.float()
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


def lecam(
    real: Tensor, fake: Tensor, average_real: Tensor | float, average_fake: Tensor | float
) -> Tensor:
    """Compute the LeCam regularisation (Tseng et al. 2021, eq. 4), a float32 scalar.

    As in the authors' code, it penalises only real logits above the running average of fake logits,
    and fake logits below the running average of real logits.

    Args:
        real: logits of images, any shape.
        fake: logits of reconstructions, any shape.
        average_real: running average of the mean real logit, a scalar.
        average_fake: running average of the mean fake logit, a scalar.
    """
    above = F.relu(real.float() - average_fake)
    below = F.relu(average_real - fake.float())
    return above.square().mean() + below.square().mean()
