"""Train an autoencoder on a folder of images."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path

from kl_vae.accel.compilation import check_compiler, compile_parts, uncompiled
from kl_vae.checkpoints.run_directory import newest_checkpoint
from kl_vae.data import StepSampler, batch_loader, validation_batches
from kl_vae.runtime.device import deterministic
from kl_vae.runtime.distributed import Ranks, check_agreement, connect, explain
from kl_vae.training.checkpoints import Checkpoints
from kl_vae.training.config import RunConfig
from kl_vae.training.figures import as_figures, scalar
from kl_vae.training.global_batch import divide_batch
from kl_vae.training.guards import BadImages
from kl_vae.training.journal import Journal
from kl_vae.training.pictures import draw_pictures
from kl_vae.training.prepare import (
    build_data,
    build_model,
    build_state,
    describe,
    rehearse,
    wrap,
)
from kl_vae.training.run_directory import (
    check_run,
    prepare_run,
    say_how_it_ended,
    write_status,
)
from kl_vae.training.run_lock import RunLock
from kl_vae.training.signals import StopRequest, no_worker_left, stop_on_signals
from kl_vae.training.state import TrainingState
from kl_vae.training.step import TrainingStep
from kl_vae.training.validate import validate

logger = logging.getLogger(__name__)


def train(config: RunConfig, run: Path, device: str = "auto") -> TrainingState:
    """Train as `config` says, in the directory `run`, or resume what it holds.

    Under torchrun each process calls this. Nothing is written before everything that can be checked
    has been. docs/faults.md says what becomes of a run when something goes wrong.

    Args:
        config: of the run.
        run: its directory; made where it is not there.
        device: auto, cuda, mps, cpu, or one GPU such as cuda:1.

    Returns:
        The state in which the run ended: complete, or as far as it came when a signal ended it.

    Raises:
        ValueError: something that the user can mend; the text says how.
        RunError: the run cannot go on; the text says why.
    """
    with (
        deterministic(config.training.deterministic),
        connect(device, config.training.timeout_seconds) as ranks,
        stop_on_signals() as stop,
        RunLock(run) as lock,
    ):
        # a function of its own, so that DDP is gone before its process group (see `connect`)
        with no_worker_left():
            return _train(config, run, ranks, stop, lock)


def _train(
    config: RunConfig, run: Path, ranks: Ranks, stop: StopRequest, lock: RunLock
) -> TrainingState:
    training, plain = config.training, dataclasses.asdict(config)

    # what the run is made of
    ranks.on_first(lambda: check_run(run, plain))
    if training.compile:
        check_compiler(ranks.device)
    train_set, val_set = build_data(config, ranks)
    steps_per_epoch = len(train_set) // training.global_batch_size
    total_steps = training.max_steps or (training.epochs or 0) * steps_per_epoch
    validate_every_steps = training.validate_every_steps or steps_per_epoch
    found = ranks.on_first(lambda: newest_checkpoint(run))
    path, content = found or (None, {})
    before = content.get("batches")
    accumulate, batches = divide_batch(training, ranks.world_size, before)
    training = dataclasses.replace(training, accumulate_batches=accumulate)
    config = dataclasses.replace(config, training=training)
    model = build_model(config, ranks, resuming=found is not None)
    rehearse(model, config, train_set.crop, val_set is not None, ranks)
    val_fingerprint = "" if val_set is None else val_set.fingerprint
    state = build_state(config, model, plain, train_set.fingerprint, val_fingerprint)
    state.batches = {**batches, "accumulated": accumulate}
    if model.adversary is not None and before and before["accumulated"] != accumulate:
        logger.info(
            "a step accumulates %d batches, before it was %d: the adaptive weight is that of each, "
            "so that numbers differ by more than rounding",
            *(accumulate, before["accumulated"]),
        )

    # where it stands
    if found is not None:
        state.restore(content, source=str(path))
        del found, content  # as large as the state itself
    ranks.on_first(lock.acquire)
    ranks.on_first(lambda: prepare_run(run, plain))
    checkpoints = Checkpoints(run, state, training.keep_checkpoints, resumed=path)
    ranks.on_first(checkpoints.complete)
    if ranks.is_first:
        say_how_it_ended(run)
        describe(state, config, ranks, run, train_set, val_set, total_steps)
    status = partial(write_status, run, total_steps=total_steps)
    if state.step >= total_steps and (val_set is None or state.validated_step == state.step):
        ranks.on_first(lambda: status("finished", state.step))
        logger.info("nothing to do: all %d steps are taken", state.step)
        return state

    # what a step needs
    if training.compile:
        compile_parts(model, dynamic=training.equivariance > 0)
    autoencoder, discriminator = wrap(model, ranks)
    bad_images = BadImages(
        run, ranks, len(train_set) + len(val_set or ()), config.data.max_bad_fraction
    )
    take_step = TrainingStep(
        state, autoencoder, discriminator, config, ranks, total_steps, bad_images
    )
    batch_size = training.global_batch_size // (ranks.world_size * accumulate)
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
    load = partial(
        batch_loader,
        num_workers=config.data.num_workers,
        pin_memory=ranks.device.type == "cuda",
        timeout_seconds=training.timeout_seconds,
    )
    train_batches = iter(load(train_set, sampler))
    val_size = 0 if val_set is None else len(val_set)
    val_batches = validation_batches(val_size, batch_size, ranks.rank, ranks.world_size)
    averaged = None if state.average is None else state.average.model
    journal = Journal(run, state, total_steps) if ranks.is_first else None
    ranks.on_first(lambda: status("running", state.step))

    model.train()
    saved = True  # nothing has been done yet
    try:
        while True:
            # after a step, or where a signal has cut the validation after it short
            done = state.step >= total_steps  # more, where there are to be fewer than were taken
            milestone = state.step > 0 and (done or state.step % validate_every_steps == 0)
            cut_short = False
            if val_set is not None and milestone and state.validated_step < state.step:
                batches_of_val = load(val_set, val_batches)
                with uncompiled(training.compile):
                    val_figures = validate(
                        *(model, batches_of_val, state.step, config, ranks, bad_images, averaged),
                        stop=lambda: stop.signal is not None,
                    )
                cut_short = val_figures is None
                if val_figures is not None:
                    state.validated_step = state.step
                    saved = False
                    if model.monitor is not None:
                        state.note_best(model.monitor, scalar(val_figures, model.monitor))
                    with uncompiled(training.compile):
                        pictures = ranks.on_first(
                            lambda: draw_pictures(
                                averaged or model, val_set, training.sample_images
                            )
                        )
                    if journal is not None:
                        journal.write_validation(val_figures, pictures)

            stopping = cut_short or (not done and ranks.any(stop.signal is not None))
            ending = done or stopping or bad_images.too_many
            if not saved and (ending or milestone or state.step % training.save_every_steps == 0):
                check_agreement(model, ranks, state.step)
                ranks.on_first(partial(checkpoints.save, final=ending))
                ranks.on_first(lambda: status("running", state.step))
                saved = True
            if bad_images.too_many:
                raise bad_images.error()
            if ending:
                break

            figures = take_step(train_batches)
            saved = False
            every = training.check_ranks_every_steps
            if every is not None and state.step % every == 0:
                check_agreement(model, ranks, state.step)
            if state.step % training.log_every_steps == 0 or state.step == total_steps:
                means = as_figures(ranks.mean(figures))
                means["epoch"] = state.step / steps_per_epoch
                means["skipped_steps"] = state.skips.total
                means["skipped_by_scaler"] = state.skips.by_scaler
                if journal is not None:
                    journal.write_step(means)
            if journal is not None:
                journal.advance()
    except Exception as error:
        failure = explain(error, ranks.roll_call)
        if ranks.is_first:
            status("failed", state.step, reason=f"{type(failure).__name__}: {failure}")
        if failure is error:
            raise
        raise failure from error
    finally:
        if journal is not None:
            journal.close()

    # how it ended
    if not stopping:
        ranks.on_first(lambda: status("finished", state.step))
        logger.info("finished all %d steps; results in %s", total_steps, run)
        return state
    signal = next((name for name in ranks.gather(stop.signal) if name is not None), None)
    ranks.on_first(lambda: status("stopped", state.step, reason=signal))
    if ranks.is_first:
        logger.info(
            "stopped by %s at step %d of %d, saved in %s; the same command resumes",
            *(signal, state.step, total_steps, run),
        )
    return state
