"""What a run is made of, built and checked before anything is written."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kl_vae.accel.accelerate import accelerate
from kl_vae.data import ImageDataset, build_datasets
from kl_vae.losses.discriminator import RealAndFake
from kl_vae.losses.equivariance import Equivariance
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.distributed import Ranks
from kl_vae.training.config import RunConfig
from kl_vae.training.ema import WeightAverage
from kl_vae.training.figures import evaluating
from kl_vae.training.freeze import freeze
from kl_vae.training.state import TrainingState
from kl_vae.training.updater import Updater

logger = logging.getLogger(__name__)

# renamed in torch 2.15, where the old name gives a warning
_NEW, _OLD = "forward_sync_buffers", "broadcast_buffers"
_SYNC_NOT: dict[str, Any] = {
    _NEW if _NEW in inspect.signature(DistributedDataParallel).parameters else _OLD: False
}


def build_data(config: RunConfig, ranks: Ranks) -> tuple[ImageDataset, ImageDataset | None]:
    """Build the training set and, unless the config wants none, the validation set.

    Raises:
        ValueError: no images, too few, too small, or not the same ones on all ranks.
    """
    ddconfig, training = config.model.params.ddconfig, config.training

    def build() -> tuple[ImageDataset, ImageDataset | None]:
        return build_datasets(config.data, ddconfig.in_channels, ddconfig.resolution, training.seed)

    if config.data.name != "folder":
        ranks.on_first(lambda: build() and None)  # downloads, once
    train_set, val_set = build()
    if train_set.crop % ddconfig.downsampling_factor:
        raise ValueError(
            f"data.crop={train_set.crop}: the model halves an image to a "
            f"{ddconfig.downsampling_factor}th; use a multiple of {ddconfig.downsampling_factor}"
        )
    if len(train_set) < training.global_batch_size:
        raise ValueError(
            f"training.global_batch_size={training.global_batch_size}: more than the "
            f"{len(train_set)} training images; lower it, or add images"
        )
    fingerprint = train_set.fingerprint
    if ranks.on_first(lambda: fingerprint) != fingerprint:
        raise ValueError(
            f"rank {ranks.rank} sees other images in data.train.root than rank 0; "
            "give all machines the same folder"
        )

    def check_sizes() -> None:
        for dataset in (train_set, val_set):
            if dataset is not None:
                dataset.check_sizes()

    ranks.on_first(check_sizes)
    return train_set, val_set


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
        discriminator = model.adversary.discriminator
        nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)  # type: ignore[no-untyped-call]
    return model


def build_state(
    config: RunConfig,
    model: AutoEncoderKL,
    plain: dict[str, Any],
    data_fingerprint: str,
    validation_fingerprint: str = "",
) -> TrainingState:
    """Build what updates the model's parameters, and with it all that a checkpoint holds."""
    precision, decay = config.training.precision, config.training.ema_decay
    updater = Updater.build(model.own_parameters(), config.optimizer, precision)
    discriminator_updater = None
    if model.adversary is not None:
        discriminator_updater = Updater.build(
            list(model.adversary.discriminator.parameters()),
            config.discriminator_optimizer,
            precision,
        )
    average = None if decay is None else WeightAverage(model, decay)
    return TrainingState(
        model,
        updater,
        plain,
        data_fingerprint,
        validation_fingerprint,
        discriminator_updater,
        average,
    )


def wrap(model: AutoEncoderKL, ranks: Ranks) -> tuple[nn.Module, nn.Module | None]:
    """What a step calls in place of the model and of its discriminator.

    On several ranks each is in a DistributedDataParallel of its own; the model's passes the
    discriminator's parameters over, since its backward never reaches them.
    """

    def distribute(module: nn.Module) -> nn.Module:
        if ranks.world_size == 1:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_SYNC_NOT,
        )

    if model.adversary is None:
        return distribute(model), None
    discriminator = model.adversary.discriminator
    wrapped = distribute(RealAndFake(discriminator))
    discriminator.requires_grad_(False)
    autoencoder = distribute(model)
    discriminator.requires_grad_(True)
    return autoencoder, wrapped


@torch.no_grad()
def rehearse(
    model: AutoEncoderKL, config: RunConfig, crop: int, validates: bool, ranks: Ranks
) -> None:
    """Pass one blank image through model and loss, so that what cannot work fails at once.

    Raises:
        ValueError: `monitor` is none of the figures, or nothing `validates`; images that the
            discriminator cannot take; a last layer that is frozen and needed.
    """
    if model.monitor is not None and not validates:
        raise ValueError(
            f"model.params.monitor={model.monitor}: there is no validation set to measure it "
            "on; set data.validation.fraction, or monitor to null"
        )
    blank = torch.zeros(1, model.config.in_channels, crop, crop, device=ranks.device)
    figures = {"val/psnr", "val/ssim"}
    with evaluating(model):
        smallest = None
        if config.training.equivariance > 0:
            smallest = Equivariance(0, config.training.equivariance_min_scale)
        out = model.step(blank, 0, "val", equivariance=smallest)
        figures |= out.log.keys()
        if model.adversary is not None:
            model.adversary.discriminator_loss(out.target, out.reconstruction)
            model.adversary.check_last_layer(model.get_last_layer())
    if config.training.ema_decay is not None:
        figures |= {key.replace("val/", "val_ema/") for key in figures}
    if model.monitor is not None and model.monitor not in figures:
        raise ValueError(
            f"model.params.monitor={model.monitor}: not a validation figure; choose one of "
            f"{', '.join(sorted(figures))}"
        )


def describe(
    state: TrainingState,
    config: RunConfig,
    ranks: Ranks,
    run: Path,
    train_set: ImageDataset,
    val_set: ImageDataset | None,
    total_steps: int,
) -> None:
    """Say the size of the model, what it trains on, where, how precisely, and where it writes."""
    model, training = state.model, config.training
    images = training.global_batch_size // (ranks.world_size * training.accumulate_batches)
    side, f = train_set.crop, model.downsampling_factor
    count = sum(p.numel() for p in model.without_loss().parameters())
    trained = sum(p.numel() for p in model.without_loss().parameters() if p.requires_grad)
    frozen = "" if trained == count else f"; {trained:,} of them trained"
    device = str(ranks.device)
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    elif ranks.device.type == "cpu":
        device = f"cpu ({torch.get_num_threads()} threads)"
    precision = training.precision + (", compiled" if training.compile else "")
    latents = f"{model.latent_channels} x {side // f} x {side // f}"
    for line in (
        f"model      {count:,} parameters, f = {f}: {side} x {side} -> latents {latents}{frozen}",
        f"data       {len(train_set)} training images and {len(val_set or ())} for validation, "
        f"from {config.data.train.root}",
        f"devices    {ranks.world_size} x {device}, {precision}",
        f"batch      {training.global_batch_size} images a step = {ranks.world_size} (ranks) x "
        f"{training.accumulate_batches} (accumulated) x {images}",
        f"length     {total_steps} steps, {state.step} of them taken",
        f"results    {run}",
    ):
        logger.info(line)
