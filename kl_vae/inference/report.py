"""What a reconstruction of many images is summed up in: metrics.csv, summary.json, comparison.png.

metrics.csv has one line an image: `path, output, width, height, psnr, ssim`. `output` is relative
to the output folder; size and figures are those of the image after resize and crop. psnr is `inf`
where the reconstruction is exact; ssim is empty where a side is below 11 pixels. Both are left out
of the means and counted.
"""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_vae.data import ImageError, display_name
from kl_vae.inference.grid import comparison_row, image_grid, save_png
from kl_vae.inference.outputs import make_folder, replace_file
from kl_vae.inference.picture_files import as_picture
from kl_vae.inference.reconstruct import Reconstruction
from kl_vae.inference.sources import ImageSource

METRICS, SUMMARY, COMPARISON = "metrics.csv", "summary.json", "comparison.png"
RESERVED = (METRICS, SUMMARY, COMPARISON)

DEFINITIONS = {
    "psnr": "10 log10(R^2 / MSE) in dB, the MSE over all pixels and channels; inf for an exact "
    "reconstruction, which mean_psnr_db leaves out (number_exact)",
    "ssim": "Wang et al. 2004: Gaussian window 11 x 11, sigma 1.5, K1 0.01, K2 0.03, windows "
    "inside the image, mean over channels; none where a side is below 11 pixels, which mean_ssim "
    "leaves out (number_without_ssim)",
    "compared": "the picture as written with the image after resize and crop: both 8 bits, "
    "R = 255; for .npy float32 in [0, 1], R = 1",
    "comparison": "rows of image, reconstruction, absolute difference times 4",
}


class Report:
    """Takes results as they come and writes the three files into `out`.

    Those of an earlier run are removed. `comparison.png` shows the first `grid_size` images, as
    pictures by `to_rgb` (the model's).

    Raises:
        ValueError: `out` cannot be written to.
    """

    def __init__(self, out: Path, to_rgb: Callable[[Tensor], Tensor], grid_size: int) -> None:
        self._out = out
        self._to_rgb = to_rgb
        self._grid_size = grid_size
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._skipped: list[dict[str, str]] = []
        self._cells: list[Tensor] = []  # three an image
        make_folder(out)
        try:
            for name in RESERVED:
                (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot replace {display_name(out / name)} ({error.strerror}); "
                "give another output folder"
            ) from error
        self._append("path", "output", "width", "height", "psnr", "ssim")

    def add(self, source: ImageSource, output: str, result: Reconstruction) -> None:
        """Record a reconstruction that was written to `output`."""
        self._psnr.append(result.psnr)
        self._ssim.append(result.ssim)
        height, width = result.image.shape[1:]
        self._append(
            display_name(source.path),
            display_name(output),
            str(width),
            str(height),
            f"{result.psnr:.4f}",
            "" if math.isnan(result.ssim) else f"{result.ssim:.6f}",
        )
        if len(self._cells) < 3 * self._grid_size:
            # side by side: images of many channels are stretched to the range of both
            both = as_picture(torch.cat([result.image, result.reconstruction], 2), self._to_rgb)
            self._cells += comparison_row(both[:, :, :width], both[:, :, width:])

    def skip(self, source: ImageSource, error: ImageError) -> None:
        """Record an image that could not be reconstructed."""
        reason = str(error).removeprefix(f"{display_name(source.path)}: ")
        self._skipped.append({"path": display_name(source.path), "reason": reason})

    @property
    def number_skipped(self) -> int:
        """How many images were skipped so far."""
        return len(self._skipped)

    def finish(self, about: Mapping[str, Any]) -> str:
        """Write summary.json, which begins with `about`, and comparison.png; return the result.

        Raises:
            ValueError: a file cannot be written.
        """
        mean_psnr, mean_ssim = _mean_of_finite(self._psnr), _mean_of_finite(self._ssim)
        summary = {
            **about,
            "number": len(self._psnr),
            "mean_psnr_db": mean_psnr,
            "mean_ssim": mean_ssim,
            "number_exact": sum(map(math.isinf, self._psnr)),
            "number_without_ssim": sum(map(math.isnan, self._ssim)),
            "number_skipped": self.number_skipped,
            "skipped": self._skipped,
            "definitions": DEFINITIONS,
        }
        text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
        replace_file(self._out / SUMMARY, f"{text}\n".encode())
        result = (
            f"{len(self._psnr)} images: PSNR {_shown(mean_psnr, 2)} dB, "
            f"SSIM {_shown(mean_ssim, 3)}; pictures in {display_name(self._out)}"
        )
        if not self._cells:
            return result
        save_png(self._out / COMPARISON, image_grid(self._cells, columns=3))
        return f"{result} ({COMPARISON} shows {len(self._cells) // 3} of them)"

    def _append(self, *fields: str) -> None:
        try:
            with (self._out / METRICS).open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(fields)
        except OSError as error:
            raise ValueError(
                f"cannot write {display_name(self._out / METRICS)} ({error.strerror}); "
                "make room and permission for it, or give another folder"
            ) from error


def _mean_of_finite(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _shown(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"
