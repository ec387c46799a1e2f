"""Images that are encoded already: a data set to train a diffusion model on.

n images of a shard, z latent channels, h and w height and width of the latents.
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
from kl_vae.runtime.files import display_name

View = Literal["latents", "flipped", "both"]


class LatentSample(NamedTuple):
    """An encoded image."""

    latents: Tensor  # [z, h, w], or of moments [2z, h, w]: mean, then log variance
    label: int  # of the class; -1: there are no labels
    name: str  # the image's path, relative to the folder it was listed from


class LatentDataset(Dataset[LatentSample]):
    """A folder that `kl_vae.encode_dataset` or `kl-vae encode --out` has written.

    Access is random: each process maps a shard into memory when it first uses it, and what is read
    stays in the cache of the operating system, not in the process.

    Attributes:
        index: the content of index.json (`LatentIndex`): settings, statistics, classes.

    Args:
        folder: the folder of latents.
        view: `latents` of the images as they are, of the `flipped` images, or `both`: twice as
            many, the mirrored ones after the others.

    Raises:
        ValueError: there is no index or it cannot be read, a shard is missing or has another size,
            there are no flipped latents, or safetensors is not installed.
    """

    def __init__(self, folder: str | Path, view: View = "latents") -> None:
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
        for shard in self.index.shards:
            shard.check_size(self.folder)
        try:
            import safetensors  # noqa: F401
        except ImportError:
            raise ValueError(
                f'{name}: latents are kept in safetensors files; pip install "kl-vae[formats]"'
            ) from None
        self._ends = list(accumulate(shard.number for shard in self.index.shards))
        self._shards: dict[int, _Shard] = {}  # those that this process has opened

    def __repr__(self) -> str:
        """Return folder, view, length, and what each image's latents are."""
        settings, classes = self.index.settings, self.index.classes
        parts = [
            f"view={self.view!r}",
            f"length={len(self)}",
            f"{settings.what} {list(settings.shape)} {settings.dtype}",
            "normalized" if settings.normalized else "raw",
            f"f={settings.f}",
            f"scale_factor={self.index.statistics.scale_factor:.4g}",
        ]
        if settings.labels is not None:
            parts.append("labels" if classes is None else f"labels of {len(classes)} classes")
        return f"{type(self).__name__}({display_name(self.folder)!r}, {', '.join(parts)})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped files out: each process opens its own."""
        return {**self.__dict__, "_shards": {}}

    def __len__(self) -> int:
        """Return the number of images, or with view="both" twice that."""
        return self.index.number * (2 if self.view == "both" else 1)

    def __getitem__(self, i: int) -> LatentSample:
        """Return latents of the stored dtype, label and name of an image.

        Raises:
            IndexError: there is no such image.
            ValueError: its shard is damaged.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        mirrored, i = divmod(i % len(self), self.index.number)
        number = bisect_right(self._ends, i)
        if number not in self._shards:
            entry = self.index.shards[number]
            self._shards[number] = _open_shard(self.folder, entry, self.index.settings)
        shard = self._shards[number]
        row = i - (self._ends[number - 1] if number else 0)
        key = "flipped" if mirrored or self.view == "flipped" else "latents"
        label = int(shard.tensors["labels"][row]) if "labels" in shard.tensors else -1
        # a copy, since the mapped file must not be written to
        return LatentSample(shard.tensors[key][row].clone(), label, shard.keys[row])

    def verify(self) -> None:
        """Read all shards and compare their sha256 with the index.

        Raises:
            ValueError: shards are damaged or missing.
        """
        bad = [shard.file for shard in self.index.shards if not shard.is_intact(self.folder)]
        if bad:
            raise ValueError(
                f"{display_name(self.folder)}: {len(bad)} of {len(self.index.shards)} shards are "
                f"damaged or missing ({', '.join(bad[:5])}{', ...' if bad[5:] else ''}); copy them "
                "again, or give the command that wrote them once more, with --resume"
            )


class _Shard(NamedTuple):
    """An open shard; its tensors are mapped into memory and read when they are used."""

    # latents and perhaps flipped, [n, z, h, w] or of moments [n, 2z, h, w]; perhaps labels, [n]
    tensors: dict[str, Tensor]
    keys: PathList  # of the n images


def _open_shard(folder: Path, entry: ShardEntry, settings: LatentSettings) -> _Shard:
    """Map a shard and compare its tensors with the index."""
    from safetensors import safe_open

    name = display_name(folder / entry.file)
    entry.check_size(folder)  # mapping a file that was cut short would end the process
    try:
        with safe_open(folder / entry.file, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            keys = PathList.of(json.loads((file.metadata() or {}).get(KEYS, "null")))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # types differ by version, and a panic of Rust is no Exception
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
        raise ValueError(f"{name}: holds something else than the index says; {REPAIR}")
    return _Shard(tensors, keys)
