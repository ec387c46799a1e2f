"""Units of images, their output files and their records."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.data import FolderSource, read_image, to_float
from kl_vae.inference import reconstruct as inference_reconstruct
from kl_vae.inference.images import load_images
from kl_vae.inference.reconstruct import (
    Background,
    ReconstructConfig,
    Reconstructor,
    measure,
    reconstruct,
    unit_size,
)
from kl_vae.inference.reconstruction_report import ImageMetrics, OutputFiles
from kl_vae.metrics.similarity import psnr, ssim
from kl_vae.runtime.randomness import generator_for
from kl_vae.visual.image_files import PNG, ImageFormat, as_saved
from tests.messages import is_about, mentions
from tests.tiny import reconstruct_image

SIZES = [(24, 20), (9, 30), (24, 20), (22, 19), (13, 13), (21, 17)]


@pytest.fixture
def source(tmp_path: Path, make_images: Callable[..., Path]) -> FolderSource:
    """Six images of four padded sizes, and a damaged file between them."""
    for i, size in enumerate(SIZES):
        make_images(tmp_path / "images" / str(i), 1, size)
    (tmp_path / "images" / "3bad.png").touch()
    paths = [f"{i}/000.png" for i in range(6)]
    paths.insert(4, "3bad.png")
    return FolderSource(tmp_path / "images", paths, channels=3)


class LogLines(logging.Handler):
    """Collects log lines."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def do(
    model: AutoEncoderKL,
    source: FolderSource,
    out: Path,
    config: ReconstructConfig | None = None,
    unit: range | None = None,
    image_format: ImageFormat = PNG,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    gallery: bool = True,
) -> tuple[dict[str, Any], list[str]]:
    """Process one unit; return its record and its log lines."""
    config = config or ReconstructConfig()
    files = OutputFiles.of(out, source, image_format, gallery)
    said = LogLines()
    images = load_images(source, unit or range(len(source)), resize=config.resize, crop=config.crop)
    with Background(1) as background:
        logging.getLogger("kl_vae").addHandler(said)
        record = Reconstructor(model, source, files, config, perceptual, background).do(images)
        logging.getLogger("kl_vae").removeHandler(said)
    return json.loads(json.dumps(record, allow_nan=False)), said.lines


def tree(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_unit_is_recorded_in_the_order_of_its_images(
    model: AutoEncoderKL, source: FolderSource, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    record, said = do(model, source, out, unit=range(1, 7))
    assert [figures["index"] for figures in record["images"]] == [1, 2, 3, 5, 6]
    ((position, reason),) = record["skipped"]
    assert position == 4 and is_about(reason, "empty")
    (message,) = said
    assert is_about(message, f"{source.root}/3bad.png", reason)
    for figures in record["images"]:
        index = figures["index"]
        picture = read_image(out / f"{source.key(index)}", 3)
        original = read_image(out / "gallery" / "originals" / source.key(index), 3)
        assert torch.equal(original, source.read(index))
        expected = as_saved(reconstruct_image(model, to_float(original)))
        assert (picture.int() - expected.int()).abs().max() <= 1  # of another batch
        assert figures == asdict(measure(index, original, picture))
        with Image.open(
            out / "gallery" / "thumbnails" / source.key(index).replace("png", "jpg")
        ) as thumbnail:
            assert thumbnail.size == (2 * original.shape[2], original.shape[1])
    assert len(tree(out)) == 15
    again, _ = do(model, source, tmp_path / "again", unit=range(1, 7))
    assert again == record
    assert tree(tmp_path / "again") == tree(out)


def test_noise_depends_on_seed_and_name_alone(
    model: AutoEncoderKL, source: FolderSource, tmp_path: Path
) -> None:
    def sample(seed: int, unit: range, batch_size: int) -> Tensor:
        config = ReconstructConfig(mode="sample", seed=seed, batch_size=batch_size)
        do(model, source, tmp_path / "out", config, unit, gallery=False)
        return read_image(tmp_path / "out" / "2" / "000.png", 3).int()

    expected = as_saved(
        reconstruct_image(
            model,
            to_float(source.read(2)),
            generator=generator_for("reconstruct", 5, "2/000.png"),
        )
    )
    assert (sample(5, range(7), 8) - expected.int()).abs().max() <= 1
    assert (sample(5, range(2, 3), 1) - expected.int()).abs().max() == 0
    assert (sample(6, range(7), 8) - expected.int()).abs().max() > 1


def test_resize_and_crop_apply_to_the_original_as_well(
    model: AutoEncoderKL, source: FolderSource, tmp_path: Path
) -> None:
    record, said = do(model, source, tmp_path / "out", ReconstructConfig(resize=16, crop=12))
    assert {(f["width"], f["height"]) for f in record["images"]} == {(12, 12)}
    with Image.open(tmp_path / "out" / "gallery" / "originals" / "0" / "000.png") as original:
        assert original.size == (12, 12)
    _, said = do(model, source, tmp_path / "more", ReconstructConfig(crop=20), gallery=False)
    assert any(is_about(message, source.name(1), "9 x 30", "crop", 20) for message in said)
    assert not (tmp_path / "more" / "gallery").exists()


def test_metrics_are_computed_before_lossy_compression(
    model: AutoEncoderKL, source: FolderSource, tmp_path: Path
) -> None:
    png, _ = do(model, source, tmp_path / "png")
    jpg, _ = do(model, source, tmp_path / "jpg", image_format=ImageFormat("jpg", 10))
    assert jpg == png
    assert (tmp_path / "jpg" / "0" / "000.jpg").exists()


def test_lpips_is_recorded(model: AutoEncoderKL, source: FolderSource, tmp_path: Path) -> None:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return torch.full((1,), float(x.shape[2]))

    record, _ = do(model, source, tmp_path / "out", perceptual=distance)
    assert [f["lpips"] for f in record["images"]] == [float(height) for _, height in SIZES]


def test_images_recomputed_in_fp32_are_logged_once(
    model: AutoEncoderKL, source: FolderSource, tmp_path: Path
) -> None:
    """The last convolution overflows in half precision."""
    model.decoder.conv_out.register_forward_hook(
        lambda module, args, y: y / 0 if y.dtype == torch.bfloat16 else y
    )
    record, said = do(
        model, source, tmp_path / "out", ReconstructConfig(precision="bf16"), range(2)
    )
    assert [figures["redone_in_fp32"] for figures in record["images"]] == [True, True]
    assert len(said) == 2
    for i, message in enumerate(said):
        assert is_about(message, source.name(i), "NaN", "bf16", "fp32")


def test_a_failed_reconstruction_leaves_no_file(
    model: AutoEncoderKL, source: FolderSource, tmp_path: Path
) -> None:
    torch.nn.init.constant_(model.decoder.conv_out.bias, math.nan)
    record, said = do(model, source, tmp_path / "out")
    assert record["images"] == []
    assert len(record["skipped"]) == 7
    assert is_about(said[1], source.name(0), "fp32", "NaN")
    assert tree(tmp_path / "out") == {}


def test_an_image_too_long_for_the_format_is_skipped(model: AutoEncoderKL, tmp_path: Path) -> None:
    Image.new("RGB", (16500, 1)).save(tmp_path / "a.png")
    source = FolderSource(tmp_path, ["a.png"], channels=3)
    record, _ = do(model, source, tmp_path / "out", image_format=ImageFormat("webp"))
    ((position, reason),) = record["skipped"]
    assert position == 0 and is_about(reason, "16500 x 1", "webp", 16383, "png")


def test_a_file_that_cannot_be_written_is_an_error(
    model: AutoEncoderKL, source: FolderSource, tmp_path: Path
) -> None:
    (tmp_path / "out" / "0" / "000.png").mkdir(parents=True)
    with pytest.raises(ValueError, match=mentions("000.png", "Is a directory")):
        do(model, source, tmp_path / "out")


def test_the_size_of_units() -> None:
    sizes = [unit_size(number) for number in (1, 500, 1000, 4096, 10**6)]
    assert sizes == [8, 8, 15, 64, 64]


def pair(channels: int = 3, height: int = 12, width: int = 15) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, channels, height, width), generator=generator).byte()


def test_metrics_of_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair()
    expected = ImageMetrics(
        7,
        15,
        12,
        psnr=psnr(x[None], y[None], (0, 255)).item(),
        ssim=ssim(x[None], y[None], (0, 255)).item(),
    )
    assert measure(7, x, y) == expected
    monkeypatch.setattr(inference_reconstruct, "MEASURED_ON_DEVICE", 0)
    assert measure(7, x, y) == expected


def test_the_variant_of_ssim() -> None:
    x, y = pair()
    expected = ssim(x[None], y[None], (0, 255), "skimage").item()
    assert measure(7, x, y, ssim_variant="skimage").ssim == expected
    assert measure(7, x, y).ssim != expected
    with pytest.raises(ValueError, match=mentions("ssim='other'", "wang", "skimage")):
        ReconstructConfig(ssim="other")  # type: ignore[arg-type]


def test_metrics_of_floats() -> None:
    x, y = pair(5) / 255
    assert measure(0, x, y).psnr == psnr(x[None], y[None], (0, 1)).item()


def test_an_exact_and_tiny_image() -> None:
    x = pair(height=10)[0]
    assert measure(0, x, x) == ImageMetrics(0, 15, 10, psnr=None, ssim=None)
    assert measure(0, x, x, redone_in_fp32=True).redone_in_fp32


def test_lpips_is_of_values_from_minus_one_to_one() -> None:
    x, y = pair()

    def mean(x: Tensor, y: Tensor) -> Tensor:
        assert x.shape == y.shape == (1, 3, 12, 15)
        assert -1 <= x.min() < -0.9 and 0.9 < x.max() <= 1
        return (x - y).abs().mean((1, 2, 3))

    expected = (x.float() - y.float()).abs().mean().item() / 127.5
    assert measure(0, x, y, mean).lpips == pytest.approx(expected)
    assert measure(0, x, y, lambda x, y: torch.tensor([math.nan])).lpips is None
    assert measure(0, x, y, lambda x, y: torch.empty(2**50)).lpips is None
    with pytest.raises(RuntimeError, match="another"):
        measure(0, x, y, _fail)


def _fail(x: Tensor, y: Tensor) -> Tensor:
    raise RuntimeError("another")


@pytest.mark.parametrize("threads", [0, 2])
def test_finish_waits_for_all_tasks(threads: int) -> None:
    done: list[int] = []
    with Background(threads) as background:
        for i in range(20):
            background.do(lambda i=i: done.append(i))
        background.finish()
        assert sorted(done) == list(range(20))


def test_an_error_in_a_task_is_raised_in_the_caller() -> None:
    def fail() -> None:
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"), Background(1) as background:
        background.do(fail)
        background.finish()
    with pytest.raises(ValueError, match="no room"), Background(1) as background:
        for _ in range(4):
            background.do(fail)
    with pytest.raises(ValueError, match="no room"), Background(0) as background:
        background.do(fail)


def test_the_queue_holds_twice_the_threads() -> None:
    gate = threading.Event()
    with Background(1) as background:
        for _ in range(2):
            background.do(gate.wait)
        threading.Timer(0.1, gate.set).start()
        before = time.monotonic()
        background.do(gate.wait)
        assert time.monotonic() - before > 0.05
        background.finish()


def test_queued_tasks_are_dropped_after_an_error() -> None:
    gate, done = threading.Event(), list[int]()
    with pytest.raises(KeyboardInterrupt), Background(1) as background:
        background.do(gate.wait)
        background.do(lambda: done.append(1))
        threading.Timer(0.1, gate.set).start()
        raise KeyboardInterrupt
    assert done == []


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("resize", 0, ("resize=0", 1)),
        ("crop", -1, ("crop=-1", 1)),
        ("max_pixels", 0, ("max_pixels=0", 1)),
        ("batch_size", 0, ("batch_size=0", 1)),
        ("mode", "mean", ("mode='mean'", "mode, sample")),
        ("precision", "fp8", ("precision='fp8'", "fp32", "bf16", "fp16")),
    ],
)
def test_invalid_values(key: str, value: object, parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        ReconstructConfig(**{key: value})


def test_reconstruct_takes_a_model(
    model: AutoEncoderKL, source: FolderSource, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = reconstruct(model, source.root, out, num_workers=0, resize=16, grid_size=2)
    assert (found.folder, found.count, found.shown) == (out, 6, 2)
    assert found.paths == tuple(str(source.root / f"{i}/000.png") for i in range(6))
    assert found.outputs == tuple(f"{i}/000.png" for i in range(6))
    ((skipped, reason),) = found.skipped
    assert skipped == f"{source.root}/3bad.png" and is_about(reason, "empty")
    assert found.page == out / "index.html" and found.page.exists()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["checkpoint"] == "a model in memory"
    assert (summary["mean_psnr_db"], summary["mean_ssim"]) == (
        found.mean("psnr"),
        found.mean("ssim"),
    )
    with pytest.raises(ValueError, match=mentions("lpips_heads", "lpips")):
        reconstruct(model, source.root, tmp_path / "other", lpips_heads="heads.pth")
