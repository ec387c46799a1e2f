"""`kl-vae sample` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kl_vae.cli.main import main
from kl_vae.inference.progress import Progress
from tests.messages import is_about
from tests.processes import TORCHRUN
from tests.tiny import save_tiny_model


@pytest.fixture
def model(tmp_path) -> list[str]:
    """The arguments that name random weights, f = 2, and their config."""
    return save_tiny_model(tmp_path, embed_dim=None)


def test_samples_as_a_user_types_it(tmp_path, model):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "kl_vae", "sample", *model, "--out", str(out)]
    done = subprocess.run([*command, "--number", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert is_about(done.stdout.splitlines()[-1], 3, out, "grid.png")
    names = ["grid.png", *(f"sample_{i:05d}.png" for i in range(3))]
    assert sorted(path.name for path in out.iterdir()) == names
    sizes = []
    for name in names:
        with Image.open(out / name) as picture:
            sizes.append(picture.size)
    assert sizes == [(2 * 18 + 2, 2 * 18 + 2), (16, 16), (16, 16), (16, 16)]


def test_an_image_depends_on_seed_and_number_alone(tmp_path, model):
    pictures = {}
    for name, arguments in {
        "first": ["--number", "5", "--batch-size", "2"],
        "again": ["--number", "3", "--batch-size", "3"],
        "other": ["--number", "3", "--seed", "1"],
    }.items():
        out = tmp_path / name
        assert main(["sample", *model, "--out", str(out), "--size", "12", *arguments]) == 0
        with Image.open(out / "sample_00002.png") as picture:
            pictures[name] = np.asarray(picture).astype(int)
    assert pictures["first"].shape == (12, 12, 3)
    # the sums of a larger batch may be rounded in another order
    assert abs(pictures["first"] - pictures["again"]).max() <= 1
    assert abs(pictures["first"] - pictures["other"]).max() > 1


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def array(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_from_one_image_to_the_next(tmp_path, model, make_images, capsys):
    folder = make_images(tmp_path / "images", 3)
    command = ["sample", *model, "--from", "interpolation", "--steps", "3", "--size", "20"]
    two = ["--images", str(folder)]  # its first two
    three = ["--images", *(f"{folder}/{i:03d}.png" for i in range(3))]
    assert main([*command, *two, "--out", f"{tmp_path}/two"]) == 0
    assert main([*command, *three, "--out", f"{tmp_path}/three", "--lerp"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert is_about(first, 3, f"{tmp_path}/two", "grid.png")
    assert is_about(second, 6, f"{tmp_path}/three", "grid.png")
    pictures = [f"pair_{pair:05d}_step_{step:05d}.png" for pair in (0, 1) for step in range(3)]
    assert sorted(written(tmp_path / "two")) == ["grid.png", *pictures[:3]]
    assert sorted(written(tmp_path / "three")) == ["grid.png", *pictures]
    assert array(tmp_path / "three" / "grid.png").shape == (2 * 22 + 2, 3 * 22 + 2, 3)
    reconstructed = ["--images", str(folder), "--resize", "20", "--crop", "20"]
    assert main(["reconstruct", *model, *reconstructed, "--out", f"{tmp_path}/expected"]) == 0
    for name, expected in ((pictures[0], 0), (pictures[2], 1), (pictures[3], 1), (pictures[5], 2)):
        reconstruction = array(tmp_path / "expected" / f"{expected:03d}.png")
        assert abs(array(tmp_path / "three" / name) - reconstruction).max() <= 1
    ends = [array(tmp_path / "three" / pictures[i]) for i in (0, 2)]
    assert min(abs(array(tmp_path / "three" / pictures[1]) - end).max() for end in ends) > 5
    assert (
        array(tmp_path / "two" / pictures[1]).tolist()
        != array(tmp_path / "three" / pictures[1]).tolist()
    )


def test_samples_of_posteriors_and_their_spread(tmp_path, model, make_images, capsys, caplog):
    folder = make_images(tmp_path / "images", 2)
    (folder / "00.png").write_bytes(b"no image")
    command = ["sample", *model, "--from", "posterior", "--number", "5", "--batch-size", "4"]
    out = tmp_path / "out"
    assert main([*command, "--images", str(folder), "--out", str(out), "--num-workers", "1"]) == 1
    assert is_about(caplog.text, f"{folder}/00.png", "PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["channel", "0", "1"]
    assert is_about(lines[-1], 14, out, "grid.png")
    kinds = ["mode", "original", *(f"sample_{k:05d}" for k in range(5))]
    names = [f"image_{i:05d}_{kind}.png" for i in (1, 2) for kind in kinds]
    assert sorted(written(out)) == ["grid.png", *names, "posterior.json"]

    samples = np.stack([array(out / f"image_00001_sample_{k:05d}.png") for k in range(5)]) / 127.5
    first, second = json.loads((out / "posterior.json").read_text())["images"]
    assert first["image"] == f"{folder}/000.png" and second["image"] == f"{folder}/001.png"
    assert first["files"] == "image_00001_*"
    # of values that were rounded to 8 bits
    assert first["image_std"] == pytest.approx(samples.var(0, ddof=1).mean() ** 0.5, rel=0.01)
    of_channels = first["posterior_std"]
    for channel in range(2):
        low, mean, high = (of_channels[key][channel] for key in ("smallest", "mean", "largest"))
        assert 0 < low < mean < high
    assert array(out / "grid.png").shape == (2 * 18 + 2, 7 * 18 + 2, 3)


def test_a_resumed_command_gives_the_same_files(tmp_path, model, make_images, monkeypatch):
    folder = make_images(tmp_path / "images", 3)
    command = ["sample", *model, "--from", "posterior", "--images", str(folder), "--number", "3"]
    command += ["--batch-size", "2", "--num-workers", "0"]
    out = ["--out", f"{tmp_path}/out"]
    assert main([*command, "--out", f"{tmp_path}/whole"]) == 0
    done = []

    def write(progress: Progress, unit: int, record: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(unit)
        recorded(progress, unit, record)

    recorded = Progress.write
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "write", write)
        assert main([*command, *out]) == 130
    drawn = sorted((tmp_path / "out").glob("image_0000[01]_sample_*.png"))
    before = [path.stat().st_mtime_ns for path in drawn]
    assert len(drawn) == 6
    assert main([*command, *out, "--resume", "--number", "6"]) == 2
    assert main([*command, *out, "--resume", "--fast", "off"]) == 2
    assert main([*command, *out, "--resume"]) == 0
    assert [path.stat().st_mtime_ns for path in drawn] == before
    assert written(tmp_path / "out") == written(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_draw_what_one_does(tmp_path, model, make_images):
    folder = make_images(tmp_path / "images", 2)
    (folder / "00.png").write_bytes(b"no image")
    command = ["sample", *model, "--from", "posterior", "--images", str(folder), "--number", "2"]
    command += ["--device", "cpu", "--num-workers", "0", "--out"]
    assert main([*command, f"{tmp_path}/one"]) == 1
    start = [*TORCHRUN, "--nproc-per-node=2", "-m", "kl_vae", *command, f"{tmp_path}/two"]
    done = subprocess.run(start, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # as one process, since an image was skipped
    assert is_about(done.stdout.splitlines()[-1], "8 images")
    assert written(tmp_path / "two") == written(tmp_path / "one")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--size", "13"], ("size=13", 2, 12)),
        (["--checkpoint", "none.pt"], ("none.pt", "checkpoint")),
        (["--out", "{}/model.pt"], ("model.pt", "file")),
        (
            ["--steps", "3"],
            ("--steps", "--from prior", "--from interpolation"),
        ),
        (["--from", "posterior"], ("--from posterior", "--images")),
        (["--exclude", "*"], ("--exclude", "--from prior")),
        (
            ["--from", "interpolation", "--images", "{}/images/000.png"],
            ("--images", 1, 2),
        ),
        (
            ["--from", "interpolation", "--images", "{}/images", "--steps", "1"],
            ("steps=1", 2),
        ),
        (
            ["--from", "interpolation", "--images", "{}/images", "{}/model.pt"],
            ("model.pt", "--images"),
        ),
        (
            ["--from", "posterior", "--images", "{}/images", "--number", "1"],
            ("number=1", 2),
        ),
        (
            ["--from", "posterior", "--images", "{}/images", "--out", "{}/images/out"],
            ("images/out", "output folder"),
        ),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    tmp_path, model, make_images, capsys, arguments, parts
):
    make_images(tmp_path / "images", 2)
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert main(["sample", *model, "--out", f"{tmp_path}/out", *arguments]) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("kl-vae sample: error: ")
    assert is_about(last_line, *parts)
    assert not (tmp_path / "out").exists()


def test_no_readable_image_leaves_nothing_to_resume(tmp_path, model, capsys, caplog):
    (tmp_path / "bad.png").write_bytes(b"no image")
    arguments = ["--from", "posterior", "--images", f"{tmp_path}/bad.png", "--num-workers", "0"]
    assert main(["sample", *model, "--out", f"{tmp_path}/out", *arguments]) == 2
    assert is_about(caplog.text, f"{tmp_path}/bad.png", "PNG")
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("kl-vae sample: error: ")
    assert is_about(last_line, 1, "images")
    assert not list((tmp_path / "out").iterdir())


def test_foreign_files_are_not_overwritten(tmp_path, model, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "sample_00000.png").write_bytes(b"an image")
    assert main(["sample", *model, "--out", str(out)]) == 2
    assert is_about(capsys.readouterr().err, "sample_00000.png", "grid.png")
