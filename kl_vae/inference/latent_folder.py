"""Write a folder of latents: what it was made from, the classes of the images, its shards.

n images of a shard, z latent channels, h and w height and width of the latents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kl_vae.checkpoints.safetensors_file import safetensors_bytes
from kl_vae.data import BadImage, Source
from kl_vae.data.latent_format import (
    INDEX,
    KEYS,
    LatentIndex,
    LatentSettings,
    ShardEntry,
    SkippedImage,
    read_index,
)
from kl_vae.data.paths import name_bytes
from kl_vae.inference.progress import FOLDER, differences
from kl_vae.metrics.moments import RunningMoments
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.files import display_name, remove_temporaries, write_atomically


@dataclasses.dataclass(frozen=True)
class Labels:
    """The class of each image of a source."""

    values: Tensor  # [N], int64, at least 0
    classes: tuple[str, ...] | None  # the names of 0, 1, ...; None: they have none

    @property
    def checksum(self) -> str:
        """32 hex digits of labels and names."""
        digest = hashlib.blake2b(self.values.numpy().tobytes(), digest_size=16)
        digest.update(b"\0".join(map(name_bytes, self.classes or ())))
        return digest.hexdigest()


def class_labels(source: Source) -> Labels:
    """Return the label that each image comes with; where none does, the folder that it lies in.

    Folders are taken as torchvision's ImageFolder does: the first of the image's relative path,
    numbered in the order of their names' bytes.

    Raises:
        ValueError: an image has no label.
    """
    texts = [source.label_text(i) for i in range(len(source))]
    if any(text is not None for text in texts):
        for i, text in enumerate(texts):
            if text is None or not text.strip().isdecimal():
                what = "has no label" if text is None else f"its label is {text.strip()!r:.40}"
                raise ValueError(
                    f"{source.name(i)}: {what}; give each image an integer of at least 0, or leave "
                    "--labels out"
                )
        return Labels(torch.tensor([int(text) for text in texts if text is not None]), None)
    folders = []
    for i in range(len(source)):
        folder, slash, _ = source.key(i).partition("/")
        if not slash:
            raise ValueError(
                f"{source.name(i)}: has no label, since it lies in no subfolder of what is given "
                "as --images; put the images of each class into a folder, or leave --labels out"
            )
        folders.append(folder)
    classes = tuple(sorted(set(folders), key=name_bytes))
    numbers = {name: number for number, name in enumerate(classes)}
    return Labels(torch.tensor([numbers[folder] for folder in folders]), classes)


def weights_sha256(model: AutoEncoderKL) -> str:
    """Return 64 hex digits of the names, shapes and bits of a model's tensors, without its loss."""
    digest = hashlib.sha256()
    for key, x in sorted(model.without_loss().state_dict().items()):
        digest.update(f"{key} {x.dtype} {list(x.shape)}\n".encode())
        # as bytes: NumPy has no bf16
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_folder(out: Path, settings: LatentSettings, resume: bool) -> LatentIndex | None:
    """Check that latents may be written to `out`, and remove what a killed process left.

    Returns:
        The index of a folder that was complete before; None: it was not.

    Raises:
        ValueError: it holds other latents, or complete ones without `resume`.
    """
    name = display_name(out)
    if not (out / INDEX).exists():
        begun = (out / FOLDER).exists()
        stray = sorted(out.glob("latents-*-of-*.safetensors"))
        if stray and not begun:
            raise ValueError(
                f"{name}: holds {display_name(stray[0].name)} and no {INDEX}; remove the latents "
                "there, or give another --out"
            )
        if begun and resume:
            remove_temporaries(out)
        return None
    if not resume:
        raise ValueError(
            f"{name}: holds latents already; give --resume to verify and repair them, or another "
            "--out"
        )
    index = read_index(out)
    plain = (json.loads(json.dumps(dataclasses.asdict(x))) for x in (index.settings, settings))
    changed = differences(*plain)
    if changed:
        raise ValueError(
            f"{name}: holds other latents ({changed}); give the same again to verify them, or "
            "another --out"
        )
    remove_temporaries(out)
    return index


def write_shard(
    path: Path,
    tensors: Mapping[str, Tensor],
    keys: list[str],
    *,
    moments: RunningMoments,
    bad: list[BadImage],
) -> ShardEntry:
    """Write a shard, and return its entry in the index.

    Args:
        path: the file.
        tensors: latents and perhaps flipped, [n, z, h, w]; perhaps labels, [n].
        keys: relative paths of the n images.
        moments: per channel, of raw latents of the n images.
        bad: images of the source that are not among them.

    Raises:
        ValueError: the file cannot be written.
    """
    # a single entry, since the library's order of several differs from run to run
    content = safetensors_bytes(dict(tensors), {KEYS: json.dumps(keys)})
    write_file(path, content)
    return ShardEntry(
        file=path.name,
        number=len(keys),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        skipped=tuple(SkippedImage(*image) for image in bad),
        values=moments.count,
        mean=tuple(moments.mean.tolist()),
        squares=tuple(moments.squares.tolist()),
    )


def entry_moments(entry: ShardEntry) -> RunningMoments:
    """Return the moments that `write_shard` recorded."""
    mean, squares = torch.tensor([entry.mean, entry.squares], dtype=torch.float64)
    return RunningMoments(entry.values, mean, squares)


def write_file(path: Path, content: bytes) -> None:
    """Write a file of the folder whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise ValueError(
            f"cannot write {display_name(path)} ({error.strerror}); make room and permission for "
            "it, and continue with --resume"
        ) from error
