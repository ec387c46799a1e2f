"""Units of work that are recorded and taken up again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kl_vae.inference.progress import FOLDER, Progress, units_of
from kl_vae.runtime.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
WORK = {"seed": 0, "images": ["a", "b"], "size": (1, 2)}


def test_units_are_of_consecutive_images() -> None:
    assert units_of(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    assert units_of(6, 3) == [range(0, 3), range(3, 6)]
    assert units_of(0, 3) == []
    with pytest.raises(ValueError, match="size=0: give at least 1 image a unit"):
        units_of(7, 0)


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    progress = Progress(out, WORK, False, ALONE)
    assert progress.share(3) == [0, 1, 2]
    progress.path(1, ".npy").write_bytes(b"x")
    assert progress.share(3) == [0, 1, 2]  # what a unit keeps is no record
    progress.write(1, {"psnr": 20.5})
    again = Progress(out, WORK, True, ALONE)
    assert again.share(3) == [0, 2]
    again.write(0, [None])
    again.write(2, "c")
    assert list(again.read(3)) == [[None], {"psnr": 20.5}, "c"]
    again.close()
    assert not (out / FOLDER).exists()


def test_resuming_nothing_begins(tmp_path: Path) -> None:
    assert Progress(tmp_path, WORK, True, ALONE).share(2) == [0, 1]


def test_unfinished_work_is_not_thrown_away(tmp_path: Path) -> None:
    Progress(tmp_path, WORK, False, ALONE)
    with pytest.raises(ValueError, match="had done all; give --resume to go on, or remove that"):
        Progress(tmp_path, WORK, False, ALONE)


def test_other_work_is_refused_by_what_differs(tmp_path: Path) -> None:
    Progress(tmp_path, WORK, False, ALONE)
    text = r"holds other work \(seed was 0 and is now 1\); give the same again to resume it, or"
    with pytest.raises(ValueError, match=text):
        Progress(tmp_path, {**WORK, "seed": 1}, True, ALONE)


def test_a_damaged_record_of_what_it_is(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "identity.json").write_text("[1")
    with pytest.raises(ValueError, match=r"identity.json: cannot be read \(.*; remove"):
        Progress(tmp_path, WORK, True, ALONE)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*file/\.unfinished \(.*\); make room and"):
        Progress(tmp_path / "file", WORK, False, ALONE)


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    progress = Progress(tmp_path, WORK, False, ALONE)
    progress.close()
    (tmp_path / FOLDER).write_text("")
    with pytest.raises(ValueError, match="cannot write .*; make room and permission for it, or"):
        progress.write(0, 1)
