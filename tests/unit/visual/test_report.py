"""Read a run and write its report page."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import kl_vae
import kl_vae.visual.report
from kl_vae.runtime.locks import is_locked
from kl_vae.visual.report.comparison import (
    as_text,
    best_metrics,
    config_differences,
    last_metrics,
    run_names,
    states,
)
from kl_vae.visual.report.metrics import (
    MAX_LINE_BYTES,
    MAX_METRICS,
    MetricsFile,
    Series,
    VectorSeries,
)
from kl_vae.visual.report.page import (
    MAX_NUMBERS,
    check_output,
    embedded_images,
    linked_images,
    page_content,
    render,
    write_page,
)
from kl_vae.visual.report.panels import panels_of, split_of
from kl_vae.visual.report.run import (
    RunReading,
    check_run_directory,
    describe_silence,
    duration,
    read_run,
)
from kl_vae.visual.report.terminal import describe_run
from kl_vae.visual.web_page import script_json
from tests.messages import is_about, mentions


def write_run(run: Path, lines: list[dict[str, Any]], **status: Any) -> Path:
    """Write the files of a run with the given status."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(
        "model:\n  params:\n    ddconfig:\n      resolution: 16\n"
        "training:\n  global_batch_size: 8\n  max_steps: 100\n"
    )
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if status:
        (run / "status.json").write_text(json.dumps(status))
    return run


def read(run: Path) -> tuple[RunReading, MetricsFile]:
    metrics = MetricsFile(run / "metrics.jsonl")
    metrics.read()
    return read_run(run, metrics), metrics


def content_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = page_content(*read(run), images=[])
    return content


def test_short_series_are_not_thinned() -> None:
    series = Series(max_points=4)
    for step in (10, 20, 30):
        series.add(step, step / 3)
    assert [(b.first, b.mean, b.count) for b in series.buckets] == [
        (step, step / 3, 1) for step in (10, 20, 30)
    ]
    assert not series.thinned and series.range == (10 / 3, 10)


def test_thinning_keeps_extremes_means_and_nan() -> None:
    series, number = Series(max_points=50), 10_000
    for step in range(1, number + 1):
        value = {4321: 1000.0, 4322: -7.0, 777: math.nan, 778: math.inf}.get(step, 1.0)
        series.add(step, value)
    assert 25 <= len(series.buckets) <= 50 and series.thinned
    assert series.range == (-7.0, 1000.0)
    assert sum(bucket.count for bucket in series.buckets) == number
    (broken,) = [bucket for bucket in series.buckets if bucket.broken]
    assert broken.first <= 777 <= broken.last and broken.kinds == {"nan", "inf"}
    total = sum(bucket.total for bucket in series.buckets)
    assert total == number - 4 + 993
    assert series.latest == (number, 1.0)


def test_a_bucket_of_nan_has_no_mean() -> None:
    series = Series()
    series.add(1, math.nan)
    assert series.buckets[0].mean is None and series.range == (math.inf, -math.inf)


def test_repeated_steps_replace_earlier_ones() -> None:
    series, vector = Series(), VectorSeries(1)
    for step, value in ((10, 1.0), (20, 2.0), (30, 3.0), (20, 5.0)):
        series.add(step, value)
        vector.add(step, [value])
    assert [(b.first, b.mean) for b in series.buckets] == [(10, 1.0), (20, 3.5)]
    assert vector.steps == [(10, 10), (20, 20)] and vector.means == [[1.0], [3.5]]


def test_vectors_are_thinned_to_means() -> None:
    vector = VectorSeries(2, max_points=8)
    for step in range(64):
        vector.add(step, [float(step), 1.0])
    vector.add(64, [math.nan, 1.0])
    vector.add(65, [1.0])
    assert vector.steps == [(i, i + 7) for i in range(0, 64, 8)]
    assert vector.means == [[i + 3.5, 1.0] for i in range(0, 64, 8)]


def test_lines_are_read_once_while_the_file_grows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.read()
    assert metrics.latest is None and not metrics.scalars  # no file yet
    path.write_bytes(b'{"step": 1, "a": 1.5}\n{"step": 2, "a": "nan"}\n{"step": 3, "a"')
    sizes: list[int] = []
    metrics.read(sizes.append)
    assert metrics.lines == 2 and metrics.unreadable == 0 and sum(sizes) == 46
    with path.open("ab") as file:
        file.write(b': 7}\nnonsense\n[1]\n{"step": true}\n{"a": 1}\n{"step": 4, "a": 8}\n')
    metrics.read()
    assert (metrics.lines, metrics.unreadable, metrics.latest) == (4, 4, 4)
    assert [b.mean for b in metrics.scalars["a"].buckets] == [1.5, None, 7.0, 8.0]


def test_a_replaced_file_is_read_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n')
    metrics = MetricsFile(path)
    metrics.read()
    (tmp_path / "new").write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 5}\n')
    os.replace(tmp_path / "new", path)
    metrics.read()
    assert [b.mean for b in metrics.scalars["a"].buckets] == [1.0, 5.0]


def test_invalid_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        b"[" * 200_000,
        b'{"step": 1, "a": ' + b"9" * (2 * MAX_LINE_BYTES) + b"}",
        b'{"step": 1e400}',
        b'{"step": -1}',
        b"\xff\xfe",
        json.dumps({"step": 5, **{f"metric{i}": i for i in range(MAX_METRICS + 5)}}).encode(),
        b'{"step": 6, "metric0": 1' + b"0" * 400 + b', "metric1": {}, "metric2": "x", "v": [[]]}',
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    metrics = MetricsFile(path)
    metrics.read()
    assert (metrics.lines, metrics.unreadable) == (2, 5)
    assert len(metrics.scalars) == MAX_METRICS and metrics.left_out == 6
    notes = read_run(write_run(tmp_path / "run", []), metrics).notes
    assert any(is_about(note, "metrics.jsonl", "5 lines") for note in notes)
    assert any(is_about(note, "metrics.jsonl", "6 metrics") for note in notes)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads every file")
def test_metrics_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    path.chmod(0)
    with pytest.raises(ValueError, match=mentions("metrics.jsonl", "Permission denied")):
        MetricsFile(path).read()


def test_metrics_that_are_a_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match=mentions("metrics.jsonl", "Is a directory")):
        MetricsFile(tmp_path / "metrics.jsonl").read()


def test_metrics_of_one_name_share_a_panel() -> None:
    keys = ["val/psnr", "my_own", "train/psnr", "val_ema/psnr", "epoch", "train/logits_fake"]
    keys += ["train/logits_real", "images_seen", "val/mine"]
    shown = {panel.title: metrics for panel, metrics in panels_of(keys)}
    assert shown == {
        "PSNR": ["train/psnr", "val/psnr", "val_ema/psnr"],
        "Discriminator's logits": ["train/logits_real", "train/logits_fake"],
        "mine": ["val/mine"],
        "my_own": ["my_own"],
    }
    assert split_of("val_ema/psnr") == ("val_ema", "psnr")
    assert split_of("other/psnr") == ("train", "other/psnr")


def test_constants_and_bits_per_pixel(tmp_path: Path) -> None:
    lines = [{"step": i, "train/logvar": 0.0, "train/kl_loss": 512.0 * i} for i in (1, 2)]
    content = content_of(write_run(tmp_path / "run", lines))
    assert content["constants"] == [["train/logvar", 0.0]]
    assert [(panel["title"], panel["unit"]) for panel in content["panels"]] == [
        ("KL", "nats per image"),
        ("KL", "bits per pixel"),
    ]
    bits = content["scalars"]["train/kl_bits_per_pixel"]
    assert bits["of"] == "train/kl_loss"
    assert bits["latest"] == [2, pytest.approx(1024 / math.log(2) / 256)]


def test_page_size_is_limited(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    names = [f"train/metric{i}" for i in range(120)]
    metrics = MetricsFile(run / "metrics.jsonl")
    for name in names:
        metrics.scalars[name] = Series()
    for step in range(1100):
        for i, name in enumerate(names):
            metrics.scalars[name].add(step, math.sin(step * i))
    content = page_content(read_run(run, metrics), metrics, [])
    numbers = [series for series in content["scalars"].values()]
    assert sum(len(s["mean"]) + len(s["low"]) + len(s["high"]) for s in numbers) <= MAX_NUMBERS
    assert len(render(content)) < 2_000_000
    assert max(numbers[3]["high"]) > 0.999 and min(numbers[3]["low"]) < -0.999


def test_nan_and_inf_are_marked(tmp_path: Path) -> None:
    lines = [{"step": i, "train/rec_loss": x} for i, x in enumerate((1.0, "nan", "inf", 2.0))]
    series = content_of(write_run(tmp_path / "run", lines))["scalars"]["train/rec_loss"]
    assert series["mean"] == [1, None, None, 2]
    assert series["broken"] == [[1, 1, "nan"], [2, 1, "inf"]]


HOSTILE = "</script><script>alert(1)</script><!--&amp;\u2028\ud800{{script}}"


def test_text_is_escaped(tmp_path: Path) -> None:
    text = script_json({"a": HOSTILE})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"a": HOSTILE}
    run = write_run(tmp_path / "<b>&", [{"step": 1, HOSTILE: 1.0}], state="failed", reason=HOSTILE)
    (run / "config.yaml").write_text("# </script><script>alert(1)</script>\n")
    page = render(content_of(run)).decode()
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<title>&lt;b&gt;&amp;: failed</title>" in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy and policy[1].startswith("default-src 'none'; img-src data: 'self' file:; style")
    assert "unsafe" not in policy[1] and "http" not in policy[1]
    assert "img-src data:;" in render(content_of(run), linked=False).decode()


def test_image_paths_are_relative_to_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run", [])
    (run / "samples").mkdir()
    for name in ("prior_00000020", "reconstructions_00000100", "prior_00000010", "we#ird_00000010"):
        (run / "samples" / f"{name}.png").write_bytes(b"x" * 10)
    (run / "samples" / "notes.txt").write_text("")
    reading, _ = read(run)
    assert linked_images(reading, run)[0] == {
        "name": "reconstructions",
        "steps": ["00000100"],
        "base": "samples/reconstructions_",
    }
    bases = [picture["base"] for picture in linked_images(reading, tmp_path / "pages")]
    assert bases[1:] == ["../a%20run/samples/prior_", "../a%20run/samples/we%23ird_"]
    images, left_out = embedded_images(reading)
    assert left_out == 0 and images[1]["steps"] == ["00000010", "00000020"]
    assert images[1]["content"] == ["data:image/png;base64,eHh4eHh4eHh4eA=="] * 2
    images, left_out = embedded_images(reading, max_bytes=45)
    assert left_out == 1 and images[1]["steps"] == ["00000020"]


def test_skipped_images_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    (run / "samples").mkdir()
    for step in (1, 2, 3):
        (run / "samples" / f"prior_{step:08d}.png").write_bytes(b"x" * 30)
    reading, metrics = read(run)
    write_page(tmp_path / "page.html", [(reading, metrics)], embed=True, max_bytes=64)
    assert is_about(reading.notes[-1], 1, "images")


def test_the_remaining_time_of_a_run(tmp_path: Path) -> None:
    lines = [{"step": i, "images_per_second": 4.0, "epoch": i, "images_seen": i} for i in (10, 20)]
    run = write_run(tmp_path, lines, state="running", step=5, total_steps=100, pid=os.getpid())
    reading, metrics = read(run)
    assert (reading.state, reading.progress) == ("running", "step 20 of 100")
    assert reading.seconds_left == 80 * 8 / 4.0
    text = "\n".join(describe_run(reading, metrics))
    assert is_about(text, "running", "step 20 of 100", "20%")
    assert is_about(text, "4 images/s", "2 min 40 s")


LOCKING = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(descriptor, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_killed_run_is_detected_by_its_lock(tmp_path: Path) -> None:
    run = write_run(tmp_path, [{"step": 3, "a": 1}], state="running", step=3, total_steps=9, pid=1)
    assert is_locked(run / ".lock") is None  # no lock file
    command = [sys.executable, "-S", "-c", LOCKING, str(run / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"locked\n"
        assert is_locked(run / ".lock") is True
        hour_ago = time.time() - 3600
        for name in ("metrics.jsonl", "status.json"):
            os.utime(run / name, (hour_ago, hour_ago))
        reading, _ = read(run)
        assert reading.state == "running" and is_about(reading.remark, "1 h 00 min", "validation")
        process.kill()
    assert is_locked(run / ".lock") is False
    reading, metrics = read(run)
    assert reading.state == "lost" and reading.seconds_left is None
    assert is_about(reading.remark, "1 h 00 min", "process", "lock")
    assert any(line.endswith(reading.remark) for line in describe_run(reading, metrics))


def test_describe_silence() -> None:
    assert describe_silence(False, 10) == describe_silence(None, 600) == (False, "")
    assert describe_silence(True, 100) == (False, "")
    assert describe_silence(None, 7200)[0]
    assert is_about(describe_silence(None, 7200)[1], "2 h 00 min", "process")
    assert [duration(x) for x in (3.4, 185, 7800, 273_600)] == [
        *("3 s", "3 min 05 s", "2 h 10 min", "3 d 4 h"),
    ]


def test_a_damaged_run_is_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path, [{"step": 7, "my_metric": 0.5}])
    (run / "config.yaml").write_text("a: [1\n")
    (run / "status.json").write_text('{"state": "runn')
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best.json").write_text("{}")
    (run / "bad_images.txt").write_bytes(b"a\xff.png\tnot an image\nno tab\n")
    reading, metrics = read(run)
    assert (reading.state, reading.step, reading.total_steps) == ("unknown", 7, None)
    assert reading.bad_images == [("a\ufffd.png", "not an image")] and reading.number_bad == 1
    config, status, best = reading.notes
    assert is_about(config, "config.yaml", "YAML")
    assert is_about(status, "status.json") and is_about(best, "checkpoints/best.json")
    text = describe_run(reading, metrics)
    assert is_about(text[0], run, "unknown", "step 7")
    assert "my_metric             0.5" in text
    render(page_content(reading, metrics, []))


def test_a_run_without_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path, [], state="failed", step=0, total_steps=9, reason="RunError: a\nb")
    (run / "metrics.jsonl").unlink()
    reading, metrics = read(run)
    assert (reading.state, reading.remark) == ("failed", "RunError: a b")
    assert is_about(describe_run(reading, metrics)[-1], "metrics")
    assert content_of(run)["panels"] == []


def test_invalid_run_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=mentions(tmp_path / "nowhere", "directory")):
        check_run_directory(tmp_path / "nowhere")
    parts = (tmp_path, "config.yaml", "metrics.jsonl", "status.json")
    with pytest.raises(ValueError, match=mentions(*parts)):
        check_run_directory(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=mentions(tmp_path / "file", "directory")):
        check_run_directory(tmp_path / "file")


def test_report_is_one_call(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"step": 3, "train/psnr": 20.0}], state="finished", step=3)
    seen: list[kl_vae.visual.report.RunReport] = []
    result = kl_vae.report(run, watch_seconds=0.01, on_report=seen.append)
    assert seen == [result] and result.page == run / "report.html"
    assert result.page.read_text().startswith("<!doctype html>")
    assert (result.reading.state, result.metrics.latest) == ("finished", 3)
    assert "psnr" in result.text
    result.page.unlink()
    assert kl_vae.report(str(run), write=False).page is None and not (run / "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a/x/run", "b/x/run", "c/run", "c/other")]
    assert run_names(runs) == ["a/x/run", "b/x/run", "c/run", "other"]
    assert run_names([tmp_path / "a" / ".." / "run"]) == ["run"]
    with pytest.raises(ValueError, match=mentions("run", "twice")):
        run_names([tmp_path / "run", tmp_path / "a" / ".." / "run"])
    with pytest.raises(ValueError, match=mentions("run_dir", "runs/NAME")):
        kl_vae.report([])


def test_tables_of_runs_have_a_column_per_run(tmp_path: Path) -> None:
    first = [{"step": 5, "val/psnr": 24.5}, {"step": 9, "val/psnr": 23.0, "val/rec_loss": "nan"}]
    runs = [
        read(write_run(tmp_path / "a", first, state="finished", step=9)),
        read(write_run(tmp_path / "b", [{"step": 3, "train/psnr": 20.0, "epoch": 1}])),
    ]
    (tmp_path / "b" / "config.yaml").write_text("training: {global_batch_size: 8, seed: [1]}\n")
    readings, files = [read(tmp_path / name)[0] for name in "ab"], [file for _, file in runs]
    assert last_metrics(files) == [
        ["val/rec_loss", "nan", ""],
        ["train/psnr (dB)", "", "20"],
        ["val/psnr (dB)", "23", ""],
    ]
    assert best_metrics(files) == [
        ["val/rec_loss, lowest", "none", ""],
        ["val/psnr (dB), highest", "24.5 at step 5", ""],
    ]
    assert config_differences(readings) == [
        ["model.params.ddconfig.resolution", "16", "not set"],
        ["training.max_steps", "100", "not set"],
        ["training.seed", "not set", "[1]"],
    ]
    assert states(readings)[:2] == [["state", "finished", "unknown"], ["step", "9 of 100", "3"]]
    assert as_text("key", ["a", "long"], [["k", "1.5", ""], ["key 2", "", "2"]]) == [
        *("key      a  long", "k      1.5", "key 2          2"),
    ]


def test_a_config_without_end_is_not_compared(tmp_path: Path) -> None:
    readings = [read(write_run(tmp_path / name, []))[0] for name in "ab"]
    readings[1].config_text = "a: &a {b: *a}\n"
    assert {row[2] for row in config_differences(readings)} == {"not set"}


def test_a_report_of_several_runs_is_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"step": step, "train/psnr": 20.0 + step, "train/logvar": 0.0} for step in (1, 2)]
    runs = [write_run(tmp_path / name / "run", lines, state="finished", step=2) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    result = kl_vae.report(runs)
    assert result.page == Path("report.html") and result.number_running == 0
    assert not (runs[0] / "report.html").exists()
    blocks = result.text.split("\n\n")
    assert [block.split(":")[0] for block in blocks[:2]] == list(map(str, runs))
    assert blocks[2].splitlines()[:2] == [
        *("last metrics     a/run  b/run", "train/psnr (dB)     22     22"),
    ]
    page = result.page.read_text()
    content = json.loads(re.findall(r'id="content">(.*?)</script>', page)[0])
    assert [(panel["unit"], panel["keys"]) for panel in content["panels"]] == [
        ("dB, train/psnr", ["train/psnr"]),  # the log-variance never changes
    ]
    assert [run["name"] for run in content["runs"]] == ["a/run", "b/run"]
    assert "<title>a/run, b/run: finished</title>" in page


def test_invalid_output_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=mentions("--out metrics.jsonl", ".html")):
        check_output(Path("metrics.jsonl"))
    (tmp_path / "a.html").mkdir()
    with pytest.raises(ValueError, match=mentions(tmp_path / "a.html", "report.html")):
        check_output(tmp_path / "a.html")
    (tmp_path / "file").write_text("")
    reading, metrics = read(write_run(tmp_path / "run", []))
    with pytest.raises(ValueError, match=mentions(tmp_path / "file")):
        write_page(tmp_path / "file" / "a.html", [(reading, metrics)])


def test_text_for_a_terminal_is_printable(tmp_path: Path) -> None:
    lines = [{"step": 1, "train/a\x1b[31m": 1.0, "train/\ud800": 2.0}]
    run = write_run(tmp_path / "run", lines, state="failed", reason="\x1b[31mred")
    text = kl_vae.report(run, write=False).text
    assert is_about(text, "a\\x1b[31m", "\\ud800", "\\x1b[31mred")
    assert all(line.isprintable() for line in text.split("\n"))
