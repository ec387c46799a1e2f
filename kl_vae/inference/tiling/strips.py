"""A feature map as a row of strips, streams of such strips, and group norms over them.

B batch, C channels, H and W height and width. The map is cut along one axis, `dim` (2: H, 3: W), on
which it has L lines of M positions each: a strip of l lines is [B, C, l, M] or [B, C, M, l].
S strips, G groups.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kl_vae.runtime.memory import give_back_memory

Strips = Iterator[Tensor]

# after so many that are held: between strips that stay the C library keeps what was let go
_GIVE_BACK_BYTES = 256 * 2**20


class Moments:
    """Mean and squared deviation of each channel, strip by strip, merged exactly.

    Strips are merged in float64 by the formula of Chan et al. (1979), "Updating formulae and a
    pairwise algorithm for computing sample variances", equation 2.1: the mean is never subtracted
    from a sum of squares, which would lose what a small variance has left.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._means: list[Tensor] = []
        self._deviations: list[Tensor] = []

    def add(self, strip: Tensor) -> None:
        """Count a strip [B, C, h, w]."""
        x = _at_least_float32(strip).flatten(2)
        mean = x.mean(2, keepdim=True)
        self._numbers.append(x.shape[2])
        self._means.append(mean[:, :, 0])
        # several times as fast as torch.var_mean on the CPU
        self._deviations.append(torch.linalg.vector_norm(x - mean, dim=2))

    def normalization(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        """What `norm` does with the whole map, as a function of a strip of it."""
        assert isinstance(norm, nn.GroupNorm), "check_exact"
        mean, var = self._of_groups(norm.num_groups)  # each [B, G]
        each = norm.num_channels // norm.num_groups
        device, dtype = self._means[0].device, self._means[0].dtype
        scale = (var + norm.eps).rsqrt().repeat_interleave(each, 1)  # [B, C]
        shift = -mean.repeat_interleave(each, 1) * scale
        if norm.affine:
            weight, bias = (p.detach().cpu().double() for p in (norm.weight, norm.bias))
            scale, shift = weight * scale, weight * shift + bias
        scale, shift = (x[:, :, None, None].to(dtype).to(device) for x in (scale, shift))

        def normalize(strip: Tensor) -> Tensor:
            # of half precision as well, since scale and shift are float32
            out = (strip * scale).add_(shift)
            if torch.is_autocast_enabled(strip.device.type):
                return out
            return out.to(strip.dtype)

        return normalize

    def _of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        # [S, B, C], on the CPU: not every device has float64
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
    """All strips of one feature map, first to last, and the moments of its channels."""

    dim: int
    strips: deque[Tensor] = field(default_factory=deque)
    moments: Moments = field(default_factory=Moments)

    @classmethod
    def collect(cls, strips: Iterable[Tensor], dim: int) -> FeatureMap:
        """Hold all of a stream; the moments are taken while each strip is still in the cache."""
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
        """Stream the strips; none is held any longer once it has been given."""
        while self.strips:
            yield self.strips.popleft()

    def replace(self, function: Callable[[Tensor], Tensor]) -> Strips:
        """Stream the strips, and hold what `function` makes of each in its place."""
        for _ in range(len(self.strips)):  # once round
            strip = self.strips.popleft()
            self.strips.append(function(strip))
            yield strip

    def whole(self) -> Tensor:
        """The map in one tensor [B, C, H, W]; the strips are not held any longer."""
        strips = list(self.drain())
        return strips[0] if len(strips) == 1 else torch.cat(strips, self.dim)


def split(x: Tensor, dim: int, lines: int) -> Strips:
    """Stream a whole map as views of at most so many lines."""
    return iter(torch.split(x, lines, dim))


def regroup(strips: Strips, dim: int, lines: int) -> Strips:
    """Stream the same map in strips of so many lines, the last one of what is left."""
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
    """Each strip with the line that follows it, and the one `before` it; 0 beyond the map's ends.

    What a convolution of 3 lines needs, whose own padding must then be on the other axis alone.
    """
    strip: Tensor | None = next(strips)
    assert strip is not None
    beyond = torch.zeros_like(strip.narrow(dim, 0, 1))
    last = [beyond] if before else []
    while strip is not None:
        following = next(strips, None)
        first = beyond if following is None else following.narrow(dim, 0, 1)
        padded = torch.cat([*last, strip, first], dim)
        if before:
            last = [strip.narrow(dim, -1, 1).clone()]  # a view would hold the strip
        strip = following
        yield padded


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
