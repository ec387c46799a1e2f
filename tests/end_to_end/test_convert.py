"""`kl-vae convert` as a user types it, and what others make of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kl_vae
from kl_vae import AutoEncoderKL
from kl_vae.cli.main import main
from tests.messages import is_about, mentions
from tests.processes import assert_same

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def model(
    tiny_ddconfig: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AutoEncoderKL:
    """Saved as model.ckpt in the working directory, as a trainer would."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = AutoEncoderKL(tiny_ddconfig, 4).eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, "model.ckpt")
    return model


def tensors_in(path: str) -> dict[str, Any]:
    tensors: dict[str, Any] = safetensors.load_file(path)
    return tensors


def test_round_trip_of_layouts(model: AutoEncoderKL, capsys: pytest.CaptureFixture[str]) -> None:
    number = sum(x.numel() for x in model.parameters())
    assert main(["convert", "model.ckpt", "vae", "--to", "diffusers"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert is_about(line, f"{number:,}", "vae", "diffusers", "fp32")
    assert {path.name for path in Path("vae").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert main(["convert", "vae", "back.safetensors", "--to", "compvis"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert is_about(line, f"{number:,}", "back.safetensors", "compvis", "fp32")
    assert_same(tensors_in("back.safetensors"), dict(model.state_dict()))
    assert not [path for path in Path().rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_the_size(model: AutoEncoderKL, name: str, dtype: torch.dtype) -> None:
    expected = {key: x.to(dtype) for key, x in model.state_dict().items()}
    command = ["convert", "model.ckpt", "--dtype", name, "--to"]
    assert main([*command, "compvis", "half.safetensors"]) == 0
    assert_same(tensors_in("half.safetensors"), expected)
    assert main([*command, "diffusers", "half"]) == 0
    halves = tensors_in("half/diffusion_pytorch_model.safetensors").values()
    assert {x.dtype for x in halves} == {dtype}
    assert_same(
        dict(AutoEncoderKL.from_checkpoint("half").state_dict()),
        {key: x.float() for key, x in expected.items()},
    )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nothing.pt", "x", "--to", "diffusers"], ("nothing.pt",)),
        (["model.ckpt", "x", "--to", "compvis"], ("x", "x.safetensors")),
        (["model.ckpt", "old", "--to", "diffusers"], ("old", "exists")),
        (
            ["model.ckpt", "old/file/x.safetensors", "--to", "compvis"],
            ("old/file/x.safetensors", "File exists"),
        ),
        (
            ["large.pt", "x", "--to", "diffusers", "--dtype", "fp16"],
            ("decoder.conv_out.bias", "fp16"),
        ),
        (["linear.pt", "x", "--to", "diffusers"], ("diffusers", "attn_type")),
        (["model.ckpt", "x", "--to", "diffusers", "--config", "kl-f8"], ("model.ckpt", "ch=32")),
        (
            ["only decoder.pt", "x", "--to", "diffusers"],
            ("only decoder.pt", "encoder.conv_in.weight"),
        ),
    ],
)
def test_errors_are_one_line_and_change_nothing(
    model: AutoEncoderKL,
    tiny_ddconfig: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    parts: tuple[str, ...],
) -> None:
    linear = AutoEncoderKL(tiny_ddconfig | {"attn_type": "linear"}, 4)
    torch.save(linear.state_dict(), "linear.pt")
    tensors = model.state_dict()
    torch.save({k: x for k, x in tensors.items() if k[0] == "d"}, "only decoder.pt")
    large = tensors | {"decoder.conv_out.bias": torch.full((3,), 1e6)}
    torch.save(large, "large.pt")
    Path("old").mkdir()
    Path("old/file").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    assert main(["convert", *arguments]) == 2
    message = capsys.readouterr().err.splitlines()
    assert message[-1].startswith("kl-vae convert: error: ")
    assert is_about(message[-1], *parts)
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before


def test_an_unknown_scale_is_written_as_one_with_a_warning(
    model: AutoEncoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["convert", "model.ckpt", "vae", "--to", "diffusers"]) == 0
    assert is_about(caplog.text, "vae", "scaling_factor=1.0", "kl-vae encode --statistics")
    assert json.loads(Path("vae/config.json").read_text())["scaling_factor"] == 1.0


@pytest.mark.filterwarnings("ignore")  # of packages that diffusers looks for
def test_the_quickstart_model_gives_diffusers_the_same_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained for two steps, its latents measured, converted, loaded by diffusers."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    pictures = ["--images", "package:skimage/data", "--include", "chelsea.png", "coffee.png"]
    fewer = ["training.max_steps=2", "training.validate_every_steps=2"]
    assert main(["train", "quickstart", "--run-dir", "run", *fewer]) == 0
    measure = ["encode", "--checkpoint", "run", *pictures, "--statistics", "measured.pt"]
    assert main([*measure, "--num-workers", "0"]) == 0
    assert main(["convert", "measured.pt", "vae", "--to", "diffusers"]) == 0

    ours = AutoEncoderKL.from_checkpoint("run")
    theirs = diffusers.AutoencoderKL.from_pretrained("vae")
    assert ours.config.norm_groups == theirs.config.norm_num_groups == 4
    x = 2.0 * torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) - 1.0
    with torch.no_grad():
        picture, expected = theirs(x).sample, ours(x, sample_posterior=False)[0]
    assert (picture - expected).abs().max() <= 1e-5 * expected.abs().max()
    measured = AutoEncoderKL.from_checkpoint("measured.pt").latents
    assert measured is not None
    assert theirs.config.scaling_factor == measured.scale_factor
    assert theirs.config.shift_factor == measured.shift_factor
    assert theirs.config.latents_mean is None  # its pipelines would scale twice


def test_from_python(model: AutoEncoderKL) -> None:
    """A model in memory in place of a checkpoint."""
    result = kl_vae.convert(model, "vae.safetensors", "compvis")
    assert result.path == Path("vae.safetensors")
    assert result.parameters == sum(x.numel() for x in model.parameters())
    assert_same(tensors_in("vae.safetensors"), dict(model.state_dict()))
    assert (
        kl_vae.export(model, "alone.pt").weights == f"weights ({len(model.state_dict())} tensors)"
    )
    exported = kl_vae.export("alone.pt", "again.pt")
    assert exported.path == Path("again.pt")
    assert_same(dict(AutoEncoderKL.from_checkpoint("again.pt").state_dict()), model.state_dict())
    with pytest.raises(ValueError, match=mentions("to='gguf'", "compvis", "diffusers")):
        kl_vae.convert(model, "vae.gguf", "gguf")  # type: ignore[arg-type]
