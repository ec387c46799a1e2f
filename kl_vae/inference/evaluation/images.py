"""What is kept of each image: per_image.csv, and features until all are there.

per_image.csv has one line an image and model: `checkpoint, path, width, height`, then the figures.
Width and height are those after resize and crop. psnr is `inf` where the reconstruction is exact; a
figure that an image does not have is empty. d is the number of features.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from kl_vae.data import Source
from kl_vae.inference.evaluation.records import Record, image_figures
from kl_vae.runtime.files import display_name, write_atomically
from kl_vae.runtime.outputs import make_folder, replace_file

PER_IMAGE = "per_image.csv"


def write_per_image(
    out: Path, records: Iterable[Record], source: Source, names: Sequence[str]
) -> None:
    """Write per_image.csv, in the order of the images and of the models.

    Raises:
        ValueError: it cannot be written.
    """

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        figures: list[str] | None = None
        for record in records:
            of_models = [image_figures(record, model) for model in range(len(names))]
            for index, height, width in record["images"]:
                for name, of_model in zip(names, of_models, strict=True):
                    values = next(of_model)
                    if figures is None:
                        figures = list(values)
                        writer.writerow(["checkpoint", "path", "width", "height", *figures])
                    cells = ("" if x is None else f"{x:.8g}" for x in values.values())
                    writer.writerow([name, source.name(index), width, height, *cells])
        text.flush()
        text.detach()  # the file is not ours to close

    make_folder(out)
    try:
        write_atomically(out / PER_IMAGE, write, durable=False)
    except OSError as error:
        raise ValueError(
            f"cannot write {display_name(out / PER_IMAGE)} ({error.strerror}); "
            "make room and permission for it, or give another folder"
        ) from error


def write_features(path: Path, features: Tensor) -> None:
    """Keep a unit's features [1 + models, images, d].

    Raises:
        ValueError: the file cannot be written.
    """
    stream = io.BytesIO()
    np.save(stream, features.numpy())
    replace_file(path, stream.getvalue())


def read_features(paths: Iterable[Path], position: int) -> Iterator[Tensor]:
    """Those [images, d] of the images (0), or of a model's reconstructions (from 1 on), by unit."""
    for path in paths:
        if path.exists():  # a unit without a usable image has none
            features = np.load(path, mmap_mode="r", allow_pickle=False)
            yield torch.from_numpy(features[position].copy())
