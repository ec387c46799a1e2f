"""Each fault in each command that can meet it: the cells of docs/development/faults.md."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from kl_vae.cli.main import main
from kl_vae.data import decoding
from tests.messages import is_about
from tests.tiny import save_tiny_model, tiny_ddconfig

IMAGES = ["--images", "images", "--num-workers", "0", "--device", "cpu"]
MODEL = ["--checkpoint", "model.pt", "--config", "model.yaml"]
COMMANDS = {
    "train": ["train", "tiny.yaml", "--device", "cpu", "model.params.ckpt_path=model.pt"],
    "reconstruct": ["reconstruct", *MODEL, *IMAGES],
    "encode": ["encode", *MODEL, *IMAGES],
    "evaluate": ["evaluate", *MODEL, *IMAGES, "--crop", "16"],
    "sample": ["sample", *MODEL, "--from", "posterior", *IMAGES],
    "convert": ["convert", "model.pt", "OUT", "--config", "model.yaml", "--to", "diffusers"],
    "export": ["export", *MODEL],
    "report": ["report", "finished"],
}
READ_IMAGES = ("train", "reconstruct", "encode", "evaluate", "sample")
READ_WEIGHTS = ("train", "reconstruct", "encode", "evaluate", "sample", "convert", "export")

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command; the working directory has eight images, a model, and a config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decoding.time, "sleep", lambda seconds: None)
    make_images(tmp_path / "images", 8)
    save_tiny_model(tmp_path)
    loss = {"target": "elbo", "params": {"kl_weight": 1.0e-4}}
    params = {"embed_dim": 2, "ddconfig": tiny_ddconfig(), "lossconfig": loss}
    data = {"train": {"root": "images"}, "validation": {"fraction": 0.2}, "num_workers": 0}
    data |= {"max_bad_fraction": 0.5}
    training = {"global_batch_size": 4, "max_steps": 2}
    config = {"model": {"params": params}, "data": data, "training": training}
    Path("tiny.yaml").write_text(yaml.safe_dump(config))

    def run(name: str, out: str = "out", *options: str) -> int:
        out_option = "--run-dir" if name == "train" else "--out"
        command = [out if word == "OUT" else word for word in COMMANDS[name]]
        out_arguments = [] if "OUT" in COMMANDS[name] else [out_option, out]
        return main([*command, *out_arguments, *options])

    return run


def tree() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", READ_IMAGES)
def test_a_damaged_image(name: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    content = Path("images/003.png").read_bytes()
    Path("images/bad.png").write_bytes(content[: len(content) // 2])
    assert run(name) == (0 if name == "train" else 1)
    listed = Path("out/bad_images.txt").read_text() if name == "train" else capsys.readouterr().err
    assert "bad.png" in listed
    assert Path("out").is_dir()


@pytest.mark.parametrize("name", READ_IMAGES)
def test_the_storage_fails(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(decoding.PngReader, "load", fail)
        assert run(name) in (1, 2)
    assert is_about(capsys.readouterr().err, "images", "storage", "Input/output error")
    assert not Path("out/bad_images.txt").exists()
    resume = [] if name == "train" or not Path("out/.unfinished").exists() else ["--resume"]
    assert run(name, "out", *resume) == 0


@pytest.mark.parametrize("damage", ["truncated", "malicious"])
@pytest.mark.parametrize("name", READ_WEIGHTS)
def test_a_damaged_checkpoint(
    name: str, damage: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, ("executed",)

    content = Path("model.pt").read_bytes()
    content = content[: len(content) // 2] if damage == "truncated" else pickle.dumps(Malicious())
    Path("model.pt").write_bytes(content)
    before = tree()
    assert run(name) == 2
    assert is_about(capsys.readouterr().err, "model.pt")
    assert tree() == before and not Path("executed").exists()


@pytest.mark.parametrize("name", READ_WEIGHTS)
def test_weights_that_are_not_finite(
    name: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = torch.load("model.pt", weights_only=True)
    weights["decoder.conv_in.weight"][0] = torch.nan
    torch.save(weights, "model.pt")
    assert run(name) == 2
    assert is_about(capsys.readouterr().err, "decoder.conv_in.weight")


@pytest.mark.parametrize("name", READ_WEIGHTS)
def test_a_config_executes_nothing(name: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    loss = {"target": "os.mkdir", "params": {"path": "executed"}}
    for path in ("tiny.yaml", "model.yaml"):
        config = yaml.safe_load(Path(path).read_text())
        config["model"]["params"]["lossconfig"] = loss
        Path(path).write_text(yaml.safe_dump(config))
    assert run(name) == (2 if name == "train" else 0)  # the others use no loss
    for path in ("tiny.yaml", "model.yaml"):
        Path(path).write_text("model: !!python/object/apply:os.mkdir [executed]\n")
    assert run(name, "other") == 2
    assert is_about(capsys.readouterr().err, "yaml", "tag")
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_written(
    name: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "report":
        assert run("train", "finished") == 0
    Path("file").touch()
    before = tree()
    assert run(name, "file/out") == 2
    assert is_about(capsys.readouterr().err, "file")
    assert tree() == before


@pytest.mark.parametrize("name", ["reconstruct", "encode", "evaluate", "sample"])
@pytest.mark.parametrize("out", ["images", "images/out"])
def test_an_output_in_the_folder_of_the_images(
    out: str, name: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree()
    assert run(name, out) == 2
    assert is_about(capsys.readouterr().err, out, "images")
    assert tree() == before


def test_an_export_in_the_place_of_its_checkpoint(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree()
    assert run("export", "model.pt", "--overwrite") == 2
    assert is_about(capsys.readouterr().err, "model.pt", "checkpoint")
    assert tree() == before


def test_a_run_in_the_folder_of_its_images(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Its sample images would become training images."""
    assert run("train", "images/run") == 0
    assert any(
        is_about(text, "images/run", "data.train.root", "--run-dir") for text in caplog.messages
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_unusual_names(name: str, run: Run) -> None:
    for i, text in enumerate((b"=1+1\n<b>.png", b"\xff\xfe.png", b"-x.png", b"a\x1b[2J.png")):
        os.rename(f"images/00{i}.png", os.path.join(b"images", text))
    out = "=out <i>\n.html"
    if name == "report":
        assert run("train", "finished") == 0
    assert run(name, out) == 0
    assert Path(out).exists()
