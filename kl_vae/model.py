"""KL autoencoder: encoder, posterior, decoder and training loss.

Shapes: B batch, C channels, H and W image height and width, h = H/f, w = W/f, z latent channels
(`embed_dim`, or z_channels if that is None), D size of the context vector.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.accelerate import set_activation_checkpointing
from kl_vae.checkpoints.architecture import check_stated
from kl_vae.checkpoints.export import write_compvis, write_diffusers
from kl_vae.checkpoints.presets import find_preset
from kl_vae.checkpoints.pretrained import (
    complete_params,
    has_published_parts,
    match,
    stated_latents,
)
from kl_vae.checkpoints.reading import Weights, read_weights
from kl_vae.checkpoints.run_files import trained_discriminator
from kl_vae.ddconfig import DDConfig, check_autoencoder, check_context, check_images, check_latents
from kl_vae.decoder import Decoder
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.encoder import Encoder
from kl_vae.latents import LatentNormalization
from kl_vae.losses import Loss, LPIPSWithDiscriminator, build_loss, default_loss
from kl_vae.losses.equivariance import Equivariance
from kl_vae.optim.config import DiscriminatorOptimizerConfig, OptimizerConfig, build_optimizer
from kl_vae.runtime.published_config import ConfigSource, model_params
from kl_vae.runtime.randomness import generator_for
from kl_vae.runtime.schema import from_mapping, suggest

logger = logging.getLogger(__name__)


class StepOutput(NamedTuple):
    """Result of one pass of a batch through autoencoder and loss."""

    total: Tensor  # scalar to minimise
    log: dict[str, Tensor]  # detached scalars with keys "train/..." or "val/..."
    target: Tensor  # [B, C, H, W], target of the reconstruction
    reconstruction: Tensor  # [B, C, H, W]
    posterior: DiagonalGaussianDistribution


class AutoEncoderKL(nn.Module):
    """KL-regularised autoencoder (Rombach et al. 2022, section 3.1; Kingma & Welling 2013).

    Images are [B, C, H, W] in [-1, 1], with H and W multiples of f. They, latents and contexts are
    cast to the data type of the weights: after `model.half()`, images come out in float16.

    Args:
        ddconfig: the architecture, see `DDConfig`.
        embed_dim: channels of the latents; None: z_channels, without quant convolutions.
        lossconfig: `{target: NAME, params: {...}}`, or a callable with the signature described in
            `kl_vae.losses`; None: `default_loss`.
        ckpt_path: a checkpoint to load weights from.
        ignore_keys: prefixes of checkpoint keys that are not loaded.
        colorize_nlabels: number of channels that `to_rgb` projects to three; in_channels, or None.
        monitor: validation metric that selects the best checkpoint, such as "val/rec_loss".
        latents: normalisation for `normalize_latents`, see `LatentNormalization`; None: unknown.

    Raises:
        ValueError: a key or value is invalid, or the checkpoint does not match.
    """

    __call__: Callable[..., tuple[Tensor, DiagonalGaussianDistribution]]
    colorize: Tensor | None
    default_loss = staticmethod(default_loss)  # for lossconfig=None

    def __init__(
        self,
        ddconfig: DDConfig | Mapping[str, Any],
        embed_dim: int | None,
        lossconfig: Mapping[str, Any] | Loss | None = None,
        ckpt_path: str | Path | None = None,
        ignore_keys: Iterable[str] = (),
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        latents: LatentNormalization | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(ddconfig, DDConfig):
            ddconfig = DDConfig.from_dict(ddconfig)
        check_autoencoder(ddconfig, embed_dim, colorize_nlabels)
        self.config = ddconfig
        self.embed_dim = embed_dim
        self.monitor = monitor
        # `data.range` of the images that it was trained on; checkpoints state it
        self.pixel_range: Any = "auto"
        self.latents: LatentNormalization | None = None
        if latents is not None:
            self.latents = from_mapping(LatentNormalization, latents, "latents")
            self.latents.check_channels(self.latent_channels)
        self.encoder = Encoder(**dataclasses.asdict(ddconfig))
        self.decoder = Decoder(**dataclasses.asdict(ddconfig))
        if embed_dim is not None:
            self.quant_conv = nn.Conv2d(2 * ddconfig.z_channels, 2 * embed_dim, 1)
            self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig.z_channels, 1)
        self.loss = build_loss(lossconfig)
        colorize = None
        if colorize_nlabels is not None:
            generator = generator_for("colorize", colorize_nlabels)
            colorize = torch.randn(3, colorize_nlabels, 1, 1, generator=generator, device="cpu")
        self.register_buffer("colorize", colorize)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    @property
    def downsampling_factor(self) -> int:
        """Downsampling factor f: an image of H x W has latents of H/f x W/f."""
        return self.config.downsampling_factor

    @property
    def latent_channels(self) -> int:
        """Number of latent channels z."""
        return self.config.z_channels if self.embed_dim is None else self.embed_dim

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.decoder.conv_out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights; inputs are cast to it, and without autocast images have it."""
        return self.decoder.conv_out.weight.dtype

    def encode(self, x: Tensor, context: Tensor | None = None) -> DiagonalGaussianDistribution:
        """Encode images [B, C, H, W] to the posterior over latents [B, z, h, w].

        The posterior is float32, or float64 if the weights are.

        Raises:
            ValueError: x is not a batch of images in [-1, 1], such as integers, or H or W is not a
                multiple of f.
        """
        check_images(x, self.config)
        check_context(context, self.config)
        moments = self.encoder(x.to(self.dtype), self._cast(context))
        if self.embed_dim is not None:
            moments = self.quant_conv(moments)
        return DiagonalGaussianDistribution(moments)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Decode latents [B, z, h, w] to unclamped images [B, out_ch, H, W].

        Without autocast, the images have the data type of the weights.

        Raises:
            ValueError: z is not a batch of latents of this model.
        """
        check_latents(z, self.latent_channels)
        check_context(context, self.config)
        z = z.to(self.dtype)
        if self.embed_dim is not None:
            z = self.post_quant_conv(z)
        image: Tensor = self.decoder(z, self._cast(context))
        return image

    def _cast(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else context.to(self.dtype)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, context: Tensor | None = None) -> Tensor:
        """Reconstruct images of any size from the posterior mode, in eval mode without gradients.

        Args:
            image: [B, C, H, W] or [C, H, W] in [-1, 1]. Edges are repeated to pad the size to a
                multiple of f.
            context: see `forward`.

        Returns:
            A tensor of the image's shape, with out_ch channels, unclamped.

        Raises:
            ValueError: see `encode`; any size is accepted.
        """
        batch = image[None] if isinstance(image, Tensor) and image.ndim == 3 else image
        check_images(batch, self.config, any_size=True)
        height, width = batch.shape[2:]
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            padded = pad(batch, self.downsampling_factor)
            out = self.decode(self.encode(padded, context).mode(), context)[..., :height, :width]
        finally:
            for module in training:
                module.training = True
        return out[0] if image.ndim == 3 else out

    def normalize_latents(self, z: Tensor) -> Tensor:
        """Normalise raw latents [B, z, h, w] to about zero mean and unit variance.

        Raises:
            ValueError: the scale of the latents is unknown, or z is not a batch of latents of this
                model.
        """
        return self._normalization(z).normalize(z)

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """Convert normalised latents [B, z, h, w] back to raw latents for `decode`.

        Raises:
            ValueError: see `normalize_latents`.
        """
        return self._normalization(z).denormalize(z)

    def _normalization(self, z: Tensor) -> LatentNormalization:
        check_latents(z, self.latent_channels)
        if self.latents is None:
            raise ValueError(
                "the scale of this model's latents is unknown; measure it with "
                "kl-vae encode --statistics, or give latents={'scale_factor': ...}"
            )
        return self.latents

    def forward(
        self,
        input: Tensor,
        sample_posterior: bool = True,
        context: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        equivariance: Equivariance | None = None,
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Encode images, sample latents, and decode them.

        Args:
            input: images [B, C, H, W].
            sample_posterior: decode a sample of the posterior; False: its mode.
            context: context vectors [B, D], if the ddconfig has context_channels D.
            noise: standard normal noise [B, z, h, w] for the sample; None: PyTorch's global
                generator.
            equivariance: rotation and scaling of the latents before decoding.

        Returns:
            The reconstruction [B, out_ch, H, W], which is rotated and scaled if `equivariance` is
            given, and the posterior.
        """
        posterior = self.encode(input, context)
        z = posterior.sample(noise=noise) if sample_posterior else posterior.mode()
        if equivariance is not None:
            z = equivariance.of_latents(z)
        return self.decode(z, context), posterior

    def step(
        self,
        batch: Tensor,
        global_step: int,
        split: str,
        *,
        forward: Callable[..., Any] | None = None,
        noise: Tensor | None = None,
        equivariance: Equivariance | None = None,
    ) -> StepOutput:
        """Run autoencoder and loss on a batch [B, C, H, W].

        `forward` is called instead of this module. In distributed training it is the
        DistributedDataParallel wrapper, which averages gradients over the ranks.
        """
        reconstruction, posterior = (forward or self)(batch, noise=noise, equivariance=equivariance)
        target = batch
        if equivariance is not None:
            target = equivariance.of_images(batch, self.downsampling_factor)
        loss: Loss = self.default_loss if self.loss is None else self.loss
        # losses run in float32, a discriminator in the autocast precision
        no_autocast = torch.autocast(batch.device.type, enabled=False)
        with nullcontext() if self.adversary is not None else no_autocast:
            total, log = loss(
                target,
                reconstruction.float(),
                posterior,
                global_step=global_step,
                last_layer=self.get_last_layer(),
                split=split,
            )
        log = {f"{split}/total_loss": total.detach(), **log}
        return StepOutput(total, log, target, reconstruction, posterior)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the training loss of a batch of images [B, C, H, W].

        `batch_idx` is used as the number of completed optimisation steps. The loss of an active
        discriminator is added; the two losses do not contribute to each other's gradients.
        """
        out = self.step(batch, batch_idx, "train")
        if self.adversary is None or not self.adversary.discriminates(batch_idx):
            return out.total
        loss, _ = self.adversary.discriminator_loss(out.target, out.reconstruction)
        return out.total + loss

    @torch.no_grad()
    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the validation metrics of images [B, C, H, W], with keys "val/..."."""
        return self.step(batch, batch_idx, "val").log

    def configure_optimizers(
        self,
        config: OptimizerConfig | None = None,
        discriminator_config: OptimizerConfig | None = None,
    ) -> torch.optim.Optimizer | list[torch.optim.Optimizer]:
        """Return the optimiser, or a list with that of the discriminator if there is one.

        A learned logvar is trained with the autoencoder.
        """
        optimizer = build_optimizer(self.own_parameters(), config or OptimizerConfig())
        if self.adversary is None:
            return optimizer
        parameters = self.adversary.discriminator.parameters()
        discriminator_config = discriminator_config or DiscriminatorOptimizerConfig()
        return [optimizer, build_optimizer(parameters, discriminator_config)]

    @property
    def adversary(self) -> LPIPSWithDiscriminator | None:
        """The loss if it has a discriminator, otherwise None."""
        return self.loss if isinstance(self.loss, LPIPSWithDiscriminator) else None

    def set_activation_checkpointing(self, kind: str | None) -> None:
        """Set which activations are recomputed in backward: none, norms, blocks, or None.

        See `kl_vae.accel.accelerate.set_activation_checkpointing`.

        Raises:
            ValueError: the kind is unknown.
        """
        set_activation_checkpointing(self, kind)

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of autoencoder and loss, except the discriminator's."""
        adversary = self.adversary
        excluded = set() if adversary is None else set(adversary.discriminator.parameters())
        return [p for p in self.parameters() if p.requires_grad and p not in excluded]

    def without_loss(self) -> AutoEncoderKL:
        """Return a shallow copy of the model without the loss; modules are shared."""
        bare = copy.copy(self)
        bare._modules = {key: module for key, module in self._modules.items() if key != "loss"}
        bare.loss = None
        return bare

    def get_last_layer(self) -> Tensor:
        """Return the weight of the decoder's last convolution, [out_ch, ch, 3, 3]."""
        return self.decoder.conv_out.weight

    @classmethod
    def from_config(cls, config: ConfigSource) -> AutoEncoderKL:
        """Build the autoencoder of a config, with its loss.

        Args:
            config: a YAML file, the name of a shipped config, or its keys (a mapping, an OmegaConf
                object), also of latent-diffusion and generative-models: an autoencoder, or a
                diffusion model with its `first_stage_config`.

        Raises:
            ValueError: the config is of another model, or a key or value is invalid.
        """
        from kl_vae.runtime.config_file import load_model_params

        params = load_model_params(config)
        known = [name for name in inspect.signature(cls).parameters if name != "self"]
        for key in params.keys() - set(known):
            raise ValueError(f"model.params.{key}: unknown key; {suggest(key, known)}")
        for key in ("ddconfig", "embed_dim"):
            if key not in params:
                raise ValueError(f"model.params.{key}: required, but missing")
        return cls(**params)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        params: Mapping[str, Any] | None = None,
        *,
        ema: bool = True,
        ignore_keys: Iterable[str] = (),
    ) -> AutoEncoderKL:
        """Load a trained autoencoder, in eval mode and without its loss.

        float32 weights are memory-mapped (copy-on-write). Until the model is moved to another
        device, the file may be removed or replaced, but must not be overwritten.

        Args:
            path: a run directory (its best checkpoint, otherwise its latest), a kl_vae checkpoint,
                a torch.save or safetensors file in the CompVis or diffusers layout (an autoencoder
                or a whole pipeline), a diffusers folder, or
                `hf://ORG/NAME[@REVISION][/SUBFOLDER or /FILE]`.
            params: a config, or its `model.params`, which the tensors must match; None: read from
                the checkpoint, or inferred from the names and shapes of its tensors.
            ema: load the EMA weights if the checkpoint has them; False: the latest trained weights.
            ignore_keys: prefixes of keys, in the CompVis layout, that are not loaded; these weights
                keep their initial values.

        Raises:
            ValueError: the path holds no autoencoder, or it does not match the params.
        """
        params = None if params is None else model_params(params)
        weights = read_weights(path, ema)
        return cls._of_weights(weights, complete_params(weights, params), tuple(ignore_keys))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, subfolder: str = "", ignore_keys: Iterable[str] = ()
    ) -> AutoEncoderKL:
        """Load a model from a path or the Hugging Face Hub, with the interface of diffusers.

        Args:
            name: a path accepted by `from_checkpoint`; if there is no such path, ORG/NAME means
                `hf://ORG/NAME`.
            subfolder: subfolder of the folder or repository, such as vae.
            ignore_keys: see `from_checkpoint`.

        Raises:
            ValueError: see `from_checkpoint`.
        """
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+(@[^/]+)?", str(name)) and not Path(name).exists()
        text = f"hf://{name}" if is_id else str(name)
        text = f"{text}/{subfolder}" if subfolder else text
        return cls.from_checkpoint(text, ignore_keys=ignore_keys)

    @classmethod
    def from_preset(
        cls, name: str, weights: str | Path | None = None, *, ignore_keys: Iterable[str] = ()
    ) -> AutoEncoderKL:
        """Load a published autoencoder in eval mode, with the normalisation of its latents.

        Args:
            name: one of `kl_vae.checkpoints.presets.PRESETS`, such as sdxl-vae.
            weights: a path accepted by `from_checkpoint`; None: download the published weights.
            ignore_keys: see `from_checkpoint`.

        Raises:
            ValueError: the preset is unknown, or the weights do not match it.
        """
        preset = find_preset(name)
        read = read_weights(preset.location if weights is None else weights)
        return cls._of_weights(read, preset.params_of(read), tuple(ignore_keys))

    @classmethod
    def _of_weights(
        cls, weights: Weights, params: Mapping[str, Any], ignore_keys: tuple[str, ...]
    ) -> AutoEncoderKL:
        # the meta device avoids an initialisation that would be overwritten
        overwritten = has_published_parts(params["ddconfig"]) and not ignore_keys
        device = "meta" if overwritten else "cpu"
        with torch.device(device):
            model = cls(**params)
        own = model.state_dict()
        fitting = match(own, weights.tensors, ignore_keys, weights.source)
        tensors = {key: x.to(own[key].dtype) for key, x in fitting.items()}
        model.load_state_dict(tensors, strict=False, assign=True)
        model.pixel_range = weights.pixel_range or "auto"
        return model.eval()

    @property
    def params(self) -> dict[str, Any]:
        """`model.params` of this model without its loss, as plain values."""
        return {
            "ddconfig": dataclasses.asdict(self.config),
            "embed_dim": self.embed_dim,
            "colorize_nlabels": None if self.colorize is None else self.colorize.shape[1],
            "monitor": self.monitor,
            "latents": None if self.latents is None else dataclasses.asdict(self.latents),
        }

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: str = "fp32",
        *,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a diffusers folder, for `diffusers.AutoencoderKL` and this class.

        Args:
            folder: the new folder.
            dtype: data type of the written weights: fp32, fp16 or bf16.
            max_shard_size: largest size of a file, in bytes or as in "500MB", above which the
                weights are divided into several files; None: one file.
            variant: part of the file names, such as fp16, by which diffusers selects them.
            overwrite: replace a diffusers folder of an autoencoder.

        Raises:
            ValueError: diffusers cannot represent this model, the folder exists or cannot be
                written, a weight is too large for fp16, or a size or variant is invalid.
        """
        write_diffusers(
            Path(folder),
            self._own_tensors(),
            self.params,
            dtype,
            max_shard_size=max_shard_size,
            variant=variant,
            overwrite=overwrite,
        )

    def save_compvis(
        self, path: str | Path, dtype: str = "fp32", *, overwrite: bool = False
    ) -> None:
        """Write a safetensors file with the original key names, and `params` in its metadata.

        Args:
            path: the new .safetensors file.
            dtype: data type of the written weights: fp32, fp16 or bf16.
            overwrite: replace an existing file.

        Raises:
            ValueError: the file exists or cannot be written, or a weight is too large for fp16.
        """
        write_compvis(Path(path), self._own_tensors(), self.params, dtype, overwrite)

    def _own_tensors(self) -> dict[str, Tensor]:
        return self.without_loss().state_dict()

    def init_from_ckpt(self, path: str | Path, ignore_keys: Iterable[str] = ()) -> None:
        """Load weights from a path accepted by `from_checkpoint`.

        EMA weights are preferred. If the discriminator of a run's best checkpoint is not trained,
        that of its newest is used. Keys with a prefix in `ignore_keys` are skipped, and so are
        tensors of a loss that this model does not have. A log line lists the loaded, ignored,
        missing and unexpected tensors. A model whose `latents` are None takes the normalisation
        that the checkpoint states, if the whole encoder is loaded.

        Raises:
            ValueError: tensors are missing, unexpected or have other shapes, and `ignore_keys` does
                not cover them; or the checkpoint states another ddconfig. The model is not modified
                in this case.
        """
        weights, prefixes = read_weights(path), tuple(ignore_keys)
        check_stated(self.config, weights.params, weights.source)
        tensors, source = weights.tensors, weights.source
        if self.adversary is not None:
            discriminator, words = trained_discriminator(Path(path), weights.files[0])
            tensors, source = tensors | discriminator, source + words
        self.load_weights(tensors, prefixes, source=source)
        of_encoder = ("encoder.", "quant_conv.")
        ignored = (key for key in self.state_dict() if key.startswith(prefixes))
        if not any(key.startswith(of_encoder) for key in ignored):
            self._inherit_latents(weights)

    def _inherit_latents(self, weights: Weights) -> None:
        stated = stated_latents(weights)
        if stated is None:
            return
        latents = from_mapping(LatentNormalization, stated, f"{weights.source}: latents")
        latents.check_channels(self.latent_channels)
        if self.latents is None:
            self.latents = latents
            logger.info("%s: keeping its normalization of latents: %s", weights.source, latents)
        elif self.latents != latents:
            logger.info("%s: states %s; used is %s", weights.source, latents, self.latents)

    def load_weights(
        self, tensors: Mapping[str, Tensor], ignore_keys: Iterable[str] = (), source: str = ""
    ) -> None:
        """Load a state dict; see `init_from_ckpt`."""
        self.load_state_dict(match(self.state_dict(), tensors, ignore_keys, source), strict=False)

    def to_rgb(self, x: Tensor) -> Tensor:
        """Convert images with any number of channels to RGB images [B, 3, H, W] in [-1, 1].

        One channel is repeated, and three are kept. Images with more than three
        channels are projected by the `colorize` buffer and rescaled to the full range; without this
        buffer, the first three channels are used.
        """
        channels = x.shape[1]
        if channels == 1:
            return x.expand(-1, 3, -1, -1)
        if channels > 3 and self.colorize is not None:
            x = F.conv2d(x, self.colorize.to(x))
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            return 2.0 * (x - low) / (high - low).clamp_min(1e-12) - 1.0
        return F.pad(x, (0, 0, 0, 0, 0, 1)) if channels == 2 else x[:, :3]


AutoencoderKL = AutoEncoderKL  # the spelling of latent-diffusion and diffusers


def padded_size(images: Tensor, factor: int) -> tuple[int, int]:
    """Round H and W of images [..., H, W] up to multiples of `factor` (f), at least 2 f."""
    # 2 f, since the group norm of a single latent position fails or is constant
    height, width = (max(2, -(-side // factor)) * factor for side in images.shape[-2:])
    return height, width


def pad(images: Tensor, factor: int) -> Tensor:
    """Pad images [B, C, H, W] at the right and bottom to `padded_size` by repeating the edge."""
    height, width = padded_size(images, factor)
    # not reflection, which requires images larger than the padding
    border = (0, width - images.shape[3], 0, height - images.shape[2])
    return F.pad(images, border, mode="replicate")
