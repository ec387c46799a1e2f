"""Train an autoencoder: each step, its logging, saving and validation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kl_vae.accel.compilation import uncompiled
from kl_vae.checkpoints.run_files import CONFIG, checkpoint_path, run_of
from kl_vae.runtime.device import deterministic, gpu_settings
from kl_vae.runtime.distributed import Ranks, check_agreement, connect, explain
from kl_vae.runtime.published_config import ConfigSource
from kl_vae.training.config import RunConfig
from kl_vae.training.guards import StopRequest, stop_on_signals, workers_killed_on_error
from kl_vae.training.logging import Metrics, RunLogger, to_numbers
from kl_vae.training.run_directory import RunDirectory
from kl_vae.training.setup import Setup, set_up
from kl_vae.training.validate import validate, warn_about_scale
from kl_vae.visual.validation_images import draw_validation_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        run_dir: holds config.yaml, metrics.jsonl, samples/ and checkpoints/; `from_checkpoint`
            loads the model from it.
        step: optimisation steps taken.
        total_steps: of the run.
        finished: whether all steps are complete and validated.
        stopped_by: the signal that stopped the run, such as SIGINT; None: it is finished.
        best: `monitor`, `value` and `step` of the best validation; empty without a monitor.
        metrics: the latest value of each metric logged in this call.
    """

    run_dir: Path
    step: int
    total_steps: int
    finished: bool
    stopped_by: str | None
    best: dict[str, Any]
    metrics: Metrics


def train(
    config: RunConfig | ConfigSource,
    run_dir: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    device: str = "auto",
) -> TrainingResult:
    """Train an autoencoder in a run directory, or resume what the directory holds.

    Under torchrun each process calls this. All inputs are checked before anything is written.
    SIGINT, SIGTERM, SIGUSR1 and SIGHUP stop the run after the current step, saved.
    docs/development/faults.md lists the behaviour for each fault.

    Args:
        config: of the run: a YAML file, the name of a shipped config such as `kl-f8`, a mapping
            with the same keys, or a RunConfig; or the directory of a run to resume, whose learning
            rate and similar settings `overrides` may change.
        run_dir: the run's directory; created if it does not exist; None: that of the run to resume,
            else `runs/CONFIG`.
        overrides: `key.path=value` with a YAML value; override the config.
        device: auto, cuda, mps, cpu, or one GPU such as cuda:1.

    Returns:
        How the run ended: finished, or stopped by a signal.

    Raises:
        ValueError: a mistake that the user can fix; the message says how.
        RunError: the run cannot continue; the message says why.
    """
    resumed = run_of(config) if isinstance(config, (str, Path)) and run_dir is None else None
    if resumed is not None:
        config, run_dir = resumed / CONFIG, resumed
    elif run_dir is None:
        if not isinstance(config, (str, Path)):
            raise ValueError("run_dir is missing: give the directory of the run")
        run_dir = Path("runs") / Path(config).stem
    if not isinstance(config, RunConfig):
        config = RunConfig.load(config, overrides)
    elif overrides := list(overrides):
        config = RunConfig.load(dataclasses.asdict(config), overrides)
    with (
        deterministic(config.training.deterministic),
        connect(device, config.training.timeout_seconds) as ranks,
        gpu_settings(
            ranks.device,
            fixed_sizes=config.training.equivariance == 0,
            deterministic=config.training.deterministic,
        ),
        stop_on_signals() as stop,
        RunDirectory(Path(run_dir), on_purpose=resumed is not None) as run,
        workers_killed_on_error(),
    ):
        # a function of its own, so that DDP is freed before its process group (see `connect`)
        return _train(config, run, ranks, stop)


def _train(config: RunConfig, run: RunDirectory, ranks: Ranks, stop: StopRequest) -> TrainingResult:
    """Run the remaining steps: step, log, save, validate."""
    setup = set_up(config, run, ranks)
    state, training = setup.state, setup.config.training
    if setup.is_finished:
        logger.info("nothing to do: all %d steps are complete", state.step)
        return _end(setup, run, ranks, stop, {})

    state.model.train()
    batches = iter(setup.train_loader)
    run_logger = RunLogger(run.path, state, setup.total_steps) if ranks.is_rank_zero else None
    _write_status(run, ranks, setup, "running")
    latest: Metrics = {}
    stopping = False

    def is_due(every: int | None) -> bool:
        return every is not None and state.step % every == 0

    try:
        while True:
            # the validation of this step, or one that was missing when the run was resumed
            if setup.validation_is_due and not stopping:
                val_metrics = _validate(setup, run, ranks, stop, run_logger)
                stopping = val_metrics is None  # interrupted by a signal
                latest |= val_metrics or {}
            setup.bad_images.check()
            if stopping or setup.is_last_step:
                break

            # forward, backward and update, see step.py
            metrics, stopping = setup.take_step(batches, stop)
            ending = stopping or setup.is_last_step or setup.bad_images.too_many
            saving = ending or setup.validation_is_due or is_due(training.save_every_steps)
            if saving or is_due(training.check_ranks_every_steps):
                check_agreement(state.model, ranks, state.step)

            if is_due(training.log_every_steps) or setup.is_last_step:
                means = to_numbers(ranks.mean(metrics))
                means["epoch"] = state.step / setup.steps_per_epoch
                means["skipped_steps"] = state.skips.total
                means["skipped_by_scaler"] = state.skips.by_scaler
                latest |= means
                if run_logger is not None:
                    run_logger.log_step(means)
            if run_logger is not None:
                run_logger.advance()

            if saving:  # before the validation, which a signal may interrupt
                if run_logger is not None:
                    run_logger.flush()  # what a checkpoint follows is on disk
                save = partial(run.save, state, training.keep_checkpoints, final=ending)
                ranks.on_rank_zero(save)
                _write_status(run, ranks, setup, "running")
    except Exception as error:
        explained = explain(error, ranks.monitor)
        reason = f"{type(explained).__name__}: {explained}"
        _write_status(run, ranks, setup, "failed", reason)
        if explained is error:
            raise
        raise explained from error
    finally:
        if run_logger is not None:
            run_logger.close()
    return _end(setup, run, ranks, stop, latest)


def _validate(
    setup: Setup, run: RunDirectory, ranks: Ranks, stop: StopRequest, run_logger: RunLogger | None
) -> Metrics | None:
    """Validate, draw images, and record the best checkpoint; None: interrupted by a signal."""
    state, training = setup.state, setup.config.training
    average = None if state.average is None else state.average.model
    assert setup.val_set is not None and setup.val_loader is not None
    with uncompiled(setup.compiled):
        metrics = validate(
            model=state.model,
            batches=setup.val_loader,
            step=state.step,
            config=setup.config,
            ranks=ranks,
            bad_images=setup.bad_images,
            average=average,
            stop=stop,
        )
        if metrics is None:
            return None
        ranks.on_rank_zero(run.check_owner)
        if run_logger is not None:
            model = average or state.model
            images = draw_validation_images(model, setup.val_set, training.sample_images)
            run_logger.log_validation(metrics, images)
    monitored = None if state.model.monitor is None else metrics[state.model.monitor]
    assert not isinstance(monitored, list)
    # a save may have failed, and a step without a checkpoint cannot be the best one
    saved = checkpoint_path(run.path, state.step).is_file()
    state.note_validation(monitored if saved else None)
    ranks.on_rank_zero(lambda: run.write_best(state, training.keep_checkpoints))
    return metrics


def _end(
    setup: Setup, run: RunDirectory, ranks: Ranks, stop: StopRequest, metrics: Metrics
) -> TrainingResult:
    """Write and log how the run ended, and return it."""
    state = setup.state
    stopped_by = None
    if setup.is_finished:
        # a process that was killed after the last save or validation may have left old checkpoints
        ranks.on_rank_zero(lambda: run.prune(state, setup.config.training.keep_checkpoints))
        _write_status(run, ranks, setup, "finished")
        if ranks.is_rank_zero:
            warn_about_scale(state.model, metrics)
        logger.info("finished all %d steps; results in %s", setup.total_steps, run.path)
    else:
        stopped_by = next((name for name in ranks.gather(stop.signal) if name is not None), None)
        _write_status(run, ranks, setup, "stopped", stopped_by)
        logger.info(
            "stopped by %s at step %d of %d, saved in %s; the same command resumes",
            stopped_by,
            state.step,
            setup.total_steps,
            run.path,
        )
    return TrainingResult(
        run_dir=run.path,
        step=state.step,
        total_steps=setup.total_steps,
        finished=setup.is_finished,
        stopped_by=stopped_by,
        best=state.best,
        metrics=metrics,
    )


def _write_status(
    run: RunDirectory, ranks: Ranks, setup: Setup, status: str, reason: str | None = None
) -> None:
    if ranks.is_rank_zero:
        run.write_status(status, setup.state.step, setup.total_steps, reason)
