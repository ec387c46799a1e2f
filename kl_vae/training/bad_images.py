"""The files of a run that could not be used: each named once, and not too many of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from kl_vae.data import BadImage
from kl_vae.distributed.ranks import Ranks
from kl_vae.errors import RunError

logger = logging.getLogger(__name__)

BAD_IMAGES = "bad_images.txt"


class BadImages:
    """What bad_images.txt lists, one `path<TAB>reason` a line; every rank knows all of it.

    Args:
        run: the run's directory, whose list is gone on with; None: nothing is written.
        ranks: that read the images.
        number: of images in all, for training and validation.
        max_fraction: of them that may be bad.
    """

    def __init__(self, run: Path | None, ranks: Ranks, number: int, max_fraction: float) -> None:
        self._path = None if run is None else run / BAD_IMAGES
        self._ranks = ranks
        self._number = number
        self._max_fraction = max_fraction
        self._names = set(ranks.on_first(self._read))

    def note(self, found: Sequence[BadImage]) -> None:
        """Take in what this rank found; every rank calls this at the same time."""
        everything = [image for images in self._ranks.gather(list(found)) for image in images]
        new = {image.name: image for image in everything if image.name not in self._names}
        self._names |= new.keys()
        if self._ranks.is_first:
            self._write(list(new.values()))

    @property
    def too_many(self) -> bool:
        """Whether more images are bad than may be."""
        return len(self._names) > self._max_fraction * self._number

    def error(self) -> RunError:
        """What ends a run with too many of them."""
        return RunError(
            f"{len(self._names)} of {self._number} images cannot be used, more than "
            f"data.max_bad_fraction={self._max_fraction} ({self._path} lists them): raise it to go "
            "on without them, or mend them and start in a new --run-dir"
        )

    def _read(self) -> list[str]:
        if self._path is None or not self._path.is_file():
            return []
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.partition("\t")[0] for line in lines if "\t" in line]

    def _write(self, images: Sequence[BadImage]) -> None:
        for image in images:
            logger.warning("an image cannot be used: %s: %s", *image)
        if self._path is None or not images:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(f"{name}\t{reason}\n" for name, reason in images)
        except OSError as error:  # the log has named them
            logger.warning("%s cannot be written (%s)", self._path, error.strerror)
