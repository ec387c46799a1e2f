"""What checkpoints of a run are kept."""

from pathlib import Path

import torch

from kl_vae import AutoEncoderKL
from kl_vae.formats.checkpoint import best_checkpoint, list_checkpoints
from kl_vae.optimizer import OptimizerConfig
from kl_vae.training.state import TrainingState
from kl_vae.training.updater import Updater


def build(ddconfig: dict[str, object]) -> TrainingState:
    model = AutoEncoderKL(ddconfig, 4)
    updater = Updater.build(model.own_parameters(), OptimizerConfig(), "fp32", "optimizer")
    return TrainingState(model, updater, {}, "")


def test_the_newest_and_the_best_are_kept(tmp_path: Path, tiny_ddconfig: dict[str, object]) -> None:
    state = build(tiny_ddconfig)
    for step, value in enumerate((3.0, 1.0, 2.0, 2.5, 1.5), start=1):
        state.step = step
        state.note_best("val/rec_loss", value)
        state.save(tmp_path, keep=2)
    kept = [path.name for path in list_checkpoints(tmp_path)]
    assert kept == ["step_00000005.pt", "step_00000004.pt", "step_00000002.pt"]
    best = best_checkpoint(tmp_path)
    assert best is not None and best.name == "step_00000002.pt"
    digests = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.sha256"))
    assert digests == sorted(f"{name}.sha256" for name in kept)


def test_what_names_the_best_is_written_again_when_it_was_lost(
    tmp_path: Path, tiny_ddconfig: dict[str, object]
) -> None:
    state = build(tiny_ddconfig)
    state.step = 1
    state.note_best("val/rec_loss", 1.0)
    state.save(tmp_path, keep=1)
    (tmp_path / "checkpoints" / "best.json").unlink()
    state.step = 2
    state.save(tmp_path, keep=1)
    best = best_checkpoint(tmp_path)
    assert best is not None and best.name == "step_00000001.pt"


def test_of_psnr_and_ssim_the_highest_is_best(tiny_ddconfig: dict[str, object]) -> None:
    for monitor, best in (("val/psnr", 2), ("val/ssim", 2), ("val/kl_loss", 1)):
        state = build(tiny_ddconfig)
        for step, value in ((1, 10.0), (2, 20.0), (3, 15.0)):
            state.step = step
            state.note_best(monitor, value)
        assert state.best["step"] == best


def test_nothing_but_tensors_and_plain_values_is_saved(
    tmp_path: Path, tiny_ddconfig: dict[str, object]
) -> None:
    state = build(tiny_ddconfig)
    state.save(tmp_path, keep=1)
    content = torch.load(list_checkpoints(tmp_path)[0], weights_only=True)
    assert content["model"].keys() == state.model.state_dict().keys()
    assert {"updaters", "ema", "config", "data_fingerprint", "versions"} <= content.keys()
