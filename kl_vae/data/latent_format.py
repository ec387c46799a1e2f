"""The format of a folder of latents: safetensors files (shards) and an `index.json` about them.

z latent channels, h and w height and width of the latents, f = H / h.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kl_vae.runtime.files import display_name, sha256_of
from kl_vae.runtime.schema import from_mapping

INDEX = "index.json"
FORMAT = "kl-vae latents"
VERSION = 1

KEYS = "keys"  # of a shard's metadata: the relative paths of its images, a JSON list
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_SHARD = re.compile(r"latents-\d{5,}-of-\d{5,}\.safetensors")
REPAIR = "copy it again, or give the command that wrote it once more, with --resume"


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """Everything that the stored latents depend on; a command that resumes must have the same.

    Attributes:
        what: the posterior's moments (mean, then log variance), a sample of it, or its mode.
        dtype: of the stored tensors.
        normalized: whether they are what the model's `normalize_latents` gives.
        flipped: whether the latents of the mirrored images are stored as well.
        f: H / h.
        channels: z.
        crop: side of the images in pixels.
        resize: short side that the images were resized to before they were cropped.
        precision: of the encoder: fp32, bf16 or fp16.
        seed: of samples; None: nothing was drawn.
        images: number of images of the source, usable or not.
        shard_size: number of images of the source per shard; the last one may have fewer.
        labels: a checksum of the images' class labels; None: there are none.
        source: the fingerprint of the source.
        weights: the sha256 of the model's tensors.
        normalization: the fields of the model's `LatentNormalization`; None: not known.
    """

    what: Literal["moments", "sample", "mode"]
    dtype: Literal["fp32", "fp16", "bf16"]
    normalized: bool
    flipped: bool
    f: int
    channels: int
    crop: int
    resize: int
    precision: str
    seed: int | None
    images: int
    shard_size: int
    labels: str | None
    source: str
    weights: str
    normalization: dict[str, Any] | None

    def __post_init__(self) -> None:
        for key in ("f", "channels", "crop", "resize", "images", "shard_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: at least 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image's stored latents: (z, h, w), or of moments (2z, h, w)."""
        side = self.crop // self.f
        return self.channels * (2 if self.what == "moments" else 1), side, side

    @property
    def number_shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_size)


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be used, by its name, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard.

    Attributes:
        file: its name.
        number: number of images in it.
        bytes: its size.
        sha256: of its content.
        skipped: images of the source that are not in it.
        values: number of values per channel, over the shard's images without the mirrored ones.
        mean: per channel, of raw latents sampled from the posteriors.
        squares: per channel, the sum of their squared deviations from `mean`.
    """

    file: str
    number: int
    bytes: int
    sha256: str
    skipped: tuple[SkippedImage, ...]
    values: int
    mean: tuple[float, ...]
    squares: tuple[float, ...]

    def __post_init__(self) -> None:
        # an index may come from anyone: no path that leads out of the folder
        if not _SHARD.fullmatch(self.file):
            raise ValueError(f"file={self.file!r:.80}: no name of a shard")
        if self.number < 0 or self.bytes < 0 or self.values < 0:
            raise ValueError("number, bytes and values: at least 0")

    def check_size(self, folder: Path) -> None:
        """Raise ValueError unless the file is there and has `bytes` bytes."""
        name = display_name(folder / self.file)
        try:
            size = (folder / self.file).stat().st_size
        except OSError as error:
            raise ValueError(
                f"{name}: a shard that cannot be found ({error.strerror}); {REPAIR}"
            ) from None
        if size != self.bytes:
            raise ValueError(f"{name}: {size:,} bytes, and {self.bytes:,} were written; {REPAIR}")

    def is_intact(self, folder: Path) -> bool:
        """Return whether the file is there and has this size and sha256."""
        path = folder / self.file
        try:
            return path.stat().st_size == self.bytes and sha256_of(path) == self.sha256
        except OSError:
            return False


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Statistics of raw latents sampled from the posteriors of all images but the mirrored ones.

    Attributes:
        scale_factor: 1 / standard deviation of all values.
        shift_factor: their mean.
        mean: per channel.
        std: per channel.
    """

    scale_factor: float
    shift_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class LatentIndex:
    """The content of index.json.

    Attributes:
        format: "kl-vae latents".
        version: of the format.
        checkpoint: the name that the model was loaded by.
        settings: everything that the latents depend on.
        classes: the names of the labels 0, 1, ...; None: labels without names, or none.
        number: number of images in all shards.
        statistics: of raw latents, whatever is stored.
        shards: in the order of the source's images.
    """

    format: str = FORMAT
    version: int = VERSION
    checkpoint: str
    settings: LatentSettings
    classes: tuple[str, ...] | None
    number: int
    statistics: LatentStatistics
    shards: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        if self.number != sum(shard.number for shard in self.shards):
            raise ValueError(f"number={self.number}: its shards hold another number of images")
        if len(self.shards) != self.settings.number_shards:
            raise ValueError(f"shards: {len(self.shards)}, not {self.settings.number_shards}")

    @property
    def skipped(self) -> int:
        """Number of images of the source that are in no shard."""
        return sum(len(shard.skipped) for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> str:
        """Return the text of index.json, with one line per shard."""
        content = dataclasses.asdict(self)
        lines = [json.dumps(shard, allow_nan=False) for shard in content.pop("shards")]
        head = json.dumps(content, indent=1, allow_nan=False).removesuffix("\n}")
        shards = ",\n  ".join(lines)
        return f'{head},\n "shards": [\n  {shards}\n ]\n}}\n'


def read_index(folder: Path) -> LatentIndex:
    """Read and check index.json, which may come from anyone.

    Raises:
        ValueError: it is missing, cannot be read, or is of another format or version.
    """
    path = folder / INDEX
    name = display_name(path)
    if not path.is_file():
        raise ValueError(
            f"{display_name(folder)}: no {INDEX} in it; give a folder that kl-vae encode --out has "
            "written to its end, or end that with --resume"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{name}: no index of latents; give a folder of kl-vae encode --out")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{name}: version {content.get('version')!r:.20} of the format, and this kl_vae reads "
            f"{VERSION}; install the kl_vae that wrote it, or encode again"
        )
    try:
        return from_mapping(LatentIndex, content)
    except ValueError as error:
        first, *others = str(error).splitlines()
        more = f" and {len(others)} more" if others else ""
        raise ValueError(f"{name}: {first}{more}; copy it again, or encode again") from None
