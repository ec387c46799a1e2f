"""What a run records while it trains: metrics.jsonl, TensorBoard, images, progress bar and log."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from kl_vae.checkpoints.run_files import METRICS, SAMPLES, TENSORBOARD, read_metrics
from kl_vae.runtime.files import flush_file, flush_folder, write_text_atomically
from kl_vae.training.state import TrainingState
from kl_vae.visual.grid import save_png

logger = logging.getLogger(__name__)

Metrics = dict[str, "float | list[float]"]  # a list has one value per latent channel

STEPS_BEFORE_ESTIMATE = 10
SECONDS_BETWEEN_LINES = 30.0  # of the log, if there is no terminal for a progress bar


def to_numbers(means: Mapping[str, Tensor]) -> Metrics:
    """Return averaged metrics as plain numbers, the second moment as standard deviation."""
    metrics: Metrics = {}
    for key, value in means.items():
        split, _, name = key.rpartition("/")
        if name == "latent_square":
            variance = value - means[f"{split}/latent_mean"].square()
            metrics[f"{split}/latent_std"] = variance.clamp_min(0.0).sqrt().tolist()
        else:
            metrics[key] = value.tolist()
    return metrics


class RunLogger:
    """The log, metrics and images of a run, written by rank 0 only.

    A failed write does not end the run: lines of metrics.jsonl are written later, images and
    TensorBoard events are dropped, with a warning.
    """

    def __init__(self, run: Path, state: TrainingState, total_steps: int) -> None:
        self._run = run
        self._state = state
        self._total_steps = total_steps
        _drop_later_lines(run, state.step)
        self._metrics = LineFile(run / METRICS)
        self._images: list[Path] = []  # written since the last flush
        self._tensorboard = _tensorboard(run / TENSORBOARD, state.step)
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
        self._start_time, self._start_step = time.perf_counter(), state.step
        self._last_line = -math.inf
        self._last_time, self._last_images_seen = self._start_time, state.images_seen

    def advance(self) -> None:
        """Move the progress bar to the state's step; after ten steps, log the time that is left."""
        self._bar.update(self._state.step - self._bar.n)
        if self._state.step - self._start_step == STEPS_BEFORE_ESTIMATE:
            left = self._total_steps - self._state.step
            logger.info("about %s for the other %d steps", self._time_left(), left)

    def log_step(self, metrics: Metrics) -> None:
        """Record the metrics of a training step, with the speed since the last call."""
        # not time.monotonic, which on Windows changes every 16 ms: a step may be shorter
        now, seen = time.perf_counter(), self._state.images_seen
        speed = (seen - self._last_images_seen) / (now - self._last_time)
        self._last_time, self._last_images_seen = now, seen
        self._write({**metrics, "images_per_second": speed, "images_seen": seen})
        summary = (
            f"loss {metrics['train/total_loss']:.4g}, PSNR {metrics['train/psnr']:.2f} dB, "
            f"{speed:.1f} images/s"
        )
        self._bar.set_postfix_str(summary)
        if self._bar.disable and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            step, total = self._state.step, self._total_steps
            logger.info("step %d/%d: %s, %s left", step, total, summary, self._time_left())

    def _time_left(self) -> str:
        """Return the time of the remaining steps, such as "02:05", at the mean speed so far."""
        step = self._state.step
        seconds_per_step = (time.perf_counter() - self._start_time) / (step - self._start_step)
        return str(tqdm.format_interval(seconds_per_step * (self._total_steps - step)))

    def log_validation(self, metrics: Metrics, images: Mapping[str, Tensor]) -> None:
        """Record the metrics of a validation, and write its images [3, H, W], uint8, to samples/.

        The line in metrics.jsonl is written last: it marks the validation as complete.
        """
        for name, image in images.items():
            path = self._run / SAMPLES / f"{name}_{self._state.step:08d}.png"
            try:
                save_png(path, image)
                self._images.append(path)
            except ValueError as error:
                logger.warning("sample image not written: %s", error)
            self._to_tensorboard("add_image", name, image)
        self._write(metrics)
        summary = ", ".join(
            f"{key.removeprefix('val/')} {value:.4g}"
            for key, value in metrics.items()
            if not isinstance(value, list)
        )
        logger.info("validation at step %d: %s", self._state.step, summary)
        self._last_time = time.perf_counter()  # the speed is that of training

    def flush(self) -> None:
        """Wait until all lines and images are on disk, so that they survive a power loss."""
        self._metrics.flush()
        with suppress(OSError):
            for path in self._images:
                flush_file(path)
            flush_folder(self._run / SAMPLES)
        self._images.clear()

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        self._redirect.close()
        self._metrics.close()
        if self._tensorboard is not None:
            with suppress(Exception):
                self._tensorboard.close()

    def _write(self, metrics: Metrics) -> None:
        line: dict[str, Any] = {"step": self._state.step}
        for key, value in metrics.items():
            if isinstance(value, list):
                line[key] = [_json(x) for x in value]
                for channel, x in enumerate(value):
                    self._to_tensorboard("add_scalar", f"{key}/{channel}", x)
            else:
                line[key] = _json(value)
                self._to_tensorboard("add_scalar", key, value)
        self._metrics.append(json.dumps(line))

    def _to_tensorboard(self, method: str, key: str, value: float | Tensor) -> None:
        if self._tensorboard is None:
            return
        try:
            getattr(self._tensorboard, method)(key, value, self._state.step)
        except Exception as error:  # its writing thread has ended
            logger.warning("TensorBoard events cannot be written and end here: %s", error)
            self._tensorboard = None


class LineFile:
    """A text file of appended lines; lines that cannot be written are retried with the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[str] = []
        self._file: FileIO | None = None
        with suppress(OSError):  # `append` reports it
            self._open()

    def append(self, line: str) -> None:
        """Write a line, after those that are still waiting."""
        self._pending.append(line)
        text = "".join(f"{line}\n" for line in self._pending).encode()
        try:
            file = self._file or self._open()
            length = os.fstat(file.fileno()).st_size  # of whole lines
            try:
                while text:  # a full disk may accept a part
                    text = text[file.write(text) :]
            except OSError:
                os.ftruncate(file.fileno(), length)
                raise
        except OSError as error:
            if len(self._pending) == 1:
                logger.warning(
                    "%s cannot be written (%s); its lines are kept until it can be",
                    self._path,
                    error.strerror,
                )
            return
        self._pending.clear()

    def _open(self) -> FileIO:
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  # closed by `close`
        return self._file

    def flush(self) -> None:
        """Wait until the lines are on disk."""
        if self._file is not None:
            with suppress(OSError):  # a later write reports it
                os.fsync(self._file.fileno())
                flush_folder(self._path.parent)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _json(number: float) -> float | str:
    """Return the number, or its name if it is not finite: JSON has neither NaN nor infinity."""
    return number if math.isfinite(number) else str(number)


def _drop_later_lines(run: Path, step: int) -> None:
    """Remove the lines of steps that will be repeated, and a truncated last line."""
    lines = [line for line in read_metrics(run) if line["step"] <= step]
    if (run / METRICS).is_file():
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        try:
            write_text_atomically(run / METRICS, text)
        except OSError as error:
            logger.warning("%s cannot be written (%s)", run / METRICS, error.strerror)


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an optional dependency
        return None
    try:
        return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    except (OSError, UnicodeError) as error:  # a file in its place; TensorBoard takes UTF-8 only
        logger.warning("TensorBoard events cannot be written to %s: %s", folder, error)
        return None
