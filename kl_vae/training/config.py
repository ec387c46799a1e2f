"""The configuration of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from kl_vae.data import DataConfig
from kl_vae.ddconfig import DDConfig
from kl_vae.latents import LatentNormalization
from kl_vae.optim.config import DiscriminatorOptimizerConfig, OptimizerConfig
from kl_vae.runtime.config_file import load_config
from kl_vae.runtime.published_config import ConfigSource
from kl_vae.runtime.schema import from_mapping


@dataclass(frozen=True, kw_only=True)
class ModelParams:
    """The arguments of `AutoEncoderKL`.

    Attributes:
        ddconfig: the architecture.
        embed_dim: channels of the latents; null: `z_channels`, without quant convolutions (SD3,
            FLUX).
        lossconfig: `{target: NAME, params: {...}}`; null: MSE + 0.5 KL, which collapses.
        ckpt_path: a checkpoint whose weights training starts from.
        ignore_keys: prefixes of checkpoint keys that are not loaded.
        colorize_nlabels: null, or `in_channels`: images of more than three channels are projected
            to three for display.
        monitor: the validation metric that selects the best checkpoint, such as val/psnr (or
            psnr): the highest of psnr and ssim, else the lowest.
        latents: shift and scale of `normalize_latents`.
    """

    ddconfig: DDConfig
    embed_dim: int | None
    lossconfig: dict[str, Any] | None = None
    ckpt_path: str | None = None
    ignore_keys: tuple[str, ...] = ()
    colorize_nlabels: int | None = None
    monitor: str | None = None
    latents: LatentNormalization | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model section; its one key `params` follows the published layout."""

    params: ModelParams


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batches, precision, logging and checkpoints of a run.

    Attributes:
        seed: seed of all random numbers: initial weights, order, crops, flips, posterior noise.
        global_batch_size: images per optimisation step, over all ranks and micro-batches.
        accumulate_batches: micro-batches per rank and step.
        epochs: passes over the data; an epoch is len(data) // global_batch_size steps.
        max_steps: optimisation steps, instead of epochs.
        precision: fp32, or bf16 or fp16 by autocast (fp16 with a gradient scaler).
        channels_last: memory layout of the convolutions; faster on CPUs and tensor cores.
        winograd: on CPUs in fp32, wide 3 x 3 convolutions and their gradients by Winograd's
            algorithm, which is faster and rounds a little more.
        activation_checkpointing: activations that the backward pass recomputes: none (except
            between a norm and its SiLU), norms (between a norm and its convolution, which costs
            little) or blocks (residual blocks: the least memory, and a third more time).
        compile: whether to use torch.compile, which fuses norm, SiLU and cast; the first step waits
            for it. auto: on GPUs, if it works there. It needs Triton on GPUs, a C++ compiler on
            CPUs.
        validate_every_steps: steps between validations; null: at the end of each epoch of
            at least 100 steps, else of as many epochs as have 100 steps.
        save_every_steps: steps between checkpoints (one is saved before each validation, too).
        keep_checkpoints: number of newest checkpoints to keep, besides the best; at least 2.
        log_every_steps: steps between lines of metrics.jsonl.
        sample_images: images in the grids of each validation.
        max_skipped_steps: consecutive steps without a finite loss or gradient that end the run.
        check_ranks_every_steps: steps between checks that all ranks have equal parameters; null:
            never.
        timeout_seconds: time limit for other ranks and data workers.
        deterministic: use deterministic kernels only; slower on GPUs.
        ema_decay: decay of the moving average of the weights, which is also validated and saved;
            null: no average.
        freeze: patterns of parameters that are not trained, such as encoder.*.
        equivariance: probability that a step rotates and scales its latents and images in the same
            way (EQ-VAE); 0: never.
        equivariance_min_scale: minimum scale.
    """

    seed: int = 0
    global_batch_size: int = 32
    accumulate_batches: int = 1
    epochs: int | None = None
    max_steps: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    winograd: bool = True
    activation_checkpointing: Literal["none", "norms", "blocks"] = "norms"
    compile: bool | Literal["auto"] = "auto"
    validate_every_steps: int | None = None
    save_every_steps: int = 1000
    keep_checkpoints: int = 2
    log_every_steps: int = 10
    sample_images: int = 8
    max_skipped_steps: int = 10
    check_ranks_every_steps: int | None = 100
    timeout_seconds: int = 600
    deterministic: bool = False
    ema_decay: float | None = None
    freeze: tuple[str, ...] = ()
    equivariance: float = 0.0
    equivariance_min_scale: float = 0.25

    def __post_init__(self) -> None:
        errors = []
        for key, value in dataclasses.asdict(self).items():
            if key != "seed" and type(value) is int and value < 1:
                errors.append(f"{key}={value}: must be at least 1")
        if self.keep_checkpoints == 1:
            errors.append("keep_checkpoints=1: at least 2, for when the newest is damaged")
        if (self.epochs is None) == (self.max_steps is None):
            errors.append(
                f"max_steps={self.max_steps}: set either epochs={self.epochs} or max_steps, "
                "and the other to null"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            errors.append(
                f"ema_decay={self.ema_decay}: at least 0 and below 1, such as 0.9999, or null"
            )
        if not 0 <= self.equivariance <= 1:
            errors.append(f"equivariance={self.equivariance}: a probability, 0 to 1, such as 0.5")
        if not 0 < self.equivariance_min_scale <= 1:
            errors.append(
                f"equivariance_min_scale={self.equivariance_min_scale}: above 0, at most 1"
            )
        if errors:
            raise ValueError("\n".join(errors))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: the sections of its config file."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: DiscriminatorOptimizerConfig = field(
        default_factory=DiscriminatorOptimizerConfig
    )
    training: TrainingConfig

    @classmethod
    def load(cls, config: ConfigSource, overrides: Iterable[str] = ()) -> RunConfig:
        """Read a config.

        Args:
            config: a YAML file, the name of a shipped config such as `kl-f8`, or a mapping, such
                as an OmegaConf object.
            overrides: `key.path=value`, the value in YAML.

        Raises:
            ValueError: lists every error in the config.
        """
        values = load_config(config, overrides)
        if isinstance(values.get("data"), dict):
            values["data"].pop("listing_cache", None)  # a key of version 0.1 without effect
        return from_mapping(cls, values)
