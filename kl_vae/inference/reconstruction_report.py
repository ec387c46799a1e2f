"""The files of a reconstruction: where each image's go, and what all are summed up in.

metrics.csv has one line per image: `path, output, width, height, psnr, ssim`, and `lpips` where it
was measured. `output` is relative to the output folder; `csv_cell` writes both names. Size and
metrics are those of the image after resize and crop. psnr is `inf` where the reconstruction is
exact; ssim is empty where a side is below its window, lpips where the image is too small or too
large for it. These are left out of the means and counted. summary.json has the means, what was
skipped and definitions; comparison.png shows the images with the lowest PSNR, the worst first;
index.html, the gallery, shows all.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_vae.data import MAX_PIXELS, ImageError, Source, read_image
from kl_vae.inference.images import load_images
from kl_vae.inference.progress import FOLDER, UNFINISHED
from kl_vae.inference.sources import size_in_words
from kl_vae.inference.tables import csv_cell
from kl_vae.metrics.similarity import SSIM_DEFINITIONS
from kl_vae.runtime.files import display_name, remove_temporaries
from kl_vae.runtime.outputs import check_outputs, make_folder, plan_outputs, replace_file
from kl_vae.visual.gallery import GalleryImage, write_gallery
from kl_vae.visual.grid import MAX_SIDE, MIN_COLUMN, save_png, sheet_header, sheet_row
from kl_vae.visual.image_files import PNG, ImageFormat, as_saved, both_for_display

logger = logging.getLogger(__name__)

METRICS, SUMMARY, COMPARISON, PAGE = "metrics.csv", "summary.json", "comparison.png", "index.html"
RESERVED = (METRICS, SUMMARY, COMPARISON, PAGE)

_ORIGINALS = "gallery/originals"
_THUMBNAILS = "gallery/thumbnails"
_RECONSTRUCTIONS = "gallery/reconstructions"

COLUMNS = ("path", "output", "width", "height", "psnr", "ssim")

DEFINITIONS = {
    "psnr": "10 log10(R^2 / MSE) in dB, the MSE over all pixels and channels; inf for an exact "
    "reconstruction, which mean_psnr_db leaves out (number_exact)",
    "lpips": "Zhang et al. 2018, v0.1, of the network named above; none where an image is too "
    "small or too large for it, which mean_lpips leaves out (number_without_lpips)",
    "compared": "the reconstruction in 8 bits, before a lossy format, with the image after resize "
    "and crop in 8 bits, R = 255; for .npy both float32 in [0, 1], R = 1",
    "comparison": "rows of image, reconstruction, absolute difference times 4",
}


@dataclass(frozen=True)
class OutputFiles:
    """Where each image's files go: POSIX paths, relative to the folder `out`.

    Attributes:
        out: the output folder.
        images: the reconstruction of each image.
        image_format: of these, where they are images.
        gallery: whether there are files for index.html.
    """

    out: Path
    outputs: tuple[str, ...]
    image_format: ImageFormat = PNG
    gallery: bool = True

    @classmethod
    def of(cls, out: Path, source: Source, image_format: ImageFormat, gallery: bool) -> OutputFiles:
        """Plan the files of all images; see `plan_outputs`.

        Raises:
            ValueError: the format does not hold such images, or an image folder has a reserved
                name.
        """
        suffix = image_format.suffix(source.channels)
        keys = [source.key(i) for i in range(len(source))]
        folders = (_ORIGINALS, _THUMBNAILS, _RECONSTRUCTIONS) if gallery else ()
        outputs = plan_outputs(keys, suffix, [*RESERVED, FOLDER, *folders])
        return cls(out, tuple(outputs), image_format, gallery)

    def original(self, index: int) -> str:
        """The image of the image as the model saw it, in the gallery."""
        return f"{_ORIGINALS}/{self._pngs[index]}"

    def thumbnail(self, index: int) -> str:
        """The small image of image and reconstruction in the gallery."""
        return f"{_THUMBNAILS}/{self._jpgs[index]}"

    def shown(self, index: int) -> str:
        """The reconstruction as an image for the gallery; that of an array is one more file."""
        output = self.outputs[index]
        return f"{_RECONSTRUCTIONS}/{self._pngs[index]}" if output.endswith(".npy") else output

    def of_image(self, index: int) -> list[str]:
        """All files of an image."""
        output = self.outputs[index]
        if not self.gallery:
            return [output]
        return list(
            {
                output: None,
                self.original(index): None,
                self.thumbnail(index): None,
                self.shown(index): None,
            }
        )

    def prepare(
        self, source: Source, image_folders: Sequence[Path] = (), overwrite: bool = False
    ) -> None:
        """Check that no foreign file will be replaced, and create the output folder.

        Raises:
            ValueError: it would be (see `check_outputs`), or the folder cannot be created.
        """
        check_outputs(
            self.out,
            [*self._all(), *RESERVED],
            source.files,
            earlier=(METRICS, UNFINISHED),
            image_folders=image_folders,
            overwrite=overwrite,
        )
        make_folder(self.out)

    def remove_temporaries(self) -> None:
        """Remove what a killed command left beside the images."""
        for folder in {"", *(os.path.dirname(path) for path in self._all())}:
            remove_temporaries(self.out / folder)

    def _all(self) -> Iterator[str]:
        return chain.from_iterable(map(self.of_image, range(len(self.outputs))))

    # planned anew: beside the folder a.jpg, the thumbnail of a.png is a.png.jpg
    @cached_property
    def _pngs(self) -> list[str]:
        return plan_outputs(self.outputs, ".png")

    @cached_property
    def _jpgs(self) -> list[str]:
        return plan_outputs(self.outputs, ".jpg")


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics of one image after resize and crop and its reconstruction, both as they are saved.

    Attributes:
        index: of the image in the source.
        width: in pixels.
        height: in pixels.
        psnr: in dB; None: both are the same.
        ssim: None where a side is below the window.
        lpips: None where it was not asked for, or the image is too small or too large for it.
        redone_in_fp32: the precision asked for gave NaN or infinity.
    """

    index: int
    width: int
    height: int
    psnr: float | None
    ssim: float | None
    lpips: float | None = None
    redone_in_fp32: bool = False


@dataclass(frozen=True)
class ReconstructionResult:
    """What `reconstruct` wrote, over all ranks.

    Attributes:
        folder: the output folder.
        images: the metrics of each image that was reconstructed, in the order of the source.
        paths: the name of each of these images.
        outputs: the file of each reconstruction, relative to `folder`.
        skipped: path and reason of each image that could not be used; a warning names each.
        shown: number of images in comparison.png.
        page: the gallery; None: there is none.
        size: resize and crop of the images in words, such as `short side 256, center crop 256`.
    """

    folder: Path
    images: tuple[ImageMetrics, ...]
    paths: tuple[str, ...]
    outputs: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    shown: int
    page: Path | None
    size: str

    @property
    def count(self) -> int:
        """Number of images that were reconstructed."""
        return len(self.images)

    def mean(self, metric: str) -> float | None:
        """Return the mean of psnr, ssim or lpips over the images that have it; None: none has."""
        return mean_of(self.images, metric)


def mean_of(images: Sequence[ImageMetrics], metric: str) -> float | None:
    """Return the mean of psnr, ssim or lpips over the images that have it; None: no image has."""
    values = [value for image in images if (value := getattr(image, metric)) is not None]
    return sum(values) / len(values) if values else None


def begin_report(files: OutputFiles) -> None:
    """Remove what an earlier command summed up, and mark the folder as one of this command.

    metrics.csv, with no line yet, says that the images beside it may be replaced.

    Raises:
        ValueError: the folder cannot be written to.
    """
    for name in (SUMMARY, COMPARISON, PAGE):
        try:
            (files.out / name).unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot replace {display_name(files.out / name)} ({error.strerror}); "
                "give another output folder"
            ) from error
    _write_lines(files, [COLUMNS])
    files.remove_temporaries()


def write_report(
    source: Source,
    files: OutputFiles,
    to_rgb: Callable[[Tensor], Tensor],
    about: Mapping[str, Any],
    records: Iterable[Mapping[str, Any]],
    rows: int,
) -> ReconstructionResult:
    """Write metrics.csv, summary.json, comparison.png and the gallery.

    Args:
        source: of the images.
        files: where the reconstructions are.
        to_rgb: the model's.
        about: what the results were made with, as summary.json begins: `checkpoint`, `lpips` (none,
            or its network) and the fields of a `ReconstructConfig`.
        records: of all units, as `Reconstructor.do` gives them.
        rows: images in comparison.png, at most; they are read once more.

    Raises:
        ValueError: a file cannot be written.
    """
    images: list[ImageMetrics] = []
    skipped: list[tuple[str, str]] = []
    for record in records:
        images += [ImageMetrics(**metrics) for metrics in record["images"]]
        skipped += [(source.name(index), reason) for index, reason in record["skipped"]]
    with_lpips = about["lpips"] != "none"
    _write_lines(files, _lines(source, files, images, with_lpips))
    summary = {**about, **_summary(source, images, skipped, with_lpips, about["ssim"])}
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(files.out / SUMMARY, f"{text}\n".encode())
    by_psnr = sorted(images, key=lambda x: float("inf") if x.psnr is None else x.psnr)
    width = max([MIN_COLUMN, *(min(x.width, MAX_SIDE) for x in by_psnr[:rows])])
    shown = list(_comparison(source, files, by_psnr[:rows], about, to_rgb, width))
    if shown:
        save_png(files.out / COMPARISON, torch.cat([sheet_header(width), *shown], 1))
    page = files.out / PAGE if files.gallery and images else None
    if page is not None:
        shown_about = {
            **{key: str(about[key]) for key in ("checkpoint", "precision", "mode")},
            "images": str(len(images)),
            "size": size_in_words(about["resize"], about["crop"]),
            "mean PSNR": f"{rounded(mean_of(images, 'psnr'), 2)} dB",
            "mean SSIM": rounded(mean_of(images, "ssim"), 3),
        }
        write_gallery(page, _gallery(source, files, images, with_lpips), shown_about)
    return ReconstructionResult(
        folder=files.out,
        images=tuple(images),
        paths=tuple(source.name(x.index) for x in images),
        outputs=tuple(files.outputs[x.index] for x in images),
        skipped=tuple(skipped),
        shown=len(shown),
        page=page,
        size=size_in_words(about["resize"], about["crop"]),
    )


def rounded(value: float | None, digits: int) -> str:
    """Return a mean as text; none where no image has the metric."""
    return "none" if value is None else f"{value:.{digits}f}"


def _write_lines(files: OutputFiles, lines: Iterable[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    replace_file(files.out / METRICS, text.getvalue().encode())


def _lines(
    source: Source, files: OutputFiles, images: Sequence[ImageMetrics], with_lpips: bool
) -> Iterator[Sequence[str]]:
    yield (*COLUMNS, "lpips") if with_lpips else COLUMNS
    for x in images:
        line = [
            csv_cell(source.name(x.index)),
            csv_cell(display_name(files.outputs[x.index])),
            str(x.width),
            str(x.height),
            "inf" if x.psnr is None else f"{x.psnr:.4f}",
            "" if x.ssim is None else f"{x.ssim:.6f}",
        ]
        if with_lpips:
            line.append("" if x.lpips is None else f"{x.lpips:.6f}")
        yield line


def _summary(
    source: Source,
    images: Sequence[ImageMetrics],
    skipped: Sequence[tuple[str, str]],
    with_lpips: bool,
    ssim: str,
) -> dict[str, Any]:
    def without(metric: str) -> int:
        return sum(getattr(image, metric) is None for image in images)

    summary = {
        "number": len(images),
        "mean_psnr_db": mean_of(images, "psnr"),
        "mean_ssim": mean_of(images, "ssim"),
        "number_exact": without("psnr"),
        "number_without_ssim": without("ssim"),
    }
    if with_lpips:
        summary["mean_lpips"] = mean_of(images, "lpips")
        summary["number_without_lpips"] = without("lpips")
    return {
        **summary,
        "redone_in_fp32": [source.name(x.index) for x in images if x.redone_in_fp32],
        "number_skipped": len(skipped),
        "skipped": [{"path": path, "reason": reason} for path, reason in skipped],
        "definitions": {
            "ssim": f"{SSIM_DEFINITIONS[ssim]}; mean_ssim leaves these images out "
            "(number_without_ssim)",
            **{k: v for k, v in DEFINITIONS.items() if k != "lpips" or with_lpips},
        },
    }


def _comparison(
    source: Source,
    files: OutputFiles,
    images: Sequence[ImageMetrics],
    about: Mapping[str, Any],
    to_rgb: Callable[[Tensor], Tensor],
    width: int,
) -> Iterator[Tensor]:
    """Yield the row of each image, with columns of this width; see `sheet_row`.

    Both files are read again. An image whose files have changed is left out with a warning.
    """
    metrics = {x.index: x for x in images}
    for loaded in load_images(source, [*metrics], resize=about["resize"], crop=about["crop"]):
        name = source.name(loaded.index)
        try:
            if loaded.image is None:
                raise ImageError(f"{name}: {loaded.reason}")
            image = as_saved(loaded.image)
            path = files.out / files.outputs[loaded.index]
            # images can be made larger than what is read otherwise
            most = max(MAX_PIXELS, image[0].numel())
            written = read_image(path, image.shape[0], max_pixels=most)
            if written.shape != image.shape:
                raise ImageError(f"{name}: has another size than before")
        except ImageError as error:
            logger.warning("left out of the comparison: %s", error)
            continue
        text = _metrics_text(metrics[loaded.index], about["lpips"] != "none")
        key = display_name(source.key(loaded.index))
        yield sheet_row(key, text, *both_for_display(image, written, to_rgb), width)


def _metrics_text(image: ImageMetrics, with_lpips: bool) -> str:
    psnr = "inf" if image.psnr is None else f"{image.psnr:.2f}"
    text = f"PSNR {psnr} dB   SSIM {rounded(image.ssim, 3)}"
    return f"{text}   LPIPS {rounded(image.lpips, 3)}" if with_lpips else text


def _gallery(
    source: Source, files: OutputFiles, images: Sequence[ImageMetrics], with_lpips: bool
) -> list[GalleryImage]:
    return [
        GalleryImage(
            name=source.name(x.index),
            original=files.original(x.index),
            reconstruction=files.shown(x.index),
            thumbnail=files.thumbnail(x.index),
            width=x.width,
            height=x.height,
            metrics={
                "psnr": float("inf") if x.psnr is None else x.psnr,
                "ssim": x.ssim,
                **({"lpips": x.lpips} if with_lpips else {}),
            },
        )
        for x in images
    ]
