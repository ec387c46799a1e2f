"""Holding out by name, and the fingerprint."""

import os
from pathlib import Path

import pytest

from kl_vae.data import fingerprint, held_out, split

PATHS = [f"folder/{number}.png" for number in range(4000)]


def test_the_parts_are_complete_and_in_order() -> None:
    training, validation = split(PATHS, 0.05)
    assert sorted(training + validation) == sorted(PATHS)
    assert training == [path for path in PATHS if path in set(training)]
    assert 150 < len(validation) < 250  # 200 expected, standard deviation 14


def test_a_file_stays_where_it_is_when_others_come_and_go() -> None:
    _, before = split(PATHS[:2000], 0.1)
    _, after = split(PATHS[::-1], 0.1)
    assert set(before) == set(after) & set(PATHS[:2000])


def test_a_larger_fraction_holds_out_more_of_the_same() -> None:
    assert set(split(PATHS, 0.05)[1]) < set(split(PATHS, 0.2)[1])
    assert split(PATHS, 0) == (PATHS, [])


def test_the_choice_never_changes_between_versions() -> None:
    assert [number for number in range(40) if held_out(f"{number}.png", 0.1)] == [11, 26]


@pytest.mark.parametrize("fraction", [-0.1, 1, float("nan")])
def test_fractions_that_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction={fraction}: give a number of at least 0"):
        split(PATHS, fraction)


def test_fingerprint_depends_on_names_sizes_and_order(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"12")
    first = fingerprint(tmp_path, ["a", "b"])
    assert len(first) == 32
    assert first == fingerprint(tmp_path, ["a", "b"])
    others = {fingerprint(tmp_path, names) for names in (["b", "a"], ["a"], ["a", "c"], ["ab"][:0])}
    (tmp_path / "b").write_bytes(b"123")
    others.add(fingerprint(tmp_path, ["a", "b"]))
    assert len(others) == 5
    assert first not in others


def test_fingerprint_of_files_that_have_no_size(tmp_path: Path) -> None:
    odd, empty = tmp_path / "odd", tmp_path / "empty"
    (odd / "folder").mkdir(parents=True)
    empty.mkdir()
    os.mkfifo(odd / "pipe")
    (odd / "loop").symlink_to(odd / "loop")
    for name in ("folder", "pipe", "loop", "gone"):
        (empty / name).touch()
        assert fingerprint(odd, [name]) == fingerprint(tmp_path / "nowhere", [name])
        assert fingerprint(odd, [name]) != fingerprint(empty, [name])
