"""Checkpoint files of a run: atomic writes and detection of damage."""

import hashlib
import json
import logging
import resource
from pathlib import Path

import pytest
import torch

from kl_vae.checkpoints.run_files import (
    BEST,
    best_checkpoint,
    checkpoint_path,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    remove_checkpoint,
    write_checkpoint,
)
from tests.messages import is_about, mentions


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1, 20 and 300."""
    for step in (20, 300, 1):
        write_checkpoint(checkpoint_path(tmp_path, step), {"step": step, "x": torch.ones(3)})
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(run: Path) -> None:
    content = read_checkpoint(checkpoint_path(run, 20))
    assert content["step"] == 20
    assert torch.equal(content["x"], torch.ones(3))


def test_the_sha256_file_has_the_format_of_sha256sum(run: Path) -> None:
    path = run / "checkpoints" / "step_00000020.pt"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_name("step_00000020.pt.sha256").read_text() == f"{digest}  {path.name}\n"


def test_content_that_cannot_be_saved_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        write_checkpoint(tmp_path / "model.pt", {"f": lambda: None})
    assert names(tmp_path) == []


def test_a_full_disk_is_an_oserror_and_keeps_the_old_file(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save raises a RuntimeError instead, without the reason."""
    path = checkpoint_path(run, 300)
    before = {file: (run / "checkpoints" / file).read_bytes() for file in names(path.parent)}
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, room[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(path, {"x": torch.randn(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
    assert {file: (path.parent / file).read_bytes() for file in names(path.parent)} == before


def test_a_file_that_cannot_be_read_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("kl_vae.checkpoints.run_files.sha256_of", fail)
    with pytest.raises(ValueError, match=mentions("step_00000300.pt", "Input/output error")):
        read_checkpoint(checkpoint_path(run, 300))


def test_a_changed_byte_is_detected_by_the_sha256(run: Path) -> None:
    path = checkpoint_path(run, 300)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=mentions("step_00000300.pt", "sha256")):
        read_checkpoint(path)


def test_a_checkpoint_without_its_sha256_file_is_read(run: Path) -> None:
    path = checkpoint_path(run, 300)
    path.with_name(path.name + ".sha256").unlink()
    assert read_checkpoint(path)["step"] == 300


def test_a_file_of_another_program_is_an_error(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=mentions("model.pt", "checkpoint", "kl_vae")):
        read_checkpoint(tmp_path / "model.pt")


def test_checkpoints_are_listed_newest_first(run: Path) -> None:
    assert list_checkpoints(run) == [checkpoint_path(run, step) for step in (300, 20, 1)]
    assert list_checkpoints(run / "elsewhere") == []
    for name in ("step_best.pt", "step_00000301.pt.sha256", ".123.tmp", "step_123456789.pt"):
        (run / "checkpoints" / name).touch()
    steps = (123456789, 300, 20, 1)
    assert list_checkpoints(run) == [checkpoint_path(run, step) for step in steps]


def test_damaged_checkpoints_are_skipped_and_logged(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_checkpoint(run) is not None
    assert caplog.messages == []
    truncated = checkpoint_path(run, 300)
    truncated.write_bytes(truncated.read_bytes()[:-100])
    (run / "checkpoints" / "step_00000020.pt.sha256").write_bytes(b"\xff\x00")
    with caplog.at_level(logging.WARNING, "kl_vae"):
        newest = newest_checkpoint(run)
    assert newest is not None
    assert newest[0] == checkpoint_path(run, 1)
    assert newest[1]["step"] == 1
    first, second = caplog.messages
    assert is_about(first, "step_00000300.pt", "sha256")
    assert is_about(second, "step_00000020.pt", "sha256")


def test_a_run_without_a_checkpoint_has_no_newest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None


def test_a_run_without_a_checkpoint_that_can_be_read_is_refused(run: Path) -> None:
    for path in list_checkpoints(run):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=mentions(f"{run}:", "checkpoints")):
        newest_checkpoint(run)


def test_the_best_checkpoint_is_read_from_best_json(run: Path) -> None:
    best = run / "checkpoints" / BEST
    assert best_checkpoint(run) is None
    best.write_text('{"checkpoint": "step_00000020.pt"}')
    assert best_checkpoint(run) == checkpoint_path(run, 20)
    others = ["step_00000021.pt", "s" * 1000, "\0", "\ud800", 1, None]
    damaged = [json.dumps({"checkpoint": name}) for name in others]
    for text in ("[" * 100_000, "{", "[]", "{}", *damaged):
        best.write_text(text)
        assert best_checkpoint(run) is None
    (run / "step_0.pt").touch()
    best.write_text('{"checkpoint": "../step_0.pt"}')
    assert best_checkpoint(run) is None


def test_removing_a_checkpoint_removes_its_sha256(run: Path) -> None:
    remove_checkpoint(checkpoint_path(run, 300))
    remove_checkpoint(checkpoint_path(run, 300))  # again
    assert names(run / "checkpoints") == [
        f"step_{step:08d}.pt{end}" for step in (1, 20) for end in ("", ".sha256")
    ]
