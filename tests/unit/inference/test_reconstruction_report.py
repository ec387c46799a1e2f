"""The report of a folder of reconstructions."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kl_vae.inference.reconstruction_report
from kl_vae import AutoEncoderKL
from kl_vae.data import FolderSource
from kl_vae.inference.reconstruction_report import (
    ImageMetrics,
    OutputFiles,
    ReconstructionResult,
    begin_report,
    write_report,
)
from kl_vae.visual.image_files import PNG, ImageFormat, write_image
from tests.messages import is_about, mentions

ABOUT = {
    "checkpoint": "run",
    "precision": "fp32",
    "mode": "mode",
    "resize": None,
    "crop": None,
    "lpips": "none",
    "ssim": "wang",
}
METRICS = [
    ImageMetrics(0, 6, 4, 20.0, 0.5),
    ImageMetrics(2, 6, 4, 30.0, None),
    ImageMetrics(3, 6, 4, None, 1.0),
]
Write = Callable[..., ReconstructionResult]


def report(
    folder: Path, model: AutoEncoderKL, names: list[str], gallery: bool = True, **about: Any
) -> Write:
    """Write black images of 6 x 4 to `folder`, and reconstructions of value 10 to out."""
    source = FolderSource(folder, names, channels=3)
    files = OutputFiles.of(folder / "out", source, PNG, gallery)
    begin_report(files)
    for name, picture in zip(names, files.outputs, strict=True):
        Image.new("RGB", (6, 4)).save(folder / name)
        write_image(files.out / picture, torch.full((3, 4, 6), 10, dtype=torch.uint8))
    return partial(write_report, source, files, model.to_rgb, {**ABOUT, **about})


def record(
    metrics: Sequence[ImageMetrics] = (), skipped: Sequence[tuple[int, str]] = ()
) -> dict[str, Any]:
    """The record of one unit."""
    return {"images": [asdict(x) for x in metrics], "skipped": list(skipped)}


def rows(folder: Path) -> list[list[str]]:
    with (folder / "out" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def summary(folder: Path) -> dict[str, Any]:
    text = (folder / "out" / "summary.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def test_a_report_of_some_images(tmp_path: Path, model: AutoEncoderKL) -> None:
    names = [f"{i}.bmp" for i in range(4)]
    write = report(tmp_path, model, names)
    units = [record(METRICS[:1], [(1, "is bad")]), record(METRICS[1:])]
    result = write(units, rows=2)

    out = tmp_path / "out"
    assert (result.count, result.shown, result.page) == (3, 2, out / "index.html")
    assert (result.mean("psnr"), result.mean("ssim"), result.mean("lpips")) == (25.0, 0.75, None)
    assert result.images == tuple(METRICS)
    assert result.paths == tuple(f"{tmp_path}/{i}.bmp" for i in (0, 2, 3))
    assert result.outputs == ("0.png", "2.png", "3.png")
    assert result.skipped == ((f"{tmp_path}/1.bmp", "is bad"),)
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
        # columns of 192 pixels; a line of text, then rows of one and 6 x 4 pixels, enlarged
        assert comparison.size == (3 * 194 + 2, 20 + 2 * (20 + 128 + 2))
        assert [comparison.getpixel((194 * i + 90, 100))[0] for i in range(3)] == [0, 10, 40]
    page = (out / "index.html").read_text()
    assert "gallery/originals/3.png" in page and "Infinity" in page


def test_the_variant_of_ssim_is_defined_and_the_size_is_said(
    tmp_path: Path, model: AutoEncoderKL
) -> None:
    write = report(tmp_path, model, ["0.bmp"], ssim="skimage", resize=8, crop=4)
    result = write([record(METRICS[:1])], rows=0)
    assert result.size == "short side 8, center crop 4"
    assert summary(tmp_path)["ssim"] == "skimage"
    assert is_about(summary(tmp_path)["definitions"]["ssim"], "7 x 7", "number_without_ssim")
    assert is_about((tmp_path / "out" / "index.html").read_text(), result.size)


def test_lpips_and_images_recomputed_in_fp32(tmp_path: Path, model: AutoEncoderKL) -> None:
    metrics = [ImageMetrics(0, 6, 4, 20.0, 0.5, 0.125, True), ImageMetrics(1, 6, 4, 20.0, 0.5)]
    write = report(tmp_path, model, ["0.bmp", "1.bmp"], gallery=False, lpips="vgg")
    result = write([record(metrics)], rows=1)
    assert result.mean("lpips") == 0.125
    assert result.page is None and not (tmp_path / "out" / "index.html").exists()
    assert [row[-1] for row in rows(tmp_path)] == ["lpips", "0.125000", ""]
    found = summary(tmp_path)
    assert (found["mean_lpips"], found["number_without_lpips"]) == (0.125, 1)
    assert "v0.1" in found["definitions"]["lpips"]
    assert found["redone_in_fp32"] == [f"{tmp_path}/0.bmp"]


def test_an_empty_report_replaces_an_earlier_one(tmp_path: Path, model: AutoEncoderKL) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("metrics.csv", "summary.json", "comparison.png", "index.html"):
        (out / name).write_text("earlier")
    write = report(tmp_path, model, [])
    assert [path.name for path in out.iterdir()] == ["metrics.csv"]  # marks the folder
    assert rows(tmp_path) == [["path", "output", "width", "height", "psnr", "ssim"]]
    result = write([], rows=2)
    assert (result.count, result.shown, result.mean("psnr"), result.page) == (0, 0, None, None)
    found = summary(tmp_path)
    assert found["mean_psnr_db"] is found["mean_ssim"] is None
    assert sorted(path.name for path in out.iterdir()) == ["metrics.csv", "summary.json"]


def test_the_comparison_shows_the_worst_first(
    tmp_path: Path, model: AutoEncoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[Any, ...]] = []
    draw = kl_vae.inference.reconstruction_report.sheet_row

    def sheet_row(*arguments: Any) -> torch.Tensor:
        written.append(arguments[:2])
        return draw(*arguments)

    monkeypatch.setattr("kl_vae.inference.reconstruction_report.sheet_row", sheet_row)
    metrics = [*METRICS, ImageMetrics(1, 6, 4, 12.345, 0.25, 0.5)]
    write = report(tmp_path, model, [f"{i}.bmp" for i in range(4)], lpips="vgg")
    assert write([record(metrics)], rows=3).shown == 3
    assert written == [
        ("1.bmp", "PSNR 12.35 dB   SSIM 0.250   LPIPS 0.500"),
        ("0.bmp", "PSNR 20.00 dB   SSIM 0.500   LPIPS none"),
        ("2.bmp", "PSNR 30.00 dB   SSIM none   LPIPS none"),
    ]


def test_missing_files_are_left_out_of_the_comparison(
    tmp_path: Path, model: AutoEncoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    write = report(tmp_path, model, [f"{i}.bmp" for i in range(4)])
    (tmp_path / "0.bmp").unlink()
    (tmp_path / "out" / "2.png").write_bytes(b"")
    Image.new("RGB", (3, 4)).save(tmp_path / "3.bmp")
    metrics = [*METRICS, ImageMetrics(1, 6, 4, 20.0, 0.5)]
    assert write([record(metrics)], rows=9).shown == 1
    missing, empty, resized = caplog.messages
    assert is_about(missing, f"{tmp_path}/0.bmp", "No such file or directory")
    assert is_about(empty, f"{tmp_path}/out/2.png", "empty")
    assert is_about(resized, f"{tmp_path}/3.bmp", "size")


def test_names_that_are_not_utf8_and_names_of_two_lines(
    tmp_path: Path, model: AutoEncoderKL
) -> None:
    names = [os.fsdecode(b"\xff.bmp"), "a\nb,é.bmp"]
    write = report(tmp_path, model, names)
    metrics = [ImageMetrics(i, 6, 4, 20.0, 0.5) for i in range(2)]
    write([record(metrics, [(0, "bad")])], rows=1)
    assert [row[1] for row in rows(tmp_path)[1:]] == [r"\xff.png", r"a\nb,\xe9.png"]
    assert summary(tmp_path)["skipped"][0]["path"] == rf"{tmp_path}/\xff.bmp"


def test_arrays_are_compared_as_images(
    tmp_path: Path, model_of_five_channels: AutoEncoderKL
) -> None:
    array = np.random.default_rng(0).random((4, 6, 5), dtype=np.float32)
    np.save(tmp_path / "a.npy", array)
    source = FolderSource(tmp_path, ["a.npy"], channels=5)
    files = OutputFiles.of(tmp_path / "out", source, PNG, gallery=True)
    begin_report(files)
    np.save(files.out / "a.npy", 1 - array)
    to_rgb = model_of_five_channels.to_rgb
    result = write_report(source, files, to_rgb, ABOUT, [record(METRICS[:1])], rows=1)
    assert result.shown == 1
    assert "gallery/reconstructions/a.png" in (files.out / "index.html").read_text()


def test_a_folder_that_cannot_be_written(tmp_path: Path, model: AutoEncoderKL) -> None:
    out = tmp_path / "out"
    (out / "summary.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=mentions("summary.json", "Is a directory")):
        report(tmp_path, model, [])
    (out / "summary.json").rmdir()
    write = report(tmp_path, model, [])
    (out / "metrics.csv").unlink()
    (out / "metrics.csv").mkdir()
    with pytest.raises(ValueError, match=mentions("metrics.csv", "Is a directory")):
        write([], rows=1)


NAMES = ["a.jpg", "a.png", "sub/b.webp"]


def test_output_files_of_images(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, NAMES, channels=3)
    files = OutputFiles.of(tmp_path / "out", source, ImageFormat("webp"), gallery=True)
    assert files.outputs == ("a.webp", "a.png.webp", "sub/b.webp")
    assert files.original(1) == "gallery/originals/a.png.png"
    assert files.thumbnail(2) == "gallery/thumbnails/sub/b.jpg"
    assert files.shown(2) == "sub/b.webp"


def test_arrays_are_shown_as_images(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, ["a.npy"], channels=5)
    files = OutputFiles.of(tmp_path / "out", source, PNG, gallery=True)
    assert files.outputs == ("a.npy",)
    assert files.shown(0) == "gallery/reconstructions/a.png"


def test_a_folder_of_images_may_be_called_gallery(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, ["gallery/a.png", "index.html/a.png"], channels=3)
    with pytest.raises(ValueError, match=mentions("index.html")):
        OutputFiles.of(tmp_path / "out", source, PNG, gallery=True)
    names = ["gallery/a.png", "gallery/originals/a.png"]
    source = FolderSource(tmp_path, names[:1], channels=3)
    assert OutputFiles.of(tmp_path, source, PNG, gallery=True).outputs == ("gallery/a.png",)
    source = FolderSource(tmp_path, names, channels=3)
    assert OutputFiles.of(tmp_path, source, PNG, gallery=False).outputs == tuple(names)
    with pytest.raises(ValueError, match=mentions("gallery/originals")):
        OutputFiles.of(tmp_path, source, PNG, gallery=True)


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, NAMES, channels=3)
    files = OutputFiles.of(tmp_path / "out", source, PNG, gallery=True)
    files.prepare(source)
    (tmp_path / "out/gallery/thumbnails/sub").mkdir(parents=True)
    foreign = tmp_path / "out/gallery/thumbnails/sub/b.jpg"
    foreign.touch()
    with pytest.raises(ValueError, match=mentions("sub/b.jpg", "metrics.csv")):
        files.prepare(source)
    OutputFiles.of(tmp_path / "out", source, PNG, gallery=False).prepare(source)
    foreign.unlink()
    (tmp_path / "out" / "index.html").touch()
    with pytest.raises(ValueError, match=mentions("index.html", "metrics.csv")):
        files.prepare(source)


def test_temporary_files_of_a_killed_command_are_removed(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, NAMES, channels=3)
    files = OutputFiles.of(tmp_path / "out", source, PNG, gallery=True)
    left = [tmp_path / "out" / name / ".123.tmp" for name in ("", "sub", "gallery/originals/sub")]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "out" / "a.png").touch()
    files.remove_temporaries()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "out" / "a.png"]


def test_an_image_folder_with_the_name_of_the_records_is_an_error(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, [".unfinished/a.jpg"], channels=3)
    with pytest.raises(ValueError, match=mentions(".unfinished")):
        OutputFiles.of(tmp_path / "out", source, PNG, gallery=True)


def test_the_files_of_an_image_are_of_no_other(tmp_path: Path) -> None:
    names = ["a.jpeg", "a.jpg/x.png", "A.jpg", "b.png/x.png", "b.webp", "c.jpg.png", "c.jpg/y.jpg"]
    source = FolderSource(tmp_path, names, channels=3)
    for image_format in (PNG, ImageFormat("webp"), ImageFormat("jpg")):
        files = OutputFiles.of(tmp_path / "out", source, image_format, gallery=True)
        written = [name.casefold() for i in range(len(names)) for name in files.of_image(i)]
        folders = {str(folder) for name in written for folder in Path(name).parents}
        assert len(written) == len(set(written)) == 3 * len(names)
        assert not folders & set(written)
