"""metrics.jsonl when a run goes on."""

import json
import math
from pathlib import Path

import torch

from kl_vae import AutoEncoderKL
from kl_vae.training.journal import Journal
from kl_vae.training.state import TrainingState


def state_at(step: int, ddconfig: dict[str, object]) -> TrainingState:
    model = AutoEncoderKL(ddconfig, 4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainingState(model, model.configure_optimizers(), scaler, {}, "", step=step)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_lines_of_steps_to_be_taken_again_and_cut_lines_are_dropped(
    tmp_path: Path, tiny_ddconfig: dict[str, object]
) -> None:
    lines = "".join(f'{{"step": {step}}}\n' for step in range(1, 6))
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 6, "tra')
    journal = Journal(tmp_path, state_at(3, tiny_ddconfig), 10)
    journal.close()
    assert steps(tmp_path) == [1, 2, 3]


def test_nan_is_written_as_text_so_that_the_file_stays_json(
    tmp_path: Path, tiny_ddconfig: dict[str, object]
) -> None:
    state = state_at(0, tiny_ddconfig)
    journal = Journal(tmp_path, state, 10)
    state.step = 1
    journal.write_step({"train/total_loss": math.nan, "train/psnr": 1.5})
    journal.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: 1 / 0)
    assert line["train/total_loss"] == "nan" and line["train/psnr"] == 1.5
