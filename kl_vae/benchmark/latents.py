"""What an epoch takes over images that are encoded already."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from kl_vae.benchmark.timing import Timing, alternate
from kl_vae.data import FolderSource, ImageDataset, LatentDataset, list_images, to_float
from kl_vae.data.latent_format import DTYPES
from kl_vae.data.loader import START_METHOD
from kl_vae.ddconfig import DDConfig
from kl_vae.inference.encode import EncodeConfig, encode_folder
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.distributed import Ranks

_QUALITY = 90  # of the pictures, as JPEG


@dataclass(frozen=True)
class LatentsResult:
    """What was measured; the epochs are those of a `DataLoader` in random order."""

    encode_seconds: float
    epochs: Timing
    number: int
    checked: int  # images whose latents were compared, bit for bit, with the model's
    megabytes: float

    @property
    def ratio(self) -> float:
        """How many times as long it takes to encode the images, by the median of the epochs."""
        return self.encode_seconds / self.epochs.median

    def markdown(self) -> str:
        """A table, and below it what was compared."""
        encode, epoch = self.encode_seconds, self.epochs
        per = 1e6 / self.number
        lines = [
            "| | s | lowest to highest | µs an image | ratio |",
            "|---|---|---|---|---|",
            f"| decode and encode the images | {encode:.4g} | | {encode * per:.4g} | "
            f"{self.ratio:.1f} |",
            f"| an epoch over their latents | {epoch.cells} | {epoch.median * per:.4g} | 1.0 |",
            "",
            f"Of {self.checked:,} images the latents that were read are compared with the model's "
            "and are the same, bit for bit.",
        ]
        return "\n".join(lines)


def compare_latents(
    ddconfig: DDConfig,
    embed_dim: int | None,
    device: torch.device,
    size: int,
    config: EncodeConfig,
    number: int,
    repeats: int,
) -> LatentsResult:
    """Write pictures, encode them with random weights, and read the latents again.

    The pictures are JPEG files of `size`, the system holds them in memory; the latents are moments.

    Raises:
        ValueError: safetensors is not installed, or the latents are not those of the model.
    """
    torch.manual_seed(0)
    model = AutoEncoderKL(ddconfig, embed_dim).eval().to(device)
    with tempfile.TemporaryDirectory() as name:
        images, out = Path(name, "images"), Path(name, "latents")
        write_pictures(images, number, size, ddconfig.in_channels)
        paths = list_images(images, ddconfig.in_channels)
        source = FolderSource(images, paths, ddconfig.in_channels)
        dataset = ImageDataset(source, size, size, flip=False, seed=0, training=False)
        start = time.perf_counter()
        ranks = Ranks(0, 1, device)
        index = encode_folder(model, dataset, out, config, ranks, checkpoint="random").index
        assert index is not None
        encode_seconds = time.perf_counter() - start

        latents = LatentDataset(out)
        checked = _check(model, source, latents, config)
        loader = DataLoader(
            latents,
            batch_size=config.batch_size,
            shuffle=True,
            num_workers=config.num_workers,
            multiprocessing_context=START_METHOD if config.num_workers else None,
            generator=torch.Generator().manual_seed(0),
        )

        def epoch() -> None:
            images = sum(len(batch.latents) for batch in loader)
            assert images == number

        epochs = alternate({"epoch": epoch}, repeats, device)["epoch"]
    megabytes = index.bytes / 1e6
    return LatentsResult(encode_seconds, epochs, number, checked, megabytes)


def write_pictures(folder: Path, number: int, size: int, channels: int) -> None:
    """Write smooth random pictures, 0000000.jpg and so on; of other channels .png or .npy."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    suffix = {1: ".jpg", 3: ".jpg", 4: ".png"}.get(channels, ".npy")
    for i in range(number):
        path = folder / f"{i:07d}{suffix}"
        side = size if suffix == ".npy" else size // 4 + 1
        pixels = rng.integers(0, 256, (side, side, channels), dtype=np.uint8)
        if suffix == ".npy":
            np.save(path, pixels)
            continue
        picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
        picture.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=_QUALITY)


@torch.inference_mode()
def _check(
    model: AutoEncoderKL, source: FolderSource, latents: LatentDataset, config: EncodeConfig
) -> int:
    """Encode the first batch of each shard once more; return of how many images it is the same."""
    device, checked = next(model.parameters()).device, 0
    for first in range(0, len(source), config.shard_size):
        last = min(first + min(config.batch_size, config.shard_size), len(source))
        images = torch.stack([to_float(source.read(i)) for i in range(first, last)])
        expected: Tensor = model.encode(images.to(device)).parameters.cpu().to(DTYPES[config.dtype])
        stored = torch.stack([latents[i].latents for i in range(first, last)])
        if not torch.equal(stored, expected):
            raise ValueError(
                f"the latents of the images from {first} on are not those of the model"
            )
        checked += last - first
    return checked
