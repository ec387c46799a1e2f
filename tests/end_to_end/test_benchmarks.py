"""The scripts of `benchmarks/` on a tiny model: their rows, and their checks before timing."""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from tests.messages import is_about, mentions

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
MEGABYTE = 2**20
TINY = ["--config", "tiny.yaml", "--device", "cpu", "--repeats", "1", "--json", "out.json"]

pytest.importorskip("diffusers")
# Python 3.12 warns of every fork in a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a script as its own folder does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(project: Path, script: Callable[[str], ModuleType]) -> Callable[..., list[dict[str, Any]]]:
    """Run a script on the tiny model; return its rows, which are those of its JSON."""

    def run(name: str, *arguments: str) -> list[dict[str, Any]]:
        threads = torch.get_num_threads()
        rows = script(name).main([*TINY, *arguments])
        torch.set_num_threads(threads)
        content = json.loads((project / "out.json").read_text())
        assert content["machine"] and content["arguments"]["config"] == "tiny.yaml"
        assert len(content["rows"]) == len(rows)
        assert all(row["median"] > 0.0 for row in rows if "median" in row)
        return rows

    return run


def named(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in rows}


@pytest.mark.slow
def test_encode_and_decode(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows = run("encode_decode", "--sizes", "16", "32", "--batch-sizes", "2")
    variants = {"diffusers", "diffusers, channels_last", "ours, plain modules", "ours"}
    assert variants < set(named(rows)) and len(rows) == 2 * 2 * len(named(rows))
    assert all(row["difference"] < 1e-4 and row["batch"] == 2 for row in rows)
    assert "| encode | ours | 2 x 32 x 32 | " in capsys.readouterr().out


def test_different_results_are_not_timed(
    run: Callable[..., Any], script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("encode_decode")

    def doubled(module: Any, work: str, precision: str) -> Callable[[Any], Any]:
        factor = 2.0 if isinstance(module, AutoEncoderKL) else 1.0
        return lambda x: factor * x

    monkeypatch.setattr(module, "coder", doubled)
    with pytest.raises(RuntimeError, match=mentions("ours, plain modules")):
        run("encode_decode", "--sizes", "16")


def test_a_plain_step(run: Callable[..., Any]) -> None:
    rows = named(run("step", "--size", "16", "--precision", "bf16"))
    assert {"diffusers", "ours", "ours, checkpointing blocks"} < set(rows)
    assert all(row["difference"] < 1e-4 for row in rows.values())


@pytest.mark.slow
def test_a_gan_step(run: Callable[..., Any]) -> None:
    rows = named(run("step", "--loss", "gan", "--size", "32"))
    published, ours = rows["published"], rows["ours"]
    assert published["difference"] < 1e-3 and ours["difference"] < 1e-3
    assert published["autoencoder"] == "2 + 1" and ours["autoencoder"] == "1 + 1"
    assert published["LPIPS"] == "4 + 2" and ours["LPIPS"] == "2 + 1"
    assert published["discriminator"] == "3 + 4" and ours["discriminator"] == "3 + 3"
    assert published["gflop"] > 1.2 * ours["gflop"] and published["times_ours"] > 0.0


@pytest.mark.slow
def test_memory(run: Callable[..., Any]) -> None:
    rows = run("memory", "--size", "16")
    assert {"diffusers", "ours"} < set(named(rows))
    assert all(row["peak"] > row["added"] >= 0 for row in rows)


@pytest.mark.slow
def test_tiling(run: Callable[..., Any], project: Path) -> None:
    rows = run("tiling", "--sizes", "32", "--work", "decode", "--plot", "plot.png")
    assert len(rows) == 4 and all(row["difference"] < 1e-4 for row in rows)
    assert (project / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_tiles_change(
    script: Callable[[str], ModuleType], project: Path, tiny_ddconfig: dict[str, Any]
) -> None:
    model = AutoEncoderKL(tiny_ddconfig, 4, latents={"scale_factor": 1.0})
    model.save_compvis("tiny.safetensors")
    compare = partial(script("tiling").compare_reconstructions, "tiny.safetensors", "images")
    changes = named(compare(16, CPU))
    assert changes["exact"]["largest"] < 0.01
    assert changes["blend"]["largest"] > changes["exact"]["largest"]
    with pytest.raises(ValueError, match=mentions("--tile 64")):
        compare(64, CPU)


def test_operations(run: Callable[..., Any], tiny_ddconfig: dict[str, Any]) -> None:
    rows = run("operations", "--sizes", "32", "--product", "64")
    encode, decode, step = rows
    assert sum(encode["shares"].values()) == pytest.approx(1.0)
    assert encode["shares"]["upsampling"] == 0.0 and decode["shares"]["downsampling"] == 0.0
    # a step is three passes but for the gradient of the image, by the first convolution
    first = 2 * 9 * 3 * tiny_ddconfig["ch"] * 32**2 / 1e9
    assert step["gflop"] == pytest.approx(3 * (encode["gflop"] + decode["gflop"]) - first)


def test_the_published_architecture_takes_what_is_known_of_it(
    script: Callable[[str], ModuleType],
) -> None:
    operations, architecture = script("operations"), script("common").Architecture.of("kl-f8")
    counts = operations.operations_of("encode", architecture, 256)
    assert round(counts.total() / 1e9) == 273


@pytest.mark.slow
def test_loading(run: Callable[..., Any]) -> None:
    rows = run("loading")
    assert len(rows) == 4 and rows[0]["ratio"] == 1.0


def test_optimizers(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run("optimizer", "--size", "16")) == 3
    assert is_about(capsys.readouterr().out, "step", 12, "images")


def test_the_work_of_ranks_with_muon(run: Callable[..., Any]) -> None:
    one, many = run("muon_ranks", "--ranks", "1", "64")
    assert one["ranks"] == 1 and one["load"] == pytest.approx(1.0)
    assert many["load"] >= 1.0 and many["load"] >= many["largest"] * (1.0 - 1e-6)
    assert one["bytes"] == many["bytes"] and 0.9 < many["share"] <= 1.0


@pytest.mark.slow
def test_the_precision_of_muon(run: Callable[..., Any]) -> None:
    small = ["--steps", "4", "--seeds", "2", "--out", "runs"]
    with pytest.raises(SystemExit, match="2"):
        run("muon_precision", *small)
    small += ["optimizer.name=muon", "optimizer.learning_rate=0.01"]
    rows = named(run("muon_precision", *small))
    assert set(rows) == {"fp32", "tf32", "bf16"}
    losses = {name: [seed["val/psnr"] for seed in row["seeds"]] for name, row in rows.items()}
    assert losses["fp32"] != losses["bf16"]
    assert losses["tf32"] == pytest.approx(losses["fp32"], abs=0.5)


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (64, 64)])
def test_muon_with_tf32_products_is_accurate(
    script: Callable[[str], ModuleType], shape: tuple[int, int], smallest: float
) -> None:
    module, generator = script("muon_precision"), torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 64, generator=generator))[0] for n in shape)
    matrix = (u * torch.logspace(0.0, math.log10(smallest), 64)) @ v.T
    exact, tf32, bf16 = (module.orthogonalize(matrix[None], bits) for bits in (23, 10, 7))
    assert torch.equal(exact, module.ORTHOGONALIZE(matrix[None]))
    assert 0.0 < (tf32 - exact).norm() < 0.02 * exact.norm()
    assert (bf16 - exact).norm() > 3.0 * (tf32 - exact).norm()


def test_the_loader(run: Callable[..., Any]) -> None:
    small = ["--images", "8", "--size", "64", "--crop", "24", "--batch-size", "4"]
    rows = run("data", *small, "--workers", "0", "1")
    assert len(rows) == 2 * (4 + 3) and all(row["rate"] > 0.0 for row in rows)
    assert all(row["ratio"] == 1.0 for row in rows if row["variant"] == "torchvision")


def test_latents(run: Callable[..., Any]) -> None:
    small = ["--size", "16", "--number", "8", "--batch-size", "4", "--num-workers", "0"]
    encoding, reading = run("latents", *small)
    assert encoding["ratio"] > 0.0 and reading["ratio"] == 1.0


@pytest.mark.slow
def test_recipes(run: Callable[..., Any], project: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.save(squeezenet1_1(weights=None).features.state_dict(), "squeeze.pth")
    recipes = ["published:3:1.0e-3", "mse:3", "gan:3"]
    rows = run(
        "recipes",
        *("data.resize=24", "data.crop=24", "training.global_batch_size=4"),
        *(flag for recipe in recipes for flag in ("--recipe", recipe)),
        *("--perceptual-features", "squeeze.pth", "--out", "out", "--seeds", "2"),
    )
    names = ["published at 0.001", "mse", "gan"]
    assert [row["recipe"] for row in rows] == [name for name in names for _ in range(3)]
    assert all(" ± " in row["psnr"] and " ± " in row["ssim"] for row in rows)
    for row in rows:  # of mse it is measured at the end alone
        assert (" ± " in row["perceptual"]) == (row["recipe"] != "mse" or row["step"] == 3)
    assert (project / "out" / "comparison.png").stat().st_size > 0


# ---- the common helpers ----


@pytest.mark.slow
def test_calls_are_interleaved_after_one_untimed_call(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = script("common")
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "abc"}
    assert common.alternate(calls, 4, CPU).keys() == {"a", "b", "c"}
    assert " ".join(map("".join, zip(*[iter(order)] * 3, strict=True))) == "abc abc bca cab abc"

    now, durations = [0.0], iter([100.0, 3.0, 1.0, 8.0])

    def call() -> None:
        now[0] += next(durations)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timing = common.alternate({"a": call}, 3, CPU)["a"]
    assert timing == common.Timing(median=3.0, low=1.0, high=8.0)


def prepare(work: str) -> Callable[[], object]:
    """Return what the measuring process calls."""
    torch.ones(400 * MEGABYTE // 4)  # what loading takes is not the call's
    kept = torch.ones(50 * MEGABYTE // 4)

    def call() -> None:
        assert len(kept)
        if work == "allocate":
            torch.ones(200 * MEGABYTE // 4)
            time.sleep(0.1)
        elif work == "fail":
            raise ValueError("a\nb")
        else:
            os._exit(9)

    return call


@pytest.mark.slow
def test_the_peak_of_a_call(script: Callable[[str], ModuleType]) -> None:
    cost_of = script("common").cost_of
    cost = cost_of(partial(prepare, "allocate"), CPU)
    assert 190 * MEGABYTE < cost.peak - cost.before < 260 * MEGABYTE
    assert cost.before > 50 * MEGABYTE and cost.seconds > 0.1
    with pytest.raises(RuntimeError, match=mentions("ValueError: a b")):
        cost_of(partial(prepare, "fail"), CPU)
    with pytest.raises(RuntimeError, match=mentions("process", "killed")):
        cost_of(partial(prepare, "exit"), CPU)


def test_a_cell_without_a_value_is_empty(script: Callable[[str], ModuleType]) -> None:
    table = script("common").markdown_table({"": "{a}", "x": "{b:.1f}"}, [{"a": "A", "b": None}])
    assert table.splitlines() == ["|  | x |", "| --- | --- |", "| A |  |"]


def test_invalid_arguments_are_named(
    script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, parts in (
        (["--repeats", "0"], ("--repeats 0", 1)),
        (["--json", "none/out.json"], ("--json none/out.json", "folder")),
    ):
        with pytest.raises(SystemExit):
            script("loading").main(arguments)
        assert is_about(capsys.readouterr().err, *parts)
