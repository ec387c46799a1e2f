"""Means, latents and tables of evaluation records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.data import FolderSource
from kl_vae.inference.evaluate import EvaluateConfig, Evaluator
from kl_vae.inference.evaluation_report import (
    DEFINITIONS,
    IMAGE_METRICS,
    Mean,
    as_markdown,
    as_text,
    evaluate_records,
    read_features,
    rows_of,
    write_features,
    write_per_image,
)
from tests.messages import mentions

SUMS = {"images": 1, "values": 4, "mean": [0.0, 1.0], "squares": [4.0, 4.0]}


def record(mse: list[float], kl: list[float | None], first: int = 0) -> dict[str, Any]:
    """Of one model and images of 8 x 4."""
    images = [[first + i, 8, 4] for i in range(len(mse))]
    means = {**SUMS, "squares": [0.041, 0.039]}  # variances about 0.01
    models = [{"metrics": {"mse": mse, "kl": kl}, "latents": SUMS, "means": means}]
    return {"images": images, "skipped": [], "models": models}


def test_a_mean_and_its_standard_error() -> None:
    values = [20.0, 24.0, 28.0, math.inf, None]
    expected = Mean(24.0, pytest.approx(4.0 / math.sqrt(3)), 3, 2)  # type: ignore[arg-type]
    assert Mean.of(values) == expected
    assert Mean.of([1.5]) == Mean(1.5, None, 1, 0)
    assert Mean.of([None, math.nan]) == Mean(None, None, 0, 2)


def test_records_are_averaged() -> None:
    records = [record([0.01, 0.0], [1.0, 3.0]), record([0.001], [None], 2)]
    (found,) = evaluate_records(lambda: records, None, ["a"])
    assert found.metrics["psnr"].mean == pytest.approx(25.0)
    assert (found.metrics["psnr"].number, found.metrics["psnr"].left_out) == (2, 1)
    assert found.psnr_of_mean_mse == pytest.approx(-10 * math.log10(0.011 / 3))
    assert found.metrics["kl_nats"].mean == 2.0
    assert found.metrics["kl_bits_per_pixel"].mean == pytest.approx(2.0 / math.log(2) / 32)
    assert found.latents.mean == (0.0, 1.0)
    assert found.latents.std == pytest.approx((1.0, 1.0))
    assert found.variances == pytest.approx([0.01025, 0.00975])
    assert found.active_channels == 1
    assert found.rfid is None


def test_every_metric_is_defined() -> None:
    assert {*IMAGE_METRICS, "rfid", "psnr_of_mean_mse", "latents", "active_channels"} <= set(
        DEFINITIONS
    )


def test_tables() -> None:
    (a,) = evaluate_records(lambda: [record([0.01, 0.001], [1.0, 3.0])], None, ["a"])
    (b,) = evaluate_records(lambda: [record([0.0], [1.0])], None, ["a longer name"])
    names, rows = ["a", "a longer name"], rows_of([a, b])
    assert as_text(names, rows).splitlines() == [
        "                                     a  a longer name",
        "PSNR (dB)                 25.00 ± 5.00           none",
        "PSNR of mean MSE (dB)            22.60           none",
        "KL (nats per image)          2.0 ± 1.0            1.0",
        "KL (bits per pixel)    0.0902 ± 0.0451         0.0451",
        "active channels                 1 of 2         1 of 2",
        "scale_factor                    0.8944         0.8944",
        "shift_factor                       0.5            0.5",
    ]
    assert as_markdown(names, rows).splitlines()[:3] == [
        "|  | a | a longer name |",
        "|---|---:|---:|",
        "| PSNR (dB) | 25.00 ± 5.00 | none |",
    ]


def test_the_row_of_an_exact_reconstruction(tmp_path: Path) -> None:
    source = FolderSource(Path("x"), ["a.png", "b, c.png"], 3)
    write_per_image(tmp_path, [record([0.0, 0.01], [1.0, None])], source, ["m"])
    assert (tmp_path / "per_image.csv").read_text().splitlines() == [
        "checkpoint,path,width,height,psnr,kl_nats,kl_bits_per_pixel",
        "m,x/a.png,4,8,inf,1,0.04508422",
        'm,"x/b, c.png",4,8,20,,',
    ]


def test_a_table_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "per_image.csv").mkdir()
    source = FolderSource(Path("x"), ["a.png"], 3)
    with pytest.raises(ValueError, match=mentions("per_image.csv", "Is a directory")):
        write_per_image(tmp_path, [record([0.0], [1.0])], source, ["m"])


def test_features_are_kept_by_unit(tmp_path: Path) -> None:
    first, third = torch.rand(2, 3, 5), torch.rand(2, 1, 5)
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    write_features(paths[0], first)
    write_features(paths[2], third)
    found = list(read_features(paths, 1))
    assert len(found) == 2
    assert torch.equal(torch.cat(found), torch.cat([first[1], third[1]]))
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(ValueError, match=mentions(paths[0], "--resume")):
        list(read_features(paths, 1))


@pytest.mark.parametrize("metric", ["lpips", "rfid"])
def test_lpips_and_rfid_need_rgb_images(tiny_model: AutoEncoderKL, metric: str) -> None:
    source = FolderSource(Path(), ["a.npy"], 5)
    config = EvaluateConfig(None, None, metrics=(metric,))
    with pytest.raises(ValueError, match=mentions(metric, 5, "metrics")):
        Evaluator([tiny_model], ["a"], source, config, 8)
