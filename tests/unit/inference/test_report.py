import csv
import json
import math
import os

import pytest
import torch
from PIL import Image

from kl_vae.data import ImageError
from kl_vae.inference.reconstruct import Reconstruction
from kl_vae.inference.report import Report
from kl_vae.inference.sources import ImageSource


def result(psnr: float, ssim: float) -> Reconstruction:
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    return Reconstruction(image, image + 10, psnr, ssim)


def test_a_report_of_some_images(tmp_path, model):
    report = Report(tmp_path / "out", model.to_rgb, grid_size=2)
    figures = [(20.0, 0.5), (30.0, math.nan), (math.inf, 1.0)]
    for i, (psnr, ssim) in enumerate(figures):
        report.add(ImageSource(tmp_path, f"{i}.jpg"), f"{i}.png", result(psnr, ssim))
    report.skip(ImageSource(tmp_path, "bad.jpg"), ImageError(f"{tmp_path}/bad.jpg: is bad"))
    line = report.finish({"checkpoint": "run"})

    assert line == (
        f"3 images: PSNR 25.00 dB, SSIM 0.750; pictures in {tmp_path}/out "
        "(comparison.png shows 2 of them)"
    )
    with (tmp_path / "out" / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "output", "width", "height", "psnr", "ssim"],
        [f"{tmp_path}/0.jpg", "0.png", "6", "4", "20.0000", "0.500000"],
        [f"{tmp_path}/1.jpg", "1.png", "6", "4", "30.0000", ""],
        [f"{tmp_path}/2.jpg", "2.png", "6", "4", "inf", "1.000000"],
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    del summary["definitions"]
    assert summary == {
        "checkpoint": "run",
        "number": 3,
        "mean_psnr_db": 25.0,
        "mean_ssim": 0.75,
        "number_exact": 1,
        "number_without_ssim": 1,
        "number_skipped": 1,
        "skipped": [{"path": f"{tmp_path}/bad.jpg", "reason": "is bad"}],
    }
    with Image.open(tmp_path / "out" / "comparison.png") as comparison:
        assert comparison.size == (3 * 8 + 2, 2 * 6 + 2)
        assert [comparison.getpixel((x, 4))[0] for x in (4, 12, 20)] == [0, 10, 40]


def test_nothing_to_report_and_an_earlier_report(tmp_path, model):
    for name in ("metrics.csv", "summary.json", "comparison.png"):
        (tmp_path / name).write_text("earlier")
    line = Report(tmp_path, model.to_rgb, grid_size=2).finish({})
    assert line == f"0 images: PSNR none dB, SSIM none; pictures in {tmp_path}"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mean_psnr_db"] is summary["mean_ssim"] is None
    assert not (tmp_path / "comparison.png").exists()
    assert "earlier" not in (tmp_path / "metrics.csv").read_text()


def test_names_that_are_not_utf8_and_names_of_two_lines(tmp_path, model):
    report = Report(tmp_path, model.to_rgb, grid_size=1)
    names = os.fsdecode(b"\xff.jpg"), "a\nb,é.jpg"
    for name in names:
        report.add(ImageSource(tmp_path, name), name, result(20.0, 0.5))
    report.skip(ImageSource(tmp_path, names[0]), ImageError("bad"))
    report.finish({})
    with (tmp_path / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [row[1] for row in rows[1:]] == [r"\xff.jpg", r"a\nb,\xe9.jpg"]
    json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))


def test_a_folder_that_cannot_be_written(tmp_path, model):
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(ValueError, match=r"cannot replace .*summary\.json \(.*\); give another"):
        Report(tmp_path, model.to_rgb, grid_size=1)
    (tmp_path / "summary.json").rmdir()
    report = Report(tmp_path, model.to_rgb, grid_size=1)
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*metrics\.csv \(Is a directory\); make"):
        report.add(ImageSource(tmp_path, "a"), "a", result(20.0, 0.5))
