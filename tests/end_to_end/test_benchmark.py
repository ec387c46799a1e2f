"""`kl-vae benchmark` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kl_vae import AutoEncoderKL
from kl_vae.benchmark import tiling
from kl_vae.cli.main import main

CHECKOUT = Path(__file__).resolve().parents[2]


def rows(markdown: str) -> dict[str, list[str]]:
    """The rows of all tables, by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in lines}


def test_steps_as_a_user_types_it(project: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "scripts" / "benchmark.py"), "step"]
    command += "--config tiny.yaml --size 32 --repeats 2 --device cpu --out step.json".split()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == "One GAN step of tiny.yaml: 1 x 32 x 32 images, fp32, 2 of each by turns."
    assert last.startswith("Measured on ") and "thread" in last and ", torch 2." in last
    table = rows(done.stdout)
    assert table["step"][-3:] == ["autoencoder", "LPIPS", "discriminator"]
    assert table["published"][-3:] == ["2 + 1", "4 + 2", "3 + 4"]
    assert table["ours"][-4:] == ["1.00", "1 + 1", "2 + 1", "3 + 3"]
    assert "In fp32 the autoencoder's gradients of both agree to " in done.stdout

    figures = json.loads((project / "step.json").read_text())
    assert figures["published"]["passes"]["autoencoder"] == {"forward": 2, "backward": 1}
    assert figures["ours"]["passes"]["autoencoder"] == {"forward": 1, "backward": 1}
    assert figures["difference"] < 1e-3
    medians = {name: figures[name]["timing"]["median"] for name in ("published", "ours")}
    assert figures["ratio"] == pytest.approx(medians["published"] / medians["ours"])
    assert table["published"][2] == f"{figures['ratio']:.2f}"
    about = {"benchmark": "step", "config": "tiny.yaml", "size": 32, "batch_size": 1}
    assert figures.items() >= {**about, "precision": "fp32", "repeats": 2, "device": "cpu"}.items()
    assert last == f"Measured on {figures['machine']}."


def test_optimizers(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--config tiny.yaml --size 32 --images 3 --repeats 1 --device cpu --out o.json"
    assert main(["benchmark", "optimizer", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    table = rows(printed)
    assert printed.startswith("Adam and Muon on all parameters of tiny.yaml, 1 of each by turns.\n")
    for row in ("one image of 32 x 32, forward and backward", "an update by Adam (fused)"):
        assert float(table[row][0]) > 0.0
    assert table["Adam"][1] == "1.000"
    figures = json.loads((project / "o.json").read_text())
    image, muon = figures["image"]["median"], figures["muon"]["median"]
    assert figures["step_seconds"]["Muon"] == pytest.approx(3 * image + muon)
    assert table["Muon"][0] == f"{figures['step_seconds']['Muon']:.4g}"
    assert figures.items() >= {"benchmark": "optimizer", "images": 3, "size": 32}.items()


@pytest.mark.parametrize("benchmark", ["step", "optimizer", "safety"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--size 33", "size=33: must be a multiple of 2; give 32"),
        ("--config none", "no such config: none; give a YAML file, or one of cifar10, "),
        ("--config context.yaml", "context.yaml: its model needs a context (context_channels=5)"),
        ("--config bare.yaml", "model.params.embed_dim: missing; it has no default, so write it"),
        ("--device tpu", "device 'tpu': choose one of auto, cuda, mps, cpu, or cuda:INDEX"),
        ("--out none/out.json", "--out none/out.json: give a file in a folder that exists"),
        ("--out images", "--out images: give a file in a folder that exists"),
    ],
)
def test_mistakes_are_one_line(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    benchmark: str,
    arguments: str,
    message: str,
) -> None:
    config = yaml.safe_load((project / "tiny.yaml").read_text())
    params = config["model"]["params"]
    params["ddconfig"]["context_channels"] = 5
    (project / "context.yaml").write_text(yaml.safe_dump(config))
    del params["embed_dim"]
    (project / "bare.yaml").write_text(yaml.safe_dump(config))
    assert main(["benchmark", benchmark, "--config", "tiny.yaml", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("kl-vae benchmark: error: ")
    assert message in printed.err.splitlines()[-1]
    assert not printed.out


@pytest.mark.parametrize("option", ["--repeats", "--size", "--batch-size"])
def test_numbers_are_at_least_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", "step", option, "0"])
    assert f"argument {option}: '0': give an integer of at least 1" in capsys.readouterr().err


def test_a_benchmark_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark"])
    assert "the following arguments are required: BENCHMARK" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["benchmark", "speed"])
    assert "invalid choice: 'speed' (choose from " in capsys.readouterr().err


def test_guards(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--config tiny.yaml --size 64 --repeats 1 --device cpu --out s.json"
    assert main(["benchmark", "safety", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("What the guards of a run cost, tiny.yaml: 1 x 64 x 64 images a rank")
    table = rows(printed)
    for row in ("losses and gradients finite on all ranks", "a signal on any rank"):
        assert float(table[row][0]) > 0.0 and table[row][2] == "1"
    assert table["the same parameters on all ranks"][2] == "100"
    figures = json.loads((project / "s.json").read_text())
    assert figures["ranks"] == 1 and figures["step"]["median"] > 0.0
    assert table["all"][-1].endswith(f"{figures['total']:.4%}")
    assert not list(project.glob("tmp*"))  # what was saved is gone


def test_loading(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    arguments = "--config tiny.yaml --repeats 2 --device cpu --out l.json"
    assert main(["benchmark", "loading", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((project / "l.json").read_text())
    assert printed.startswith(f"Reading tiny.yaml of {figures['megabytes']:.0f} MB, 2 of each by t")
    assert len(figures["timings"]) == 4
    table = rows(printed)
    for name, timing in figures["timings"].items():
        baseline = next(iter(figures["timings"].values()))["median"]
        assert figures["ratios"][name] == pytest.approx(timing["median"] / baseline)
        assert table[name][2] == f"{figures['ratios'][name]:.2f}"


def test_tiling_as_a_user_types_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--config tiny.yaml --sizes 64x32 --what decode --ways exact --device cpu"
    more = "--plot tiling.png --out tiling.json"
    assert main(["benchmark", "tiling", *arguments.split(), *more.split()]) == 0
    printed = capsys.readouterr().out
    assert "tiny.yaml, one image, fp32, each call in a process of its own, 1 of each" in printed
    assert "| decode | 64 x 32 | whole | " in printed and "| decode | 64 x 32 | exact | " in printed
    assert (project / "tiling.png").stat().st_size > 10_000
    whole, exact = json.loads((project / "tiling.json").read_text())["measured"]
    assert whole["way"] == "whole" and exact["way"] == "exact"
    assert exact["difference"] < 1e-4 and exact["peak"] > exact["added"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--checkpoint x", "--checkpoint and --images: give both, or neither"),
        ("--plot none/x.png", "--plot none/x.png: give a file in a folder that exists"),
        ("--sizes 33x32", "size=33: must be a multiple of 2; give 32"),
    ],
)
def test_mistakes_about_tiling_are_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    command = ["benchmark", "tiling", "--config", "tiny.yaml", "--device", "cpu"]
    assert main([*command, *arguments.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_pictures_are_larger_than_the_tiles_that_blend_them(
    project: Path,
    tiny_model: AutoEncoderKL,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_model.save_compvis("tiny.safetensors")
    monkeypatch.setattr(tiling, "measure", lambda *_: iter(()))  # has tests of its own
    command = ["benchmark", "tiling", "--config", "tiny.yaml", "--device", "cpu"]
    blended = ["--checkpoint", "tiny.safetensors", "--images", "images"]
    assert main([*command, *blended, "--tile", "8"]) == 0
    assert "| blend, tiles of 8, overlap 2 | " in capsys.readouterr().out
    assert main([*command, *blended]) == 2
    message = "not larger than --tile 256; give larger pictures, or smaller tiles"
    assert message in capsys.readouterr().err
