"""What a run directory must be, and what may change before a run goes on."""

from pathlib import Path
from typing import Any

import pytest

from kl_vae.training.run_directory import (
    HARMLESS,
    check_run,
    prepare_run,
    say_how_it_ended,
    write_status,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


CONFIG: dict[str, Any] = {"optimizer": {"betas": (0.9, 0.99)}, "training": {"max_steps": 5}}


def test_a_new_or_empty_directory_holds_no_run(tmp_path: Path) -> None:
    assert not check_run(tmp_path / "new", CONFIG)
    assert not check_run(tmp_path, CONFIG)
    assert not (tmp_path / "new").exists()


def test_a_run_of_the_same_config_goes_on(run: Path) -> None:
    prepare_run(run, CONFIG)
    assert check_run(run, CONFIG)


def test_the_length_may_change_and_is_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare_run(run, CONFIG)
    caplog.set_level("INFO")
    assert check_run(run, {**CONFIG, "training": {"max_steps": 9}})
    assert caplog.messages == ["resuming: training.max_steps was 5 and is now 9"]


def test_a_start_that_was_killed_leaves_a_directory_that_can_be_used(run: Path) -> None:
    for name in (".lock", ".123.tmp"):
        (run / name).touch()
    assert not check_run(run, CONFIG)
    (run / "notes.txt").touch()
    with pytest.raises(ValueError, match="not empty, and holds no run"):
        check_run(run, CONFIG)


def test_what_cut_short_saves_have_left_is_removed(run: Path) -> None:
    others = [run / ".hidden.tmp", run / "checkpoints" / "5.tmp", run / "samples" / "a.png"]
    for path in (run / ".1.tmp", run / "checkpoints" / ".22.tmp", run / "samples" / ".333.tmp"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in others:
        path.touch()
    prepare_run(run, CONFIG)
    left = {path for path in run.rglob("*") if path.is_file()}
    assert left == {*others, run / "config.yaml"}


def test_a_config_that_is_too_large_is_refused(run: Path) -> None:
    (run / "config.yaml").write_text("#" * (1 << 20) + "\na: 1\n")
    with pytest.raises(ValueError, match="config.yaml: over 1048576 bytes"):
        check_run(run, CONFIG)


def test_how_the_last_part_ended_is_said(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    say_how_it_ended(run)
    write_status(run, "finished", 5, 5)
    say_how_it_ended(run)
    write_status(run, "stopped", 5, 9, reason="SIGTERM")
    say_how_it_ended(run)
    assert caplog.messages == []
    write_status(run, "running", 7, 9)
    say_how_it_ended(run)
    assert "the last part of this run ended without a word after step 7 (" in caplog.messages[0]
    write_status(run, "failed", 7, 9, reason="RunError: rank 1 failed: boom")
    say_how_it_ended(run)
    assert caplog.messages[1] == "the last part of this run failed: RunError: rank 1 failed: boom"
    for text in ("{", "5", "[" * 100_000):
        (run / "status.json").write_text(text)
        say_how_it_ended(run)
    assert len(caplog.messages) == 2


def test_a_status_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_status(tmp_path / "gone", "running", 1, 2)
    assert "gone/status.json cannot be written (No such file or directory)" in caplog.text


def test_every_harmless_key_is_a_key_of_the_config() -> None:
    import dataclasses

    from kl_vae.training.config import RunConfig

    config = dataclasses.asdict(RunConfig.load("example"))
    for key in HARMLESS:
        section = config
        for name in key.split("."):
            assert name in section
            section = section[name]


def test_all_that_changed_is_named_at_once(run: Path) -> None:
    prepare_run(run, CONFIG)
    other = {"optimizer": {"betas": (0.5, 0.9)}, "training": {"max_steps": 5, "seed": 1}}
    with pytest.raises(ValueError) as error:
        check_run(run, other)
    text = str(error.value)
    assert "optimizer.betas was [0.9, 0.99] and is now [0.5, 0.9]" in text
    assert "training.seed was None and is now 1" in text
    assert "choose another --run-dir" in text and "\n" not in text
