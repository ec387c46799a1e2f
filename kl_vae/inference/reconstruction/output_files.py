"""The files that `kl-vae reconstruct` writes of each image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kl_vae.data import Source
from kl_vae.runtime.files import remove_temporaries
from kl_vae.runtime.outputs import check_outputs, make_folder, plan_outputs
from kl_vae.visual.image_files import PNG, PictureFormat

METRICS, SUMMARY, COMPARISON, PAGE = "metrics.csv", "summary.json", "comparison.png", "index.html"
RESERVED = (METRICS, SUMMARY, COMPARISON, PAGE)

_ORIGINALS = "gallery/originals"
_THUMBNAILS = "gallery/thumbnails"
_RECONSTRUCTIONS = "gallery/reconstructions"


@dataclass(frozen=True)
class OutputFiles:
    """Where each image's files go: POSIX paths, relative to the folder `out`.

    Attributes:
        out: the output folder.
        pictures: the reconstruction of each image.
        picture_format: of these, where they are pictures.
        gallery: whether there are files for index.html.
    """

    out: Path
    pictures: tuple[str, ...]
    picture_format: PictureFormat = PNG
    gallery: bool = True

    @classmethod
    def of(
        cls, out: Path, source: Source, picture_format: PictureFormat, gallery: bool
    ) -> OutputFiles:
        """Plan the files of all images; see `plan_outputs`.

        Raises:
            ValueError: the format does not hold such images, or an image folder has a reserved
                name.
        """
        suffix = picture_format.suffix(source.channels)
        keys = [source.key(i) for i in range(len(source))]
        folders = (_ORIGINALS, _THUMBNAILS, _RECONSTRUCTIONS) if gallery else ()
        pictures = plan_outputs(keys, suffix, [*RESERVED, *folders])
        return cls(out, tuple(pictures), picture_format, gallery)

    def original(self, index: int) -> str:
        """The picture of the image as the model saw it, in the gallery."""
        return self._in_gallery(_ORIGINALS, index, ".png")

    def thumbnail(self, index: int) -> str:
        """The image's small picture in the gallery."""
        return self._in_gallery(_THUMBNAILS, index, ".jpg")

    def shown(self, index: int) -> str:
        """The reconstruction as a picture for the gallery; that of an array is one more file."""
        picture = self.pictures[index]
        apart = picture.endswith(".npy")
        return self._in_gallery(_RECONSTRUCTIONS, index, ".png") if apart else picture

    def prepare(self, source: Source) -> None:
        """Check that nothing of somebody else's will be replaced, and create the output folder.

        Raises:
            ValueError: it would be (see `check_outputs`), or the folder cannot be created.
        """
        check_outputs(self.out, [*self._all(), *RESERVED], source.files, earlier=METRICS)
        make_folder(self.out)

    def remove_temporaries(self) -> None:
        """Remove what a killed command left beside the pictures; no rank may be writing."""
        for folder in {"", *(os.path.dirname(path) for path in self._all())}:
            remove_temporaries(self.out / folder)

    def _all(self) -> Iterator[str]:
        for index, picture in enumerate(self.pictures):
            yield picture
            if self.gallery:
                yield self.original(index)
                yield self.thumbnail(index)
                if self.shown(index) != picture:
                    yield self.shown(index)

    def _in_gallery(self, folder: str, index: int, suffix: str) -> str:
        return f"{folder}/{os.path.splitext(self.pictures[index])[0]}{suffix}"
