"""The KL autoencoder: encoder, posterior, decoder, and the loss that trains them.

B batch, C channels, H and W the image's height and width, h = H/f, w = W/f, z latent channels
(`embed_dim`, or z_channels where that is None), D size of the context vector.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.accelerate import set_activation_checkpointing
from kl_vae.checkpoints.export import write_compvis, write_diffusers
from kl_vae.checkpoints.presets import find_preset
from kl_vae.checkpoints.pretrained import complete_params, has_published_parts, match
from kl_vae.checkpoints.reading import Weights, read_weights
from kl_vae.ddconfig import DDConfig, check_autoencoder, check_context, check_images, check_latents
from kl_vae.decoder import Decoder
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.encoder import Encoder
from kl_vae.latents import LatentNormalization
from kl_vae.losses import Loss, LPIPSWithDiscriminator, build_loss, default_loss
from kl_vae.losses.equivariance import Equivariance
from kl_vae.optim.config import DiscriminatorOptimizerConfig, OptimizerConfig, build_optimizer
from kl_vae.runtime.randomness import generator_for
from kl_vae.runtime.schema import from_mapping


class StepOutput(NamedTuple):
    """What one pass of a batch through autoencoder and loss gives."""

    total: Tensor  # the scalar to minimise
    log: dict[str, Tensor]  # detached scalars under "train/..." or "val/..."
    target: Tensor  # [B, C, H, W], what the reconstruction should be
    reconstruction: Tensor  # [B, C, H, W]
    posterior: DiagonalGaussianDistribution


class AutoEncoderKL(nn.Module):
    """KL-regularised autoencoder (Rombach et al. 2022, section 3.1; Kingma & Welling 2013).

    Images are float32 [B, C, H, W] in [-1, 1], H and W multiples of `f`.

    Args:
        ddconfig: the architecture (`DDConfig` describes each key).
        embed_dim: channels of the latents; None: z_channels, without quant convolutions.
        lossconfig: `{target: NAME, params: {...}}`, or a callable (`kl_vae.losses` gives its
            signature); None: `default_loss`.
        ckpt_path: a checkpoint to load weights from.
        ignore_keys: beginnings of the checkpoint's keys that are not loaded.
        colorize_nlabels: number of channels that `to_rgb` projects to three; in_channels, or None.
        monitor: the validation metric, such as "val/rec_loss", that selects the best checkpoint.
        latents: how `normalize_latents` scales (`LatentNormalization` describes each key); None:
            unknown.

    Raises:
        ValueError: a key, value or checkpoint that does not fit; the text says how to fix it.
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
        """f: an image of H x W has latents of H/f x W/f."""
        return self.config.downsampling_factor

    @property
    def latent_channels(self) -> int:
        """z, channels of the latents."""
        return self.config.z_channels if self.embed_dim is None else self.embed_dim

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.conv_out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights, and outside autocast of what goes in and comes out."""
        return self.decoder.conv_out.weight.dtype

    def encode(self, x: Tensor, context: Tensor | None = None) -> DiagonalGaussianDistribution:
        """Return the posterior over latents [B, z, h, w] of images [B, C, H, W].

        Raises:
            ValueError: x is not a batch of images in [-1, 1], or f does not divide its size.
        """
        check_images(x, self.config)
        check_context(context, self.config)
        moments = self.encoder(x, context)
        if self.embed_dim is not None:
            moments = self.quant_conv(moments)
        return DiagonalGaussianDistribution(moments)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the images [B, out_ch, H, W], unclamped, of latents [B, z, h, w].

        Outside autocast they have the weights' precision, whatever the latents have.

        Raises:
            ValueError: z is not a batch of latents of this model.
        """
        check_latents(z, self.latent_channels)
        check_context(context, self.config)
        if not torch.is_autocast_enabled(z.device.type):
            z = z.to(self.dtype)
        if self.embed_dim is not None:
            z = self.post_quant_conv(z)
        image: Tensor = self.decoder(z, context)
        return image

    @torch.no_grad()
    def reconstruct(self, image: Tensor, context: Tensor | None = None) -> Tensor:
        """Decode the posterior's mode of images of any size, as in eval mode; without gradients.

        Args:
            image: [B, C, H, W] or [C, H, W] in [-1, 1]. The edge is repeated up to a multiple of f.
            context: as for `forward`.

        Returns:
            A tensor of the image's shape, with out_ch channels, unclamped.

        Raises:
            ValueError: as `encode`, but for the size.
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
        """Scale raw latents [B, z, h, w] to about zero mean and unit variance.

        Raises:
            ValueError: this model's scale is not known, or z is not a batch of latents of it.
        """
        return self._normalization(z).normalize(z)

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """Return the raw latents [B, z, h, w], as `decode` takes them, of normalised ones.

        Raises:
            ValueError: as `normalize_latents`.
        """
        return self._normalization(z).denormalize(z)

    def _normalization(self, z: Tensor) -> LatentNormalization:
        check_latents(z, self.latent_channels)
        if self.latents is None:
            raise ValueError(
                "the scale of this model's latents is not known; measure it with "
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
        """Encode, draw latents, decode.

        Args:
            input: images [B, C, H, W].
            sample_posterior: decode a sample of the posterior; else its mode.
            context: vectors [B, D], where the ddconfig has context_channels D.
            noise: standard normal noise [B, z, h, w] for the sample; None: torch's generator.
            equivariance: how to rotate and scale the latents before they are decoded.

        Returns:
            The reconstruction [B, out_ch, H, W] (of the rotated and scaled image, where there is an
            equivariance) and the posterior.
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
        """Pass a batch [B, C, H, W] through autoencoder and loss: what every step begins with.

        `forward` is called in place of this module: in training the DistributedDataParallel
        wrapper, without which the gradients of the ranks would stay apart.
        """
        reconstruction, posterior = (forward or self)(batch, noise=noise, equivariance=equivariance)
        target = batch
        if equivariance is not None:
            target = equivariance.of_images(batch, self.downsampling_factor)
        loss: Loss = self.default_loss if self.loss is None else self.loss
        # losses are float32; a discriminator has autocast's precision
        in_full = torch.autocast(batch.device.type, enabled=False)
        with nullcontext() if self.adversary is not None else in_full:
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
        """Return the loss of a batch of images [B, C, H, W], to be minimised.

        `batch_idx` counts as the number of optimisation steps so far. Where a discriminator learns,
        its loss is added: neither's gradient reaches the other's parameters.
        """
        out = self.step(batch, batch_idx, "train")
        if self.adversary is None or not self.adversary.discriminates(batch_idx):
            return out.total
        loss, _ = self.adversary.discriminator_loss(out.target, out.reconstruction)
        return out.total + loss

    @torch.no_grad()
    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the validation metrics of a batch of images [B, C, H, W], under "val/..."."""
        return self.step(batch, batch_idx, "val").log

    def configure_optimizers(
        self,
        config: OptimizerConfig | None = None,
        discriminator_config: OptimizerConfig | None = None,
    ) -> torch.optim.Optimizer | list[torch.optim.Optimizer]:
        """Return the optimiser of autoencoder and loss, or with a discriminator that and its own.

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
        """The loss, where it has a discriminator."""
        return self.loss if isinstance(self.loss, LPIPSWithDiscriminator) else None

    def set_activation_checkpointing(self, kind: str | None) -> None:
        """Choose what the backward pass computes again: none, norms, blocks, or None as at first.

        `kl_vae.accel.accelerate.set_activation_checkpointing` describes each.

        Raises:
            ValueError: no such kind.
        """
        set_activation_checkpointing(self, kind)

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of autoencoder and loss, without the discriminator's."""
        adversary = self.adversary
        others = set() if adversary is None else set(adversary.discriminator.parameters())
        return [p for p in self.parameters() if p.requires_grad and p not in others]

    def without_loss(self) -> AutoEncoderKL:
        """Return a model of the same modules and parameters, shared, without the loss."""
        bare = copy.copy(self)
        bare._modules = {key: module for key, module in self._modules.items() if key != "loss"}
        bare.loss = None
        return bare

    def get_last_layer(self) -> Tensor:
        """Return the weight of the decoder's last convolution, [out_ch, ch, 3, 3]."""
        return self.decoder.conv_out.weight

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, params: Mapping[str, Any] | None = None, *, ema: bool = True
    ) -> AutoEncoderKL:
        """Load a trained autoencoder, in eval mode and without its loss.

        float32 weights are mapped into memory: a page of them is read when it is used, and copied
        when it is written to. Until the model is moved to a device, the file may be removed or
        replaced, but not overwritten.

        Args:
            path: a run directory (its best checkpoint, else its newest), one of our checkpoints, a
                file of torch's or a safetensors file in the CompVis or diffusers layout, of an
                autoencoder or a whole pipeline, a folder of diffusers', or
                `hf://ORG/NAME[@REVISION][/SUBFOLDER or /FILE]`.
            params: `model.params` of a config, against which the tensors are checked; None: as the
                checkpoint says, else as the names and shapes of its tensors show.
            ema: load the moving average of the weights, where the checkpoint has one; else the
                weights as they were trained last.

        Raises:
            ValueError: no autoencoder there, or not one of these params.
        """
        weights = read_weights(path, ema)
        return cls._of_weights(weights, complete_params(weights, params))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, subfolder: str = "") -> AutoEncoderKL:
        """Load what `from_checkpoint` takes, or ORG/NAME of the Hugging Face hub, as diffusers do.

        Args:
            name: a path; where there is none of that name, ORG/NAME means `hf://ORG/NAME`.
            subfolder: of a folder or a repository, such as vae.

        Raises:
            ValueError: as `from_checkpoint`.
        """
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+(@[^/]+)?", str(name)) and not Path(name).exists()
        text = f"hf://{name}" if is_id else str(name)
        return cls.from_checkpoint(f"{text}/{subfolder}" if subfolder else text)

    @classmethod
    def from_preset(cls, name: str, weights: str | Path | None = None) -> AutoEncoderKL:
        """Load a published autoencoder, in eval mode, with the scale of its latents.

        Args:
            name: one of `kl_vae.checkpoints.presets.PRESETS`, such as sdxl-vae.
            weights: as the path of `from_checkpoint`; None: fetched from where they are published.

        Raises:
            ValueError: no such preset, or weights that are not what it says.
        """
        preset = find_preset(name)
        read = read_weights(preset.location if weights is None else weights)
        return cls._of_weights(read, preset.params_of(read))

    @classmethod
    def _of_weights(cls, weights: Weights, params: Mapping[str, Any]) -> AutoEncoderKL:
        # on meta nothing is initialised that is then overwritten
        device = "meta" if has_published_parts(params["ddconfig"]) else "cpu"
        with torch.device(device):
            model = cls(**params)
        own = model.state_dict()
        fitting = match(own, weights.tensors, source=weights.source)
        tensors = {key: x.to(own[key].dtype) for key, x in fitting.items()}
        model.load_state_dict(tensors, strict=False, assign=True)
        return model.eval()

    @property
    def params(self) -> dict[str, Any]:
        """`model.params` to build this model again, without its loss; plain values."""
        return {
            "ddconfig": dataclasses.asdict(self.config),
            "embed_dim": self.embed_dim,
            "colorize_nlabels": None if self.colorize is None else self.colorize.shape[1],
            "monitor": self.monitor,
            "latents": None if self.latents is None else dataclasses.asdict(self.latents),
        }

    def save_pretrained(self, folder: str | Path, dtype: str = "fp32") -> None:
        """Write a folder that `diffusers.AutoencoderKL.from_pretrained` loads, and we as well.

        Args:
            folder: is made.
            dtype: of the weights there: fp32, fp16 or bf16.

        Raises:
            ValueError: diffusers cannot express this model, the folder exists or cannot be written,
                or a weight is too large for fp16.
        """
        write_diffusers(Path(folder), self._own_tensors(), self.params, dtype)

    def save_compvis(self, path: str | Path, dtype: str = "fp32") -> None:
        """Write one safetensors file with the original names, and `params` in its metadata.

        Args:
            path: the file to write, .safetensors.
            dtype: of the weights there: fp32, fp16 or bf16.

        Raises:
            ValueError: the file exists or cannot be written, or a weight is too large for fp16.
        """
        write_compvis(Path(path), self._own_tensors(), self.params, dtype)

    def _own_tensors(self) -> dict[str, Tensor]:
        return self.without_loss().state_dict()

    def init_from_ckpt(self, path: str | Path, ignore_keys: Iterable[str] = ()) -> None:
        """Load weights from what `from_checkpoint` takes, but for keys that `ignore_keys` begin.

        A moving average of the weights is preferred. One log line says what was loaded, ignored,
        missing and unexpected. The tensors of a loss that this model does not have are ignored.

        Raises:
            ValueError: missing, unexpected or differently shaped tensors that `ignore_keys` does
                not name. The model is then left as it was.
        """
        weights = read_weights(path)
        self.load_weights(weights.tensors, ignore_keys, source=weights.source)

    def load_weights(
        self, tensors: Mapping[str, Tensor], ignore_keys: Iterable[str] = (), source: str = ""
    ) -> None:
        """Load a state dict as `init_from_ckpt` does a file."""
        self.load_state_dict(match(self.state_dict(), tensors, ignore_keys, source), strict=False)

    def to_rgb(self, x: Tensor) -> Tensor:
        """Return RGB images [B, 3, H, W] in [-1, 1] of images with any number of channels.

        Three channels stay, one is repeated. More than three are projected by the `colorize` buffer
        and each image stretched to the whole range; without that buffer the first three are shown.
        """
        channels = x.shape[1]
        if channels == 1:
            return x.expand(-1, 3, -1, -1)
        if channels > 3 and self.colorize is not None:
            x = F.conv2d(x, self.colorize.to(x))
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            return 2.0 * (x - low) / (high - low).clamp_min(1e-12) - 1.0
        return F.pad(x, (0, 0, 0, 0, 0, 1)) if channels == 2 else x[:, :3]


def padded_size(images: Tensor, factor: int) -> tuple[int, int]:
    """Return H and W of images [..., H, W] raised to multiples of `factor` (f), at least 2 f."""
    # 2 f, since the group norm of a single latent is an error or a constant
    height, width = (max(2, -(-side // factor)) * factor for side in images.shape[-2:])
    return height, width


def pad(images: Tensor, factor: int) -> Tensor:
    """Repeat the edge of images [B, C, H, W] to the right and below, up to their `padded_size`."""
    height, width = padded_size(images, factor)
    # repeated, since reflection needs an image larger than what it adds
    border = (0, width - images.shape[3], 0, height - images.shape[2])
    return F.pad(images, border, mode="replicate")
