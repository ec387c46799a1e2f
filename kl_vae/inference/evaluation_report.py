"""Evaluation records, their aggregation, and the report files.

A record holds the results of one unit of images as plain values: `images`, a list of
[index, height, width]; `skipped`, a list of [index, reason]; and `models`. Each model has
`metrics`, a list of one value per image for each metric (None: undefined), and, as
`RunningMoments` values, `latents` (of posterior samples) and `means` (of posterior means).

results.md contains a table of all models, results.json all values and their `DEFINITIONS`, and
per_image.csv one line per image and model: `checkpoint, path, width, height`, then the metrics.
Width and height are measured after resize and crop. psnr is `inf` for an exact reconstruction;
an undefined metric is an empty cell. Names are written as `csv_cell` and `markdown_text` return
them.

Shapes: n images, d features per image.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kl_vae.data import Source
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.tables import csv_cell, markdown_text
from kl_vae.latents import LatentNormalization
from kl_vae.metrics.fid import FeatureStatistics, frechet_distance
from kl_vae.metrics.moments import RunningMoments, latent_moments, latent_normalization
from kl_vae.metrics.similarity import MS_SSIM_SIDE, SSIM_DEFINITIONS
from kl_vae.runtime.files import display_name, write_atomically
from kl_vae.runtime.outputs import make_folder, replace_file

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Rows = list[tuple[str, list[str]]]  # table rows: a label, and one cell per model

TABLE, RESULTS, PER_IMAGE = "results.md", "results.json", "per_image.csv"
FILES = (TABLE, RESULTS, PER_IMAGE)

# per-image metrics in table order: label, number of digits
IMAGE_METRICS = {
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 4),
    "ms_ssim": ("MS-SSIM", 4),
    "lpips": ("LPIPS", 4),
    "kl_nats": ("KL (nats per image)", 1),
    "kl_bits_per_pixel": ("KL (bits per pixel)", 4),
}
ACTIVE_VARIANCE = 0.01
_FEW_IMAGES = 10_000  # for 2048 features; published values use 5,000 to 50,000 images

DEFINITIONS = {
    "compared": "the reconstruction rounded to 8 bits and clamped to [0, 255], as in an image "
    "file, against the 8-bit image after resize and crop; images that do not have 1, 3 or 4 "
    "channels as float32 in [0, 1]. A whole image whose sides are not multiples of f is padded by "
    "repeating its edges, and the reconstruction is cropped to the original size",
    "mean": "over the images for which the metric is defined (`number`; all other images are "
    "counted in `left_out`); `standard_error` is the standard error of this mean, the sample "
    "standard deviation (n - 1) divided by sqrt(n)",
    "psnr": "10 log10(255^2 / MSE) of each image in dB, the MSE over all pixels and channels; "
    "undefined for an exact reconstruction",
    "psnr_of_mean_mse": "10 log10(255^2 / MSE) in dB, with the mean MSE over all images; by "
    "Jensen's inequality at most the mean of psnr",
    "ssim": SSIM_DEFINITIONS["wang"],
    "ms_ssim": "Wang et al. 2003: window and constants of Wang et al. 2004, five scales by "
    "2 x 2 average pooling, weights 0.0448, 0.2856, 0.3001, 0.2363, 0.1333, range 255, negative "
    f"terms count as 0; undefined below {MS_SSIM_SIDE} pixels per side. Same as the torchmetrics "
    "MultiScaleStructuralSimilarityIndexMeasure with default arguments",
    "lpips": "Zhang et al. 2018, version 0.1 with linear heads, without resizing; a single "
    "channel is repeated three times, and only the first three of four channels are used; "
    "undefined for images that are too small for the network",
    "rfid": "Heusel et al. 2017, between the images and their reconstructions: 2048 features of "
    "the torch-fidelity InceptionV3 (TensorFlow weights of 2015, resized to 299 x 299 without "
    "antialiasing) in fp32, means and covariances (n - 1) in float64. Few images bias it upwards: "
    "compare only values for the same number of images",
    "kl_nats": "KL(posterior || N(0, I)), summed over the latents of an image, in nats",
    "kl_bits_per_pixel": "kl_nats / (ln 2 * H * W) for an image of H x W pixels",
    "latents": "statistics of posterior samples over all images and positions: mean and std of "
    "each channel; over all channels, shift_factor is the mean and scale_factor is 1 / std",
    "active_channels": "Burda et al. 2016: latent channels whose posterior mean has a variance "
    f"above {ACTIVE_VARIANCE} over all images and positions",
}


class ModelRecord:
    """Part of a record for one model, accumulated over batches."""

    def __init__(self, latent_channels: int) -> None:
        self._metrics: dict[str, list[float | None]] = {}
        self._latents = self._means = RunningMoments.empty(latent_channels)

    def add(self, posterior: DiagonalGaussianDistribution, metrics: Mapping[str, Tensor]) -> None:
        """Add a batch of B posteriors and metrics, [B] each; `mse` stands for PSNR."""
        for key, values in {**metrics, "kl": posterior.kl()}.items():
            finite = [value if math.isfinite(value) else None for value in values.tolist()]
            self._metrics.setdefault(key, []).extend(finite)
        self._latents = self._latents.merge(latent_moments(posterior))
        # variation of the posterior means, without sampling noise
        modes = DiagonalGaussianDistribution(posterior.parameters, deterministic=True)
        self._means = self._means.merge(latent_moments(modes))

    def values(self) -> Record:
        """Return the record as plain values for JSON."""
        latents, means = self._latents.values(), self._means.values()
        return {"metrics": self._metrics, "latents": latents, "means": means}


def image_metrics(record: Record, model: int) -> Iterator[dict[str, float | None]]:
    """Yield the requested metrics of each image, keyed as in `IMAGE_METRICS`.

    A value of None means that the metric is undefined. psnr is inf for an exact reconstruction.
    """
    metrics = record["models"][model]["metrics"]
    for i, (_, height, width) in enumerate(record["images"]):
        found = {key: values[i] for key, values in metrics.items()}
        nats = found["kl_nats"] = found.pop("kl")
        found["kl_bits_per_pixel"] = None if nats is None else nats / math.log(2) / height / width
        if "mse" in found:
            found["psnr"] = psnr_of(found["mse"])
        yield {key: found[key] for key in IMAGE_METRICS if key in found}


def psnr_of(mse: float) -> float:
    """Return the PSNR in dB for an MSE of images in [0, 1]; inf for an MSE of 0."""
    return -10.0 * math.log10(mse) if mse else math.inf


@dataclass(frozen=True)
class Mean:
    """Mean of a metric over images, with its standard error."""

    mean: float | None  # None: undefined for all images
    standard_error: float | None  # None: defined for fewer than two images
    number: int
    left_out: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Mean:
        """Compute the mean of all finite values; None, NaN and infinity are left out."""
        kept = [value for value in values if value is not None and math.isfinite(value)]
        number, left_out = len(kept), len(values) - len(kept)
        if not kept:
            return cls(None, None, 0, left_out)
        mean = math.fsum(kept) / number
        if number == 1:
            return cls(mean, None, 1, left_out)
        variance = math.fsum((value - mean) ** 2 for value in kept) / (number - 1)
        return cls(mean, math.sqrt(variance / number), number, left_out)


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one model.

    Attributes:
        name: name of the model.
        metrics: the requested metrics, keyed as in `IMAGE_METRICS`.
        psnr_of_mean_mse: in dB; None if not requested or if every reconstruction is exact.
        rfid: reconstruction FID; None if not requested.
        latents: statistics of posterior samples.
        variances: variance of the posterior mean over images and positions, per channel.
    """

    name: str
    metrics: Mapping[str, Mean]
    psnr_of_mean_mse: float | None
    rfid: float | None
    latents: LatentNormalization
    variances: list[float]

    @property
    def active_channels(self) -> int:
        """Number of active latent channels (Burda et al. 2016, section 5.2)."""
        return sum(variance > ACTIVE_VARIANCE for variance in self.variances)


def evaluate_records(
    records: Callable[[], Iterable[Record]],
    features: Callable[[int], Iterable[Tensor]] | None,
    names: Sequence[str],
) -> list[Evaluation]:
    """Aggregate the records of all units, in order.

    Args:
        records: returns the records of `Evaluator.unit`; called once per model.
        features: returns the features [n_i, d] of each unit, for the images (0) or for the
            reconstructions of a model (1, 2, ...); None if rfid is not requested.
        names: names of the models.

    Raises:
        ValueError: rfid is requested for fewer than two images.
    """
    evaluations = [_evaluation(records(), model, name) for model, name in enumerate(names)]
    if features is None:
        return evaluations
    image_statistics = FeatureStatistics.of(lambda: features(0))
    if image_statistics.number < _FEW_IMAGES:
        logger.warning(
            "rfid of %d images is biased upwards: compare it only with rfid of as many images",
            image_statistics.number,
        )
    distances = []
    for model in range(len(names)):
        statistics = FeatureStatistics.of(lambda i=model + 1: features(i))  # type: ignore[misc]
        distances.append(frechet_distance(image_statistics, statistics))
    return [replace(x, rfid=d) for x, d in zip(evaluations, distances, strict=True)]


def _evaluation(records: Iterable[Record], model: int, name: str) -> Evaluation:
    columns: dict[str, list[float | None]] = {}
    errors: list[float] = []
    latents = means = None
    for record in records:
        model_record = record["models"][model]
        for metrics in image_metrics(record, model):
            for key, value in metrics.items():
                columns.setdefault(key, []).append(value)
        errors += model_record["metrics"].get("mse", [])
        unit_latents, unit_means = (
            RunningMoments.from_values(model_record[key]) for key in ("latents", "means")
        )
        latents = unit_latents if latents is None else latents.merge(unit_latents)
        means = unit_means if means is None else means.merge(unit_means)
    assert latents is not None and means is not None  # there is at least one image
    mean_error = math.fsum(errors) / len(errors) if errors else 0.0
    return Evaluation(
        name,
        {key: Mean.of(columns[key]) for key in IMAGE_METRICS if key in columns},
        psnr_of(mean_error) if mean_error else None,
        None,
        latent_normalization(latents),
        [std**2 for std in means.variance().sqrt().tolist()],
    )


def skipped_images(records: Iterable[Record], source: Source) -> list[dict[str, str]]:
    """Return the `path` of each skipped image and the `reason`."""
    return [
        {"path": source.name(index), "reason": reason}
        for record in records
        for index, reason in record["skipped"]
    ]


def write_files(
    out: Path,
    evaluations: Sequence[Evaluation],
    rows: Rows,
    records: Iterable[Record],
    source: Source,
    *,
    about: Mapping[str, Any],
    about_models: Sequence[Mapping[str, Any]],
) -> None:
    """Write results.md, results.json and per_image.csv.

    Args:
        out: output folder; files of an earlier evaluation are replaced.
        evaluations: results of the models.
        rows: table of the models.
        records: records of all units.
        source: source of the images.
        about: first entries of results.json, plain values; its `heading` is also the first line of
            results.md, its `ssim` the variant.
        about_models: first entries of each model in results.json.

    Raises:
        ValueError: a file cannot be written.
    """
    names = [evaluation.name for evaluation in evaluations]
    write_per_image(out, records, source, names)
    replace_file(out / TABLE, f"{_page(about['heading'], evaluations, rows)}\n".encode())
    checkpoints = [
        {"name": x.name, **of_model, **_plain(x)}
        for of_model, x in zip(about_models, evaluations, strict=True)
    ]
    definitions = {**DEFINITIONS, "ssim": SSIM_DEFINITIONS[about["ssim"]]}
    content = {**about, "checkpoints": checkpoints, "definitions": definitions}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(out / RESULTS, f"{text}\n".encode())


def _page(heading: str, evaluations: Sequence[Evaluation], rows: Rows) -> str:
    parts = [markdown_text(heading), as_markdown([x.name for x in evaluations], rows)]
    parts.append(
        "Mean ± standard error of the mean, over the images. The definition of each metric is in "
        f"{RESULTS}. Latent statistics per channel:"
    )
    for evaluation in evaluations:
        columns = (f"mean of {evaluation.name}", "std", "variance of the posterior mean")
        parts.append(as_markdown(columns, channel_rows(evaluation)))
    return "\n\n".join(parts)


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    metrics: dict[str, Any] = {key: asdict(mean) for key, mean in evaluation.metrics.items()}
    if "psnr" in metrics:
        metrics["psnr_of_mean_mse"] = evaluation.psnr_of_mean_mse
    if evaluation.rfid is not None:
        metrics["rfid"] = evaluation.rfid
    latents = evaluation.latents
    return {
        **metrics,
        "latents": {
            "scale_factor": latents.scale_factor,
            "shift_factor": latents.shift_factor,
            "mean": latents.mean,
            "std": latents.std,
        },
        "active_channels": {
            "number": evaluation.active_channels,
            "of": len(evaluation.variances),
            "variance_of_posterior_mean": evaluation.variances,
        },
    }


def write_per_image(
    out: Path, records: Iterable[Record], source: Source, names: Sequence[str]
) -> None:
    """Write per_image.csv, in the order of the images, then of the models.

    Raises:
        ValueError: the file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        metrics: list[str] | None = None
        for record in records:
            iterators = [image_metrics(record, model) for model in range(len(names))]
            for index, height, width in record["images"]:
                for name, metrics_of_images in zip(names, iterators, strict=True):
                    values = next(metrics_of_images)
                    if metrics is None:
                        metrics = list(values)
                        writer.writerow(["checkpoint", "path", "width", "height", *metrics])
                    cells = ("" if x is None else f"{x:.8g}" for x in values.values())
                    texts = map(csv_cell, (name, source.name(index)))
                    writer.writerow([*texts, width, height, *cells])
        text.flush()
        text.detach()  # the caller closes the file

    make_folder(out)
    try:
        write_atomically(out / PER_IMAGE, write, durable=False)
    except OSError as error:
        raise ValueError(
            f"cannot write {display_name(out / PER_IMAGE)} ({error.strerror}); "
            "check free space and permissions, or give another folder"
        ) from error


def write_features(path: Path, features: Tensor) -> None:
    """Save the features [1 + models, images, d] of a unit.

    Raises:
        ValueError: the file cannot be written.
    """
    stream = io.BytesIO()
    np.save(stream, features.numpy())
    replace_file(path, stream.getvalue())


def read_features(paths: Iterable[Path], position: int) -> Iterator[Tensor]:
    """Yield the features [images, d] of each unit.

    `position` selects the images (0) or the reconstructions of a model (1, 2, ...).
    """
    for path in paths:
        if path.exists():  # a unit without a usable image has none
            try:
                features = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:  # also a file shorter than it says
                raise ValueError(
                    f"{display_name(path)}: cannot be read ({error}); remove it with the JSON file "
                    "beside it, and continue with --resume"
                ) from None
            yield torch.from_numpy(features[position].copy())


def rows_of(
    evaluations: Sequence[Evaluation], lpips_net: str = "", ssim: str = "wang", size: str = ""
) -> Rows:
    """Return the rows of the table; cells of averaged metrics read `mean ± standard error`.

    Args:
        evaluations: results of the models.
        lpips_net: network of LPIPS.
        ssim: variant of SSIM.
        size: `size_in_words` of the images, which is named beside PSNR.
    """
    rows: Rows = []
    variants = {
        "psnr": f", {size}" if size else "",
        "lpips": f" ({lpips_net})" if lpips_net else "",
    }
    variants["ssim"] = "" if ssim == "wang" else f" ({ssim})"

    def add(label: str, cell: Callable[[Evaluation], str]) -> None:
        rows.append((label, [cell(evaluation) for evaluation in evaluations]))

    for key, (label, digits) in IMAGE_METRICS.items():
        if key == "kl_nats" and evaluations[0].rfid is not None:
            add("rFID", lambda x: _number(x.rfid, 2))
        if key not in evaluations[0].metrics:
            continue
        add(label + variants.get(key, ""), lambda x, k=key, d=digits: _mean(x.metrics[k], d))  # type: ignore[misc]
        if key == "psnr":
            add("PSNR of mean MSE (dB)", lambda x: _number(x.psnr_of_mean_mse, 2))
    add("active channels", lambda x: f"{x.active_channels} of {len(x.variances)}")
    add("scale_factor", lambda x: f"{x.latents.scale_factor:.4g}")
    add("shift_factor", lambda x: f"{x.latents.shift_factor:.4g}")
    return rows


def as_text(names: Sequence[str], rows: Rows) -> str:
    """Format a table for the terminal."""
    lines = [["", *names], *([label, *cells] for label, cells in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_markdown(names: Sequence[str], rows: Rows) -> str:
    """Format a table in Markdown."""
    head = [_line(["", *names]), "|---|" + "---:|" * len(names)]
    return "\n".join([*head, *(_line([label, *cells]) for label, cells in rows)])


def channel_rows(evaluation: Evaluation) -> Rows:
    """Return one row per latent channel: mean, std, variance of the posterior mean."""
    latents = evaluation.latents
    values = zip(latents.mean or (), latents.std or (), evaluation.variances, strict=True)
    return [(str(i), [f"{value:.4g}" for value in row]) for i, row in enumerate(values)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"


def _mean(metric: Mean, digits: int) -> str:
    if metric.mean is None:
        return "none"
    cell = f"{metric.mean:.{digits}f}"
    error = metric.standard_error
    return cell if error is None else f"{cell} ± {error:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"
