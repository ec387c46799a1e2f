"""`kl-vae train` as a user types it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from kl_vae import AutoEncoderKL
from kl_vae.cli.main import main
from tests.messages import is_about
from tests.processes import (
    TRAIN,
    Running,
    assert_same,
    checkpoint,
    faulty_loss,
    metrics,
    status,
    without_speed,
)


def train(*arguments: str) -> int:
    return main(["train", "tiny.yaml", *arguments])


def test_the_files_of_a_run(project: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    assert train("--run-dir", "run", "training.validate_every_steps=2") == 0
    run = project / "run"
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "history.jsonl", "metrics.jsonl", "status.json", "samples"),
        *("checkpoints", "tensorboard"),
        ".lock",
    }
    # the last two, and the best where it is another
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    figures = {line["step"]: line for line in metrics(run) if "val/rec_loss" in line}
    assert sorted(figures) == [2, 4, 6]
    assert best["value"] == min(line["val/rec_loss"] for line in figures.values())
    kept = {path.name for path in (run / "checkpoints").glob("*.pt")}
    assert kept == {"step_00000004.pt", "step_00000006.pt", best["checkpoint"]}
    assert status(run)["state"] == "finished"
    for name in ("reconstructions", "prior"):
        with Image.open(run / "samples" / f"{name}_00000006.png") as picture:
            assert picture.mode == "RGB"
    # the header: size, data, devices, precision, results
    header = caplog.text
    assert is_about(header, "parameters", "f = 2", "images", "cpu", "fp32", "run")


def test_crops_that_are_no_squares_and_small_images(project: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    Image.new("RGB", (15, 40)).save(project / "images" / "small.png")
    sizes = ["data.crop=[16, 12]", "data.min_size=16", "training.max_steps=2"]
    assert train("--run-dir", "run", *sizes) == 0
    assert is_about(caplog.text, "data.min_size=16", "1 of", "small.png", "15 x 40")
    assert is_about(caplog.text, "16 x 12", "8 x 6")
    assert not (project / "run" / "bad_images.txt").exists()
    with Image.open(project / "run" / "samples" / "prior_00000002.png") as picture:
        assert picture.height > 12


@pytest.mark.slow
def test_training_lowers_the_loss(project: Path) -> None:
    assert train("--run-dir", "run", "training.max_steps=40", "optimizer.learning_rate=0.002") == 0
    losses = [line["train/rec_loss"] for line in metrics("run") if "train/rec_loss" in line]
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(project: Path) -> None:
    arguments = ["data.num_workers=2", "training.accumulate_batches=2"]
    arguments += ["model.params.ddconfig.dropout=0.1", "training.validate_every_steps=1"]
    assert train("--run-dir", "whole", *arguments) == 0
    # 3 steps of an epoch of 2: it stops in the middle of the second
    assert train("--run-dir", "parts", *arguments, "training.max_steps=3") == 0
    assert train("--run-dir", "parts", *arguments) == 0
    whole, parts = checkpoint("whole", 6), checkpoint("parts", 6)
    assert_same(whole, parts)
    stopped = [line for line in without_speed(metrics("parts"))]
    for line in without_speed(metrics("whole")):
        assert line in stopped


def test_a_terminal_shows_a_bar_with_loss_psnr_speed_and_time_left(project: Path) -> None:
    command = [sys.executable, "-m", "kl_vae", "train", "tiny.yaml", "--run-dir", "run"]
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = subprocess.Popen(command, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # how the end of a terminal is told
        while text := os.read(terminal, 4096):
            shown += text
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    lines = shown.decode().replace("\r", "\n").splitlines()
    bars = [line for line in lines if re.search(r" \d+/6 \[", line)]
    last = r"6/6 \[\d\d:\d\d<\d\d:\d\d, .*loss [\d.]+, PSNR [\d.]+ dB, [\d.]+ images/s\]"
    assert re.search(last, bars[-1]), bars[-1]
    assert any(is_about(line, "validation", "step 6", "psnr") for line in lines)  # on its own line


def test_ctrl_c_saves_and_the_same_command_goes_on(project: Path) -> None:
    command = [sys.executable, "-m", "kl_vae", "train", "tiny.yaml", "--run-dir", "run"]
    command += ["data.num_workers=2", "training.max_steps=60", "training.validate_every_steps=60"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (Path("run/metrics.jsonl").is_file() and len(metrics("run")) >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert any(line.startswith("SIGINT: ") for line in errors.splitlines())
    assert "Traceback" not in errors
    stopped = status("run")
    assert stopped["state"] == "stopped" and stopped["reason"] == "SIGINT"
    assert 3 <= stopped["step"] < 60

    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert any(is_about(line, "60 steps", stopped["step"]) for line in again.stderr.splitlines())
    assert status("run")["state"] == "finished"
    steps = [line["step"] for line in metrics("run") if "train/rec_loss" in line]
    assert steps == list(range(1, 61))
    # no step in the curve: it is the curve of a run that was never stopped
    assert train("--run-dir", "whole", *command[-3:]) == 0
    assert without_speed(metrics("run")) == without_speed(metrics("whole"))


def test_a_second_ctrl_c_ends_at_once(project: Path) -> None:
    command = [*TRAIN, *faulty_loss(project), "--run-dir", "run"]
    with Running(*command, FAULTS="wait@train:0") as running:
        running.wait_at_gate()  # in the first step
        running.send(signal.SIGINT)
        running.wait_for("SIGINT: ")
        running.send(signal.SIGINT)
        assert running.end() == -signal.SIGINT
    assert not list(Path("run").glob("checkpoints/*.pt"))


def test_a_finished_run_is_not_changed(project: Path, caplog: Any) -> None:
    assert train("--run-dir", "run") == 0
    before = metrics("run")
    caplog.set_level("INFO")
    assert train("--run-dir", "run") == 0
    assert is_about(caplog.messages[-1], 6, "steps")
    assert metrics("run") == before


MISTAKES: dict[str, tuple[list[str], tuple[object, ...]]] = {
    "override without a value": (
        ["--run-dir", "run", "tiny.yml"],
        ("'tiny.yml'", "key.path=value"),
    ),
    "unknown key": (
        ["training.max_step=5"],
        ("training.max_step=5", "max_steps"),
    ),
    "misplaced key": (
        ["max_steps=5"],
        ("max_steps=5", "training.max_steps"),
    ),
    "misplaced in data": (
        ["data.max_steps=5"],
        ("data.max_steps=5", "training.max_steps"),
    ),
    "wrong type": (
        ["model.params.ddconfig.ch=many"],
        ("model.params.ddconfig.ch='many'",),
    ),
    "groups": (
        ["model.params.ddconfig.ch=48"],
        ("model.params.ddconfig.ch=48", 32, "groups"),
    ),
    "no folder": (["data.train.root=null"], ("data.train.root=",)),
    "missing folder": (["data.train.root=nowhere"], ("nowhere",)),
    "folder without images": (["data.train.root=empty"], ("empty", "images")),
    "too few images": (
        ["training.global_batch_size=64"],
        ("training.global_batch_size=64", "images"),
    ),
    "image smaller than the crop": (
        ["data.resize=null", "data.crop=22"],
        (22, "data.resize", "data.crop"),
    ),
    "resize smaller than the crop": (["data.resize=8"], ("data.resize=8", "crop")),
    "embed_dim that does not fit": (
        ["model.params.ckpt_path=other.pt", "model.params.embed_dim=3"],
        ("other.pt", "embed_dim=4", 3),
    ),
    "unwritable run": (["--run-dir", "tiny.yaml/run"], ("tiny.yaml/run", "--run-dir")),
    "run is a file": (["--run-dir", "tiny.yaml"], ("tiny.yaml", "file", "--run-dir")),
    "run is another folder": (["--run-dir", "images"], ("images", "--run-dir")),
    "unknown monitor": (
        ["model.params.monitor=val/quality"],
        ("model.params.monitor=val/quality", "val/psnr", "val/rec_loss"),
    ),
    "monitor without validation": (
        ["data.validation.fraction=0.0"],
        ("model.params.monitor=val/rec_loss", "data.validation.fraction"),
    ),
    "indivisible batch": (
        ["training.accumulate_batches=3"],
        ("training.global_batch_size=8", 1, 3),
    ),
    "crop that f does not divide": (["data.crop=15"], ("data.crop=15", 2)),
    "side that f does not divide": (["data.crop=[16, 15]"], ("data.crop=[16, 15]", 2)),
    "both lengths": (["training.epochs=2"], ("epochs=2", "max_steps")),
    "fraction of bad images": (
        ["data.max_bad_fraction=1.5"],
        ("data.max_bad_fraction=1.5",),
    ),
    "one checkpoint": (
        ["training.keep_checkpoints=1"],
        ("training.keep_checkpoints=1", 2),
    ),
    "unknown checkpointing": (
        ["training.activation_checkpointing=all"],
        ("training.activation_checkpointing='all'", "none, norms, blocks"),
    ),
    "unknown device": (["--device", "tpu"], ("'tpu'", "auto, cuda, mps, cpu")),
    "unknown loss": (
        ["model.params.lossconfig.target=best"],
        ("model.params.lossconfig.target='best'", "elbo"),
    ),
    "published adversarial loss": (
        ["model.params.lossconfig={target: ldm.modules.losses.LPIPSWithDiscriminator}"],
        ("lossconfig.params", "'disc_start'"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_is_one_line_and_writes_nothing(mistake: str, project: Path, capsys: Any) -> None:
    arguments, parts = MISTAKES[mistake]
    (project / "empty").mkdir()
    (project / "empty" / "notes.txt").write_text("no image")
    config = yaml.safe_load((project / "tiny.yaml").read_text())["model"]["params"]
    torch.save(AutoEncoderKL(config["ddconfig"], 4).state_dict(), project / "other.pt")
    before = sorted(project.rglob("*"))
    assert train(*arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("kl-vae train: error: ")
    assert is_about(errors[0], *parts)
    assert sorted(project.rglob("*")) == before


def test_a_misspelled_config_is_answered_with_the_nearest(capsys: Any) -> None:
    assert main(["train", "quikstart"]) == 2
    assert is_about(capsys.readouterr().err, "quikstart", "did you mean quickstart?")


def test_a_number_needs_no_point(project: Path) -> None:
    arguments = ["training.max_steps=1e0", "model.params.lossconfig.params.kl_weight=1E-4"]
    text = (project / "tiny.yaml").read_text()
    (project / "tiny.yaml").write_text(text + "optimizer:\n  learning_rate: 1e-5\n")
    assert train("--run-dir", "run", *arguments) == 0
    config = yaml.safe_load((project / "run" / "config.yaml").read_text())
    assert config["optimizer"]["learning_rate"] == 1e-5
    assert config["training"]["max_steps"] == 1
    assert config["model"]["params"]["lossconfig"]["params"]["kl_weight"] == 1e-4


def test_another_config_is_an_error_that_names_the_changes(project: Path, capsys: Any) -> None:
    assert train("--run-dir", "run", "training.max_steps=1") == 0
    before = {path: path.stat().st_mtime_ns for path in (project / "run").rglob("*")}
    assert train("--run-dir", "run", "optimizer.learning_rate=0.01") == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    again = "kl-vae train run optimizer.learning_rate=0.01"
    assert is_about(line, "run", "optimizer.learning_rate", 0.0001, 0.01, again)
    assert train("--run-dir", "run", "training.seed=1") == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert is_about(line, "training.seed", 0, 1, "--run-dir NEW model.params.ckpt_path=run")
    assert {path: path.stat().st_mtime_ns for path in (project / "run").rglob("*")} == before


def history(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["run", "run/config.yaml"])
def test_a_run_is_resumed_by_its_directory(project: Path, name: str) -> None:
    assert train("--run-dir", "whole") == 0
    assert train("--run-dir", "run", "training.max_steps=3", "training.epochs=null") == 0
    assert main(["train", name, "training.max_steps=6"]) == 0
    assert not Path("runs").exists()
    assert_same(checkpoint("whole", 6)["model"], checkpoint("run", 6)["model"])
    assert [(line["step"], line["changes"]) for line in history("run")] == [
        (0, {}),
        (3, {"training.max_steps": [3, 6]}),
    ]


def test_settings_are_changed_on_purpose(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The learning rate is the new one, and what it was is said; frozen parameters stay."""
    assert train("--run-dir", "run", "training.max_steps=3", "training.epochs=null") == 0
    before = checkpoint("run", 3)["model"]
    changes = ["training.max_steps=4", "optimizer.learning_rate=0.0", "training.ema_decay=0.9"]
    assert main(["train", "run", changes[0], "optimizer.learning_rate=1e-12", changes[2]]) == 0
    assert is_about(caplog.text, "learning rate", "1e-12", "0.0001")
    after = checkpoint("run", 4)
    assert after["ema"] is not None
    for key, x in after["model"].items():
        torch.testing.assert_close(x, before[key], rtol=0, atol=1e-9)
    changes = ["training.max_steps=5", "optimizer.learning_rate=1e-3"]
    assert main(["train", "run", *changes, "training.freeze=[encoder.*]"]) == 0
    last = checkpoint("run", 5)
    for key, x in last["model"].items():
        if not key.startswith("loss."):
            assert torch.equal(x, after["model"][key]) == key.startswith("encoder."), key
    assert main(["train", "run", "training.max_steps=6", "training.freeze=[]"]) == 0
    assert not torch.equal(
        checkpoint("run", 6)["model"]["encoder.conv_in.weight"],
        last["model"]["encoder.conv_in.weight"],
    )


def test_extending_a_cosine_schedule_is_said(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cosine = ["optimizer.schedule=cosine", "training.epochs=null"]
    assert train("--run-dir", "run", *cosine, "training.max_steps=4") == 0
    assert main(["train", "run", "training.max_steps=8"]) == 0
    assert is_about(caplog.text, "learning rate", "instead of")


def test_given_weights_are_validated_at_step_0(project: Path) -> None:
    assert train("--run-dir", "first", "training.max_steps=2", "training.epochs=null") == 0
    assert train("--run-dir", "run", "model.params.ckpt_path=first") == 0
    (start,) = (line for line in metrics("run") if line["step"] == 0)
    (end,) = (line for line in metrics("first") if line["step"] == 2 and "val/psnr" in line)
    assert start["val/psnr"] == pytest.approx(end["val/psnr"], abs=1e-4)
    assert list(Path("run/samples").glob("*_00000000.png"))


def test_changed_images_are_an_error_on_resume(project: Path, capsys: Any) -> None:
    assert train("--run-dir", "run", "training.max_steps=1") == 0
    (project / "images" / "000.png").unlink()
    assert train("--run-dir", "run") == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert is_about(last_line, "step_00000001.pt", "images", "model.params.ckpt_path")


def test_a_resumed_run_does_not_read_ckpt_path(project: Path) -> None:
    config = yaml.safe_load((project / "tiny.yaml").read_text())["model"]["params"]
    torch.save(AutoEncoderKL(config["ddconfig"], 4).state_dict(), project / "start.pt")
    start = "model.params.ckpt_path=start.pt"
    assert train("--run-dir", "run", start, "training.max_steps=1") == 0
    (project / "start.pt").unlink()
    assert train("--run-dir", "run", start, "training.max_steps=2") == 0
    assert status("run")["step"] == 2


def test_a_damaged_checkpoint_is_skipped_with_a_warning(project: Path, caplog: Any) -> None:
    assert train("--run-dir", "run", "training.validate_every_steps=2") == 0
    newest = project / "run" / "checkpoints" / "step_00000006.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert train("--run-dir", "run", "training.max_steps=8") == 0
    assert any(is_about(text, "step_00000006.pt", "sha256") for text in caplog.messages)
    assert status("run")["step"] == 8


def test_a_run_without_readable_images_fails(project: Path, capsys: Any) -> None:
    for path in (project / "images").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    assert train() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert is_about(error, "data.train.root")
    listed = (project / "runs" / "tiny" / "bad_images.txt").read_text().splitlines()
    assert any(line.replace("\t", ": ") in error for line in listed)  # with its reason
    assert status("runs/tiny")["state"] == "failed"
    assert error.removeprefix("kl-vae train: error: ") in status("runs/tiny")["reason"]
    listed = (project / "runs" / "tiny" / "bad_images.txt").read_text().splitlines()
    assert len(listed) == len({line.split("\t")[0] for line in listed}) > 8


def test_a_run_without_readable_validation_images_fails(project: Path, capsys: Any) -> None:
    (project / "val").mkdir()
    (project / "val" / "a.png").write_bytes(b"garbage")
    arguments = ["data.validation.root=val", "data.max_bad_fraction=1.0"]
    assert train("--run-dir", "run", *arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("kl-vae train: error: ")
    assert is_about(error, "validation", "bad_images.txt")
    (line,) = (project / "run" / "bad_images.txt").read_text().splitlines()
    assert line.startswith("val/a.png\t") and is_about(line, "PNG")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision: str, project: Path) -> None:
    assert train("--run-dir", "run", f"training.precision={precision}", "training.max_steps=2") == 0
    lines = [line for line in metrics("run") if "train/rec_loss" in line]
    assert len(lines) == 2
    assert all(isinstance(line["train/rec_loss"], float) for line in lines)


def test_a_learned_logvar_is_trained_and_kept(project: Path) -> None:
    assert train("--run-dir", "run", "model.params.lossconfig.params.learn_logvar=true") == 0
    assert checkpoint("run", 6)["model"]["loss.logvar"] != 0.0


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_grey_and_rgba_train_and_reconstruct(
    channels: int, mode: str, project: Path, make_images: Callable[..., Path]
) -> None:
    make_images(project / "other", 12, mode=mode)
    arguments = ["data.train.root=other", "training.max_steps=2"]
    arguments += [f"model.params.ddconfig.{key}={channels}" for key in ("in_channels", "out_ch")]
    assert train("--run-dir", "run", *arguments) == 0
    assert main(["reconstruct", "--checkpoint", "run", "--images", "other", "--out", "out"]) == 0
    with Image.open(project / "out" / "000.png") as picture:
        assert picture.mode == mode and picture.size == (24, 20)


def test_arrays_of_many_channels_train_with_colorized_pictures(project: Path) -> None:
    (project / "arrays").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        np.save(project / "arrays" / f"{i}.npy", rng.random((20, 20, 7), dtype=np.float32))
    arguments = ["data.train.root=arrays", "training.max_steps=2"]
    arguments += ["model.params.colorize_nlabels=7"]
    arguments += [f"model.params.ddconfig.{key}=7" for key in ("in_channels", "out_ch")]
    assert train("--run-dir", "run", *arguments) == 0
    assert (project / "run" / "samples" / "reconstructions_00000002.png").is_file()


def test_custom_parts_are_imported_for_every_command(project: Path, capsys: Any) -> None:
    (project / "my_parts.py").write_text(
        """
from torch import nn
from kl_vae import register_attention

@register_attention("gate")
class Gate(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * self.proj(x).sigmoid()

class OnlyMSE(nn.Module):
    def forward(self, inputs, reconstructions, posterior, global_step, last_layer, split):
        loss = (inputs - reconstructions).square().mean()
        return loss, {f"{split}/rec_loss": loss.detach()}
"""
    )
    own = ["model.params.ddconfig.attn_type=gate", "training.max_steps=2"]
    own += ["model.params.lossconfig={target: my_parts.OnlyMSE}", "--allow-import", "my_parts"]
    assert train("--run-dir", "run", *own) == 2
    assert is_about(capsys.readouterr().err, "attn_type='gate'", "linear, none, vanilla")
    assert train("--run-dir", "run", "--import", "my_parts", *own) == 0
    for line in metrics("run"):  # the total is there though the loss does not name it
        split = "val" if "val/psnr" in line else "train"
        assert line[f"{split}/total_loss"] == line[f"{split}/rec_loss"]
    others = ["--checkpoint", "run", "--import", "my_parts", "--out", "out", "--num-workers", "0"]
    assert main(["reconstruct", "--images", "images", *others]) == 0
    assert train("--run-dir", "run", "--import", "no_such_parts", *own) == 2
    assert is_about(capsys.readouterr().err, "--import no_such_parts", "No module named")


def test_a_config_runs_no_command(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "model.params.lossconfig={target: os.system, params: {command: touch executed}}"
    assert train("--run-dir", "run", command) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert is_about(line, "lossconfig.target=os.system", "--allow-import os")
    assert not (project / "executed").exists() and not (project / "run").exists()


def test_the_quickstart_trains_on_another_folder(project: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    fewer = ["training.max_steps=1", "training.global_batch_size=2", "data.resize=64"]
    fewer += ["model.params.ddconfig.ch=8", "--run-dir", "run"]
    assert main(["train", "quickstart", "data.train.root=images", *fewer]) == 0
    for key in ("data.train.include", "data.validation.include"):
        assert any(is_about(message, key, "images") for message in caplog.messages)
    config = yaml.safe_load((project / "run" / "config.yaml").read_text())
    assert config["data"]["train"]["include"] == config["data"]["validation"]["include"] == []
    (data,) = [message for message in caplog.messages if message.startswith("data ")]
    training, held_out = re.findall(r"\d+", data)
    assert int(training) + int(held_out) == 24 and int(held_out) > 0
    assert data.endswith("from images")


def test_the_small_config_trains_on_few_small_images(
    project: Path, make_images: Callable[..., Path], caplog: Any
) -> None:
    caplog.set_level("INFO")
    make_images(project / "few", 5, size=(40, 30))
    fewer = ["training.max_steps=1", "model.params.ddconfig.ch=8", "--run-dir", "run"]
    assert main(["train", "small", "data.train.root=few", *fewer]) == 0
    (data,) = [message for message in caplog.messages if message.startswith("data ")]
    assert is_about(data, "4 training images", "1 for validation", "few")
    assert metrics("run")[-1]["val/psnr"] > 0


def test_a_bare_monitor_is_a_validation_metric(project: Path) -> None:
    arguments = ["training.max_steps=2", "training.validate_every_steps=1"]
    assert train("--run-dir", "run", "model.params.monitor=psnr", *arguments) == 0
    best = json.loads((project / "run" / "checkpoints" / "best.json").read_text())
    values = [line["val/psnr"] for line in metrics("run") if "val/psnr" in line]
    assert best["monitor"] == "val/psnr" and best["value"] == max(values)
    # the same command resumes: it is the same config
    assert train("--run-dir", "run", "model.params.monitor=psnr", *arguments) == 0


def test_a_validation_folder_of_its_own_is_named(project: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    (project / "val").mkdir()
    (project / "images" / "000.png").rename(project / "val" / "000.png")
    assert train("data.validation.root=val", "training.max_steps=1") == 0
    (data,) = [message for message in caplog.messages if message.startswith("data ")]
    assert is_about(data, 23, 1, "images", "val")


def test_a_named_data_set_trains_on_its_own_split(project: Path, caplog: Any) -> None:
    folder = project / "sets" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, number in (("train", 16), ("t10k", 4)):
        for part, shape in (("images-idx3", (number, 28, 28)), ("labels-idx1", (number,))):
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            values = rng.integers(0, 10, shape, dtype=np.uint8)
            (folder / f"{name}-{part}-ubyte").write_bytes(header + values.tobytes())
    caplog.set_level("INFO")
    arguments = ["data.name=fashion-mnist", "data.train.root=sets", "training.max_steps=2"]
    arguments += [f"model.params.ddconfig.{key}=1" for key in ("in_channels", "out_ch")]
    assert train("--run-dir", "run", *arguments) == 0
    assert any(is_about(text, 16, 4, "validation", "sets") for text in caplog.messages)


def test_a_published_config_asks_for_the_images_alone(project: Path, capsys: Any) -> None:
    published = {
        "model": {
            "base_learning_rate": 4.5e-06,
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": yaml.safe_load((project / "tiny.yaml").read_text())["model"]["params"],
        },
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 12}},
        "lightning": {"trainer": {"benchmark": True}},
    }
    published["model"]["params"]["lossconfig"] = {
        "target": "ldm.modules.losses.LPIPSWithDiscriminator",
        "params": {
            **{"disc_start": 50001, "kl_weight": 1.0e-6, "disc_weight": 0.5},
            **{"disc_num_layers": 2, "perceptual_weight": 0.0},  # small, and without network
        },
    }
    (project / "published.yaml").write_text(yaml.safe_dump(published))
    assert main(["train", "published.yaml"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert is_about(error, "data.train.root=FOLDER")
    # 12 images on 1 GPU
    ours = ["data.train.root=images", "training.max_steps=1", "--run-dir", "run"]
    assert main(["train", "published.yaml", *ours]) == 0
    config = yaml.safe_load((project / "run" / "config.yaml").read_text())
    assert config["training"]["global_batch_size"] == 12
    for optimizer in (config["optimizer"], config["discriminator_optimizer"]):
        assert (optimizer["name"], optimizer["betas"]) == ("adam", [0.5, 0.9])
        assert optimizer["learning_rate"] == pytest.approx(12 * 4.5e-6)


def test_shipped_configs_are_found_by_name_and_are_whole() -> None:
    from kl_vae.runtime.config_file import shipped_configs
    from kl_vae.training.config import RunConfig

    names = set(shipped_configs())
    assert names == {
        *("kl-f4", "kl-f8", "kl-f16", "kl-f32", "example", "cifar10", "quickstart", "small"),
        *(f"kl-f{f}-published" for f in (4, 8, 16, 32)),
    }
    for name in names:
        config = RunConfig.load(name)
        assert config.model.params.lossconfig is not None, "the default loss collapses"
        assert config.model.params.ddconfig.downsampling_factor in (4, 8, 16, 32)


def test_damaged_auxiliary_files_do_not_end_a_run(project: Path, caplog: Any) -> None:
    assert train("--run-dir", "run", "training.max_steps=2", "training.epochs=null") == 0
    run = Path("run")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    (run / "history.jsonl").unlink()
    (run / "history.jsonl").mkdir()
    for path in (run / "samples").iterdir():
        path.unlink()
    (run / "samples").rmdir()
    (run / "samples").write_text("")
    (run / "status.json").write_bytes(b"\xff{")
    (run / "checkpoints" / "best.json").write_text("[" * 100_000)
    assert main(["train", "run", "training.max_steps=4"]) == 0
    assert checkpoint("run", 4)["step"] == 4
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    for name in ("metrics.jsonl", "history.jsonl", "samples"):
        assert any(is_about(line, name) for line in caplog.messages), name
