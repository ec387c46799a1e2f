"""`kl-vae report` as a user types it, and its page in a browser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kl_vae.cli.main import main
from tests.browser import chromium, complaints, open_page, requested, width_of
from tests.messages import is_about
from tests.processes import metrics


def fake_run(folder: Path, state: str, step: int = 10) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("training: {max_steps: 20}\n")
    status = {"state": state, "step": step, "total_steps": 20, "pid": os.getpid()}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "train/psnr": 20.5}) + "\n")
    return folder


def value(browser: Any, key: str) -> str:
    """What a plot reads for a figure."""
    script = "return document.querySelector(`[data-key='${arguments[0]}'] .value`).textContent"
    return str(browser.execute_script(script, key))


def path(browser: Any, key: str) -> str:
    """The curve of a figure."""
    script = "return document.querySelector(`path.line[data-key='${arguments[0]}']`)"
    return str(browser.execute_script(f"{script}.getAttribute('d')", key))


def plot(browser: Any, title: str) -> Any:
    return browser.find_element("css selector", f"[data-title='{title}']")


def test_a_run_as_text_and_as_a_page_in_a_browser(project: Path, capsys: Any) -> None:
    from selenium.webdriver import ActionChains, Keys

    run = Path("run")
    arguments = ["--run-dir", "run", "training.validate_every_steps=2", "training.ema_decay=0.5"]
    assert main(["train", "tiny.yaml", *arguments]) == 0
    capsys.readouterr()

    assert main(["report", "run", "--text"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert is_about(text[0], "run", "finished", "step 6", "100%")
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    score = (f"val/rec_loss {best['value']:.5g}", f"step {best['step']}", best["checkpoint"])
    assert is_about(" ".join(text), *score)
    (line,) = [line for line in text if line.startswith("ssim ")]
    last = metrics(run)[-1]
    assert line.split() == ["ssim", f"{last['val/ssim']:.5g}", f"{last['val_ema/ssim']:.5g}"]
    assert len(text) <= 16 and not (run / "report.html").exists()

    assert main(["report", "run"]) == 0
    (printed,) = capsys.readouterr().out.splitlines()
    assert is_about(printed, "run/report.html", 6, "finished")
    lines: dict[str, dict[int, Any]] = {"val": {}, "train": {}}
    for line in metrics(run):
        lines["val" if "val/psnr" in line else "train"][line["step"]] = line
    with chromium() as browser:
        open_page(browser, run / "report.html")
        assert browser.title == "run: finished"

        # plots with all of their figures
        psnr = plot(browser, "PSNR dB")
        curves = psnr.find_elements("css selector", "path.line")
        keys = ["train/psnr", "val/psnr", "val_ema/psnr"]
        assert [curve.get_attribute("data-key") for curve in curves] == keys
        assert path(browser, "train/psnr").count("L") == 5
        assert path(browser, "val/psnr").count("L") == 2
        maps = browser.find_elements("css selector", "#latents .plot")
        assert len(maps) == 6  # mean and std of each split
        assert "1e-4" in browser.find_element("id", "constants").text  # kl_weight

        # one step is read in all plots: the values of metrics.jsonl
        assert value(browser, "val/psnr") == f"{lines['val'][6]['val/psnr']:.3f}"
        svg = psnr.find_element("css selector", "svg:not(.swatch)")
        width = svg.size["width"]
        left, right = 54, width - 10  # the frame's margins; steps 1 to 6

        def move_to(step: float) -> ActionChains:
            x = left + (step - 1) / 5 * (right - left) - width / 2
            return ActionChains(browser, duration=20).move_to_element_with_offset(svg, round(x), 0)

        move_to(4).perform()
        time.sleep(0.1)  # an animation frame
        assert browser.find_element("id", "at").text == "step 4"
        shown = float(value(browser, "val/psnr"))
        assert shown == pytest.approx(lines["val"][4]["val/psnr"], rel=1e-4)
        for key in ("train/rec_loss", "train/grad_norm", "images_per_second"):
            assert float(value(browser, key)) == pytest.approx(lines["train"][4][key], rel=1e-4)
        assert len(browser.find_elements("css selector", ".cursor")) == len(
            browser.find_elements("css selector", ".plot")
        )

        # a drag zooms all plots, a double click undoes it
        whole_run = path(browser, "train/rec_loss")
        move_to(2).click_and_hold().perform()
        move_to(5).release().perform()
        # a pixel beside a step leaves it out
        assert re.fullmatch("steps [23] to [45]", browser.find_element("id", "range").text)
        assert path(browser, "train/rec_loss") != whole_run
        ActionChains(browser, duration=20).double_click(svg).perform()
        assert path(browser, "train/rec_loss") == whole_run

        # scales and smoothing
        before = path(browser, "train/psnr")
        psnr.find_element("css selector", "header button").click()
        logarithmic = path(browser, "train/psnr")
        assert logarithmic != before and "log=PSNR" in browser.current_url
        browser.execute_script(
            "const s = document.getElementById('smooth'); s.value = 0;"
            "s.dispatchEvent(new Event('input'))"
        )
        assert path(browser, "train/psnr") != logarithmic
        assert not browser.find_elements("css selector", "path.raw")

        # images through time
        def picture() -> str:
            script = "const i = document.querySelector('[data-name=prior] img');"
            script += "return `${i.src.split('/').pop()} ${i.complete && i.naturalWidth > 0}`"
            return str(browser.execute_script(script))

        assert picture() == "prior_00000006.png true"
        browser.find_element("tag name", "body").send_keys(Keys.ARROW_LEFT)
        time.sleep(0.1)
        assert picture() == "prior_00000004.png true"

        # the config is searched, with the keys that a line stands under
        browser.find_element("id", "search").send_keys("z_chan")
        assert browser.find_element("id", "config").text.split() == [
            *("model:", "params:", "ddconfig:", "z_channels:", "4"),
        ]
        lines_button = browser.find_element("id", "as-lines")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", lines_button)
        lines_button.click()
        assert path(browser, "val/latent_mean/3").count("L") == 2

        # what was chosen outlives a reload; nothing came from elsewhere
        browser.refresh()
        assert "log=PSNR" in browser.current_url and path(browser, "val/latent_mean/3")
        assert complaints(browser) == []
        urls = requested(browser)
        assert urls and all(url.startswith(("file:", "about:")) for url in urls)


def test_one_file_holds_the_pictures(tmp_path: Path) -> None:
    run, page = fake_run(tmp_path / "run", "finished"), tmp_path / "elsewhere" / "page.html"
    (run / "samples").mkdir()
    for name in ("prior", "reconstructions"):
        Image.new("RGB", (20, 10)).save(run / "samples" / f"{name}_00000010.png")
    assert main(["report", str(run), "--embed", "--out", str(page)]) == 0
    (run / "samples").rename(tmp_path / "hidden")
    with chromium() as browser:
        open_page(browser, page)
        script = "return [...document.images].map((i) => [i.src.slice(0, 15), i.naturalWidth])"
        time.sleep(0.1)
        assert browser.execute_script(script) == [["data:image/png;", 20]] * 2
        assert complaints(browser) == []


def test_a_page_of_several_runs_compares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a", "b", "other")):
        (tmp_path / name).mkdir()
        run = fake_run(tmp_path / name / ("run" if i < 2 else "last"), "finished")
        lines = [{"step": x, "train/psnr": 20.5 + i, "val/psnr": 19.5 + i} for x in (5, 10)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (run / "config.yaml").write_text(f"training: {{max_steps: 20, seed: {i}}}\n")
        (run / "samples").mkdir()
        for step in (5, 10):
            Image.new("RGB", (20, 10)).save(run / "samples" / f"prior_{step:08d}.png")
    names = ["a/run", "b/run", "last"]
    assert main(["report", "a/run", "b/run", "other/last"]) == 0
    assert capsys.readouterr().out == "report: report.html (3 runs, 0 running)\n"
    with chromium() as browser:
        open_page(browser, tmp_path / "report.html")

        def texts(selector: str) -> list[str]:
            return [x.text for x in browser.find_elements("css selector", selector)]

        psnr = plot(browser, "PSNR dB, val/psnr")
        curves = psnr.find_elements("css selector", "path.line")
        colors = {curve.value_of_css_property("stroke") for curve in curves}
        assert len(curves) == len(colors) == 3
        legend = [x.text for x in psnr.find_elements("css selector", ".readout .label")]
        assert legend == names
        assert value(browser, "b/run: val/psnr") == "20.500"
        heads = [x.split() for x in texts("table.numbers tr:first-child")]
        assert [head[-3:] for head in heads] == [names] * 4
        assert "val/psnr (dB) 19.5 20.5 21.5" in texts("#overview tr")
        assert texts("#differences tr")[1:] == ["training.seed 0 1 2"]
        assert texts("#samples figcaption") == [f"{name}: prior, step 10" for name in names]
        script = "return [...document.images].map((i) => i.naturalWidth)"
        assert browser.execute_script(script) == [20] * 3
        assert not browser.find_element("id", "config").is_displayed()
        assert complaints(browser) == []


@pytest.mark.parametrize("number", [1, 6])
def test_a_page_is_no_wider_than_a_phone(number: int, tmp_path: Path) -> None:
    long = "a_name_without_any_gap_" * 8
    for i in range(number):
        run = fake_run(tmp_path / f"{i}{long}", "failed")
        line = {"step": 1, long: i, f"val/{long}": 1.5, "val_ema/psnr": 21.0, "train/kl_loss": 3e9}
        (run / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")
        (run / "config.yaml").write_text(f"{long}: {long}{i}\n")
        (run / "bad_images.txt").write_text(f"{long}\t{long}\n")
        status = {"state": "failed", "step": 1, "reason": long}
        (run / "status.json").write_text(json.dumps(status))
        (run / "samples").mkdir()
        Image.new("RGB", (700, 200)).save(run / "samples" / f"{long[:40]}_00000010.png")
    runs = [str(run) for run in tmp_path.iterdir()]
    page = tmp_path / "page.html"
    assert main(["report", *runs, "--out", str(page)]) == 0
    with chromium() as browser:
        open_page(browser, page)
        assert [width_of(browser, width) for width in (390, 1400)] == [390, 1400]


def test_hostile_names_are_shown_as_text(tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    run = fake_run(tmp_path / "<b>run", "failed")
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 1, "reason": bad}))
    (run / "config.yaml").write_text(f"a: {bad!r}\n")
    (run / "bad_images.txt").write_text(f"{bad}\t{bad}\n")
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": i, bad: i, "v": [bad, i], "train/psnr": "nan"}) + "\n"
            for i in (1, 2)
        )
    )
    assert main(["report", str(run)]) == 0
    with chromium() as browser:
        open_page(browser, run / "report.html")
        assert browser.find_element("id", "name").text == "<b>run"
        assert browser.find_element("id", "remark").text == bad
        assert browser.find_element("id", "config").text == f"a: {bad!r}"
        assert bad in plot(browser, bad.replace("'", "\\'")).text
        assert not browser.find_elements("css selector", "img, script[src]")
        broken = browser.find_elements("css selector", "path.broken")
        assert [mark.get_attribute("data-key") for mark in broken] == ["train/psnr"] * 2
        assert complaints(browser) == []


def test_the_page_of_a_run_without_metrics(tmp_path: Path, capsys: Any) -> None:
    run = fake_run(tmp_path / "run", "running", step=0)
    (run / "metrics.jsonl").unlink()
    assert main(["report", str(run)]) == 0
    assert is_about(capsys.readouterr().out, "step 0", 20, "running")
    with chromium(dark=True) as browser:
        open_page(browser, run / "report.html")
        assert "No metrics yet" in browser.find_element("id", "empty").text
        assert browser.find_element("tag name", "html").get_attribute("class") == "dark"
        assert complaints(browser) == []


def once_there(page: Path, then: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a page is there."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not page.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_watch_ends_with_the_run(tmp_path: Path, capsys: Any) -> None:
    run = fake_run(tmp_path / "run", "running")
    page = run / "report.html"

    def go_on() -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 20, "train/psnr": 23.25}) + "\n")
        status = {"state": "finished", "step": 20, "total_steps": 20}
        (run / "new.json").write_text(json.dumps(status))
        (run / "new.json").replace(run / "status.json")

    thread = once_there(page, go_on)
    assert main(["report", str(run), "--watch", "1"]) == 0
    thread.join()
    (line,) = capsys.readouterr().out.splitlines()
    assert is_about(line, page, "step 20", "finished")
    assert "23.25" in page.read_text()


def test_watching_several_runs_lasts_as_long_as_any_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_run(tmp_path / "ended", "finished")
    running = fake_run(tmp_path / "running", "running")
    status = {"state": "stopped", "step": 15, "total_steps": 20}
    page = tmp_path / "report.html"
    thread = once_there(page, lambda: (running / "status.json").write_text(json.dumps(status)))
    assert main(["report", "ended", "running", "--watch", "1"]) == 0
    thread.join()
    assert capsys.readouterr().out == "report: report.html (2 runs, 0 running)\n"
    assert "15 of 20" in page.read_text()


def test_ctrl_c_ends_watching_cleanly(tmp_path: Path, capsys: Any) -> None:
    run = fake_run(tmp_path / "run", "running")
    page = run / "report.html"
    thread = once_there(page, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(["report", str(run), "--watch", "600"]) == 0
    thread.join()
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert is_about(line, page, "step 10", 20, "running") and captured.err == ""


def test_text_may_be_cut_short_by_its_reader(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "finished")
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does
    command = [sys.executable, "-m", "kl_vae", "report", str(run), "--text"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


MISTAKES = {
    "no run": (["nowhere"], ("nowhere", "run")),
    "a project": (["."], ("config.yaml", "metrics.jsonl", "status.json")),
    "no page": (["run", "--out", "run/metrics.jsonl"], (".html",)),
    "twice": (["run", "./run"], ("run", "twice")),
    "unwritable": (["run", "--out", "tiny.yaml/a.html"], ("tiny.yaml",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_is_one_line_and_changes_nothing(mistake: str, project: Path, capsys: Any) -> None:
    arguments, parts = MISTAKES[mistake]
    fake_run(project / "run", "finished")
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    assert main(["report", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kl-vae report: error: ") and is_about(line, *parts)
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_of_several_ranks_the_first_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = fake_run(tmp_path / "run", "finished")
    monkeypatch.setenv("RANK", "1")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == "" and not (run / "report.html").exists()
    monkeypatch.setenv("RANK", "0")
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").exists()
