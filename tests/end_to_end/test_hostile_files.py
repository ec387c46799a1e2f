"""Files of strangers, given to the commands: each is answered with one line and harms nothing."""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.cli.main import main
from tests.hostile_files import ERRORS, MARKER, write_hostile_files
from tests.messages import is_about

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_hostile_files(tmp_path_factory.mktemp("hostile"))


def peak_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def test_every_hostile_file_is_one_line(
    hostile: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = peak_bytes()
    for name, error in ERRORS.items():
        if name.startswith("directory"):
            error = r"checkpoint; give a run directory or a file$"
        assert main(["convert", str(hostile[name]), "out", "--to", "diffusers"]) == 2, name
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("kl-vae convert: error: "), (name, lines)
        text = lines[0].removeprefix("kl-vae convert: error: ")
        assert re.search(error, text), (name, text)
    assert not hostile[MARKER].exists()
    assert not list(tmp_path.iterdir())
    assert peak_bytes() - before < 2**30  # of files that ask for up to 8 TB


def vq(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"quantize.embedding.weight": torch.zeros(8, 3)}


def video(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: x[..., None] if x.ndim == 4 else x for key, x in tensors.items()}


def narrower_decoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: x[:16] if key.startswith("decoder.up.0.block.0.conv1") else x
        for key, x in tensors.items()
    }


def of_another_kind(_: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(9)}


def wide_by_its_word(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A few small tensors that ask for a model of terabytes."""
    small = torch.zeros(200_000, 3, 1, 1)
    names = ("encoder.conv_in", "encoder.down.0.block.0.conv1", "encoder.down.1.block.0.conv1")
    names += ("decoder.up.0.block.0.conv1", "decoder.up.1.block.0.conv1")
    return tensors | {f"{name}.weight": small for name in names}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (vq, ("VQ", "KL")),
        (
            video,
            ("encoder.conv_in.weight", "[32, 3, 3, 3, 1]"),
        ),
        (
            narrower_decoder,
            ("encoder", "(32, 64)", "decoder", "(16, 64)"),
        ),
        (
            of_another_kind,
            ("a diffusion model", "model.diffusion_model.input_blocks.0.0.weight"),
        ),
        (
            wide_by_its_word,
            ("tensors", "shape"),
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_another_architecture_is_named(
    tiny_model: AutoEncoderKL,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    parts: tuple[object, ...],
    suffix: str,
) -> None:
    path = tmp_path / f"a.{suffix}"
    tensors = {key: x.clone() for key, x in change(dict(tiny_model.state_dict())).items()}
    if suffix == "pt":
        torch.save(tensors, path)
    else:
        safetensors.save_file({key: x.contiguous() for key, x in tensors.items()}, path)
    before = peak_bytes()
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "diffusers"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and is_about(lines[0], path, *parts)
    assert peak_bytes() - before < 2**29


def test_a_folder_that_names_what_lies_outside_is_refused(
    tiny_ddconfig: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoEncoderKL(tiny_ddconfig, 4).save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"encoder.conv_in.weight": "../secret.safetensors"}}
    Path(f"{weights}.index.json").write_text(json.dumps(index))
    assert main(["convert", str(tmp_path / "vae"), "out", "--to", "diffusers"]) == 2
    assert is_about(capsys.readouterr().err, "'../secret.safetensors'")
