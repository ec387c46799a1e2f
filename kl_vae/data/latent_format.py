"""Format of a folder of latents: safetensors files (shards) and an `index.json`.

Shapes: z latent channels, h and w height and width of the latents, f = H / h.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kl_vae.latents import LatentNormalization
from kl_vae.runtime.files import display_name, sha256_of
from kl_vae.runtime.schema import from_mapping

INDEX = "index.json"
FORMAT = "kl-vae latents"
VERSION = 1

# one line per shard: size (bytes), modification time (ns) and hash of the file of each image of the
# source at encoding; for members of a tar file, size and time of the tar file, hash of the member
SOURCES = "sources.jsonl"

KEYS = "keys"  # metadata key of a shard; its value is a JSON list of the images' relative paths
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_SHARD = re.compile(r"latents-\d{5,}-of-\d{5,}\.safetensors")
REPAIR = "copy it again, or repeat the command that wrote it, with --resume"


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """Settings that determine the stored latents; a command that resumes must use the same.

    Attributes:
        what: moments of the posterior (mean, then log variance), a sample, or the mode.
        dtype: of the stored tensors.
        normalized: whether the latents are normalised by the model's `normalize_latents`.
        flipped: whether the latents of the mirrored images are also stored.
        f: H / h.
        channels: z.
        crop: side of the cropped images in pixels.
        resize: short side of the images in pixels before cropping.
        precision: precision of the encoder: fp32, bf16 or fp16.
        seed: seed of the samples; None: no sampling.
        images: number of images of the source, including unusable ones.
        shard_size: number of images of the source per shard; the last shard may have fewer.
        labels: checksum of the class labels of the images; None: no labels.
        source: checksum of the images' relative paths, in their order.
        weights: SHA-256 of the model's tensors.
        normalization: fields of the model's `LatentNormalization`; None: unknown.
        range: values of black and white, see `kl_vae.data.DataConfig`.
        pages: what the pages of TIFF files are.
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
    range: Any = "auto"
    pages: str | None = None

    def __post_init__(self) -> None:
        for key in ("f", "channels", "crop", "resize", "images", "shard_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the stored latents of an image: (z, h, w), or (2z, h, w) for moments."""
        side = self.crop // self.f
        return self.channels * (2 if self.what == "moments" else 1), side, side

    @property
    def number_shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_size)


@dataclass(frozen=True)
class SkippedImage:
    """The name of an unusable image and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """Index entry of a shard.

    Statistics are over raw latents sampled from the posteriors, without mirrored images.

    Attributes:
        file: file name of the shard.
        number: number of images in the shard.
        bytes: size of the file in bytes.
        sha256: SHA-256 of the file.
        skipped: unusable images of the source, which are not in the shard.
        values: number of values per channel.
        mean: mean per channel.
        squares: sum of squared deviations from the mean, per channel.
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
        # an index may be untrusted: accept no path outside its folder
        if not _SHARD.fullmatch(self.file):
            raise ValueError(f"file={self.file!r:.80}: not the name of a shard")
        if self.number < 0 or self.bytes < 0 or self.values < 0:
            raise ValueError("number, bytes and values: must be at least 0")

    def check_size(self, folder: Path) -> None:
        """Check the size of the file.

        Raises:
            ValueError: The file is missing or its size is not `bytes`.
        """
        name = display_name(folder / self.file)
        try:
            size = (folder / self.file).stat().st_size
        except OSError as error:
            raise ValueError(
                f"{name}: cannot find this shard ({error.strerror}); {REPAIR}"
            ) from None
        if size != self.bytes:
            raise ValueError(f"{name}: has {size:,} bytes, not {self.bytes:,}; {REPAIR}")

    def is_intact(self, folder: Path) -> bool:
        """Return whether the file exists and has the size and SHA-256 of this entry."""
        path = folder / self.file
        try:
            return path.stat().st_size == self.bytes and sha256_of(path) == self.sha256
        except OSError:
            return False


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Statistics of raw latents sampled from the posteriors of all images, except mirrored ones.

    Attributes:
        scale_factor: 1 / standard deviation of all values.
        shift_factor: mean of all values.
        mean: mean per channel.
        std: standard deviation per channel.
    """

    scale_factor: float
    shift_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class LatentIndex:
    """Content of index.json.

    Attributes:
        format: "kl-vae latents".
        version: version of the format.
        checkpoint: name that the model was loaded by.
        settings: settings that determine the latents.
        classes: names of the labels 0, 1, ...; None: no labels, or labels without names.
        number: number of images in all shards.
        statistics: statistics of the raw latents, for every stored form.
        shards: entries of the shards, in the order of the source.
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
            raise ValueError(f"number={self.number}: must be the number of images in the shards")
        if len(self.shards) != self.settings.number_shards:
            raise ValueError(
                f"shards: has {len(self.shards)} entries, not {self.settings.number_shards}"
            )
        LatentNormalization(**vars(self.statistics)).check_channels(self.settings.channels)

    @property
    def skipped(self) -> int:
        """Number of unusable images of the source."""
        return sum(len(shard.skipped) for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Total size of the shards in bytes."""
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> str:
        """Return the content of index.json, with one line per shard."""
        content = dataclasses.asdict(self)
        lines = [json.dumps(shard, allow_nan=False) for shard in content.pop("shards")]
        head = json.dumps(content, indent=1, allow_nan=False).removesuffix("\n}")
        shards = ",\n  ".join(lines)
        return f'{head},\n "shards": [\n  {shards}\n ]\n}}\n'


def read_index(folder: Path) -> LatentIndex:
    """Read and validate index.json, which may be untrusted.

    Raises:
        ValueError: The file is missing, cannot be read, or has another format or version.
    """
    path = folder / INDEX
    name = display_name(path)
    if not path.is_file():
        raise ValueError(
            f"{display_name(folder)}: contains no {INDEX}; give a folder written by kl-vae encode "
            "--out, or complete an interrupted one with --resume"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{name}: not an index of latents; give a folder written by kl-vae encode --out"
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{name}: format version {content.get('version')!r:.20} is not supported, only "
            f"{VERSION} is; install the kl_vae version that wrote it, or encode again"
        )
    try:
        return from_mapping(LatentIndex, content)
    except ValueError as error:
        first, *others = str(error).splitlines()
        more = f" and {len(others)} more" if others else ""
        raise ValueError(f"{name}: {first}{more}; copy it again, or encode again") from None
