"""Batches of uint8 crops give the same floats as images converted one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kl_vae.data import (
    Batch,
    FolderSource,
    ImageDataset,
    Sample,
    center_crop,
    channels_inside,
    collate,
    list_images,
    normalized,
    random_flip,
    random_recolor,
    resize_short_side,
    to_float,
)
from kl_vae.data.transforms import random_place
from kl_vae.runtime.randomness import generator_for
from kl_vae.training.step import to_device

CPU = torch.device("cpu")
# within and beyond one tile of 512 x 512
SIZES = [(40, 52), (523, 601), (64, 64)]


def picture(kind: str, height: int, width: int) -> tuple[Image.Image, str]:
    """An image of random colours and the suffix of its file."""
    rng = np.random.default_rng(height)
    smooth = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 4), np.uint8)
    colors = Image.fromarray(smooth).resize((width, height))
    if kind == "16 bit":
        grey = np.asarray(colors.convert("L")).astype(np.uint16) * 257
        return Image.fromarray(grey), "png"
    mode = {"png": "RGB", "jpeg": "RGB", "grey": "L", "rgba": "RGBA", "cmyk": "CMYK"}[kind]
    rgb = colors.convert("RGB") if mode == "CMYK" else colors
    return rgb.convert(mode), "jpg" if kind in ("jpeg", "cmyk") else "png"


def decoded(path: Path, channels: int) -> Tensor:
    """[C,H,W] from Pillow and NumPy alone, contiguous in that order."""
    image = Image.open(path)
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode == "RGBA" and channels < 4:
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        image = white
    if image.mode == "CMYK":
        image = image.convert("RGB")
    pixels = np.array(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    pixels = pixels[:, :, None] if channels == 1 else pixels
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def as_it_was(
    image: Tensor, crop: int, resize: int | None, training: bool, recolor: bool, index: int
) -> Tensor:
    """A sample of seed 0 and epoch 3, converted to floats in the worker."""
    if resize is not None:
        image = resize_short_side(image, resize)
    if training:
        generator = generator_for("augment", 0, 3, index)
        rows, columns = random_place(*image.shape[1:], crop, generator)
        image = random_flip(image[:, rows, columns], generator)
        image = random_recolor(image, generator) if recolor else image
    else:
        image = center_crop(image, crop)
    return image / 127.5 - 1 if image.dtype == torch.uint8 else image.float() * 2 - 1


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["png", "jpeg", "grey", "rgba", "16 bit", "cmyk"])
def test_batches_equal_converted_images(tmp_path: Path, kind: str, channels: int) -> None:
    for number, (height, width) in enumerate(SIZES):
        image, suffix = picture(kind, height, width)
        image.save(tmp_path / f"{number}.{suffix}")
    source = FolderSource(tmp_path, list_images(tmp_path, channels), channels)
    for training, recolor, resize in [(True, True, 36), (True, False, None), (False, False, 37)]:
        data = ImageDataset(source, 33, resize, True, 0, training, recolor)
        samples = [data[3, index, index] for index in range(3)]
        assert not any(sample.bad for sample in samples)
        expected = torch.stack(
            [
                as_it_was(decoded(Path(sample.name), channels), 33, resize, training, recolor, i)
                for i, sample in enumerate(samples)
            ]
        )
        batch = collate(samples)
        assert batch.images.dtype == torch.uint8
        assert torch.equal(normalized(batch.images), expected)
        for layout in (torch.channels_last, torch.contiguous_format):
            moved = to_device(batch.images, CPU, layout == torch.channels_last)
            assert torch.equal(moved, expected) and moved.is_contiguous(memory_format=layout)


def test_batches_of_float_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "0.npy", rng.random((40, 50, 5), np.float32))
    np.save(tmp_path / "1.npy", rng.integers(0, 65536, (33, 50, 5)).astype(np.uint16))
    source = FolderSource(tmp_path, ["0.npy", "1.npy"], 5)
    data = ImageDataset(source, 24, 30, True, 0, training=True, recolor=True)
    samples = [data[3, index, index] for index in range(2)]
    expected = [as_it_was(source.read(i), 24, 30, True, True, i) for i in range(2)]
    batch = collate(samples)
    assert batch.images.dtype == torch.float32
    assert torch.equal(batch.images, torch.stack(expected))
    assert torch.equal(to_device(batch.images, CPU, True), batch.images)


def test_all_uint8_values() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(values), values / 127.5 - 1)
    floats = torch.linspace(-1, 1, 7)
    assert normalized(floats) is floats
    assert torch.equal(normalized(values), to_float(values))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_all_uint8_values_on_a_gpu() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(values.cuda()).cpu(), values / 127.5 - 1)


def test_a_batch_of_uint8_and_floats_is_float() -> None:
    bytes_ = channels_inside(torch.full((3, 4, 6), 255, dtype=torch.uint8))
    samples = [Sample(bytes_, 0, "a", ()), Sample(torch.full((3, 4, 6), 0.5), 1, "b", ())]
    batch = collate(samples)
    assert batch.images.dtype == torch.float32
    assert batch.images.flatten(1)[:, 0].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_crops_are_copied_with_channels_inside(channels: int) -> None:
    whole = torch.randint(0, 256, (64, 80, channels), dtype=torch.uint8).permute(2, 0, 1)
    for crop in (center_crop(whole, 32), whole[:, 8:16], whole):
        alone = channels_inside(crop)
        assert torch.equal(alone, crop)
        assert alone.untyped_storage().nbytes() == crop.numel()
        assert alone.data_ptr() != whole.data_ptr()
        order = alone if channels == 1 else alone.permute(1, 2, 0)
        assert order.is_contiguous()
    batch: Batch = collate([Sample(channels_inside(whole), i, "a", ()) for i in range(2)])
    layout = torch.contiguous_format if channels == 1 else torch.channels_last
    assert batch.images.is_contiguous(memory_format=layout)
    # with one channel the strides match both layouts
    assert (
        batch.images.stride() == torch.empty(2, channels, 64, 80).to(memory_format=layout).stride()
    )
