"""Build and check everything that a run needs, before anything is written."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from kl_vae.accel.accelerate import accelerate
from kl_vae.accel.compilation import can_compile, compile_blocks
from kl_vae.checkpoints.run_files import SAMPLES, metric_number, newest_checkpoint, read_metrics
from kl_vae.data import (
    ImageDataset,
    Sample,
    StepSampler,
    batch_loader,
    build_datasets,
    check_sizes,
    validation_batches,
)
from kl_vae.data.config import DataConfig
from kl_vae.data.folder import matcher
from kl_vae.data.roots import resolve_root
from kl_vae.data.transforms import as_written
from kl_vae.latents import LatentNormalization
from kl_vae.losses.batch_norm import synchronize_batch_norms
from kl_vae.losses.equivariance import Equivariance
from kl_vae.model import AutoEncoderKL
from kl_vae.optim.config import learning_rate_at
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.files import display_name
from kl_vae.runtime.published_config import section_at
from kl_vae.runtime.schema import from_mapping
from kl_vae.training.config import RunConfig, TrainingConfig
from kl_vae.training.ema import WeightAverage
from kl_vae.training.guards import BadImages
from kl_vae.training.run_directory import HARMLESS, RunDirectory, flatten
from kl_vae.training.state import Network, TrainingState, check_content
from kl_vae.training.step import TrainingStep
from kl_vae.training.validate import evaluating

logger = logging.getLogger(__name__)

MIN_INTERVAL = 100  # steps between validations, unless the config states another number


@dataclass(frozen=True)
class Setup:
    """Everything that the training loop uses.

    Attributes:
        config: the run's, with `accumulate_batches` for this number of ranks.
        state: new, or restored from the newest checkpoint.
        take_step: takes the next step.
        train_loader: this rank's micro-batches, from the state's step to the last.
        val_set: validation images; None: the run does not validate.
        val_loader: this rank's share of it.
        bad_images: unusable images found so far.
        total_steps: of the run.
        steps_per_epoch: of the training set.
        validate_every_steps: steps between validations.
        compiled: whether the blocks of the model are compiled.
    """

    config: RunConfig
    state: TrainingState
    take_step: TrainingStep
    train_loader: DataLoader[Sample]
    val_set: ImageDataset | None
    val_loader: DataLoader[Sample] | None
    bad_images: BadImages
    total_steps: int
    steps_per_epoch: int
    validate_every_steps: int
    compiled: bool

    @property
    def is_last_step(self) -> bool:
        """Whether all steps are taken (more, if `max_steps` was lowered since)."""
        return self.state.step >= self.total_steps

    @property
    def validation_is_due(self) -> bool:
        """Whether this step ends with a validation that has not been completed."""
        if self.val_set is None or self.state.validated_step >= self.state.step:
            return False
        return self.is_last_step or self.state.step % self.validate_every_steps == 0

    @property
    def is_finished(self) -> bool:
        """Whether all steps are taken and validated."""
        return self.is_last_step and not self.validation_is_due


def set_up(config: RunConfig, run: RunDirectory, ranks: Ranks) -> Setup:
    """Build and check what a run needs, then lock and prepare its directory.

    Raises:
        ValueError: a user's mistake; nothing has been written.
    """
    training = config.training
    config = with_range(config, ranks.on_rank_zero(run.pixel_range) or config.data.range)
    check_same_config(config, ranks)
    changes = ranks.on_rank_zero(lambda: run.check(dataclasses.asdict(config)))
    compiled = all(ranks.gather(can_compile(ranks.device, training.compile)))
    train_set, val_set = build_data(config, ranks)
    if ranks.is_rank_zero and config.data.name == "folder":
        warn_of_own_samples(run.path, config.data)
    config = with_range(config, train_set.source.pixel_format.value_range)
    plain = dataclasses.asdict(config)
    steps_per_epoch = len(train_set) // training.global_batch_size
    total_steps = number_of_steps(training, steps_per_epoch)

    found = ranks.on_rank_zero(lambda: newest_checkpoint(run.path))
    path, content = found or (None, {})
    if found is not None:
        check_content(content, str(path))
    before = content.get("batches")
    accumulate, batches = divide_batch(training, ranks.world_size, before)
    training = dataclasses.replace(training, accumulate_batches=accumulate)
    config = dataclasses.replace(config, training=training)
    model = build_model(config, ranks, resuming=found is not None)
    if found is not None and model.latents is None:  # inherited from ckpt_path at the start
        latents = section_at(content["config"], "model.params").get("latents")
        if latents is not None:
            model.latents = from_mapping(LatentNormalization, latents, f"{path}: latents")
    metrics = dry_run(model, config, train_set.crop_size, val_set is not None, ranks)
    if model.monitor is not None and model.monitor not in metrics:
        model.monitor = f"val/{model.monitor}"
    val_fingerprint = "" if val_set is None else val_set.fingerprint
    # checkpoints state the normalisation of latents that was inherited, config.yaml what was asked
    stated = dataclasses.replace(config.model.params, latents=model.latents)
    saved = {**plain, "model": {"params": dataclasses.asdict(stated)}}
    state = build_state(config, model, saved, train_set.fingerprint, val_fingerprint)
    state.batches = {**batches, "accumulated": accumulate}
    if model.adversary is not None and before and before["accumulated"] != accumulate:
        logger.info(
            "a step accumulates %d batches, before it was %d: the adaptive weight is computed per "
            "batch, so results differ by more than rounding",
            accumulate,
            before["accumulated"],
        )
    if found is not None:
        state.restore(content, source=str(path))
        same_images = content["validation_fingerprint"] == val_fingerprint
        restore_validation(state, run, ranks, same_images)
        if changes:
            try:
                before_changes = RunConfig.load(content["config"])
            except ValueError as error:
                lines = (f"{path}: {line}" for line in str(error).splitlines())
                raise ValueError("\n".join(lines)) from None
            log_learning_rates(before_changes, config, state.step, steps_per_epoch)
        del found, content  # as large as the state itself

    ranks.on_rank_zero(run.lock)
    ranks.on_rank_zero(lambda: run.prepare(plain, path, state, changes))
    if compiled:
        compile_blocks(model, dynamic=training.equivariance > 0)
    if path is None and config.model.params.ckpt_path is not None:
        state.validated_step = -1  # also validates the given weights
    number = len(train_set) + len(val_set or ())
    bad_images = BadImages(run.path, ranks, number, config.data.max_bad_fraction)
    batch_size = training.global_batch_size // (ranks.world_size * accumulate)
    sampler = StepSampler(
        num_samples=len(train_set),
        global_batch_size=training.global_batch_size,
        micro_batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=training.seed,
        start_step=state.step,
        total_steps=total_steps,
    )
    val_batches = validation_batches(len(val_set or ()), batch_size, ranks.rank, ranks.world_size)
    load = partial(
        batch_loader,
        num_workers=config.data.num_workers,
        pin_memory=ranks.device.type == "cuda",
        timeout_seconds=training.timeout_seconds,
    )
    setup = Setup(
        config=config,
        state=state,
        take_step=TrainingStep(state, config, ranks, total_steps, bad_images),
        train_loader=load(train_set, sampler),
        val_set=val_set,
        val_loader=None if val_set is None else load(val_set, val_batches, persistent=True),
        bad_images=bad_images,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        validate_every_steps=training.validate_every_steps or default_interval(steps_per_epoch),
        compiled=compiled,
    )
    if ranks.is_rank_zero:
        describe(setup, ranks, run, train_set)
    return setup


def default_interval(steps_per_epoch: int) -> int:
    """Return the steps between validations: whole epochs, and at least `MIN_INTERVAL` steps."""
    return steps_per_epoch * -(-MIN_INTERVAL // steps_per_epoch)


def warn_of_own_samples(run: Path, data: DataConfig) -> None:
    """Log a warning if the sample images of a run would be read as its images on a resume."""
    for key, images in (("train", data.train), ("validation", data.validation)):
        if images.root is None:
            continue
        root, sample = resolve_root(images.root).resolve(), run.resolve() / SAMPLES / "image.png"
        if sample.is_relative_to(root):
            name = sample.relative_to(root).as_posix()
            if matcher(images.include, images.exclude)(name):
                logger.warning(
                    "the run directory %s is in data.%s.root=%s, where its samples are other "
                    "images for a resume, which is refused then; give another --run-dir",
                    display_name(run),
                    key,
                    images.root,
                )


def check_same_config(config: RunConfig, ranks: Ranks) -> None:
    """Check that all ranks have the config of rank 0, except for harmless keys.

    Raises:
        ValueError: they have not; the first key that differs is named.
    """
    own = flatten(dataclasses.asdict(config))
    first = ranks.on_rank_zero(lambda: own)
    for key in sorted((own.keys() | first.keys()) - set(HARMLESS)):
        if own.get(key) != first.get(key):
            raise ValueError(
                f"rank {ranks.rank}: {key}={own.get(key)!r}, but rank 0 has {first.get(key)!r}; "
                "give all ranks the same config and overrides"
            )


def log_learning_rates(
    before: RunConfig, config: RunConfig, step: int, steps_per_epoch: int
) -> None:
    """Log how the changes of a resumed run change the learning rate of its next step."""
    old, new = (
        learning_rate_at(step, number_of_steps(of.training, steps_per_epoch), of.optimizer)
        for of in (before, config)
    )
    if old != new:
        factor = f", {new / old:.3g} times as high" if old else ""
        logger.warning("learning rate of the next step: %.3g instead of %.3g%s", new, old, factor)


def number_of_steps(training: TrainingConfig, steps_per_epoch: int) -> int:
    """Return the number of steps of a run."""
    return training.max_steps or (training.epochs or 0) * steps_per_epoch


def with_range(config: RunConfig, value_range: Any) -> RunConfig:
    """Return the config with this `data.range`, if its own is `auto`."""
    if config.data.range != "auto":
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, range=value_range))


def build_data(config: RunConfig, ranks: Ranks) -> tuple[ImageDataset, ImageDataset | None]:
    """Build the training set and, unless the config wants none, the validation set.

    Raises:
        ValueError: no images, too few, too small, or different ones on the ranks.
    """
    ddconfig, training = config.model.params.ddconfig, config.training

    def build() -> tuple[ImageDataset, ImageDataset | None]:
        return build_datasets(config.data, ddconfig.in_channels, ddconfig.resolution, training.seed)

    if config.data.name != "folder":
        ranks.on_rank_zero(lambda: build() and None)  # downloads, once
    train_set, val_set = build()
    f = ddconfig.downsampling_factor
    if any(side % f for side in train_set.crop_size):
        raise ValueError(
            f"data.crop={as_written(train_set.crop)}: the model downsamples by {f}; "
            f"use a multiple of {f}"
        )
    fingerprint = train_set.fingerprint
    if ranks.on_rank_zero(lambda: fingerprint) != fingerprint:
        raise ValueError(
            f"rank {ranks.rank} sees other images in data.train.root than rank 0; "
            "give all machines the same folder"
        )
    for part, dataset in (("training", train_set), ("validation", val_set)):
        if dataset is not None:
            check = partial(check_sizes, dataset, config.data, part)
            dataset.keep(ranks.on_rank_zero(check))  # one rank reads all headers
    if len(train_set) < training.global_batch_size:
        raise ValueError(
            f"training.global_batch_size={training.global_batch_size}: more than the "
            f"{len(train_set)} training images; lower it, or add images"
        )
    return train_set, val_set


def divide_batch(
    training: TrainingConfig, world_size: int, before: Mapping[str, int] | None = None
) -> tuple[int, dict[str, int]]:
    """Compute how many micro-batches each rank divides its share of the global batch into.

    A run that is resumed on another number of ranks keeps the size of its micro-batches, or makes
    them smaller, so that they fit into memory: the number is computed anew.

    Args:
        training: of the config.
        world_size: number of ranks.
        before: the division of the checkpoint that is resumed; None: the run is new.

    Returns:
        The number, and the division: `accumulate_batches` as configured, and `micro_batch_size`,
        the largest number of images that a rank passes through the model at once.

    Raises:
        ValueError: the global batch cannot be divided.
    """
    images, asked = training.global_batch_size, training.accumulate_batches
    if before is not None and before["accumulate_batches"] == asked:
        share, rest = divmod(images, world_size)
        if rest:
            raise ValueError(
                f"training.global_batch_size={images}: cannot be divided among {world_size} ranks; "
                "resume on a number of ranks that divides it"
            )
        counts = (n for n in range(1, share + 1) if share % n == 0)
        return next(n for n in counts if share // n <= before["micro_batch_size"]), dict(before)
    parts = world_size * asked
    if images % parts:
        raise ValueError(
            f"training.global_batch_size={images}: cannot be divided among "
            f"{world_size} ranks x {asked} accumulated batches; "
            f"use a multiple of {parts}"
        )
    return asked, {"accumulate_batches": asked, "micro_batch_size": images // parts}


def build_model(config: RunConfig, ranks: Ranks, resuming: bool) -> AutoEncoderKL:
    """Build the model on the device, initialised by the seed or, unless resuming, by `ckpt_path`.

    On several GPUs the batch norms of a discriminator take their statistics over all of them.

    Raises:
        ValueError: a value under model.params, named with its key path, or a checkpoint that does
            not fit.
    """
    params = config.model.params
    given = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    ckpt_path, ignore_keys = given.pop("ckpt_path"), given.pop("ignore_keys")
    torch.manual_seed(config.training.seed)
    try:
        model = AutoEncoderKL(**given)
    except ValueError as error:
        raise ValueError(f"model.params.{error}") from None
    if ckpt_path is not None and not resuming:
        model.init_from_ckpt(ckpt_path, ignore_keys)
    freeze(model, config.training.freeze)
    model.set_activation_checkpointing(config.training.activation_checkpointing)
    model = model.to(ranks.device)
    accelerate(
        model,
        channels_last=config.training.channels_last,
        winograd=None if config.training.winograd else False,
    )
    if model.adversary is not None and ranks.device.type == "cuda" and ranks.world_size > 1:
        synchronize_batch_norms(model.adversary.discriminator)
    return model


def freeze(model: AutoEncoderKL, patterns: Iterable[str]) -> None:
    """Freeze the parameters whose names match one of `patterns`, such as `encoder.*`.

    Raises:
        ValueError: a pattern matches none, or nothing is left to train.
    """
    names = [name for name, _ in model.without_loss().named_parameters()]
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(
                f"training.freeze={pattern}: matches no parameter; there are "
                f"{names[0]}, {names[len(names) // 2]} and {len(names) - 2} others; write "
                "encoder.* for the whole encoder"
            )
        for name in matching:
            model.get_parameter(name).requires_grad_(False)
    if not any(model.get_parameter(name).requires_grad for name in names):
        raise ValueError(
            "training.freeze: leaves no parameter of the autoencoder to train; remove a pattern"
        )


@torch.no_grad()
def dry_run(
    model: AutoEncoderKL, config: RunConfig, crop: tuple[int, int], validates: bool, ranks: Ranks
) -> set[str]:
    """Pass a blank image through model and loss, to fail early.

    Returns:
        The names of the validation metrics.

    Raises:
        ValueError: `monitor` is no metric, or nothing is validated; the discriminator cannot take
            the images; a last layer is frozen and needed.
    """
    if model.monitor is not None and not validates:
        raise ValueError(
            f"model.params.monitor={model.monitor}: there is no validation set to measure it "
            "on; set data.validation.fraction, or monitor to null"
        )
    blank = torch.zeros(1, model.config.in_channels, *crop, device=ranks.device)
    metrics = {"val/psnr", "val/ssim"}
    with evaluating(model):
        smallest = None
        if config.training.equivariance > 0:
            smallest = Equivariance(0, config.training.equivariance_min_scale)
        out = model.step(blank, 0, "val", equivariance=smallest)
        metrics |= out.log.keys()
        if model.adversary is not None:
            model.adversary.discriminator_loss(out.target, out.reconstruction)
            model.adversary.check_last_layer(model.get_last_layer())
    if config.training.ema_decay is not None:
        metrics |= {key.replace("val/", "val_ema/") for key in metrics}
    monitor = model.monitor
    if monitor is not None and metrics.isdisjoint((monitor, f"val/{monitor}")):
        raise ValueError(
            f"model.params.monitor={monitor}: not a validation metric; choose one of "
            f"{', '.join(sorted(metrics))}"
        )
    return metrics


def build_state(
    config: RunConfig,
    model: AutoEncoderKL,
    plain: dict[str, Any],
    data_fingerprint: str,
    validation_fingerprint: str = "",
) -> TrainingState:
    """Build the optimisers, the scalers, the average and the state of a checkpoint."""
    precision, decay = config.training.precision, config.training.ema_decay
    discriminator = None
    if model.adversary is not None:
        parameters = list(model.adversary.discriminator.parameters())
        discriminator = Network.build(parameters, config.discriminator_optimizer, precision)
    return TrainingState(
        model=model,
        autoencoder=Network.build(model.own_parameters(), config.optimizer, precision),
        config=plain,
        data_fingerprint=data_fingerprint,
        validation_fingerprint=validation_fingerprint,
        discriminator=discriminator,
        average=None if decay is None else WeightAverage(model, decay),
    )


def restore_validation(
    state: TrainingState, run: RunDirectory, ranks: Ranks, same_images: bool
) -> None:
    """Note the validation of the restored step, if metrics.jsonl says that it was completed.

    A checkpoint is saved before its validation. A missing validation is repeated.

    Args:
        state: as restored.
        run: whose metrics.jsonl is read, by rank 0.
        ranks: all of them call this.
        same_images: whether the validation images have not changed.
    """

    def find() -> dict[str, Any] | None:
        lines = (x for x in read_metrics(run.path) if x["step"] == state.step and "val/psnr" in x)
        return next(lines, None)

    metrics = ranks.on_rank_zero(find)
    if metrics is not None and state.validated_step < state.step:
        value = metrics.get(state.model.monitor or "") if same_images else None
        state.note_validation(metric_number(value))


def describe(setup: Setup, ranks: Ranks, run: RunDirectory, train_set: ImageDataset) -> None:
    """Log the size of the model, the data, the devices, the batch, the length and the directory."""
    model, config, training = setup.state.model, setup.config, setup.config.training
    images = training.global_batch_size // (ranks.world_size * training.accumulate_batches)
    (height, width), f = train_set.crop_size, model.downsampling_factor
    count = sum(p.numel() for p in model.without_loss().parameters())
    trained = sum(p.numel() for p in model.without_loss().parameters() if p.requires_grad)
    frozen = "" if trained == count else f"; {trained:,} trained"
    device = str(ranks.device)
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    elif ranks.device.type == "cpu":
        device = f"cpu ({torch.get_num_threads()} threads)"
    precision = training.precision + (", compiled" if setup.compiled else "")
    latents = f"{model.latent_channels} x {height // f} x {width // f}"
    sources = [config.data.train.root, config.data.validation.root if setup.val_set else None]
    for line in (
        f"model      {count:,} parameters, f = {f}: {height} x {width} -> "
        f"latents {latents}{frozen}",
        f"data       {len(train_set)} training images and {len(setup.val_set or ())} for "
        f"validation, from {' and '.join(root for root in sources if root)}",
        f"devices    {ranks.world_size} x {device}, {precision}",
        f"batch      {training.global_batch_size} images per step = {ranks.world_size} (ranks) x "
        f"{training.accumulate_batches} (accumulated) x {images}",
        f"length     {setup.total_steps} steps, {setup.state.step} complete",
        f"results    {run.path}",
    ):
        logger.info(line)
