"""What an evaluation records, what the records come to, and the files that hold it.

A record is of a unit of images, plain values: `images`, [index, height, width] of each; `skipped`,
[index, reason]; and for each of `models` its `figures`, lists of one value per image (None: it has
none), and as `RunningMoments` its `latents`, of samples of the posteriors, and their `means`.

results.md has a table of all models, results.json all numbers with their `DEFINITIONS`, and
per_image.csv one line per image and model: `checkpoint, path, width, height`, then the metrics.
Width and height are those after resize and crop. psnr is `inf` where the reconstruction is exact; a
metric that an image does not have is empty.

n images, d features of each.
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
from kl_vae.latents import LatentNormalization
from kl_vae.metrics.fid import FeatureStatistics, frechet_distance
from kl_vae.metrics.moments import RunningMoments, latent_moments, latent_normalization
from kl_vae.metrics.similarity import MS_SSIM_SIDE, WINDOW
from kl_vae.runtime.files import display_name, write_atomically
from kl_vae.runtime.outputs import make_folder, replace_file

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Rows = list[tuple[str, list[str]]]  # of a table: a label, and a cell for each model

TABLE, RESULTS, PER_IMAGE = "results.md", "results.json", "per_image.csv"
FILES = (TABLE, RESULTS, PER_IMAGE)

# the metrics of an image in the order of the table: label, digits
IMAGE_METRICS = {
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 4),
    "ms_ssim": ("MS-SSIM", 4),
    "lpips": ("LPIPS", 4),
    "kl_nats": ("KL (nats an image)", 1),
    "kl_bits_per_pixel": ("KL (bits a pixel)", 4),
}
ACTIVE_VARIANCE = 0.01
_FEW_IMAGES = 10_000  # of 2048 features; published figures are of 5,000 to 50,000

DEFINITIONS = {
    "compared": "the reconstruction as a picture file would hold it, rounded to 8 bits and clamped "
    "to [0, 255], with the image after resize and crop in 8 bits; images of other than 1, 3 or 4 "
    "channels as float32 in [0, 1]. A whole image whose side is no multiple of f is continued to "
    "one by repeating its edge, which is cut off again",
    "mean": "over the images that have the figure (`number`; the others are `left_out`); "
    "`standard_error` is that of this mean, the images' standard deviation (n - 1) over sqrt(n)",
    "psnr": "10 log10(255^2 / MSE) of each image in dB, the MSE over all pixels and channels; an "
    "exact reconstruction has none",
    "psnr_of_mean_mse": "10 log10(255^2 / MSE) in dB of the mean of the images' MSE: by Jensen's "
    "inequality never above the mean of psnr",
    "ssim": "Wang et al. 2004: Gaussian window 11 x 11, sigma 1.5, K1 0.01, K2 0.03, population "
    "variances, range 255, windows inside the image, mean over windows and channels (RGB as it "
    f"is); none below {WINDOW} pixels a side. As scikit-image's with gaussian_weights=True, "
    "use_sample_covariance=False",
    "ms_ssim": "Wang et al. 2003: SSIM's window and constants, five scales of 2 x 2 means, weights "
    "0.0448, 0.2856, 0.3001, 0.2363, 0.1333, range 255, negative terms count as 0; none below "
    f"{MS_SSIM_SIDE} pixels a side. As torchmetrics' MultiScaleStructuralSimilarityIndexMeasure "
    "with its defaults",
    "lpips": "Zhang et al. 2018, version 0.1 with linear heads, at the pictures' own size; one "
    "channel three times, of four the first three; none where the network cannot see so small "
    "an image",
    "rfid": "Heusel et al. 2017, between the images and their reconstructions: 2048 features of "
    "torch-fidelity's InceptionV3 (TensorFlow's weights of 2015, its resize to 299 x 299 without "
    "antialiasing) in fp32, means and covariances (n - 1) in float64. It is biased upwards by few "
    "images: compare it with that of the same number alone",
    "kl_nats": "KL(posterior || N(0, I)) of an image's latents, summed, in nats",
    "kl_bits_per_pixel": "kl_nats / (ln 2 * H * W), H x W the image's pixels",
    "latents": "of samples of the posteriors, over all images and positions: mean and std of each "
    "channel; over the channels as well, shift_factor is the mean and scale_factor is 1 / std",
    "active_channels": "Burda et al. 2016: latent channels whose posterior mean has a variance "
    f"above {ACTIVE_VARIANCE} over all images and positions",
}


class ModelRecord:
    """One model's part of a record, made from batches."""

    def __init__(self, latent_channels: int) -> None:
        self._metrics: dict[str, list[float | None]] = {}
        self._latents = self._means = RunningMoments.empty(latent_channels)

    def add(self, posterior: DiagonalGaussianDistribution, metrics: Mapping[str, Tensor]) -> None:
        """Add a batch: B posteriors, and [B] of each metric; of PSNR `mse`, which is finite."""
        for key, values in {**metrics, "kl": posterior.kl()}.items():
            finite = [value if math.isfinite(value) else None for value in values.tolist()]
            self._metrics.setdefault(key, []).extend(finite)
        self._latents = self._latents.merge(latent_moments(posterior))
        # what varies without the noise
        points = DiagonalGaussianDistribution(posterior.parameters, deterministic=True)
        self._means = self._means.merge(latent_moments(points))

    def values(self) -> Record:
        """Return plain values for JSON."""
        latents, means = self._latents.values(), self._means.values()
        return {"figures": self._metrics, "latents": latents, "means": means}


def image_metrics(record: Record, model: int) -> Iterator[dict[str, float | None]]:
    """Yield those of `IMAGE_METRICS` that were asked for, of each image; None: it has none.

    psnr is inf where the reconstruction is exact.
    """
    metrics = record["models"][model]["figures"]
    for i, (_, height, width) in enumerate(record["images"]):
        found = {key: values[i] for key, values in metrics.items()}
        nats = found["kl_nats"] = found.pop("kl")
        found["kl_bits_per_pixel"] = None if nats is None else nats / math.log(2) / height / width
        if "mse" in found:
            found["psnr"] = psnr_of(found["mse"])
        yield {key: found[key] for key in IMAGE_METRICS if key in found}


def psnr_of(mse: float) -> float:
    """Return the PSNR in dB of an MSE of images from 0 to 1; inf of 0."""
    return -10.0 * math.log10(mse) if mse else math.inf


@dataclass(frozen=True)
class Mean:
    """The mean of a metric over images, with its standard error."""

    mean: float | None  # None: no image has it
    standard_error: float | None  # None: fewer than two have
    number: int
    left_out: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Mean:
        """Compute the mean of the values that are there and finite."""
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
    """The metrics of one model.

    Attributes:
        name: of the model.
        metrics: those of `IMAGE_METRICS` that were asked for.
        psnr_of_mean_mse: in dB; None: not asked for, or every reconstruction is exact.
        rfid: None: not asked for.
        latents: statistics of samples of the posteriors.
        variances: of the posteriors' means, over images and positions, of each channel.
    """

    name: str
    metrics: Mapping[str, Mean]
    psnr_of_mean_mse: float | None
    rfid: float | None
    latents: LatentNormalization
    variances: list[float]

    @property
    def active_channels(self) -> int:
        """Number of channels that carry information (Burda et al. 2016, section 5.2)."""
        return sum(variance > ACTIVE_VARIANCE for variance in self.variances)


def evaluate_records(
    records: Callable[[], Iterable[Record]],
    features: Callable[[int], Iterable[Tensor]] | None,
    names: Sequence[str],
) -> list[Evaluation]:
    """Sum up the records of all units, in their order.

    Args:
        records: gives those that `Evaluator.unit` made; called once a model.
        features: gives those [n_i, d] of the images (0) and of each model's reconstructions (from
            1 on), unit by unit; None: rfid is not asked for.
        names: of the models.

    Raises:
        ValueError: rfid of fewer than two images.
    """
    evaluations = [_evaluation(records(), model, name) for model, name in enumerate(names)]
    if features is None:
        return evaluations
    of_images = FeatureStatistics.of(lambda: features(0))
    if of_images.number < _FEW_IMAGES:
        logger.warning(
            "rfid of %d images is biased upwards: compare it with that of the same number alone",
            of_images.number,
        )
    distances = []
    for model in range(len(names)):
        of_model = FeatureStatistics.of(lambda i=model + 1: features(i))  # type: ignore[misc]
        distances.append(frechet_distance(of_images, of_model))
    return [replace(x, rfid=d) for x, d in zip(evaluations, distances, strict=True)]


def _evaluation(records: Iterable[Record], model: int, name: str) -> Evaluation:
    columns: dict[str, list[float | None]] = {}
    errors: list[float] = []
    latents = means = None
    for record in records:
        of_model = record["models"][model]
        for metrics in image_metrics(record, model):
            for key, value in metrics.items():
                columns.setdefault(key, []).append(value)
        errors += of_model["figures"].get("mse", [])
        ours, our_means = (
            RunningMoments.from_values(of_model[key]) for key in ("latents", "means")
        )
        latents = ours if latents is None else latents.merge(ours)
        means = our_means if means is None else means.merge(our_means)
    assert latents is not None and means is not None  # there is an image
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
    """Return the images that could not be used, each its `path` and the `reason`."""
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
    """Write all three.

    Args:
        out: the output folder; what an earlier evaluation left there is replaced.
        evaluations: of the models.
        rows: their table.
        records: of all units.
        source: of the images.
        about: what results.json begins with, plain values; `heading` in it heads results.md.
        about_models: what each model's part of results.json begins with.

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
    content = {**about, "checkpoints": checkpoints, "definitions": DEFINITIONS}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(out / RESULTS, f"{text}\n".encode())


def _page(heading: str, evaluations: Sequence[Evaluation], rows: Rows) -> str:
    parts = [heading, as_markdown([x.name for x in evaluations], rows)]
    parts.append(
        "Mean ± standard error of the mean, over the images. What is compared, and how each figure "
        f"is defined, is in {RESULTS}. The latents of each channel:"
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
    """Write per_image.csv, in the order of the images and of the models.

    Raises:
        ValueError: it cannot be written.
    """

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        metrics: list[str] | None = None
        for record in records:
            of_models = [image_metrics(record, model) for model in range(len(names))]
            for index, height, width in record["images"]:
                for name, of_model in zip(names, of_models, strict=True):
                    values = next(of_model)
                    if metrics is None:
                        metrics = list(values)
                        writer.writerow(["checkpoint", "path", "width", "height", *metrics])
                    cells = ("" if x is None else f"{x:.8g}" for x in values.values())
                    writer.writerow([name, source.name(index), width, height, *cells])
        text.flush()
        text.detach()  # the file is not ours to close

    make_folder(out)
    try:
        write_atomically(out / PER_IMAGE, write, durable=False)
    except OSError as error:
        raise ValueError(
            f"cannot write {display_name(out / PER_IMAGE)} ({error.strerror}); "
            "make room and permission for it, or give another folder"
        ) from error


def write_features(path: Path, features: Tensor) -> None:
    """Keep a unit's features [1 + models, images, d].

    Raises:
        ValueError: the file cannot be written.
    """
    stream = io.BytesIO()
    np.save(stream, features.numpy())
    replace_file(path, stream.getvalue())


def read_features(paths: Iterable[Path], position: int) -> Iterator[Tensor]:
    """Those [images, d] of the images (0), or of a model's reconstructions (from 1 on), by unit."""
    for path in paths:
        if path.exists():  # a unit without a usable image has none
            features = np.load(path, mmap_mode="r", allow_pickle=False)
            yield torch.from_numpy(features[position].copy())


def rows_of(evaluations: Sequence[Evaluation], lpips_net: str = "") -> Rows:
    """Return the rows of the table: a label, and a cell for each model; `mean ± standard error`."""
    rows: Rows = []

    def add(label: str, cell: Callable[[Evaluation], str]) -> None:
        rows.append((label, [cell(evaluation) for evaluation in evaluations]))

    for key, (label, digits) in IMAGE_METRICS.items():
        if key == "kl_nats" and evaluations[0].rfid is not None:
            add("rFID", lambda x: _number(x.rfid, 2))
        if key not in evaluations[0].metrics:
            continue
        if key == "lpips" and lpips_net:
            label = f"{label} ({lpips_net})"
        add(label, lambda x, k=key, d=digits: _mean(x.metrics[k], d))  # type: ignore[misc]
        if key == "psnr":
            add("PSNR of mean MSE (dB)", lambda x: _number(x.psnr_of_mean_mse, 2))
    add("active channels", lambda x: f"{x.active_channels} of {len(x.variances)}")
    add("scale_factor", lambda x: f"{x.latents.scale_factor:.4g}")
    add("shift_factor", lambda x: f"{x.latents.shift_factor:.4g}")
    return rows


def as_text(names: Sequence[str], rows: Rows) -> str:
    """Return a table for a terminal."""
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
    """Return the same in Markdown."""
    head = [_line(["", *names]), "|---|" + "---:|" * len(names)]
    return "\n".join([*head, *(_line([label, *cells]) for label, cells in rows)])


def channel_rows(evaluation: Evaluation) -> Rows:
    """Return a row for each latent channel: mean, std, variance of the posteriors' means."""
    latents = evaluation.latents
    values = zip(latents.mean or (), latents.std or (), evaluation.variances, strict=True)
    return [(str(i), [f"{value:.4g}" for value in row]) for i, row in enumerate(values)]


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _mean(metric: Mean, digits: int) -> str:
    if metric.mean is None:
        return "none"
    cell = f"{metric.mean:.{digits}f}"
    error = metric.standard_error
    return cell if error is None else f"{cell} ± {error:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"
