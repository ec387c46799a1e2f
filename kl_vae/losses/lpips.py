"""LPIPS v0.1, a perceptual distance.

Shapes: B batch, C channels, H and W image height and width, h and w height and width of a tap's
features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kl_vae.losses.lpips_weights import find_weights, read_features, read_heads

# ImageNet mean and standard deviation for images in [-1, 1], rounded as published
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10


@dataclass(frozen=True)
class _Network:
    architecture: str  # torchvision name
    taps: tuple[int, ...]  # layers of torchvision's `.features` whose outputs are compared
    channels: tuple[int, ...]  # C of each tap
    smallest_side: int  # smaller images have no features at the last tap


_NETWORKS = {
    # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
    "vgg": _Network("vgg16", (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16),
    "alex": _Network("alexnet", (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31),
    "squeeze": _Network(
        "squeezenet1_1", (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512), 17
    ),
}


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018, eq. 1), version 0.1.

    A network trained on ImageNet processes both images. At each tap, its features are normalised
    over the channels; their squared differences are weighted by channel, averaged over space, and
    summed over channels and taps. The distance is 0 for identical images. Distances of different
    values of `net` are not comparable.

    The module has no parameters and an empty state dict; its buffers move with `.to(device)`. It
    stays in eval mode, and computes in float32 also under autocast.

    Args:
        net: `vgg` (the usual choice for a loss), `alex` or `squeeze`.
        linear: weight channels by linear heads fitted to human judgements; False: equal weights.
        features: weights file of the network with torchvision keys; None: the torchvision weights,
            downloaded to the torch.hub cache. In distributed training, one process per node
            downloads while all ranks wait, so construct this on every rank.
        heads: weights file of the linear heads; None: the published ones, downloaded to the same
            cache.

    Raises:
        ValueError: an argument is invalid, or a file is missing, cannot be downloaded, or has
            other contents.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        net: str = "vgg",
        linear: bool = True,
        features: str | Path | None = None,
        heads: str | Path | None = None,
    ) -> None:
        super().__init__()
        if net not in _NETWORKS:
            raise ValueError(f"net={net!r}: choose one of {', '.join(_NETWORKS)}")
        if not isinstance(linear, bool):
            raise ValueError(f"linear={linear!r}: choose one of True, False")
        self.net = net
        self.network = _NETWORKS[net]
        features_file, heads_file = find_weights(net, features, heads, linear)
        self.features = _build(self.network)
        shapes = {key: x.shape for key, x in self.features.state_dict().items()}
        _fill(self.features, read_features(features_file, net, shapes))
        channels = self.network.channels
        if heads_file is None:
            weights = [torch.ones(1, c, 1, 1) for c in channels]
        else:
            weights = read_heads(heads_file, net, channels)
        for i, weight in enumerate(weights):
            self.register_buffer(f"head{i}", weight, persistent=False)
        for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.train(False)

    def forward(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the distance per pair, [B, 1, 1, 1], differentiable in `reconstructions`.

        Args:
            inputs: images [B, C, H, W] in [-1, 1], C = 1 (greyscale) or 3.
            reconstructions: images of the same shape.

        Raises:
            ValueError: the shapes differ, or are invalid or too small for the network.
        """
        self._check(inputs, reconstructions)
        with torch.autocast(inputs.device.type, enabled=False):
            with torch.no_grad():
                targets = self._features(inputs.float())
            pairs = zip(targets, self._features(reconstructions.float()), strict=True)
            distances = []
            for i, (target, features) in enumerate(pairs):
                # averaging over space first is cheaper, and commutes with the head
                squares = (target - features).square().mean(dim=(2, 3), keepdim=True)
                distances.append((self.get_buffer(f"head{i}") * squares).sum(dim=1, keepdim=True))
            return torch.stack(distances).sum(dim=0)

    def train(self, mode: bool = True) -> LPIPS:
        """Keep eval mode, regardless of the mode of the parent module."""
        return super().train(False)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Return the features [B, C, h, w] of each tap, with unit norm over the channels."""
        h = (images - self.shift) / self.scale  # broadcasts one channel to three
        taps = []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.network.taps:
                # the gradient of vector_norm at 0 is 0, that of the root of a sum is NaN
                taps.append(h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + _EPS))
        return taps

    def _check(self, inputs: Tensor, reconstructions: Tensor) -> None:
        shape = tuple(inputs.shape)
        if inputs.shape != reconstructions.shape:
            raise ValueError(
                f"LPIPS: inputs {shape} and reconstructions {tuple(reconstructions.shape)}; "
                "give both the same shape"
            )
        if len(shape) != 4:
            raise ValueError(f"LPIPS: images {shape}; give a batch [B, C, H, W]")
        if shape[1] not in (1, 3):
            raise ValueError(
                f"LPIPS: images of {shape[1]} channels, but 1 or 3 are required; set "
                "perceptual_weight: 0, or use 3 channels"
            )
        if min(shape[2:]) < self.network.smallest_side:
            raise ValueError(
                f"LPIPS: images of {shape[2]} x {shape[3]}, but {self.net} needs at least "
                f"{self.network.smallest_side} x {self.network.smallest_side}; use larger images, "
                "or set perceptual_weight: 0"
            )


def _build(network: _Network) -> nn.Sequential:
    """Build torchvision's `.features` up to the last tap, on the meta device (no random init)."""
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.get_model(network.architecture, weights=None)
    features: nn.Sequential = model.features[: network.taps[-1] + 1]
    return features


def _fill(features: nn.Sequential, tensors: dict[str, Tensor]) -> None:
    """Replace each parameter by the tensor of the same name, as a non-persistent buffer."""
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        module = features.get_submodule(path)
        delattr(module, name)
        module.register_buffer(name, tensor, persistent=False)
