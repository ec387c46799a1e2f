"""Train an autoencoder on a folder of images."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path

from kl_vae.data import StepSampler, training_loader, validation_batches, validation_loader
from kl_vae.formats.checkpoint import newest_checkpoint
from kl_vae.training.config import RunConfig
from kl_vae.training.distributed import Ranks, connect
from kl_vae.training.figures import as_figures, scalar
from kl_vae.training.journal import Journal
from kl_vae.training.pictures import draw_pictures
from kl_vae.training.prepare import (
    build_data,
    build_model,
    build_state,
    describe,
    micro_batch_size,
    rehearse,
    wrap,
)
from kl_vae.training.run_directory import check_run, prepare_run, write_status
from kl_vae.training.signals import StopRequest, stop_on_signals
from kl_vae.training.state import TrainingState
from kl_vae.training.step import TrainingStep
from kl_vae.training.validate import validate

logger = logging.getLogger(__name__)


def train(config: RunConfig, run: Path, device: str = "auto") -> TrainingState:
    """Train as `config` says, in the directory `run`, or resume what it holds.

    Under torchrun each process calls this. Nothing is written before everything that can be checked
    has been.

    Args:
        config: of the run.
        run: its directory; made where it is not there.
        device: auto, cuda, mps, cpu, or one GPU such as cuda:1.

    Returns:
        The state in which the run ended: complete, or as far as it came when a signal ended it.

    Raises:
        ValueError: something that the user can mend; the text says how.
        RuntimeError: too many steps in a row without a finite gradient.
    """
    with connect(device) as ranks, stop_on_signals() as stop:
        # a function of its own, so that DDP is gone before its process group (see `connect`)
        return _train(config, run, ranks, stop)


def _train(config: RunConfig, run: Path, ranks: Ranks, stop: StopRequest) -> TrainingState:
    training, plain = config.training, dataclasses.asdict(config)

    # what the run is made of
    ranks.on_first(lambda: check_run(run, plain))
    train_set, val_set = build_data(config, ranks)
    batch_size = micro_batch_size(config, ranks)
    steps_per_epoch = len(train_set) // training.global_batch_size
    total_steps = training.max_steps or (training.epochs or 0) * steps_per_epoch
    validate_every_steps = training.validate_every_steps or steps_per_epoch
    found = ranks.on_first(lambda: newest_checkpoint(run))
    model = build_model(config, ranks, resuming=found is not None)
    rehearse(model, config, train_set.crop, val_set is not None, ranks)
    state = build_state(config, model, plain, train_set.fingerprint)

    # where it stands
    if found is not None:
        state.restore(found[1], source=str(found[0]))
    ranks.on_first(lambda: prepare_run(run, plain))
    if ranks.is_first:
        describe(state, config, ranks, run, train_set, val_set, total_steps)
    if state.step >= total_steps:
        logger.info("nothing to do: all %d steps are taken", state.step)
        return state

    # what a step needs
    autoencoder, discriminator = wrap(model, ranks)
    take_step = TrainingStep(state, autoencoder, discriminator, config, ranks, total_steps)
    sampler = StepSampler(
        len(train_set),
        training.global_batch_size,
        batch_size,
        ranks.rank,
        ranks.world_size,
        training.seed,
        start_step=state.step,
        total_steps=total_steps,
    )
    workers, pin_memory = config.data.num_workers, ranks.device.type == "cuda"
    batches = iter(training_loader(train_set, sampler, workers, pin_memory))
    val_size = 0 if val_set is None else len(val_set)
    val_batches = validation_batches(val_size, batch_size, ranks.rank, ranks.world_size)
    averaged = None if state.average is None else state.average.model
    journal = Journal(run, state, total_steps) if ranks.is_first else None
    status = partial(write_status, run, total_steps=total_steps)
    ranks.on_first(lambda: status("running", state.step))

    model.train()
    try:
        while state.step < total_steps and not ranks.any(stop.signal is not None):
            figures = take_step(batches)
            done = state.step == total_steps

            if state.step % training.log_every_steps == 0 or done:
                means = as_figures(ranks.mean(figures))
                means["epoch"] = state.step / steps_per_epoch
                means["skipped_steps"] = sum(updater.skipped for updater in state.updaters)
                if journal is not None:
                    journal.write_step(means)
            if journal is not None:
                journal.advance()

            validating = done or state.step % validate_every_steps == 0
            if val_set is not None and validating:
                loader = validation_loader(val_set, val_batches, workers, pin_memory)
                val_figures = validate(model, loader, state.step, config, ranks, averaged)
                if model.monitor is not None:
                    state.note_best(model.monitor, scalar(val_figures, model.monitor))
                pictures = ranks.on_first(
                    lambda: draw_pictures(averaged or model, val_set, training.sample_images)
                )
                if journal is not None:
                    journal.write_validation(val_figures, pictures)

            if validating or state.step % training.save_every_steps == 0:
                ranks.on_first(lambda: state.save(run, training.keep_checkpoints))
                ranks.on_first(lambda: status("running", state.step))
        if state.step < total_steps:
            ranks.on_first(lambda: state.save(run, training.keep_checkpoints))
    except BaseException as error:
        if ranks.is_first:
            status("failed", state.step, reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        if journal is not None:
            journal.close()

    # how it ended
    stopped = state.step < total_steps
    if ranks.is_first and stopped:
        status("stopped", state.step, reason=stop.signal)
        logger.info(
            "stopped by %s at step %d of %d, saved in %s; the same command resumes",
            *(stop.signal, state.step, total_steps, run),
        )
    elif ranks.is_first:
        status("finished", state.step)
        logger.info("finished all %d steps; results in %s", total_steps, run)
    return state
