"""Architecture config (the published `ddconfig`), and checks of configs and model inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kl_vae.attention import ATTENTION
from kl_vae.blocks import BLOCKS, NORM_GROUPS, NORMALIZATION
from kl_vae.runtime.schema import from_mapping


@dataclass(frozen=True, kw_only=True)
class DDConfig:
    """Architecture of encoder and decoder.

    Attributes:
        ch: base number of channels, multiplied by `ch_mult`.
        out_ch: channels of the reconstruction.
        ch_mult: channels of each level as multiples of `ch`; each level after the first halves the
            resolution, so that f = 2 ** (len(ch_mult) - 1).
        num_res_blocks: residual blocks per level of the encoder (the decoder has one more).
        attn_resolutions: levels with attention, given by their resolution for images of size
            `resolution`.
        in_channels: channels of the image.
        resolution: side of the square training images in pixels. All other sizes that are multiples
            of f are supported as well; this one only defines the meaning of `attn_resolutions`.
        z_channels: channels of the latents before `quant_conv`.
        dropout: dropout probability in every residual block.
        resamp_with_conv: resample with convolutions; false: average pooling and plain nearest
            upsampling.
        double_z: the encoder outputs mean and log variance; false: z_channels only.
        attn_type: vanilla, linear, none, or a registered attention.
        use_linear_attn: published synonym of `attn_type: linear`.
        tanh_out: apply tanh to the output of the decoder.
        give_pre_end: the decoder returns its features before the last norm and convolution.
        norm_type: group, or a registered normalisation.
        norm_groups: number of groups of the group norm. With one channel per group, it removes the
            mean of each channel, and with it the colour of uniform images: narrow models should use
            fewer groups than 32.
        block_type: resnet, or a registered residual block.
        context_channels: size of the context vector added in each residual block; 0: no context.
        zero_init_residual: initialise the last convolution of each ResnetBlock to 0, so that it
            starts as its shortcut.

    Raises:
        ValueError: a value is invalid; the message has one line per error.
    """

    ch: int
    out_ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    in_channels: int
    resolution: int
    z_channels: int
    dropout: float = 0.0
    resamp_with_conv: bool = True
    double_z: bool = True
    attn_type: str = "vanilla"
    use_linear_attn: bool = False
    tanh_out: bool = False
    give_pre_end: bool = False
    norm_type: str = "group"
    norm_groups: int = NORM_GROUPS
    block_type: str = "resnet"
    context_channels: int = 0
    zero_init_residual: bool = False

    @classmethod
    def from_dict(cls, ddconfig: Mapping[str, object]) -> DDConfig:
        """Build a config from plain values.

        Raises:
            ValueError: keys are unknown or values have the wrong type; all errors are listed.
        """
        return from_mapping(cls, ddconfig)

    def __post_init__(self) -> None:
        errors = [*self._size_errors(), *self._name_errors()]
        if not errors:
            errors = [*self._level_errors()]
        if errors:
            raise ValueError("\n".join(errors))

    @property
    def downsampling_factor(self) -> int:
        """Downsampling factor f: an image of H x W has latents of H/f x W/f."""
        return 1 << (len(self.ch_mult) - 1)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, starting at full resolution."""
        return tuple(self.ch * multiple for multiple in self.ch_mult)

    @property
    def attention(self) -> str:
        """Type of attention, with the published synonym resolved."""
        return "linear" if self.use_linear_attn else self.attn_type

    def has_attention(self, level: int) -> bool:
        """Return whether the residual blocks of a level are followed by attention."""
        return self.resolution // 2**level in self.attn_resolutions

    def _size_errors(self) -> list[str]:
        errors = []
        sizes = ("ch", "out_ch", "num_res_blocks", "in_channels", "resolution", "z_channels")
        for key in (*sizes, "norm_groups"):
            if getattr(self, key) < 1:
                errors.append(f"{key}={getattr(self, key)}: must be at least 1")
        if not self.ch_mult or min(self.ch_mult) < 1:
            errors.append(f"ch_mult={list(self.ch_mult)}: needs one multiplier >= 1 per level")
        if not 0.0 <= self.dropout < 1.0:
            errors.append(f"dropout={self.dropout}: must be at least 0 and below 1")
        if self.context_channels < 0:
            errors.append(
                f"context_channels={self.context_channels}: must be 0 (no context) or more"
            )
        if self.use_linear_attn and self.attn_type not in ("vanilla", "linear"):
            errors.append(
                f"use_linear_attn=True: conflicts with attn_type={self.attn_type!r}; remove one of "
                "them"
            )
        return errors

    def _name_errors(self) -> list[str]:
        errors = []
        for registry in (ATTENTION, NORMALIZATION, BLOCKS):
            try:
                registry[getattr(self, registry.key)]
            except ValueError as error:
                errors.append(str(error))
        return errors

    def _level_errors(self) -> list[str]:
        errors = []
        if self.resolution % self.downsampling_factor:
            errors.append(
                f"resolution={self.resolution}: {len(self.ch_mult)} levels halve it "
                f"{len(self.ch_mult) - 1} times; use a multiple of {self.downsampling_factor}"
            )
        if self.norm_type == "group":
            # the first block normalises ch channels, independently of ch_mult[0]
            groups, common = self.norm_groups, math.gcd(self.ch, *self.channels)
            # a group of one channel would lose its mean, see norm_groups
            fewer = (n for n in range(min(groups, common // 2), 0, -1) if common % n == 0)
            fitting = next(fewer, 1)
            for channels in sorted({c for c in (self.ch, *self.channels) if c % groups}):
                errors.append(
                    f"ch={self.ch}: channels {channels} cannot be split into {groups} groups; "
                    f"set norm_groups={fitting}, or choose ch and ch_mult so that each level has "
                    f"a multiple of {groups}"
                )
        levels = [self.resolution // 2**level for level in range(len(self.ch_mult))]
        for resolution in self.attn_resolutions:
            if resolution not in levels:
                errors.append(
                    f"attn_resolutions={list(self.attn_resolutions)}: no level has resolution "
                    f"{resolution}; choose from {', '.join(map(str, levels))}"
                )
        return errors


def check_autoencoder(
    config: DDConfig, embed_dim: int | None, colorize_nlabels: int | None
) -> None:
    """Check the additional requirements of AutoEncoderKL.

    Raises:
        ValueError: a value is invalid for an autoencoder.
    """
    if not config.double_z:
        raise ValueError(
            "double_z=False: a KL autoencoder needs mean and log variance; set it to true"
        )
    if config.give_pre_end:
        raise ValueError("give_pre_end=True: an autoencoder must output an image; set it to false")
    if config.out_ch != config.in_channels:
        raise ValueError(
            f"out_ch={config.out_ch}: must equal in_channels; set it to {config.in_channels}"
        )
    if embed_dim is not None and (type(embed_dim) is not int or embed_dim < 1):
        raise ValueError(
            f"embed_dim={embed_dim!r}: must be an integer of at least 1, or null for no quant "
            "convolutions"
        )
    if colorize_nlabels is not None and colorize_nlabels != config.in_channels:
        raise ValueError(
            f"colorize_nlabels={colorize_nlabels}: must be "
            f"in_channels={config.in_channels}, or null"
        )


def check_images(x: Tensor, config: DDConfig, *, any_size: bool = False) -> None:
    """Check that x is a batch of images [B, in_channels, H, W] in [-1, 1].

    The range is only checked on the CPU, since other devices would have to synchronise.

    Args:
        x: the images.
        config: the architecture.
        any_size: accept H and W that are not multiples of f.

    Raises:
        ValueError: the type, shape, size or range is wrong.
    """
    _check_floats(x, "images", "kl_vae.load_image converts a file, a PIL image or an array")
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(
            f"images of shape {list(x.shape)}: expected [B, {config.in_channels}, H, W]"
        )
    f = config.downsampling_factor
    if not any_size and (x.shape[2] % f or x.shape[3] % f):
        raise ValueError(
            f"images of {x.shape[3]} x {x.shape[2]}: width and height must be multiples of "
            f"{f}; pad or crop them"
        )
    if _can_be_read(x) and x.numel() and (largest := x.detach().abs().amax().item()) > _LARGEST:
        raise ValueError(
            f"images with values up to {largest:g}: expected [-1, 1]; use kl_vae.load_image, or "
            "divide 0..255 by 127.5 and subtract 1"
        )


def check_latents(z: Tensor, channels: int) -> None:
    """Raise ValueError unless z is [B, channels, h, w]."""
    _check_floats(z, "latents", "call .sample() or .mode() of a posterior")
    if z.ndim != 4 or z.shape[1] != channels:
        raise ValueError(f"latents of shape {list(z.shape)}: expected [B, {channels}, h, w]")


# far above the overshoot of resampling in [-1, 1], and below the maximum of typical 0..255 images
_LARGEST = 10.0


def _check_floats(x: object, name: str, hint: str) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} of type {type(x).__name__}: expected a tensor; {hint}")
    if not x.is_floating_point():
        raise ValueError(f"{name} of {x.dtype}: expected floating point; {hint}")


def _can_be_read(x: Tensor) -> bool:
    """Return whether code may branch on the values of x."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        and not torch._C._are_functorch_transforms_active()
    )


def check_context(context: Tensor | None, config: DDConfig) -> None:
    """Raise ValueError unless a context [B, D] is given if and only if the model needs one."""
    size = config.context_channels
    if context is None:
        if size:
            raise ValueError(f"context=None: this model needs a context [B, {size}]")
    elif not size:
        raise ValueError(
            "context given: this model has no context; set context_channels in the ddconfig"
        )
    elif context.ndim != 2 or context.shape[1] != size:
        raise ValueError(f"context of shape {list(context.shape)}: expected [B, {size}]")
