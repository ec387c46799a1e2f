"""`kl-vae benchmark` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kl_vae import AutoEncoderKL
from kl_vae.benchmark import flops, tiling
from kl_vae.cli.main import main

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_SIDE", 64)


def rows(markdown: str) -> dict[str, list[str]]:
    """The rows of all tables, by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in lines}


def test_steps_as_a_user_types_it(project: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "scripts" / "benchmark.py"), "step"]
    command += "--config tiny.yaml --size 32 --repeats 2 --device cpu --out step.json".split()
    command += ["--loss", "gan"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == "A training step of tiny.yaml: 1 x 32 x 32 images, fp32, 2 of each by turns."
    assert last.startswith("Measured on ") and "thread" in last and ", torch 2." in last
    table = rows(done.stdout)
    assert table["step"][-3:] == ["autoencoder", "LPIPS", "discriminator"]
    assert table["published"][-3:] == ["2 + 1", "4 + 2", "3 + 4"]
    assert table["ours"][-4:] == ["1.00", "1 + 1", "2 + 1", "3 + 3"]
    assert "In fp32 the autoencoder's gradients of both agree to " in done.stdout

    everything = json.loads((project / "step.json").read_text())
    figures = everything["gan"]
    assert figures["published"]["passes"]["autoencoder"] == {"forward": 2, "backward": 1}
    assert figures["ours"]["passes"]["autoencoder"] == {"forward": 1, "backward": 1}
    assert figures["difference"] < 1e-3
    medians = {name: figures[name]["timing"]["median"] for name in ("published", "ours")}
    assert figures["ratio"] == pytest.approx(medians["published"] / medians["ours"])
    assert table["published"][2] == f"{figures['ratio']:.2f}"
    about = {"benchmark": "step", "config": "tiny.yaml", "size": 32, "batch_size": 1}
    about |= {"precision": "fp32", "repeats": 2, "device": "cpu"}
    assert everything.items() >= about.items() and "plain" not in everything
    assert last == f"Measured on {everything['machine']}."


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


@pytest.mark.parametrize("benchmark", ["step", "optimizer", "safety", "memory", "scaling"])
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
        ("--markdown none/x.md", "--markdown none/x.md: give a file in a folder that exists"),
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


def test_coding(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    sweep = "--sizes 16 32 --batch-sizes 1 2 --repeats 1 --device cpu --threads 1"
    files = "--plot growth.png --out e.json --markdown e.md"
    command = ["benchmark", "encode", "--config", "tiny.yaml", *sweep.split(), *files.split()]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("To encode by tiny.yaml, fp32, 1 of each by turns.\n")
    figures = json.loads((project / "e.json").read_text())
    measured = figures["measured"]
    assert len({(m["batch_size"], m["size"]) for m in measured}) == 4
    ways = [m["way"] for m in measured[: len(measured) // 4]]
    assert ways[:2] == ["diffusers", "diffusers, channels_last"] and "ours, plain modules" in ways
    for m in measured:
        assert m["difference"] < 1e-5 and m["work"] == "encode"
        assert m["share"] == pytest.approx(m["flops"] / m["timing"]["median"] / m["product_rate"])
        assert f"| {m['way']} | {m['batch_size']} x {m['size']} x {m['size']} | " in printed
    assert figures.items() >= {"benchmark": "encode", "precision": "fp32", "repeats": 1}.items()
    assert "(1 thread" in figures["machine"] and figures["without_diffusers"] is None
    page = (project / "e.md").read_text()
    assert page.startswith("## To encode by tiny.yaml, fp32, 1 of each by turns\n\n| way |")
    assert page.rstrip().endswith(f"Measured on {figures['machine']}.")
    assert (project / "growth.png").stat().st_size > 10_000


def test_without_diffusers_a_line_says_so(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kl_vae.benchmark.twin.find_spec", lambda _: None)
    arguments = "--config tiny.yaml --sizes 16 --repeats 1 --device cpu --out d.json"
    assert main(["benchmark", "decode", *arguments.split()]) == 0
    said = "Ours alone: diffusers is not installed (pip install diffusers)."
    printed = capsys.readouterr().out
    assert said in printed and "| diffusers" not in printed
    assert json.loads((project / "d.json").read_text())["without_diffusers"] == said


def test_everything_is_one_report(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--config tiny.yaml --sizes 16 --step-size 32 --repeats 1 --device cpu"
    more = "--out all.json --markdown all.md --only step encode"
    assert main(["benchmark", "all", *arguments.split(), *more.split()]) == 0
    printed = capsys.readouterr().out
    content = json.loads((project / "all.json").read_text())
    assert list(content) == ["benchmark", "encode", "step"]
    assert [m["size"] for m in content["encode"]["measured"][:1]] == [16]
    assert content["step"]["size"] == 32 and content["step"]["plain"]["measured"]
    assert content["step"]["gan"]["difference"] < 1e-3
    page = (project / "all.md").read_text()
    assert page.startswith("# kl_vae, tiny.yaml\n\n## To encode by tiny.yaml")
    assert "\n## A training step of tiny.yaml" in page and "A training step of tiny" in printed


def test_memory(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kl_vae.benchmark.twin.find_spec", lambda _: None)  # which loads slowly
    arguments = "--config tiny.yaml --size 32 --device cpu --what encode --out m.json"
    assert main(["benchmark", "memory", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    assert "Memory, tiny.yaml, fp32, 1 of each by turns." in printed
    figures = json.loads((project / "m.json").read_text())
    assert figures.items() >= {"benchmark": "memory", "size": 32, "batch_size": 1}.items()
    for m in figures["measured"]:
        assert m["peak"] > m["added"] > 0 and m["timing"]["median"] > 0.0
        assert f"| encode | 1 x 32 x 32 | {m['way']} | {m['peak'] / 1e9:.2f} | " in printed


def test_scaling(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--config tiny.yaml --size 16 --threads 2 --repeats 1 --out s.json"
    assert main(["benchmark", "scaling", *arguments.split()]) == 0
    table = rows(capsys.readouterr().out)
    assert table["1 rank x 2 threads"][2] == "1.000"
    figures = json.loads((project / "s.json").read_text())
    assert table["2 ranks x 1 thread"][2] == f"{figures['speed']:.3f}"
    assert figures.items() >= {"ranks": 2, "threads": 2, "batch_size": 2}.items()
    assert figures["norm_difference"] < 1e-5
    for key in ("single", "several", "apart", "exchange"):
        assert figures[key]["low"] > 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("encode --sizes 33", "size=33: must be a multiple of 2; give 32"),
        ("decode --plot none/x.png", "--plot none/x.png: give a file in a folder that exists"),
        ("memory --step-size 33", "size=33: must be a multiple of 2; give 32"),
        ("all --step-size 33", "size=33: must be a multiple of 2; give 32"),
        (
            "step --precision fp16 --loss gan",
            "--precision fp16: the published GAN step has no gradient scaler; give bf16, or "
            "--loss plain",
        ),
        (
            "scaling --threads 3",
            "--threads 3: --ranks 2 cannot share it evenly; give a multiple of 2",
        ),
        (
            "scaling --threads 2 --batch-size 3",
            "--batch-size 3: --ranks 2 cannot share it evenly; give a multiple of 2",
        ),
        (
            "scaling --ranks 1",
            "--ranks 1: one rank is what the others are compared with; give 2 or more",
        ),
    ],
)
def test_mistakes_about_comparisons_are_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    benchmark, *others = arguments.split()
    command = ["benchmark", benchmark, "--config", "tiny.yaml", "--device", "cpu", *others]
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_half_precision_takes_the_plain_step_alone(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--config tiny.yaml --size 16 --repeats 1 --device cpu --precision fp16"
    assert main(["benchmark", "step", *arguments.split(), "--out", "h.json"]) == 0
    figures = json.loads((project / "h.json").read_text())
    assert "gan" not in figures and figures["plain"]["measured"][-1]["difference"] is None
    assert "MSE + KL, forward, backward and AdamW:" in capsys.readouterr().out
