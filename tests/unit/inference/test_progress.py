"""Units of work: their records, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kl_vae.inference.progress import FOLDER, Progress, units_of
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
    (tmp_path / FOLDER / "identity.json").write_text("[1")
    with pytest.raises(ValueError, match=mentions(tmp_path / FOLDER / "identity.json")):
        Progress(tmp_path, WORK, True, ALONE)


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
