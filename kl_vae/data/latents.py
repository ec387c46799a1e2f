"""Dataset of encoded images, for training diffusion models.

Shapes: n images in a shard, z latent channels, h and w height and width of the latents.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kl_vae.data.latent_format import DTYPES, KEYS, REPAIR, LatentSettings, ShardEntry, read_index
from kl_vae.data.paths import PathList
from kl_vae.latents import LatentNormalization
from kl_vae.runtime.files import display_name

View = Literal["latents", "flipped", "both"]


class LatentSample(NamedTuple):
    """The latents of one image."""

    latents: Tensor  # [z, h, w]; for moments [2z, h, w]: mean, then log variance
    label: int  # class label; -1: no labels
    name: str  # path of the image, relative to the root of its source


class LatentDataset(Dataset[LatentSample]):
    """Map-style dataset over a folder written by `kl_vae.encode_dataset` or `kl-vae encode --out`.

    Each process memory-maps a shard on first access.

    Attributes:
        index: the content of index.json (`LatentIndex`): settings, statistics, classes.

    Args:
        folder: the folder of latents.
        view: `latents` of the images, latents of the `flipped` images, or `both`: first all
            images, then all flipped images.
        normalize: return float32 latents with about zero mean and unit variance per channel, by
            the statistics that were measured while encoding; `normalization` converts them back.

    Raises:
        ValueError: The index is missing or cannot be read, a shard is missing or has the wrong
            size, `view` needs flipped latents that were not stored, `normalize` is given for
            latents that were stored normalised, or safetensors is not installed.
    """

    def __init__(
        self, folder: str | Path, view: View = "latents", *, normalize: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.view = view
        name = display_name(folder)
        if view not in get_args(View):
            raise ValueError(f"view={view!r}: give one of {', '.join(get_args(View))}")
        if view != "latents" and not self.index.settings.flipped:
            raise ValueError(
                f"view={view!r}: {name} has no flipped latents; give view='latents', or encode "
                "the images again with --flip"
            )
        if normalize and self.index.settings.normalized:
            raise ValueError(
                f"normalize=True: {name} has latents that are already normalised; give "
                "normalize=False"
            )
        self.normalize = normalize
        for shard in self.index.shards:
            shard.check_size(self.folder)
        try:
            import safetensors  # noqa: F401
        except ImportError:
            raise ValueError(
                f'{name}: reading latents needs safetensors; pip install "kl-vae[formats]"'
            ) from None
        self._ends = list(accumulate(shard.number for shard in self.index.shards))
        self._shards: dict[int, _Shard] = {}  # opened by this process, by number

    def __repr__(self) -> str:
        """Return the folder, the view, the length, and the format of the latents."""
        settings, classes = self.index.settings, self.index.classes
        parts = [
            f"view={self.view!r}",
            f"length={len(self)}",
            f"{settings.what} {list(settings.shape)} {settings.dtype}",
            "normalized" if settings.normalized or self.normalize else "raw",
            f"f={settings.f}",
            f"scale_factor={self.index.statistics.scale_factor:.4g}",
        ]
        if settings.labels is not None:
            parts.append("labels" if classes is None else f"labels of {len(classes)} classes")
        return f"{type(self).__name__}({display_name(self.folder)!r}, {', '.join(parts)})"

    @property
    def normalization(self) -> LatentNormalization:
        """Normalisation per channel by the statistics of the raw latents."""
        return LatentNormalization(**vars(self.index.statistics), per_channel=True)

    def __getstate__(self) -> dict[str, Any]:
        """Drop the mapped files: each process opens its own."""
        return {**self.__dict__, "_shards": {}}

    def __len__(self) -> int:
        """Return the number of images; twice that number for view="both"."""
        return self.index.number * (2 if self.view == "both" else 1)

    def __getitem__(self, i: int) -> LatentSample:
        """Return the latents, the label and the name of an image.

        Latents have the stored dtype, or float32 if they are normalised.

        Raises:
            IndexError: The index is out of range.
            ValueError: The shard is damaged.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        mirrored, i = divmod(i % len(self), self.index.number)
        number = bisect_right(self._ends, i)
        entry = self.index.shards[number]
        entry.check_size(self.folder)  # reading a mapped file beyond its end kills the process
        if number not in self._shards:
            self._shards[number] = _open_shard(self.folder, entry, self.index.settings)
        shard = self._shards[number]
        row = i - (self._ends[number - 1] if number else 0)
        key = "flipped" if mirrored or self.view == "flipped" else "latents"
        label = int(shard.tensors["labels"][row]) if "labels" in shard.tensors else -1
        latents = shard.tensors[key][row]
        # a copy, because the mapped file is read-only
        latents = self._normalized(latents) if self.normalize else latents.clone()
        return LatentSample(latents, label, shard.keys[row])

    def _normalized(self, latents: Tensor) -> Tensor:
        """Normalise stored latents [z, h, w], or moments [2z, h, w]; float32."""
        batch = latents[None].float()
        if self.index.settings.what != "moments":
            return self.normalization.normalize(batch)[0]
        mean, logvar = batch.chunk(2, dim=1)
        std = torch.tensor(self.index.statistics.std)[:, None, None]
        return torch.cat([self.normalization.normalize(mean), logvar - 2.0 * std.log()], dim=1)[0]

    def verify(self) -> None:
        """Read all shards and compare their SHA-256 checksums with the index.

        Raises:
            ValueError: Shards are damaged or missing.
        """
        bad = [shard.file for shard in self.index.shards if not shard.is_intact(self.folder)]
        if bad:
            raise ValueError(
                f"{display_name(self.folder)}: {len(bad)} of {len(self.index.shards)} shards are "
                f"damaged or missing ({', '.join(bad[:5])}{', ...' if bad[5:] else ''}); copy them "
                "again, or repeat the command that wrote them, with --resume"
            )


class _Shard(NamedTuple):
    """An open shard, with memory-mapped tensors."""

    # "latents" and optionally "flipped": [n, z, h, w], for moments [n, 2z, h, w];
    # optionally "labels": [n]
    tensors: dict[str, Tensor]
    keys: PathList  # n paths


def _open_shard(folder: Path, entry: ShardEntry, settings: LatentSettings) -> _Shard:
    """Memory-map a shard and check its tensors against the index."""
    from safetensors import safe_open

    name = display_name(folder / entry.file)
    try:
        with safe_open(folder / entry.file, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            keys = PathList.of(json.loads((file.metadata() or {}).get(KEYS, "null")))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # types differ by version; a Rust panic is not an Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: cannot be read ({reason}); {REPAIR}") from None
    latents = ([entry.number, *settings.shape], DTYPES[settings.dtype])
    expected = {"latents": latents}
    if settings.flipped:
        expected["flipped"] = latents
    if settings.labels is not None:
        expected["labels"] = ([entry.number], torch.int64)
    found = {key: (list(x.shape), x.dtype) for key, x in tensors.items()}
    if found != expected or len(keys) != entry.number:
        raise ValueError(f"{name}: its content does not match the index; {REPAIR}")
    return _Shard(tensors, keys)
