"""Fit a Gaussian to latents in units, and draw from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from kl_vae.inference.progress import Ledger, units_of
from kl_vae.inference.sampling.fit_latents import LatentSource, evenly_spaced
from kl_vae.inference.sampling.gaussian import LatentGaussian
from kl_vae.inference.sampling.gaussian_fit import Covariance, LatentFeatures, fit, grid_side
from kl_vae.runtime.outputs import replace_file
from kl_vae.runtime.randomness import generator_for

logger = logging.getLogger(__name__)


class GaussianWork:
    """A Gaussian that is fitted to some latents of a source.

    Attributes:
        gaussian: None until `finish`.
        sizes: the number of latents of each unit.

    Args:
        source: of the latents.
        number: how many to fit to, at most; they are evenly spaced.
        covariance: see `fit`.
        batch_size: latents that are read, and images that are encoded, at once.
        notify: is told in one line of an image that is skipped.
    """

    def __init__(
        self,
        source: LatentSource,
        number: int,
        covariance: Covariance,
        batch_size: int,
        notify: Callable[[str], None],
    ) -> None:
        self._source = source
        self._covariance: Covariance = covariance
        self._notify = notify
        indices = evenly_spaced(len(source), number)
        self._units = [[indices[i] for i in unit] for unit in units_of(len(indices), batch_size)]
        self._side = grid_side(*source.shape)
        self.sizes = [len(unit) for unit in self._units]
        self.gaussian: LatentGaussian | None = None

    def do(self, units: Sequence[int], ledger: Ledger) -> Iterator[dict[str, Any]]:
        """Read units of latents and keep what the fit needs; yield how many, and the skipped."""
        read = self._source.read([self._units[unit] for unit in units])
        for unit, part in zip(units, read, strict=True):
            for name, reason in part.skipped:
                self._notify(f"skipped {name}: {reason}")
            number = 0
            if part.latents is not None:
                number = len(part.latents)
                stream = BytesIO()
                torch.save(LatentFeatures.of(part.latents, self._side).state(), stream)
                replace_file(ledger.path(unit, ".pt"), stream.getvalue())
            yield {"images": number, "skipped": len(part.skipped)}

    def check(self, records: Sequence[dict[str, Any]], ledger: Ledger) -> None:
        """Check that there is enough to fit to; rank 0 alone calls this.

        Raises:
            ValueError: there is not; the ledger is closed then.
        """
        number = sum(record["images"] for record in records)
        least = 2 if self._covariance == "low-resolution" else 1
        if number < least:
            ledger.close()
            raise ValueError(
                f"--covariance {self._covariance}: needs at least {least} images, and {number} can "
                "be used; give others, or more" + (", or --covariance channels" if number else "")
            )

    def finish(self, records: Sequence[dict[str, Any]], ledger: Ledger) -> None:
        """Fit, when all units are done and `check` has passed."""
        kept = (ledger.path(unit, ".pt") for unit, x in enumerate(records) if x["images"])
        features = LatentFeatures.join(
            LatentFeatures.from_state(torch.load(path, weights_only=True)) for path in kept
        )
        self.gaussian = fit(features, self._covariance)
        coarse = self.gaussian.coarse
        logger.info(
            "fitted to the latents of %d images%s",
            len(features.pooled),
            f", on a grid of {self._side} x {self._side}; shrinkage {coarse.shrinkage:.3g}"
            if coarse is not None
            else "",
        )

    def latents(self, seed: int, index: int, side: int) -> Tensor:
        """Those of picture `index`, [z, side, side]."""
        assert self.gaussian is not None
        return self.gaussian.draw(generator_for("gaussian", seed, index), side, side)
