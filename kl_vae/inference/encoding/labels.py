"""The classes of images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from kl_vae.data import Source
from kl_vae.data.paths import name_bytes


@dataclass(frozen=True)
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
    """The label that each image comes with; where none does, the folder that it lies in.

    Folders are as torchvision's ImageFolder takes them: the first of the image's relative path,
    numbered in the order of their names' bytes.

    Raises:
        ValueError: an image has no label.
    """
    texts = [source.label_text(i) for i in range(len(source))]
    if any(text is not None for text in texts):
        return Labels(
            torch.tensor([_number(source, i, text) for i, text in enumerate(texts)]), None
        )
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


def _number(source: Source, index: int, text: str | None) -> int:
    if text is None or not text.strip().isdecimal():
        what = "has no label" if text is None else f"its label is {text.strip()!r:.40}"
        raise ValueError(
            f"{source.name(index)}: {what}; give each image an integer of at least 0, or leave "
            "--labels out"
        )
    return int(text)
