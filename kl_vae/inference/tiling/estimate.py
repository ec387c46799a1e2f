"""How much memory encoding and decoding take.

B batch, H and W the image's height and width. The highest resolutions decide: a map of c channels
takes 4 B c H W bytes in float32 at full resolution, and a quarter of that one level below.
"""

from __future__ import annotations

from dataclasses import dataclass

from kl_vae.ddconfig import DDConfig

# measured on the CPU, torch 2.15, kl-f8: what is held beside the maps counted here are kernels'
# reordered inputs, and strips between what the allocator could not give back
WHOLE_FACTOR = 4.5
EXACT_FACTOR = 1.4
FIXED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Work:
    """One call of encoder or decoder.

    Attributes:
        config: the architecture.
        decoding: decoder, else encoder.
        batch: B.
        height: H of the images, in pixels.
        width: W of the images, in pixels.
        itemsize: bytes of a number of the maps that are kept.
        scores: whether attention writes down the score of each pair of positions.
    """

    config: DDConfig
    decoding: bool
    batch: int
    height: int
    width: int
    itemsize: int = 4
    scores: bool = False

    @property
    def whole_bytes(self) -> int:
        """Bytes that the whole image takes beside weights, input and output."""
        largest = max(max(channels) * positions for channels, positions in self._levels())
        scores = 0
        if self.scores and self.config.attention == "vanilla":
            levels = len(self.config.ch_mult)
            attended = [x for x in range(levels) if self.config.has_attention(x)] + [levels - 1]
            scores = 2 * self.batch * self._positions(min(attended)) ** 2
        # norms are float32 in any precision
        return int(WHOLE_FACTOR * 4 * self.batch * largest + 4 * scores) + FIXED_BYTES

    @property
    def exact_bytes(self) -> int:
        """Bytes that the same takes in strips: the input of a residual block, or two maps of it."""
        largest = max(max(into, 2 * out) * positions for (into, out), positions in self._levels())
        return int(EXACT_FACTOR * self.itemsize * self.batch * largest) + FIXED_BYTES

    def _levels(self) -> list[tuple[tuple[int, int], int]]:
        """Channels into and out of the blocks of each level, and its positions in one image."""
        channels = self.config.channels
        before = (self.config.ch, *channels[:-1])
        after = (*channels[1:], channels[-1])
        return [
            ((incoming, outgoing), self._positions(level))
            for level, (incoming, outgoing) in enumerate(
                zip(after if self.decoding else before, channels, strict=True)
            )
        ]

    def _positions(self, level: int) -> int:
        return (self.height >> level) * (self.width >> level)
