"""What the reconstruction of many images is summed up in, beside their pictures.

metrics.csv has one line an image: `path, output, width, height, psnr, ssim`, and `lpips` where it
was measured. `output` is relative to the output folder; size and figures are those of the image
after resize and crop. psnr is `inf` where the reconstruction is exact; ssim is empty where a side
is below 11 pixels, lpips where the image is too small or too large for it. These are left out of
the means and counted. summary.json has the means, what was skipped and definitions; comparison.png
shows the first images; index.html, the gallery, shows all.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kl_vae.data import Source
from kl_vae.inference.reconstruction.comparison import comparison_cells
from kl_vae.inference.reconstruction.figures import Figures
from kl_vae.inference.reconstruction.output_files import (
    COMPARISON,
    METRICS,
    PAGE,
    SUMMARY,
    OutputFiles,
)
from kl_vae.inference.reconstruction.results import Results
from kl_vae.runtime.files import display_name
from kl_vae.runtime.outputs import replace_file
from kl_vae.visual.gallery import GalleryPicture, write_gallery
from kl_vae.visual.grid import image_grid, save_png

COLUMNS = ("path", "output", "width", "height", "psnr", "ssim")

DEFINITIONS = {
    "psnr": "10 log10(R^2 / MSE) in dB, the MSE over all pixels and channels; inf for an exact "
    "reconstruction, which mean_psnr_db leaves out (number_exact)",
    "ssim": "Wang et al. 2004: Gaussian window 11 x 11, sigma 1.5, K1 0.01, K2 0.03, windows "
    "inside the image, mean over channels; none where a side is below 11 pixels, which mean_ssim "
    "leaves out (number_without_ssim)",
    "lpips": "Zhang et al. 2018, v0.1, of the network named above; none where an image is too "
    "small or too large for it, which mean_lpips leaves out (number_without_lpips)",
    "compared": "the reconstruction in 8 bits, before a lossy format, with the image after resize "
    "and crop in 8 bits, R = 255; for .npy both float32 in [0, 1], R = 1",
    "comparison": "rows of image, reconstruction, absolute difference times 4",
}


def begin_report(files: OutputFiles) -> None:
    """Remove what an earlier command summed up, and mark the folder as one of this command.

    metrics.csv, with no line yet, says that the pictures beside it may be replaced.

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


@dataclass(frozen=True)
class Report:
    """Writes the four files.

    Attributes:
        source: of the images.
        files: where the pictures are.
        to_rgb: the model's.
        about: what the results were made with, as summary.json begins: `checkpoint`, `lpips` (none,
            or its network) and what a `ReconstructConfig` has.
    """

    source: Source
    files: OutputFiles
    to_rgb: Callable[[Tensor], Tensor]
    about: Mapping[str, Any]

    def write(self, results: Results, rows: int) -> str:
        """Write all of them, and return the result in one line.

        Args:
            results: of all units.
            rows: images in comparison.png, at most; they are read once more.

        Raises:
            ValueError: a file cannot be written.
        """
        out = self.files.out
        _write_lines(self.files, self._lines(results))
        text = json.dumps(self._summary(results), indent=2, ensure_ascii=False, allow_nan=False)
        replace_file(out / SUMMARY, f"{text}\n".encode())
        line = self._line(results)
        shown = [f.index for f in results.figures[:rows]]
        sizes = self.about["resize"], self.about["crop"]
        cells = list(comparison_cells(self.source, shown, self.files, *sizes, self.to_rgb))
        if cells:
            save_png(out / COMPARISON, image_grid(cells, columns=3))
            line += f" ({COMPARISON} shows {len(cells) // 3} of them)"
        if self.files.gallery and results.figures:
            write_gallery(out / PAGE, self._gallery(results.figures), self._shown_about(results))
            line += f", gallery in {display_name(out / PAGE)}"
        return line

    @property
    def _with_lpips(self) -> bool:
        return bool(self.about["lpips"] != "none")

    def _line(self, results: Results) -> str:
        lpips = f", LPIPS {_shown(results.mean('lpips'), 4)}" if self._with_lpips else ""
        return (
            f"{len(results.figures)} images: PSNR {_shown(results.mean('psnr'), 2)} dB, "
            f"SSIM {_shown(results.mean('ssim'), 3)}{lpips}; "
            f"pictures in {display_name(self.files.out)}"
        )

    def _lines(self, results: Results) -> Iterator[Sequence[str]]:
        yield (*COLUMNS, "lpips") if self._with_lpips else COLUMNS
        for f in results.figures:
            line = [
                self.source.name(f.index),
                display_name(self.files.pictures[f.index]),
                str(f.width),
                str(f.height),
                "inf" if f.psnr is None else f"{f.psnr:.4f}",
                "" if f.ssim is None else f"{f.ssim:.6f}",
            ]
            if self._with_lpips:
                line.append("" if f.lpips is None else f"{f.lpips:.6f}")
            yield line

    def _summary(self, results: Results) -> dict[str, Any]:
        lpips = {
            "mean_lpips": results.mean("lpips"),
            "number_without_lpips": results.without("lpips"),
        }
        skipped = [
            {"path": self.source.name(index), "reason": reason} for index, reason in results.skipped
        ]
        definitions = dict(DEFINITIONS)
        if not self._with_lpips:
            del definitions["lpips"]
        return {
            **self.about,
            "number": len(results.figures),
            "mean_psnr_db": results.mean("psnr"),
            "mean_ssim": results.mean("ssim"),
            "number_exact": results.without("psnr"),
            "number_without_ssim": results.without("ssim"),
            **(lpips if self._with_lpips else {}),
            "redone_in_fp32": [
                self.source.name(f.index) for f in results.figures if f.redone_in_fp32
            ],
            "number_skipped": len(skipped),
            "skipped": skipped,
            "definitions": definitions,
        }

    def _gallery(self, figures: Sequence[Figures]) -> list[GalleryPicture]:
        return [
            GalleryPicture(
                name=self.source.name(f.index),
                original=self.files.original(f.index),
                reconstruction=self.files.shown(f.index),
                thumbnail=self.files.thumbnail(f.index),
                width=f.width,
                height=f.height,
                metrics={
                    "psnr": float("inf") if f.psnr is None else f.psnr,
                    "ssim": f.ssim,
                    **({"lpips": f.lpips} if self._with_lpips else {}),
                },
            )
            for f in figures
        ]

    def _shown_about(self, results: Results) -> dict[str, str]:
        return {
            **{key: str(self.about[key]) for key in ("checkpoint", "precision", "mode")},
            "images": str(len(results.figures)),
            "mean PSNR": f"{_shown(results.mean('psnr'), 2)} dB",
            "mean SSIM": _shown(results.mean("ssim"), 3),
        }


def _write_lines(files: OutputFiles, lines: Iterable[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    replace_file(files.out / METRICS, text.getvalue().encode())


def _shown(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"
