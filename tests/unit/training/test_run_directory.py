"""What a run directory must be, and what may change before a run goes on."""

from pathlib import Path
from typing import Any

import pytest

from kl_vae.training.run_directory import HARMLESS, check_run, prepare_run

CONFIG: dict[str, Any] = {"optimizer": {"betas": (0.9, 0.99)}, "training": {"max_steps": 5}}


def test_a_new_or_empty_directory_holds_no_run(tmp_path: Path) -> None:
    assert not check_run(tmp_path / "new", CONFIG)
    assert not check_run(tmp_path, CONFIG)
    assert not (tmp_path / "new").exists()


def test_a_run_of_the_same_config_goes_on(tmp_path: Path) -> None:
    prepare_run(tmp_path / "run", CONFIG)
    assert check_run(tmp_path / "run", CONFIG)


def test_the_length_may_change(tmp_path: Path) -> None:
    prepare_run(tmp_path / "run", CONFIG)
    assert check_run(tmp_path / "run", {**CONFIG, "training": {"max_steps": 9}})


def test_every_harmless_key_is_a_key_of_the_config() -> None:
    import dataclasses

    from kl_vae.training.config import RunConfig

    config = dataclasses.asdict(RunConfig.load("example"))
    for key in HARMLESS:
        section, name = key.split(".")
        assert name in config[section]


def test_all_that_changed_is_named_at_once(tmp_path: Path) -> None:
    prepare_run(tmp_path / "run", CONFIG)
    other = {"optimizer": {"betas": (0.5, 0.9)}, "training": {"max_steps": 5, "seed": 1}}
    with pytest.raises(ValueError) as error:
        check_run(tmp_path / "run", other)
    text = str(error.value)
    assert "optimizer.betas was [0.9, 0.99] and is now [0.5, 0.9]" in text
    assert "training.seed was None and is now 1" in text
    assert "choose another --run-dir" in text and "\n" not in text


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/run: cannot be written .*choose another --run-dir"):
        prepare_run(tmp_path / "file" / "run", CONFIG)
