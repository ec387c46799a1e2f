"""What the units of a reconstruction recorded, as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kl_vae.inference.reconstruction.figures import Figures


@dataclass(frozen=True)
class Results:
    """All that the units recorded, in the order of the source."""

    figures: list[Figures] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)  # index and reason

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Results:
        """Join the records of `Reconstructor.do`."""
        results = cls()
        for record in records:
            results.figures.extend(Figures(**figures) for figures in record["images"])
            results.skipped.extend((index, reason) for index, reason in record["skipped"])
        return results

    def mean(self, figure: str) -> float | None:
        """The mean of psnr, ssim or lpips over the images that have it; None: no image has."""
        values = [value for f in self.figures if (value := getattr(f, figure)) is not None]
        return sum(values) / len(values) if values else None

    def without(self, figure: str) -> int:
        """How many images have no psnr, ssim or lpips."""
        return sum(getattr(f, figure) is None for f in self.figures)
