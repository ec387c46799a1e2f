"""Several sources as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from kl_vae.data.source import Source
from kl_vae.data.wanted import EVERYTHING, Wanted


class JoinedSource:
    """The images of one source after those of another; all have the same channels."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        self.channels = self.parts[0].channels
        self._ends = list(accumulate(map(len, self.parts)))

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the parts' fingerprints."""
        text = " ".join(part.fingerprint for part in self.parts)
        return blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def files(self) -> list[Path]:
        """The files that hold the images."""
        return [file for part in self.parts for file in part.files]

    def __len__(self) -> int:
        """Return the number of images."""
        return self._ends[-1]

    def read(self, index: int, wanted: Wanted = EVERYTHING) -> Tensor:
        """Return [C,H,W] of the part that holds the image."""
        part, own = self._find(index)
        return part.read(own, wanted)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) without decoding."""
        part, own = self._find(index)
        return part.size(own)

    def name(self, index: int) -> str:
        """Return what an error calls the image."""
        part, own = self._find(index)
        return part.name(own)

    def key(self, index: int) -> str:
        """Return the image's relative path in its part; two parts may have the same."""
        part, own = self._find(index)
        return part.key(own)

    def label_text(self, index: int) -> str | None:
        """Return the label that is stored with the image; None: there is none."""
        part, own = self._find(index)
        return part.label_text(own)

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)
