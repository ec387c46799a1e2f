"""Units of work: their records, and resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae.inference.progress import FOLDER, Progress, read_identity, units_of
from kl_vae.runtime.distributed import Ranks
from tests.messages import mentions

ALONE = Ranks(0, 1, torch.device("cpu"))
WORK = {"seed": 0, "images": ["a", "b"], "size": (1, 2)}


def test_units_are_ranges_of_consecutive_images() -> None:
    assert units_of(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    assert units_of(6, 3) == [range(0, 3), range(3, 6)]
    assert units_of(0, 3) == []
    with pytest.raises(ValueError, match=mentions("size=0", 1)):
        units_of(7, 0)


def test_finished_units_are_not_repeated(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    progress = Progress(out, WORK, False, ALONE)
    assert progress.share(3) == [0, 1, 2]
    progress.path(1, ".npy").write_bytes(b"x")
    assert progress.share(3) == [0, 1, 2]  # a kept file is not a record
    progress.write(1, {"psnr": 20.5})
    again = Progress(out, WORK, True, ALONE)
    assert again.share(3) == [0, 2]
    again.write(0, [None])
    again.write(2, "c")
    assert list(again.read(3)) == [[None], {"psnr": 20.5}, "c"]
    again.close()
    assert not (out / FOLDER).exists()


def test_resume_without_a_record_starts_from_the_first_unit(tmp_path: Path) -> None:
    assert Progress(tmp_path, WORK, True, ALONE).share(2) == [0, 1]


def test_unfinished_work_is_not_overwritten(tmp_path: Path) -> None:
    Progress(tmp_path, WORK, False, ALONE)
    with pytest.raises(ValueError, match=mentions(tmp_path / FOLDER, "--resume")):
        Progress(tmp_path, WORK, False, ALONE)


def test_resume_with_other_arguments_names_the_difference(tmp_path: Path) -> None:
    Progress(tmp_path, WORK, False, ALONE)
    with pytest.raises(ValueError, match=mentions(tmp_path / FOLDER, "seed", 0, 1, "--out")):
        Progress(tmp_path, {**WORK, "seed": 1}, True, ALONE)


def test_a_damaged_identity_file(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    for text in ("[1", "[" * 100_000, "3"):
        (tmp_path / FOLDER / "identity.json").write_text(text)
        with pytest.raises(ValueError, match=mentions(tmp_path / FOLDER / "identity.json")):
            Progress(tmp_path, WORK, True, ALONE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: {**record, "result": {"psnr": 21.5}},
        lambda record: {**record, "files": {}, "checksum": 3},
        lambda record: {key: record[key] for key in ("result", "files")},  # of version 0.1
        lambda record: [record],
    ],
)
def test_a_damaged_record_is_done_again(tmp_path: Path, damage: Callable[[Any], Any]) -> None:
    with Progress(tmp_path, WORK, False, ALONE) as progress:
        progress.write(0, {"psnr": 20.5, "name": "é\ud800"})
        progress.write(1, None)
    path = tmp_path / FOLDER / "0000000.json"
    with Progress(tmp_path, WORK, True, ALONE) as again:
        assert again.share(2) == [] and again.find(0) == {"psnr": 20.5, "name": "é\ud800"}
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with Progress(tmp_path, WORK, True, ALONE) as again:
        assert again.share(2) == [0] and again.find(0) is None


def test_the_names_of_differences_are_printable(tmp_path: Path) -> None:
    Progress(tmp_path, {**WORK, "\x1b[31m": "a" * 10_000}, False, ALONE).__exit__(None, None, None)
    with pytest.raises(ValueError, match=mentions(tmp_path / FOLDER, "\\x1b[31m")) as caught:
        Progress(tmp_path, WORK, True, ALONE)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=mentions("file/.unfinished", "Not a directory")):
        Progress(tmp_path / "file", WORK, False, ALONE)


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    progress = Progress(tmp_path, WORK, False, ALONE)
    progress.close()
    (tmp_path / FOLDER).write_text("")
    with pytest.raises(ValueError, match=mentions(FOLDER, "Not a directory")):
        progress.write(0, 1)


def files_of(out: Path) -> Callable[[int, Any], list[Path]]:
    return lambda unit, record: [out / "sub" / f"{unit}.png", out / "sub" / f"{unit}.npy"]


@pytest.mark.parametrize("damage", ["emptied", "removed", "replaced by a link"])
def test_a_unit_is_finished_if_its_files_are_complete(tmp_path: Path, damage: str) -> None:
    progress = Progress(tmp_path, WORK, False, ALONE, files=files_of(tmp_path))
    (tmp_path / "sub").mkdir()
    for unit in range(3):
        for path in files_of(tmp_path)(unit, None):
            path.write_bytes(b"image")
        progress.write(unit, unit)
    path = tmp_path / "sub" / "1.npy"
    path.unlink()
    if damage == "emptied":
        path.touch()
    elif damage == "replaced by a link":
        path.symlink_to("0.npy")
    assert Progress(tmp_path, WORK, True, ALONE).share(3) == [1]


def test_a_damaged_record_is_of_no_unit(tmp_path: Path) -> None:
    progress = Progress(tmp_path, WORK, False, ALONE)
    progress.write(0, "a")
    progress.path(0, ".json").write_text("")
    assert progress.share(1) == [0]
    assert progress.find(0) is None


def test_files_are_on_disk_before_their_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Content and names, down from the output folder; and the result before the records go."""
    out = tmp_path / "out"
    progress = Progress(out, WORK, False, ALONE, files=files_of(out))
    (out / "sub").mkdir()
    for path in files_of(out)(0, None):
        path.write_bytes(b"image")
    synced: list[str] = []
    fsync = os.fsync

    def note_fsync(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    progress.write(0, "a")
    assert set(synced[:2]) == {"out/sub/0.png", "out/sub/0.npy"}
    assert set(synced[2:4]) == {"out", "out/sub"}
    assert synced[4].startswith(f"out/{FOLDER}/.") and synced[5] == f"out/{FOLDER}"
    synced.clear()
    (out / "result").write_text("finished")
    progress.close([out / "result"])
    assert synced == ["out/result", "out"]


def test_a_finished_result_of_other_arguments_is_kept(tmp_path: Path) -> None:
    def start(seed: int, **arguments: Any) -> Progress:
        def finished() -> Any:
            return read_identity(tmp_path / "result.json")

        return Progress(
            tmp_path, {**WORK, "seed": seed}, ranks=ALONE, finished=finished, **arguments
        )

    with start(0, resume=False) as progress:
        (tmp_path / "result.json").write_text(json.dumps({"identity": progress.identity}))
        progress.close()
    for resume in (False, True):
        with pytest.raises(ValueError, match=mentions(tmp_path, "seed", 0, 1, "--overwrite")):
            start(1, resume=resume)
        assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
        with start(0, resume=resume):  # the same result
            pass
        start(0, resume=True).close()
    start(1, resume=False, overwrite=True).write(0, "a")
    assert start(2, resume=False, overwrite=True).share(1) == [0]
    with pytest.raises(ValueError, match=mentions("resume", "overwrite")):
        start(0, resume=True, overwrite=True)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"identity": 3}'])
def test_a_result_that_states_no_settings_is_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=mentions(tmp_path, "--overwrite")):
        Progress(tmp_path, WORK, False, ALONE, finished=lambda: read_identity(path))
    assert path.read_text() == content
    Progress(tmp_path, WORK, False, ALONE, overwrite=True, finished=lambda: read_identity(path))


HOLD = """
import sys, torch
from pathlib import Path
from kl_vae.inference.progress import Progress
from kl_vae.runtime.distributed import Ranks
Progress(Path(sys.argv[1]), {}, False, Ranks(0, 1, torch.device("cpu")))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        for arguments in (
            {"resume": False},
            {"resume": True},
            {"resume": False, "overwrite": True},
        ):
            with pytest.raises(ValueError, match=mentions(tmp_path, "process", "--out")):
                Progress(tmp_path, {}, ranks=ALONE, **arguments)
        first.kill()
    with Progress(tmp_path, {}, True, ALONE) as progress:
        progress.close()
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_a_killed_command_are_removed(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    for folder in (tmp_path, tmp_path / FOLDER):
        (folder / ".123.tmp").write_bytes(b"half")
    Progress(tmp_path, WORK, False, ALONE)
    assert list(tmp_path.rglob(".*.tmp")) == []


def test_a_link_in_the_place_of_the_records_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / FOLDER).symlink_to("elsewhere")
    with pytest.raises(ValueError, match=mentions(tmp_path / FOLDER, "link")):
        Progress(tmp_path, WORK, False, ALONE, overwrite=True)
    assert list((tmp_path / "elsewhere").iterdir()) == []
