"""`kl-vae encode --out` as a user types it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.run_files import write_checkpoint
from kl_vae.cli.main import main
from kl_vae.data import (
    LatentDataset,
    center_crop,
    read_image,
    resize_short_side,
    to_float,
)
from kl_vae.distribution import DiagonalGaussianDistribution
from tests.messages import is_about

pytest.importorskip("safetensors")

COMMAND = ["encode", "--checkpoint", "model.pt", "--num-workers", "0", "--images", "images"]
OUT = [*COMMAND, "--out", "out", "--shard-size", "4"]


@pytest.fixture
def project(
    tmp_path: Path,
    tiny_ddconfig: dict[str, Any],
    tiny_model: AutoEncoderKL,
    make_images: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A working directory with model.pt and nine images of two classes in `images`."""
    monkeypatch.chdir(tmp_path)
    params = {"ddconfig": tiny_ddconfig, "embed_dim": 3}
    content = {"model": tiny_model.state_dict(), "config": {"model": {"params": params}}, "step": 7}
    write_checkpoint(Path("model.pt"), content)
    make_images(tmp_path / "images" / "cat", 5)
    make_images(tmp_path / "images" / "dog", 4, size=(18, 33))
    return tmp_path


def test_latents_and_statistics_in_one_pass(
    project: Path,
    tiny_model: AutoEncoderKL,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    Path("images/cat/bad.png").write_bytes(b"no image")
    command = [*OUT, "--labels", "--flip", "--dtype", "fp32", "--num-workers", "1"]
    assert main([*command, "--statistics", "measured.pt"]) == 1
    captured = capsys.readouterr()
    assert sum(is_about(text, "images/cat/bad.png", "PNG") for text in caplog.messages) == 1
    measured = AutoEncoderKL.from_checkpoint("measured.pt")
    assert measured.latents is not None
    latents = LatentDataset("out", "both")
    assert latents.index.checkpoint == "model.pt"
    assert latents.index.statistics.scale_factor == measured.latents.scale_factor
    assert latents.index.statistics.std == measured.latents.std
    size = sum(path.stat().st_size for path in Path("out").glob("*.safetensors")) / 1e6
    lines = captured.out.splitlines()
    scale = f"{measured.latents.scale_factor:.4g}"
    assert is_about(lines[0], 9, 3, f"scale_factor {scale}")
    assert is_about(lines[-2], "measured.pt")
    assert is_about(lines[-1], "9 images", "3 shards", f"{size:.1f} MB", "out", scale, "1 skipped")
    assert latents.index.classes == ("cat", "dog")
    assert [sample.label for sample in latents] == 2 * ([0] * 5 + [1] * 4)

    sample = latents[6]
    assert sample.name == "dog/001.png"
    x = center_crop(resize_short_side(read_image("images/dog/001.png", 3), 16), 16)
    images = torch.stack([to_float(x), to_float(x.flip(2))])
    with torch.no_grad():
        expected = tiny_model.eval().encode(images)
    stored = torch.stack([sample.latents, latents[9 + 6].latents])
    torch.testing.assert_close(stored, expected.parameters)
    z = DiagonalGaussianDistribution(stored).sample(torch.Generator().manual_seed(0))
    assert z.shape == (2, 3, 8, 8)

    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert main([*command, "--statistics", "measured.pt", "--resume"]) == 1
    captured = capsys.readouterr()
    kept, verified = captured.out.splitlines()[-2:]
    assert is_about(kept, "measured.pt", "exists")
    assert is_about(verified, lines[-1], "verified")
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_a_missing_shard_is_encoded_again(project: Path) -> None:
    assert main(OUT) == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    sorted(before)[2].unlink()
    index = json.loads(Path("out/index.json").read_text())
    assert index["shards"][1]["number"] == 4
    assert main([*OUT, "--resume"]) == 0
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (COMMAND, ("--out FOLDER", "--statistics FILE")),
        (
            [*COMMAND, "--statistics", "s.pt", "--flip"],
            ("--flip", "--out FOLDER"),
        ),
        (
            [*COMMAND, "--statistics", "s.pt", "--resume"],
            ("--resume", "--out FOLDER"),
        ),
        (
            [*COMMAND, "--statistics", "s.pt", "--seed", "0"],
            ("--seed", "--out FOLDER"),
        ),
        ([*OUT, "--verify"], ("--verify", "--resume")),
        (
            [*OUT, "--per-channel"],
            ("--per-channel", "--statistics FILE"),
        ),
        ([*OUT, "--normalize"], ("normalize", "kl-vae encode --statistics")),
        ([*OUT, "--statistics", "model.pt"], ("statistics=model.pt", "exists")),
        ([*OUT[:-4], "--out", "model.pt"], ("model.pt/.unfinished", "Not a directory")),
        ([*OUT, "--labels", "--images", "images/cat"], ("images/cat/000.png", "label")),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: tuple[str, ...]
) -> None:
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("kl-vae encode: error: ")
    assert is_about(last_line, *parts)
    assert sorted(Path().rglob("*")) == before


def test_safetensors_is_required_before_encoding(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert main(OUT) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert is_about(last_line, "safetensors", 'pip install "kl-vae[formats]"')
    assert not Path("out").exists()


def test_the_example_of_the_docs_trains_on_images_and_mirrored_images(project: Path) -> None:
    assert main([*COMMAND, "--out", "latents", "--flip"]) == 0
    page = Path(__file__).parents[2] / "docs" / "latents.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "LatentDataset" in block]
    code = code.replace("num_workers=2", "num_workers=0").replace("range(2)", "range(300)")
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(code, str(page), "exec"), names)
    assert len(names["dataset"]) == 18
    # predicting 0 has a loss of 2, the variance of noise - latents; at best it is 1.57 for noise
    assert names["loss"] < 1.8
    assert names["raw"].shape == names["latents"].shape == (18, 3, 8, 8)
    z = torch.stack([sample.latents for sample in names["dataset"]])[:9]
    z = DiagonalGaussianDistribution(z).sample()
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=0.1, rtol=0.0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=0.1, rtol=0.0)
