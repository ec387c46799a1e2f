"""Reconstruct images with several models at once, and measure each.

B batch, C channels, H and W the images' height and width, d Inception's features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kl_vae.data import Source, to_float
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.batches import FULL_BATCH_PIXELS
from kl_vae.inference.coding import decode_latents, encode_images
from kl_vae.inference.evaluation.config import EvaluateConfig
from kl_vae.inference.evaluation.records import ModelRecord, Record
from kl_vae.inference.images import LoadedImage
from kl_vae.inference.padding import latent_noise, pad
from kl_vae.inference.tiling import Tiling
from kl_vae.metrics.similarity import ms_ssim, mse, ssim
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.randomness import generator_for
from kl_vae.visual.image_files import as_saved

IN_COLOUR = ("lpips", "rfid")  # of networks that were trained on RGB

# float64 windows of larger images are the CPU's, which has more memory
_MEASURED_WHERE_THEY_ARE = 2**22  # pixels


class Evaluator:
    """Measures units of images; what a unit gives depends on no other.

    Args:
        models: on one device, in eval mode, of images with the same number of channels.
        names: what they are called.
        source: of the images.
        config: what is measured.
        batch_size: images of one size that are encoded at once.
        lpips: what `load_lpips` gives, where it is among the metrics.
        inception: what `load_inception` gives, where rfid is among them.

    Raises:
        ValueError: the images have no colours, and a metric needs them.
    """

    def __init__(
        self,
        models: Sequence[AutoEncoderKL],
        names: Sequence[str],
        source: Source,
        config: EvaluateConfig,
        batch_size: int,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
        inception: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        for metric in IN_COLOUR:
            if metric in config.metrics and source.channels not in (1, 3, 4):
                raise ValueError(
                    f"{metric}: images of {source.channels} channels have no colours for its "
                    "network to see; leave it out of --metrics"
                )
        self._models = list(zip(models, names, strict=True))
        self._source = source
        self._config = config
        self._batch_size = batch_size
        self._lpips = lpips
        self._inception = inception

    @torch.inference_mode()
    def unit(self, images: Iterable[LoadedImage]) -> tuple[Record, Tensor | None]:
        """Measure the images of a unit.

        Returns:
            The record, and where they are asked for the features of the images and of each model's
            reconstructions, [1 + models, images, d].

        Raises:
            ValueError: a reconstruction has NaN or infinity, also in fp32.
        """
        sizes: list[list[int]] = []
        skipped: list[tuple[int, str]] = []
        measured = [ModelRecord(model.latent_channels) for model, _ in self._models]
        features = []
        device = next(self._models[0][0].parameters()).device
        for indices, x in _equal_batches(images, self._batch_size, skipped):
            sizes += [[index, *x.shape[2:]] for index in indices]
            pictures = [_as_saved(x.to(device))]
            for (model, name), of_model in zip(self._models, measured, strict=True):
                posterior, decoded = self._autoencode(model, name, indices, x)
                pictures.append(_as_saved(decoded.to(device)))
                of_model.add(posterior, self._figures(pictures[0], pictures[-1]))
            if self._inception is not None:
                features.append(torch.stack([self._inception(_rgb(x)) for x in pictures]))
        models = [of_model.values() for of_model in measured]
        record = {"images": sizes, "skipped": skipped, "models": models}
        return record, torch.cat(features, 1) if features else None

    def _autoencode(
        self, model: AutoEncoderKL, name: str, indices: Sequence[int], x: Tensor
    ) -> tuple[DiagonalGaussianDistribution, Tensor]:
        """The posteriors of [B, C, H, W], and what they are decoded to, as large."""
        config, source = self._config, self._source
        tiling = Tiling("auto" if config.crop is None else "whole")
        names = [f"{name}: {source.name(index)}" for index in indices]
        padded = torch.stack([pad(image, model.downsampling_factor) for image in x])
        posterior = encode_images(model, padded, config.precision, tiling, names)
        if config.mode == "sample":
            keys = [("reconstruct", config.seed, source.key(index)) for index in indices]
            noise = [latent_noise(model, x[0], generator_for(*key)) for key in keys]
            z = posterior.sample(noise=torch.stack(noise))
        else:
            z = posterior.mode()
        decoded = decode_latents(model, z, config.precision, tiling, names)
        return posterior, decoded[:, :, : x.shape[2], : x.shape[3]]

    def _figures(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """[B] of each metric, for pictures [B, C, H, W] as files hold them."""
        data_range = (0.0, 255.0 if before.dtype == torch.uint8 else 1.0)
        figures = {}
        if before.shape[2] * before.shape[3] > _MEASURED_WHERE_THEY_ARE:
            before, after = before.cpu(), after.cpu()
        # PSNR follows from the MSE, which is finite also where both are the same
        measures = {"psnr": ("mse", mse), "ssim": ("ssim", ssim), "ms_ssim": ("ms_ssim", ms_ssim)}
        for metric, (key, measure) in measures.items():
            if metric in self._config.metrics:
                figures[key] = measure(before, after, data_range)
        if self._lpips is not None:
            figures["lpips"] = self._lpips(to_float(_rgb(before)), to_float(_rgb(after)))
        return figures


def _equal_batches(
    images: Iterable[LoadedImage], size: int, skipped: list[tuple[int, str]]
) -> Iterator[tuple[list[int], Tensor]]:
    """Consecutive images of one shape, as they are; what cannot be used goes to `skipped`.

    `size` at a time, of more than 512 x 512 pixels as many as have the pixels of those.
    """
    indices: list[int] = []
    batch: list[Tensor] = []
    for loaded in images:
        if loaded.image is None:
            skipped.append((loaded.index, loaded.reason))
            continue
        height, width = loaded.image.shape[1:]
        most = max(1, min(size, size * FULL_BATCH_PIXELS // (height * width)))
        if batch and (len(batch) >= most or batch[0].shape != loaded.image.shape):
            yield indices, torch.stack(batch)
            indices, batch = [], []
        indices.append(loaded.index)
        batch.append(loaded.image)
    if batch:
        yield indices, torch.stack(batch)


def _as_saved(x: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1] as files hold it: see `as_saved`."""
    return torch.stack([as_saved(image) for image in x])


def _rgb(pictures: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 3, H, W]: grey three times, or without transparency."""
    return pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures[:, :3]
