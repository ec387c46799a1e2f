"""What commands do with output folders and files that are there already."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import kl_vae
from kl_vae.cli.main import main
from kl_vae.inference.progress import Progress
from tests.messages import is_about, mentions
from tests.tiny import save_tiny_model, tiny_model

Files = dict[str, bytes]
COMMANDS = {
    "reconstruct": (["--images", "images"], ["--mode", "sample"]),
    "evaluate": (["--images", "images", "--crop", "16"], ["--mode", "sample"]),
    "sample": (["--number", "3"], ["--seed", "1"]),
    "encode": (["--images", "images"], ["--dtype", "fp32"]),
}


@pytest.fixture
def model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_images: Callable[..., Path]
) -> list[str]:
    """The arguments of a model; the working directory has 12 images in `images`."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images", 12)
    return save_tiny_model(tmp_path)


def contents(folder: str) -> Files:
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def command_of(name: str, model: list[str], out: str = "out") -> list[str]:
    workers = ["--num-workers", "0", "--device", "cpu"]
    return [name, *model, *COMMANDS[name][0], *workers, "--out", out]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_result_of_other_arguments_is_replaced_only_on_request(
    name: str, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command, other = command_of(name, model), COMMANDS[name][1]
    assert main(command) == 0
    before = contents("out")
    for resume in ([], ["--resume"]):
        capsys.readouterr()
        assert main([*command, *other, *resume]) == 2
        assert is_about(capsys.readouterr().err, "out", "--overwrite")
        assert contents("out") == before
    assert main([*command, *other, "--overwrite"]) == 0
    assert main([*command_of(name, model, "expected"), *other]) == 0
    assert contents("out") == contents("expected") != before


@pytest.mark.parametrize("name", COMMANDS)
def test_changed_images_are_other_inputs(
    name: str, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "sample":
        pytest.skip("without images")
    command = command_of(name, model)
    assert main(command) == 0
    os.utime("images/003.png", (1, 1))
    if name == "encode":  # which encodes these images again
        assert main([*command, "--resume"]) == 0
        return
    assert main(command) == 2
    assert is_about(capsys.readouterr().err, "out", "modification_times", "--overwrite")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_process_is_refused_and_a_killed_one_leaves_nothing(
    name: str,
    model: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = command_of(name, model)
    code = "import sys, kl_vae.inference.progress as p\n"
    code += "p.Progress.write = lambda *_: (print('busy', flush=True), sys.stdin.read())\n"
    code += f"from kl_vae.cli.main import main\nmain({command!r})"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as first:
        assert first.stdout is not None
        assert any(line == "busy\n" for line in first.stdout)
        for option in ([], ["--resume"], ["--overwrite"]):
            assert main([*command, *option]) == 2
            assert is_about(capsys.readouterr().err, "out", "process")
        first.send_signal(signal.SIGKILL)
        first.wait()
    Path("out/.123.tmp").write_bytes(b"half of a file")
    assert main([*command, "--resume"]) == 0
    assert main(command_of(name, model, "expected")) == 0
    assert contents("out") == contents("expected")


@pytest.mark.parametrize("name", ["reconstruct", "sample"])
def test_after_a_power_loss_empty_files_are_written_again(
    name: str, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*command_of(name, model), "--batch-size", "1"]
    assert main([*command[:-4], "--out", "expected", *command[-2:]]) == 0
    write, written = Progress.write, list[int]()

    def stop(progress: Progress, unit: int, record: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(unit)
        write(progress, unit, record)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "write", stop)
        assert main(command) == 130
    for path in Path("out").rglob("*"):
        if path.suffix in (".png", ".jpg"):
            path.write_bytes(b"")
    assert main([*command, "--resume"]) == 0
    assert contents("out") == contents("expected")


def test_files_of_others_are_replaced_only_on_request(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("out/003.png").write_text("mine")
    command = command_of("reconstruct", model)
    assert main(command) == 2
    assert is_about(capsys.readouterr().err, "out/003.png", "--overwrite")
    assert main([*command, "--overwrite"]) == 0
    with Image.open("out/003.png") as image:
        image.load()


def test_resume_and_overwrite_exclude_each_other(model: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command_of("sample", model), "--resume", "--overwrite"])


@pytest.mark.parametrize("name", ["reconstruct", "evaluate", "encode"])
@pytest.mark.parametrize("out", ["images", "images/out", "link"])
def test_nothing_is_written_into_the_images(
    name: str, out: str, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("link").symlink_to("images")
    before = contents("images")
    assert main(command_of(name, model, out)) == 2
    assert is_about(capsys.readouterr().err, out, "images")
    assert contents("images") == before


def test_an_output_folder_above_the_images(
    model: list[str], make_images: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = command_of("reconstruct", model, ".")
    assert main(command) == 0
    assert main(command) == 0
    assert json.loads(Path("summary.json").read_text())["number"] == 12
    make_images(Path("images/images"), 1)  # whose reconstruction would go to images/000.png
    before = contents("images")
    assert main([*command, "--overwrite"]) == 2
    assert is_about(capsys.readouterr().err, "images/000.png", "output folder")
    assert contents("images") == before


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_a_file_and_a_folder_with_the_name_of_its_thumbnail(suffix: str, model: list[str]) -> None:
    for name in ("a.jpeg", "a.jpg/x.png", "b.webp", "b.png/x.png", "c.png", "c.webp/x.png"):
        path = Path("names", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8 + len(name))).save(path)
    command = ["reconstruct", *model, "--images", "names", "--num-workers", "0", "--out", "out"]
    assert main([*command, "--format", suffix]) == 0
    for folder in ("originals", "thumbnails"):
        assert sum(path.is_file() for path in Path("out/gallery", folder).rglob("*")) == 6
    with open("out/metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            with Image.open(Path("out", row["output"])) as image:
                assert image.height == int(row["height"])


def test_names_that_a_spreadsheet_takes_for_formulas(model: list[str]) -> None:
    for name in ("=1+1", "+a", "-b", "@c", "plain"):
        Image.new("RGB", (16, 16)).save(f"{name}.png")
    names = [f"{name}.png" for name in ("=1+1", "+a", "@c", "plain")]
    images = ["--images", *names, "./-b.png", "--num-workers", "0"]
    assert main(["reconstruct", *model, *images, "--out", "out"]) == 0
    with open("out/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["output"] for row in rows] == [
        "'=1+1.png",
        "'+a.png",
        "'@c.png",
        "plain.png",
        "'-b.png",
    ]
    assert main(["evaluate", *model, *images, "--names", "=x", "--crop", "16", "--out", "e"]) == 0
    with open("e/per_image.csv", newline="") as file:
        cells = [cell for row in csv.DictReader(file) for cell in (row["checkpoint"], row["path"])]
    assert "'=x" in cells and not [cell for cell in cells if cell.startswith(tuple("=+-@"))]


def test_converted_and_exported_files(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    weights, config = model[1::2]
    for command, out in (
        (["convert", weights, "vae", "--to", "diffusers"], "vae"),
        (["convert", weights, "v.safetensors", "--to", "compvis"], "v.safetensors"),
        (["export", "--checkpoint", weights, "--out", "v.pt"], "v.pt"),
    ):
        command += ["--config", config]
        assert main(command) == 0
        before = contents(".")
        capsys.readouterr()
        assert main(command) == 2
        assert is_about(capsys.readouterr().err, out, "--overwrite")
        Path(".123.tmp").write_bytes(b"half")
        assert main([*command, "--overwrite"]) == 0
        assert contents(".").keys() == before.keys()
    Path("vae/mine.txt").touch()
    with pytest.raises(ValueError, match=mentions("vae")):
        kl_vae.convert(weights, "vae", "diffusers", config=config, overwrite=True)
    assert Path("vae/config.json").exists()


def test_shards_of_an_overwritten_folder_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vae = tiny_model()
    vae.save_pretrained("vae", max_shard_size="300KB", variant="fp16")
    assert len(list(Path("vae").iterdir())) > 3
    vae.save_pretrained("vae", overwrite=True)
    assert sorted(contents("vae")) == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("out", ["vae/diffusion_pytorch_model.safetensors", "vae", "link"])
def test_the_checkpoint_that_is_read_is_not_overwritten(
    out: str, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights, config = model[1::2]
    assert main(["convert", weights, "vae", "--to", "diffusers", "--config", config]) == 0
    Path("link").symlink_to("vae")
    before = contents("vae")
    to = "compvis" if out.endswith("safetensors") else "diffusers"
    assert main(["convert", "vae", out, "--to", to, "--overwrite"]) == 2
    assert is_about(capsys.readouterr().err, out, "vae")
    assert contents("vae") == before


def test_two_processes_that_write_one_file(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights, config = model[1::2]
    command = ["convert", weights, "v.safetensors", "--to", "compvis", "--config", config]
    code = "import sys, kl_vae.checkpoints.export as e\n"
    code += "e.write_atomically = lambda *_: (print('busy', flush=True), sys.stdin.read())\n"
    code += f"from kl_vae.cli.main import main\nmain({command!r})"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as first:
        assert first.stdout is not None and first.stdout.readline() == "busy\n"
        assert main(command) == 2
        assert is_about(capsys.readouterr().err, "v.safetensors", "process")
        other = [*command[:2], "w.safetensors", *command[3:]]
        assert main(other) == 0
        first.kill()
    assert main(command) == 0
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


def test_measured_statistics(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["encode", *model, "--num-workers", "0", "--images", "images", "--statistics", "s.pt"]
    assert main(command) == 0
    assert main(command) == 2
    assert is_about(capsys.readouterr().err, "s.pt", "--overwrite")
    assert main([*command, "--overwrite"]) == 0
    assert main([*command, "--out", "out", "--resume"]) == 0  # the same statistics
    before = Path("s.pt").read_bytes()
    few = [*command, "--include", "00*", "--out", "few"]
    assert main([*few, "--resume"]) == 2
    assert is_about(capsys.readouterr().err, "s.pt", "--overwrite")
    assert Path("s.pt").read_bytes() == before
