"""metrics.jsonl when a run goes on."""

import json
import math
from pathlib import Path

import pytest
import torch
from kl_vae.training.journal import Journal
from kl_vae.training.updater import Updater

from kl_vae import AutoEncoderKL
from kl_vae.optim.config import OptimizerConfig
from kl_vae.training.state import TrainingState


def state_at(step: int, ddconfig: dict[str, object], validated_step: int = 0) -> TrainingState:
    model = AutoEncoderKL(ddconfig, 4)
    updater = Updater.build(model.own_parameters(), OptimizerConfig(), "fp32")
    return TrainingState(model, updater, {}, "", step=step, validated_step=validated_step)


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


@pytest.mark.parametrize(("validated_step", "kept"), [(2, [2, 2, 3]), (3, [2, 2, 3, 3])])
def test_the_line_of_a_validation_that_will_be_done_again_is_dropped(
    validated_step: int, kept: list[int], tmp_path: Path, tiny_ddconfig: dict[str, object]
) -> None:
    lines = [
        f'{{"step": {step}, "{split}/psnr": 1.0}}' for step in (2, 3) for split in ("train", "val")
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    Journal(tmp_path, state_at(3, tiny_ddconfig, validated_step), 10).close()
    assert steps(tmp_path) == kept


def test_pictures_and_events_that_cannot_be_written_do_not_end_a_run(
    tmp_path: Path, tiny_ddconfig: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, state_at(0, tiny_ddconfig), 10)

    class Broken:
        def __getattr__(self, name: str) -> object:
            raise OSError(28, "No space left on device")

    journal._tensorboard = Broken()
    (tmp_path / "samples").write_text("where the folder would be")
    for _ in range(2):
        picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
        journal.write_validation({"val/psnr": 1.0}, {"prior": picture})
    journal.close()
    assert steps(tmp_path) == [0, 0]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert sum("a picture is left out: cannot create the folder" in text for text in warnings) == 2
    assert sum("TensorBoard's events cannot be written, and end here" in x for x in warnings) == 1


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
