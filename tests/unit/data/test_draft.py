"""JPEGs that are decoded at a fraction of their size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae.data import (
    DataConfig,
    FolderSource,
    ImageDataset,
    ImageError,
    SourceConfig,
    TarSource,
    Wanted,
    build_datasets,
    open_root,
    read_image,
    resize_short_side,
)
from tests.messages import mentions
from tests.shards import write_shard


def jpeg(width: int, height: int, seed: int = 0, orientation: int = 1, **options: object) -> bytes:
    """A smooth image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=92, exif=exif, **options)
    return stream.getvalue()


def save(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((256, 192), 192, (256, 192)),
        ((256, 192), 97, (256, 192)),  # half would be too small
        ((256, 192), 96, (128, 96)),
        ((256, 192), 48, (64, 48)),
        ((256, 192), 24, (32, 24)),
        ((256, 192), 1, (32, 24)),  # an eighth is the minimum
        ((260, 196), 24, (65, 49)),  # divisible by four only
        ((258, 196), 24, (129, 98)),
        ((257, 196), 24, (257, 196)),
        ((256, 195), 24, (256, 195)),
    ],
)
def test_the_fraction(
    tmp_path: Path, size: tuple[int, int], short_side: int, expected: tuple[int, int]
) -> None:
    path = save(tmp_path, "a.jpg", jpeg(*size))
    image = read_image(path, 3, wanted=Wanted(short_side))
    assert tuple(image.shape[:0:-1]) == expected
    if expected == size:
        assert torch.equal(image, read_image(path, 3))


@pytest.mark.parametrize("size", [(1024, 768), (512, 1000), (768, 512)])
def test_a_draft_is_close_to_the_full_decode(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(tmp_path, "a.jpg", jpeg(*size, progressive=True))
    whole = resize_short_side(read_image(path, 3), 128)
    image = read_image(path, 3, wanted=Wanted(256))
    assert min(image.shape[1:]) < min(size)
    drafted = resize_short_side(image, 128)
    assert drafted.shape == whole.shape
    mse = (drafted.double() - whole.double()).square().mean()
    assert 10 * (255**2 / mse).log10() > 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, orientation: int) -> None:
    path = save(tmp_path, "a.jpg", jpeg(512, 256, orientation=orientation))
    whole, drafted = read_image(path, 1), read_image(path, 1, wanted=Wanted(128))
    assert drafted.shape == (1, whole.shape[1] // 2, whole.shape[2] // 2)
    difference = resize_short_side(whole, 128).int() - drafted.int()
    assert difference.abs().float().mean() < 3


def test_other_formats_and_modes(tmp_path: Path) -> None:
    picture = Image.open(io.BytesIO(jpeg(256, 256)))
    for suffix in ("png", "webp", "tif"):
        picture.save(tmp_path / f"a.{suffix}")
        whole = read_image(tmp_path / f"a.{suffix}", 3)
        assert torch.equal(read_image(tmp_path / f"a.{suffix}", 3, wanted=Wanted(32)), whole)
    for mode in ("L", "CMYK"):
        picture.convert(mode).save(tmp_path / f"{mode}.jpg", quality=95)
        assert read_image(tmp_path / f"{mode}.jpg", 3, wanted=Wanted(32)).shape == (3, 32, 32)


def test_max_pixels_limits_the_size_of_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, "a.jpg", jpeg(256, 256))
    with pytest.raises(ImageError, match=mentions("256 x 256", "max_pixels=1000")):
        read_image(path, 3, max_pixels=1000, wanted=Wanted(8))


def test_drafts_are_for_training_only_and_deterministic(tmp_path: Path) -> None:
    contents = {f"{i}.jpg": jpeg(512, 384, seed=i) for i in range(3)}
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in contents.items():
        save(folder, name, content)
    shard = write_shard(tmp_path / "a.tar", contents)
    sources = [open_root(str(root), 3) for root in (folder, shard)]
    assert isinstance(sources[0], FolderSource) and isinstance(sources[1], TarSource)

    def samples(source: FolderSource | TarSource, draft: bool, training: bool) -> torch.Tensor:
        data = ImageDataset(source, 64, 80, True, 0, training, draft=draft)
        return torch.stack([data[2, index, 0].image for index in range(3)])

    for source in sources:
        drafted = samples(source, draft=True, training=True)
        assert torch.equal(drafted, samples(sources[0], draft=True, training=True))
        whole = samples(source, draft=False, training=True)
        assert not torch.equal(drafted, whole)
        # both take the same crops
        assert (drafted.int() - whole.int()).abs().float().mean() < 1.5
        of_validation = samples(source, draft=True, training=False)
        assert torch.equal(of_validation, samples(source, draft=False, training=False))


def test_the_config_sets_draft(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path, f"{i}.jpg", jpeg(64, 64))
    for draft in (True, False):
        config = DataConfig(train=SourceConfig(root=str(tmp_path)), resize=16, draft=draft)
        training, _ = build_datasets(config, 3, 16, 0)
        assert training.draft is draft
