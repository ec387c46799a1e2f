"""What many reconstructions are summed up in."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae import AutoEncoderKL
from kl_vae.data import FolderSource
from kl_vae.inference.reconstruction.figures import Figures
from kl_vae.inference.reconstruction.output_files import OutputFiles
from kl_vae.inference.reconstruction.results import Results
from kl_vae.inference.reconstruction.summary import Report, begin_report
from kl_vae.visual.image_files import PNG, save_image

ABOUT = {
    "checkpoint": "run",
    "precision": "fp32",
    "mode": "mode",
    "resize": None,
    "crop": None,
    "lpips": "none",
}
FIGURES = [Figures(0, 6, 4, 20.0, 0.5), Figures(2, 6, 4, 30.0, None), Figures(3, 6, 4, None, 1.0)]


def report(
    folder: Path, model: AutoEncoderKL, names: list[str], gallery: bool = True, **about: Any
) -> Report:
    """Black images of 6 x 4 in `folder`, and their reconstructions, of 10, in out."""
    source = FolderSource(folder, names, channels=3)
    files = OutputFiles.of(folder / "out", source, PNG, gallery)
    begin_report(files)
    for name, picture in zip(names, files.pictures, strict=True):
        Image.new("RGB", (6, 4)).save(folder / name)
        save_image(files.out / picture, torch.full((3, 4, 6), 10, dtype=torch.uint8))
    return Report(source, files, model.to_rgb, {**ABOUT, **about})


def rows(folder: Path) -> list[list[str]]:
    with (folder / "out" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def summary(folder: Path) -> dict[str, Any]:
    text = (folder / "out" / "summary.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def test_records_are_joined() -> None:
    records = [
        {"images": [{"index": 0, "width": 6, "height": 4, "psnr": 20.0, "ssim": 0.5}]},
        {"images": [{"index": 2, "width": 6, "height": 4, "psnr": 30.0, "ssim": None}]},
    ]
    results = Results.of(
        {**record, "skipped": [[i, "is bad"]]} for i, record in zip((1, 3), records, strict=True)
    )
    assert results == Results(FIGURES[:2], [(1, "is bad"), (3, "is bad")])


def test_a_report_of_some_images(tmp_path: Path, model: AutoEncoderKL) -> None:
    names = [f"{i}.bmp" for i in range(4)]
    about = report(tmp_path, model, names)
    line = about.write(Results(FIGURES, [(1, "is bad")]), rows=2)

    out = tmp_path / "out"
    assert line == (
        f"3 images: PSNR 25.00 dB, SSIM 0.750; pictures in {out} "
        f"(comparison.png shows 2 of them), gallery in {out}/index.html"
    )
    assert rows(tmp_path) == [
        ["path", "output", "width", "height", "psnr", "ssim"],
        [f"{tmp_path}/0.bmp", "0.png", "6", "4", "20.0000", "0.500000"],
        [f"{tmp_path}/2.bmp", "2.png", "6", "4", "30.0000", ""],
        [f"{tmp_path}/3.bmp", "3.png", "6", "4", "inf", "1.000000"],
    ]
    found = summary(tmp_path)
    assert set(found.pop("definitions")) == {"psnr", "ssim", "compared", "comparison"}
    assert found == {
        **ABOUT,
        "number": 3,
        "mean_psnr_db": 25.0,
        "mean_ssim": 0.75,
        "number_exact": 1,
        "number_without_ssim": 1,
        "redone_in_fp32": [],
        "number_skipped": 1,
        "skipped": [{"path": f"{tmp_path}/1.bmp", "reason": "is bad"}],
    }
    with Image.open(out / "comparison.png") as comparison:
        assert comparison.size == (3 * 8 + 2, 2 * 6 + 2)
        assert [comparison.getpixel((x, 4))[0] for x in (4, 12, 20)] == [0, 10, 40]
    page = (out / "index.html").read_text()
    assert "gallery/originals/3.png" in page and "Infinity" in page


def test_lpips_and_what_was_redone(tmp_path: Path, model: AutoEncoderKL) -> None:
    figures = [Figures(0, 6, 4, 20.0, 0.5, 0.125, True), Figures(1, 6, 4, 20.0, 0.5)]
    about = report(tmp_path, model, ["0.bmp", "1.bmp"], gallery=False, lpips="vgg")
    line = about.write(Results(figures), rows=1)
    assert ", LPIPS 0.1250; pictures" in line
    assert "gallery" not in line and not (tmp_path / "out" / "index.html").exists()
    assert [row[-1] for row in rows(tmp_path)] == ["lpips", "0.125000", ""]
    found = summary(tmp_path)
    assert (found["mean_lpips"], found["number_without_lpips"]) == (0.125, 1)
    assert "v0.1" in found["definitions"]["lpips"]
    assert found["redone_in_fp32"] == [f"{tmp_path}/0.bmp"]


def test_nothing_to_report_and_an_earlier_report(tmp_path: Path, model: AutoEncoderKL) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("metrics.csv", "summary.json", "comparison.png", "index.html"):
        (out / name).write_text("earlier")
    about = report(tmp_path, model, [])
    assert [path.name for path in out.iterdir()] == ["metrics.csv"]  # marks the folder
    assert rows(tmp_path) == [["path", "output", "width", "height", "psnr", "ssim"]]
    line = about.write(Results(), rows=2)
    assert line == f"0 images: PSNR none dB, SSIM none; pictures in {out}"
    found = summary(tmp_path)
    assert found["mean_psnr_db"] is found["mean_ssim"] is None
    assert sorted(path.name for path in out.iterdir()) == ["metrics.csv", "summary.json"]


def test_files_that_are_gone_are_left_out_of_the_comparison(
    tmp_path: Path, model: AutoEncoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    about = report(tmp_path, model, [f"{i}.bmp" for i in range(4)])
    (tmp_path / "0.bmp").unlink()
    (tmp_path / "out" / "2.png").write_bytes(b"")
    Image.new("RGB", (3, 4)).save(tmp_path / "3.bmp")
    figures = [*FIGURES, Figures(1, 6, 4, 20.0, 0.5)]
    assert "(comparison.png shows 1 of them)" in about.write(Results(figures), rows=9)
    assert caplog.messages == [
        f"left out of the comparison: {tmp_path}/0.bmp: No such file or directory",
        f"left out of the comparison: {tmp_path}/out/2.png: the file is empty",
        f"left out of the comparison: {tmp_path}/3.bmp: has another size than before",
    ]


def test_names_that_are_not_utf8_and_names_of_two_lines(
    tmp_path: Path, model: AutoEncoderKL
) -> None:
    names = [os.fsdecode(b"\xff.bmp"), "a\nb,é.bmp"]
    about = report(tmp_path, model, names)
    about.write(Results([Figures(i, 6, 4, 20.0, 0.5) for i in range(2)], [(0, "bad")]), rows=1)
    assert [row[1] for row in rows(tmp_path)[1:]] == [r"\xff.png", r"a\nb,\xe9.png"]
    assert summary(tmp_path)["skipped"][0]["path"] == rf"{tmp_path}/\xff.bmp"


def test_arrays_are_compared_as_pictures(
    tmp_path: Path, model_of_five_channels: AutoEncoderKL
) -> None:
    array = np.random.default_rng(0).random((4, 6, 5), dtype=np.float32)
    np.save(tmp_path / "a.npy", array)
    source = FolderSource(tmp_path, ["a.npy"], channels=5)
    files = OutputFiles.of(tmp_path / "out", source, PNG, gallery=True)
    begin_report(files)
    np.save(files.out / "a.npy", 1 - array)
    about = Report(source, files, model_of_five_channels.to_rgb, ABOUT)
    assert "shows 1 of them" in about.write(Results(FIGURES[:1]), rows=1)
    assert "gallery/reconstructions/a.png" in (files.out / "index.html").read_text()


def test_a_folder_that_cannot_be_written(tmp_path: Path, model: AutoEncoderKL) -> None:
    out = tmp_path / "out"
    (out / "summary.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot replace .*summary\.json \(.*\); give another"):
        report(tmp_path, model, [])
    (out / "summary.json").rmdir()
    about = report(tmp_path, model, [])
    (out / "metrics.csv").unlink()
    (out / "metrics.csv").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*metrics\.csv \(Is a directory\); make"):
        about.write(Results(), rows=1)
