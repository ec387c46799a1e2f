"""Images that are encoded already: a data set to train a diffusion model on.

z latent channels, h and w the latents' height and width.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor
from torch.utils.data import Dataset

from kl_vae.data.latent_index import read_index
from kl_vae.data.latent_shard import LatentShard, check_size, is_whole, open_shard
from kl_vae.runtime.files import display_name

View = Literal["latents", "flipped", "both"]


class LatentSample(NamedTuple):
    """An encoded image."""

    latents: Tensor  # [z, h, w], or of moments [2z, h, w]: mean, then log variance
    label: int  # of the class; -1: there are no labels
    name: str  # the image's path, relative to the folder it was listed from


class LatentDataset(Dataset[LatentSample]):
    """A folder that `kl-vae encode --out` has written, in the order of the images.

    Any image can be had at any time: shards are mapped into memory when they are first used, by
    each process for itself, and what is read stays in the system's cache, not in the process.

    Attributes:
        index: what index.json says (`LatentIndex`): settings, statistics, classes.

    Args:
        folder: that of --out.
        view: the `latents` as the images are, those of the `flipped` images, or `both`: then there
            are twice as many, the mirrored ones after the others.

    Raises:
        ValueError: no index or one that cannot be read; a shard is missing or has another size;
            there are no flipped latents; safetensors is not installed.
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
            check_size(self.folder / shard.file, shard)
        try:
            import safetensors  # noqa: F401
        except ImportError:
            raise ValueError(
                f'{name}: latents are kept in safetensors files; pip install "kl-vae[formats]"'
            ) from None
        self._ends = list(accumulate(shard.number for shard in self.index.shards))
        self._opened: dict[int, LatentShard] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped files out: each process opens its own."""
        return {**self.__dict__, "_opened": {}}

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
        shard = self._shard(number)
        own = i - (self._ends[number - 1] if number else 0)
        flipped = mirrored or self.view == "flipped"
        tensor = shard.flipped if flipped and shard.flipped is not None else shard.latents
        label = -1 if shard.labels is None else int(shard.labels[own])
        # a copy: the mapped file is not to be written to
        return LatentSample(tensor[own].clone(), label, shard.keys[own])

    def verify(self) -> None:
        """Read all shards and compare their sha256 with the index.

        Raises:
            ValueError: one or more are damaged or missing.
        """
        bad = [x.file for x in self.index.shards if not is_whole(self.folder / x.file, x)]
        if bad:
            raise ValueError(
                f"{display_name(self.folder)}: {len(bad)} of {len(self.index.shards)} shards are "
                f"damaged or missing ({', '.join(bad[:5])}{', ...' if bad[5:] else ''}); copy them "
                "again, or give the command that wrote them once more, with --resume"
            )

    def _shard(self, number: int) -> LatentShard:
        if number not in self._opened:
            entry = self.index.shards[number]
            path = self.folder / entry.file
            self._opened[number] = open_shard(path, entry, self.index.settings)
        return self._opened[number]
