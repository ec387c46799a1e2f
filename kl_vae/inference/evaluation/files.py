"""The files of an evaluation, results.md, results.json and per_image.csv, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kl_vae.data import Source
from kl_vae.inference.evaluation.images import PER_IMAGE, write_per_image
from kl_vae.inference.evaluation.records import Record
from kl_vae.inference.evaluation.results import DEFINITIONS, Evaluation
from kl_vae.inference.evaluation.table import Rows, as_markdown, channel_rows
from kl_vae.runtime.outputs import replace_file

TABLE, RESULTS = "results.md", "results.json"
FILES = (TABLE, RESULTS, PER_IMAGE)


def skipped_images(records: Iterable[Record], source: Source) -> list[dict[str, str]]:
    """The images that could not be used, each its `path` and the `reason`."""
    return [
        {"path": source.name(index), "reason": reason}
        for record in records
        for index, reason in record["skipped"]
    ]


def write_files(
    out: Path,
    evaluations: Sequence[Evaluation],
    rows: Rows,
    records: Callable[[], Iterable[Record]],
    source: Source,
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
    write_per_image(out, records(), source, names)
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
    figures: dict[str, Any] = {key: asdict(mean) for key, mean in evaluation.figures.items()}
    if "psnr" in figures:
        figures["psnr_of_mean_mse"] = evaluation.psnr_of_mean_mse
    if evaluation.rfid is not None:
        figures["rfid"] = evaluation.rfid
    latents = evaluation.latents
    return {
        **figures,
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
