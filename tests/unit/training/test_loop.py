"""`kl_vae.train` from Python: its config, its result, and a missing validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import kl_vae
from kl_vae.training.config import RunConfig
from tests.messages import mentions
from tests.processes import metrics, status


def test_train_takes_a_mapping_and_returns_the_result(project: Path) -> None:
    config = yaml.safe_load((project / "tiny.yaml").read_text())
    overrides = ["training.max_steps=2", "training.ema_decay=0.9"]
    result = kl_vae.train(config, "run", overrides=overrides, device="cpu")
    assert "ema_decay" not in config["training"]  # the mapping is not modified
    assert result.run_dir == Path("run")
    assert (result.step, result.total_steps) == (2, 2)
    assert result.finished and result.stopped_by is None
    assert result.best["monitor"] == "val/rec_loss" and result.best["step"] == 2
    assert result.best["value"] == result.metrics["val/rec_loss"]
    assert {"train/total_loss", "val_ema/psnr"} <= result.metrics.keys()
    model = kl_vae.AutoEncoderKL.from_checkpoint(result.run_dir)
    assert model.latent_channels == 4
    # resumed with a RunConfig, and once more after the last step
    longer = RunConfig.load(config, [*overrides, "training.max_steps=3"])
    assert kl_vae.train(longer, "run", device="cpu").step == 3
    again = kl_vae.train(longer, "run", overrides=["training.log_every_steps=2"], device="cpu")
    assert again.finished and again.step == 3 and again.metrics == {}


def test_an_invalid_config_is_a_value_error_and_writes_nothing(project: Path) -> None:
    with pytest.raises(ValueError, match=mentions("training.max_step=5", "max_steps")):
        kl_vae.train("tiny.yaml", "run", overrides=["training.max_step=5"])
    assert not Path("run").exists()


@pytest.mark.parametrize("lost", ["validation", "best.json"])
def test_a_missing_validation_is_repeated_on_resume(lost: str, project: Path) -> None:
    """A run that was killed after a save has it neither in metrics.jsonl nor in best.json."""
    overrides = ["training.max_steps=4", "training.validate_every_steps=2"]
    first = kl_vae.train("tiny.yaml", "run", overrides=overrides, device="cpu")
    before, best = metrics("run"), Path("run/checkpoints/best.json").read_text()
    for path in Path("run/samples").glob("*_00000004.png"):
        path.unlink()
    Path("run/checkpoints/best.json").unlink()
    if lost == "validation":
        lines = [line for line in before if line["step"] < 4 or "val/psnr" not in line]
        assert len(lines) == len(before) - 1
        text = "".join(json.dumps(line) + "\n" for line in lines)
        Path("run/metrics.jsonl").write_text(text)
    again = kl_vae.train("tiny.yaml", "run", overrides=overrides, device="cpu")
    assert (again.best, again.finished) == (first.best, True)
    assert metrics("run") == before
    assert Path("run/checkpoints/best.json").read_text() == best
    assert status("run")["state"] == "finished"
    made_up = bool(list(Path("run/samples").glob("*_00000004.png")))
    assert made_up == (lost == "validation")
