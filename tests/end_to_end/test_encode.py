"""`kl-vae encode` as a user types it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.run_files import write_checkpoint
from kl_vae.cli.main import main
from kl_vae.data import center_crop, read_image, resize_short_side, to_float
from kl_vae.inference import encode
from kl_vae.metrics.moments import RunningMoments
from tests.messages import is_about
from tests.processes import assert_same

COMMAND = ["encode", "--checkpoint", "model.pt", "--statistics", "out.pt", "--num-workers", "0"]


def save(model: AutoEncoderKL, ddconfig: dict[str, Any], ema: AutoEncoderKL | None = None) -> None:
    """Save one of our checkpoints, as a run does."""
    params = {"ddconfig": ddconfig, "embed_dim": 3, "lossconfig": {"target": "elbo"}}
    content = {"model": model.state_dict(), "config": {"model": {"params": params}}, "step": 7}
    if ema is not None:
        content["ema"] = ema.state_dict()
    write_checkpoint(Path("model.pt"), content)


@pytest.fixture
def checkpoint(
    tmp_path: Path,
    tiny_ddconfig: dict[str, Any],
    tiny_model: AutoEncoderKL,
    make_images: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A working directory with model.pt, seven images in `images` and others in `more`."""
    monkeypatch.chdir(tmp_path)
    save(tiny_model, tiny_ddconfig)
    make_images(tmp_path / "images", 7)
    make_images(tmp_path / "more", 2, size=(18, 33))
    return tmp_path / "model.pt"


def pictures(*names: str, resize: int = 16, crop: int = 16) -> torch.Tensor:
    """The images that are encoded, [B, 3, crop, crop]."""
    images = (center_crop(resize_short_side(read_image(name, 3), resize), crop) for name in names)
    return torch.stack([to_float(image) for image in images])


@torch.no_grad()
def expected(model: AutoEncoderKL, images: torch.Tensor) -> dict[str, Any]:
    """The statistics as first and second moments of all values at once."""
    posterior = model.eval().encode(images)
    mean, var = posterior.mean.double(), posterior.var.double()
    figures = {}
    for name, axes in {"all": (0, 1, 2, 3), "each": (0, 2, 3)}.items():
        first = mean.mean(axes)
        std = ((mean.square() + var).mean(axes) - first.square()).sqrt()
        figures[name] = (first.tolist(), std.tolist())
    return {
        "scale_factor": pytest.approx(1.0 / figures["all"][1], rel=1e-5),
        "shift_factor": pytest.approx(figures["all"][0], rel=1e-5),
        "mean": pytest.approx(figures["each"][0], rel=1e-5),
        "std": pytest.approx(figures["each"][1], rel=1e-5),
        "patch_size": 1,
        "per_channel": False,
    }


def written(path: str = "out.pt") -> dict[str, Any]:
    latents: dict[str, Any] = torch.load(path, weights_only=True)["config"]["model"]["params"][
        "latents"
    ]
    return latents


ALL = [f"images/{i:03d}.png" for i in range(7)]


def test_the_file_has_weights_and_statistics(
    checkpoint: Path, tiny_model: AutoEncoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--images", "images", "--batch-size", "3", "--num-workers", "2"]) == 0
    latents = written()
    assert latents == expected(tiny_model, pictures(*ALL))
    content = torch.load("out.pt", weights_only=True)
    assert content.keys() == {"format", "model", "config", "step"}
    lines = capsys.readouterr().out.splitlines()
    scale, shift = (f"{key} {latents[key]:.4g}" for key in ("scale_factor", "shift_factor"))
    assert is_about(lines[0], 7, 3, scale, shift)
    assert lines[1:-1] == [
        "channel       mean        std",
        *(f"{i:>7} {latents['mean'][i]:>10.4g} {latents['std'][i]:>10.4g}" for i in range(3)),
    ]
    assert is_about(lines[-1], "out.pt")


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_file_normalises_the_latents(checkpoint: Path, per_channel: bool) -> None:
    options = ["--per-channel"] if per_channel else []
    assert main([*COMMAND, "--images", "images", *options]) == 0
    model = AutoEncoderKL.from_checkpoint("out.pt")
    assert written()["per_channel"] is per_channel
    with torch.no_grad():
        posterior = model.encode(pictures(*ALL))
    generator = torch.Generator().manual_seed(0)
    z = torch.cat([model.normalize_latents(posterior.sample(generator)) for _ in range(200)])
    std, mean = torch.std_mean(z, (0, 2, 3) if per_channel else (0, 1, 2, 3))
    # of 90,000 values a channel
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0.0, atol=0.02)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=0.0, atol=0.02)


def test_the_average_is_measured_where_there_is_one(
    checkpoint: Path,
    tiny_ddconfig: dict[str, Any],
    tiny_model: AutoEncoderKL,
) -> None:
    average = AutoEncoderKL(tiny_ddconfig, embed_dim=3)
    checkpoint.unlink()
    save(tiny_model, tiny_ddconfig, average)
    command = [*COMMAND, "--images", "images"]
    assert main(command) == 0
    assert written() == expected(average, pictures(*ALL))
    assert main([*command, "--no-ema", "--statistics", "raw.pt"]) == 0
    assert written("raw.pt") == expected(tiny_model, pictures(*ALL))


def test_folders_and_files_with_resize_crop_and_patterns(
    checkpoint: Path, tiny_model: AutoEncoderKL
) -> None:
    command = [*COMMAND, "--images", "images", "more/001.png", "--include", "00[0-4].png"]
    command += ["--exclude", "003.png", "--resize", "20", "--crop", "12", "--precision", "bf16"]
    assert main(command) == 0
    names = [*(ALL[i] for i in (0, 1, 2, 4)), "more/001.png"]
    in_bf16, exactly = written(), expected(tiny_model, pictures(*names, resize=20, crop=12))
    assert in_bf16 != exactly
    assert in_bf16["std"] == pytest.approx(exactly["std"].expected, rel=0.03)
    Path("out.pt").unlink()
    command[-1] = "fp32"
    assert main(command) == 0
    assert written() == exactly


def test_images_are_resized_to_the_crop_unless_asked_otherwise(
    checkpoint: Path, tiny_model: AutoEncoderKL
) -> None:
    assert main([*COMMAND, "--images", "images", "more", "--crop", "8"]) == 0
    names = [*ALL, "more/000.png", "more/001.png"]
    assert written() == expected(tiny_model, pictures(*names, resize=8, crop=8))


def test_weights_alone_take_a_config(
    checkpoint: Path, tiny_ddconfig: dict[str, Any], tiny_model: AutoEncoderKL
) -> None:
    torch.save({"state_dict": tiny_model.state_dict()}, "weights.ckpt")
    config = {"model": {"params": {"ddconfig": tiny_ddconfig, "embed_dim": 3}}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    command = [*COMMAND, "--images", "images", "--checkpoint", "weights.ckpt"]
    assert main([*command, "--config", "config.yaml"]) == 0
    assert written() == expected(tiny_model, pictures(*ALL))
    assert AutoEncoderKL.from_checkpoint("out.pt").config.resolution == 16


def test_unreadable_files_are_named_and_skipped(
    checkpoint: Path,
    tiny_model: AutoEncoderKL,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    Path("images/bad.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("images/large.png")
    command = [*COMMAND, "--images", "images", "--max-pixels", "600", "--batch-size", "1"]
    assert main(command) == 1
    bad, large = caplog.messages
    assert is_about(bad, "images/bad.png", "PNG")
    assert is_about(large, "images/large.png", "40 x 40", "max_pixels=600")
    assert is_about(capsys.readouterr().out.splitlines()[0], "7 images")
    assert written() == expected(tiny_model, pictures(*ALL))


def test_no_readable_image_is_an_error(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "b.png"):
        Path("more", name).write_bytes(b"no image")
    assert main([*COMMAND, "--images", "more", "--include", "?.png"]) == 2
    first, second = caplog.messages
    assert is_about(first, "more/a.png") and is_about(second, "more/b.png")
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("kl-vae encode: error: ")
    assert is_about(last_line, 2, "--images")
    assert not Path("out.pt").exists()


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"--statistics": "model.pt"}, ("statistics=model.pt", "exists")),
        (
            {"--statistics": "none/out.pt"},
            ("statistics=none/out.pt", "none"),
        ),
        ({"--checkpoint": "none.pt"}, ("none.pt", "checkpoint")),
        ({"--images": "none"}, ("none", "folder")),
        ({"--include": "*.gif"}, ("include=['*.gif']", "exclude=[]", 7)),
        ({"--crop": "13"}, ("crop=13", 2, 12)),
        ({"--crop": "1"}, ("crop=1", 2)),
        (
            {"--resize": "12"},
            ("resize=12", "crop", 16),
        ),
        ({"--device": "tpu"}, ("'tpu'", "auto, cuda, mps, cpu")),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, str],
    parts: tuple[object, ...],
) -> None:
    before = sorted(Path().rglob("*"))
    arguments = dict(zip(COMMAND[1::2], COMMAND[2::2], strict=True)) | {"--images": "images"}
    arguments |= changed
    assert main(["encode", *(word for pair in arguments.items() for word in pair)]) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("kl-vae encode: error: ")
    assert is_about(last_line, *parts)
    assert sorted(Path().rglob("*")) == before


def test_weights_with_nan_are_an_error(
    checkpoint: Path,
    tiny_ddconfig: dict[str, Any],
    tiny_model: AutoEncoderKL,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.nn.init.constant_(tiny_model.encoder.conv_out.bias, torch.nan)
    checkpoint.unlink()
    save(tiny_model, tiny_ddconfig)
    assert main([*COMMAND, "--images", "images"]) == 2
    assert is_about(capsys.readouterr().err, "encoder.conv_out.bias", "NaN")


def test_weights_are_read_once_from_a_running_training(
    checkpoint: Path,
    tiny_ddconfig: dict[str, Any],
    tiny_model: AutoEncoderKL,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    latent_moments = encode.latent_moments

    def while_training(*args: Any) -> RunningMoments:
        checkpoint.unlink(missing_ok=True)
        save(AutoEncoderKL(tiny_ddconfig, embed_dim=3), tiny_ddconfig)
        return latent_moments(*args)

    monkeypatch.setattr(encode, "latent_moments", while_training)
    assert main([*COMMAND, "--images", "images"]) == 0
    tensors = torch.load("out.pt", weights_only=True)["model"]
    assert_same(tensors, dict(tiny_model.state_dict()))
    assert written() == expected(tiny_model, pictures(*ALL))


@pytest.mark.parametrize(
    ("option", "value", "smallest"),
    [("--num-workers", "-1", 0), ("--num-workers", "some", 0), ("--batch-size", "0", 1)],
)
def test_numbers_are_checked(
    capsys: pytest.CaptureFixture[str], option: str, value: str, smallest: int
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*COMMAND, "--images", "images", f"{option}={value}"])
    assert is_about(capsys.readouterr().err, option, repr(value), smallest)
