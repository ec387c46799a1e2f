"""What a run says while it goes on: metrics.jsonl, TensorBoard, progress bar and log."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from kl_vae.runtime.files import write_text_atomically
from kl_vae.training.figures import Figures
from kl_vae.training.line_file import LineFile
from kl_vae.training.run_directory import METRICS, SAMPLES
from kl_vae.training.state import TrainingState
from kl_vae.visual.grid import save_png

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0  # of the log, where there is no terminal for a bar


class Journal:
    """The record of a run, kept by rank 0 alone.

    What cannot be written does not end the run: lines of metrics.jsonl are written later, pictures
    and TensorBoard's events are left out, each with a line in the log.
    """

    def __init__(self, run: Path, state: TrainingState, total_steps: int) -> None:
        self._run = run
        self._state = state
        self._total_steps = total_steps
        _drop_later_lines(run / METRICS, state.step, state.validated_step)
        self._metrics = LineFile(run / METRICS)
        self._tensorboard = _tensorboard(run / "tensorboard", state.step)
        self._bar = tqdm(
            total=total_steps,
            initial=state.step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._redirect = ExitStack()
        if not self._bar.disable:
            self._redirect.enter_context(logging_redirect_tqdm())  # log lines above the bar
        self._began, self._steps_before = time.monotonic(), state.step
        self._last_line = -math.inf
        self._clock, self._images_seen = self._began, state.images_seen

    def advance(self) -> None:
        """Move the bar to the state's step."""
        self._bar.update(self._state.step - self._bar.n)

    def write_step(self, figures: Figures) -> None:
        """Record the figures of a training step, with the speed since the last call."""
        now, seen = time.monotonic(), self._state.images_seen
        speed = (seen - self._images_seen) / (now - self._clock)
        self._clock, self._images_seen = now, seen
        self._write({**figures, "images_per_second": speed, "images_seen": seen})
        shown = (
            f"loss {figures['train/total_loss']:.4g}, PSNR {figures['train/psnr']:.2f} dB, "
            f"{speed:.1f} images/s"
        )
        self._bar.set_postfix_str(shown)
        if self._bar.disable and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            step = self._state.step
            left = (now - self._began) / (step - self._steps_before) * (self._total_steps - step)
            logger.info("step %d/%d: %s, %s left", step, self._total_steps, shown, _time(left))

    def write_validation(self, figures: Figures, pictures: Mapping[str, Tensor]) -> None:
        """Record the figures of a validation, and its pictures [3, H, W] uint8 in samples/."""
        self._write(figures)
        for name, picture in pictures.items():
            try:
                save_png(self._run / SAMPLES / f"{name}_{self._state.step:08d}.png", picture)
            except ValueError as error:
                logger.warning("a picture is left out: %s", error)
            self._tell_tensorboard("add_image", name, picture)
        shown = ", ".join(
            f"{key.removeprefix('val/')} {x:.4g}"
            for key, x in figures.items()
            if not isinstance(x, list)
        )
        logger.info("validation at step %d: %s", self._state.step, shown)
        self._clock = time.monotonic()  # the speed is that of training

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        self._redirect.close()
        self._metrics.close()
        if self._tensorboard is not None:
            with suppress(Exception):
                self._tensorboard.close()

    def _write(self, figures: Figures) -> None:
        line = {
            key: [_json(x) for x in value] if isinstance(value, list) else _json(value)
            for key, value in figures.items()
        }
        self._metrics.append(json.dumps({"step": self._state.step, **line}))
        for key, value in _scalars(figures).items():
            self._tell_tensorboard("add_scalar", key, value)

    def _tell_tensorboard(self, method: str, key: str, value: float | Tensor) -> None:
        if self._tensorboard is None:
            return
        try:
            getattr(self._tensorboard, method)(key, value, self._state.step)
        except Exception as error:  # whatever ended its writing thread
            logger.warning("TensorBoard's events cannot be written, and end here: %s", error)
            self._tensorboard = None


def _json(number: float) -> float | str:
    """JSON has no NaN and no infinity: text says which it was."""
    return number if math.isfinite(number) else str(number)


def _scalars(figures: Figures) -> dict[str, float]:
    """The figures, a vector's values each under its index."""
    scalars: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, list):
            scalars |= {f"{key}/{i}": x for i, x in enumerate(value)}
        else:
            scalars[key] = value
    return scalars


def _drop_later_lines(path: Path, step: int, validated_step: int) -> None:
    """Remove the lines of what will be done again, and one that was cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
            last = validated_step if "val/psnr" in content else step
            if content["step"] <= last:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text_atomically(path, "".join(kept))


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra: the run goes without
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
