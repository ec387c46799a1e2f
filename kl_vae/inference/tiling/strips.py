"""Feature maps split into strips, streams of strips, and group norms over them.

Shapes: B batch, C channels, H and W height and width, S strips, G groups. A feature map is split
along the axis `dim` (2: H, 3: W) into lines of M positions each; a strip of l lines is
[B, C, l, M] or [B, C, M, l].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kl_vae.blocks import at_least_float32
from kl_vae.runtime.memory import give_back_memory

Strips = Iterator[Tensor]

# memory is returned to the system after this many bytes of strips: between live strips, the C
# library does not release freed memory
_GIVE_BACK_BYTES = 256 * 2**20


class Moments:
    """Mean and squared deviation of each channel, accumulated over strips.

    Strips are merged in float64 by the formula of Chan et al. (1979), "Updating formulae and a
    pairwise algorithm for computing sample variances", equation 2.1. It avoids subtracting the
    squared mean from a mean of squares, where small variances would cancel.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._means: list[Tensor] = []
        self._deviations: list[Tensor] = []

    def add(self, strip: Tensor) -> None:
        """Add a strip [B, C, h, w]."""
        x = at_least_float32(strip).flatten(2)
        mean = x.mean(2, keepdim=True)
        self._numbers.append(x.shape[2])
        self._means.append(mean[:, :, 0])
        # several times faster than torch.var_mean on the CPU
        self._deviations.append(torch.linalg.vector_norm(x - mean, dim=2))

    def normalization(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return a function that normalises a strip as `norm` normalises the whole feature map."""
        assert isinstance(norm, nn.GroupNorm), "check_exact"
        mean, var = self._of_groups(norm.num_groups)  # each [B, G]
        group_size = norm.num_channels // norm.num_groups
        device, dtype = self._means[0].device, self._means[0].dtype
        scale = (var + norm.eps).rsqrt().repeat_interleave(group_size, 1)  # [B, C]
        shift = -mean.repeat_interleave(group_size, 1) * scale
        if norm.affine:
            weight, bias = (p.detach().cpu().double() for p in (norm.weight, norm.bias))
            scale, shift = weight * scale, weight * shift + bias
        scale, shift = (x[:, :, None, None].to(dtype).to(device) for x in (scale, shift))

        def normalize(strip: Tensor) -> Tensor:
            # float32 also for half-precision strips, since scale and shift are float32
            out = (strip * scale).add_(shift)
            if torch.is_autocast_enabled(strip.device.type):
                return out
            return out.to(strip.dtype)

        return normalize

    def _of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        # [S, B, C], on the CPU, since some devices do not support float64
        means, deviations = (torch.stack(x).cpu().double() for x in (self._means, self._deviations))
        numbers = torch.tensor(self._numbers, dtype=torch.float64)[:, None, None]
        numbers = numbers.expand_as(means)

        def grouped(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], groups, -1)  # [S, B, G, C / G]

        weights = grouped(numbers)
        total = weights.sum((0, 3), keepdim=True)
        mean = (weights * grouped(means)).sum((0, 3), keepdim=True) / total
        between = weights * (grouped(means) - mean).square()
        within = grouped(deviations).square()
        var = (within + between).sum((0, 3), keepdim=True) / total
        return mean[0, :, :, 0], var[0, :, :, 0]


@dataclass
class FeatureMap:
    """Strips of one feature map, in order, and the moments of its channels."""

    dim: int
    strips: deque[Tensor] = field(default_factory=deque)
    moments: Moments = field(default_factory=Moments)

    @classmethod
    def collect(cls, strips: Iterable[Tensor], dim: int) -> FeatureMap:
        """Collect a stream; moments are computed while each strip is still in the cache."""
        collected = cls(dim)
        held = 0
        for strip in strips:
            collected.moments.add(strip)
            collected.strips.append(strip)
            held += strip.nbytes
            if held >= _GIVE_BACK_BYTES:
                give_back_memory(strip.device)
                held = 0
        return collected

    def drain(self) -> Strips:
        """Stream the strips, releasing each one as it is yielded."""
        while self.strips:
            yield self.strips.popleft()

    def replace(self, function: Callable[[Tensor], Tensor]) -> Strips:
        """Stream the strips, and replace each one by `function(strip)`."""
        for _ in range(len(self.strips)):
            strip = self.strips.popleft()
            self.strips.append(function(strip))
            yield strip

    def whole(self) -> Tensor:
        """Return the feature map as one tensor [B, C, H, W], and release the strips."""
        strips = list(self.drain())
        return strips[0] if len(strips) == 1 else torch.cat(strips, self.dim)


def split(x: Tensor, dim: int, lines: int) -> Strips:
    """Stream a whole feature map as views of at most `lines` lines."""
    return iter(torch.split(x, lines, dim))


def regroup(strips: Strips, dim: int, lines: int) -> Strips:
    """Stream the same feature map in strips of `lines` lines; the last one may be smaller."""
    pieces: list[Tensor] = []
    missing = lines
    for strip in strips:
        start, length = 0, strip.shape[dim]
        while start < length:
            taken = min(missing, length - start)
            pieces.append(strip.narrow(dim, start, taken))
            start, missing = start + taken, missing - taken
            if not missing:
                yield _joined(pieces, dim)
                pieces, missing = [], lines
    if pieces:
        yield _joined(pieces, dim)


def with_halo(strips: Strips, dim: int, before: bool = True) -> Strips:
    """Extend each strip by the following line and, if `before`, by the preceding line.

    Lines beyond the feature map are zero. A 3 x 3 convolution of the result pads only the other
    axis.
    """
    strip: Tensor | None = next(strips)
    assert strip is not None
    zeros = torch.zeros_like(strip.narrow(dim, 0, 1))
    last = [zeros] if before else []
    while strip is not None:
        following = next(strips, None)
        first = zeros if following is None else following.narrow(dim, 0, 1)
        padded = torch.cat([*last, strip, first], dim)
        if before:
            last = [strip.narrow(dim, -1, 1).clone()]  # a view would keep the strip alive
        strip = following
        yield padded


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
