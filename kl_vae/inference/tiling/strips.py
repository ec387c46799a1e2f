"""A feature map as a row of strips, and streams of such strips.

B batch, C channels, H and W height and width. The map is cut along one axis, `dim` (2: H, 3: W), on
which it has L lines of M positions each: a strip of l lines is [B, C, l, M] or [B, C, M, l].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kl_vae.inference.tiling.moments import Moments
from kl_vae.runtime.memory import give_back_memory

Strips = Iterator[Tensor]

# after so many that are held: between strips that stay the C library keeps what was let go
_GIVE_BACK_BYTES = 256 * 2**20


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
