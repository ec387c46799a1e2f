"""`kl-vae benchmark listing` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kl_vae.benchmark.listing import CACHED, WITHOUT, WRITTEN, check_folder, make_files
from kl_vae.cli.main import main


def test_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KL_VAE_CACHE", str(tmp_path / "mine"))
    arguments = "--folder files --files 10001 --repeats 1 --out l.json"
    assert main(["benchmark", "listing", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Listing 10,001 files, 1 of each by turns.\n\n| | listing, s |")
    measured = json.loads((tmp_path / "l.json").read_text())["measured"]
    assert list(measured) == [WITHOUT, WRITTEN, CACHED]
    for name, (one,) in measured.items():
        assert f"| {name} | {one['listing']:.4g} |" in printed
        assert one["files"] == 10_001 and one["listing"] > 0 and one["fingerprint"] > 0
        assert one["kept"] < 0.5 * one["as_strings"]
    assert measured[CACHED][0]["listing"] < measured[WITHOUT][0]["listing"]
    assert not (tmp_path / "mine").exists()  # the cache of the user is left alone
    assert check_folder(tmp_path / "files", 10_001)  # nothing is made again


def test_folders_and_numbers_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def refusal(arguments: str) -> str:
        assert main(["benchmark", "listing", *arguments.split()]) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("kl-vae benchmark: error: ")

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    assert refusal("--folder photos") == (
        "--folder photos: holds something else; give an empty folder, or remove it"
    )
    assert list(make_files(tmp_path / "files", 5)) == [5]
    assert refusal("--folder files --files 12000") == (
        "--folder files: holds 5 files of this benchmark; give an empty folder, or remove it"
    )
    assert refusal("--folder files --files 5") == (
        "--files 5: fewer than 10,000 are not kept in the cache; measure with more"
    )
    assert refusal("--folder x --out no/l.json") == (
        "--out no/l.json: give a file in a folder that exists"
    )
