"""Configuration of the data."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from kl_vae.data.decoding import MAX_PIXELS
from kl_vae.data.pixel_format import AUTO, check_pages, parse_ranges
from kl_vae.data.transforms import Sides, as_written, height_and_width
from kl_vae.runtime.schema import show

DatasetName = Literal["folder", "cifar10", "fashion-mnist"]


@dataclass(frozen=True)
class SourceConfig:
    """A folder of images or tar shards, and a selection of its images.

    Attributes:
        root: a folder, tar shards (`shards/train-{0000..0127}.tar`), or `package:NAME/FOLDER` in an
            installed package; see `kl_vae.data.open_root`.
        include: patterns of relative paths or file names to include; empty: all images.
        exclude: patterns of images to exclude.
    """

    root: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class ValidationConfig:
    """The validation images.

    Attributes:
        root: a separate folder or shards; null: hold out a part of the training images.
        fraction: fraction of the training images to hold out, chosen by a hash of their paths; 0:
            no validation.
        group: regular expression that is searched in each path relative to the root. The text of
            its first group in parentheses, else the whole match, names the group of the image, such
            as a patient or a scene; `fraction` then is of the groups, and no group is both trained
            and validated on. Images without a match are a group each. null: no groups.
        include: patterns of the training images to hold out, instead of a fraction; with `root`,
            patterns of the images to include.
        exclude: patterns of images to exclude.
    """

    root: str | None = None
    fraction: float = 0.05
    group: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values and their combination."""
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction={self.fraction}: must be at least 0 and less than 1")
        if self.group is not None:
            self._check_group(self.group)
        if self.exclude and not (self.include or self.root):
            raise ValueError(
                f"exclude={list(self.exclude)}: has no effect without root or include; "
                "set one of them, or train.exclude"
            )

    def _check_group(self, group: str) -> None:
        try:
            re.compile(group)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"group={show(group)}: not a regular expression ({error}); write one such as "
                "^([^/]+)/"
            ) from error
        if self.root or self.include or not self.fraction:
            raise ValueError(
                f"group={show(group)}: has no effect with root, include or a fraction of 0; "
                "remove one of them"
            )


@dataclass(frozen=True)
class DataConfig:
    """The images of a run and their preprocessing.

    Attributes:
        name: folder, or a dataset that torchvision downloads to `train.root` (cifar10,
            fashion-mnist); these have their own validation images and take no patterns.
        train: the training images.
        validation: the validation images.
        range: `auto`, or the values [low, high] of black and white. `auto`: integers have the depth
            that their files state; 8, 10, 12 or 14 bits stored in 16, and floats in [0, 1] or
            [-1, 1], are detected from a sample of all files. The run's config then states the
            range per kind of numbers, such as `{uint16: [0, 4095]}`.
        pages: what the pages of a TIFF file are: `first` (only the first page is used), `channels`,
            or `images`; null: files of several pages are an error.
        resize: short side in pixels before cropping; null: no resizing.
        crop: side of the crop in pixels, or [height, width], both multiples of f (random crops in
            training, center crops otherwise); null: the model's resolution.
        min_size: images with a shorter side, or smaller than [height, width], are skipped; null:
            without `resize`, an image smaller than the crop is an error.
        flip: mirror training crops with probability 0.5.
        recolor: blend training crops with a permutation of their channels, with probability 0.5;
            for small datasets with few colours.
        draft: decode training JPEGs whose short side is at least four times `resize` at 1/2, 1/4
            or 1/8 of their size.
        num_workers: decoding processes per rank; limited to the number of available cores.
        max_pixels: maximum number of pixels of an image, checked before decoding.
        max_bad_fraction: maximum fraction of unusable files; above it the run saves a checkpoint
            and stops.
    """

    name: DatasetName = "folder"
    train: SourceConfig = field(default_factory=SourceConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    range: str | tuple[float, ...] | dict[str, Any] = AUTO
    pages: str | None = None
    resize: int | None = None
    crop: int | tuple[int, ...] | None = None
    min_size: int | tuple[int, ...] | None = None
    flip: bool = True
    recolor: bool = False
    draft: bool = True
    num_workers: int = 4
    max_pixels: int = MAX_PIXELS
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        """Check the values and their combination."""
        if self.name not in get_args(DatasetName):
            raise ValueError(f"name={self.name}: choose one of {', '.join(get_args(DatasetName))}")
        for key in ("resize", "max_pixels"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: must be at least 1")
        parse_ranges(self.range)
        check_pages(self.pages)
        check_sides("crop", self.crop)
        check_sides("min_size", self.min_size)
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers}: must be 0 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}: must be 0 to 1")
        if self.resize is not None and self.crop is not None:
            check_crop_fits(self.resize, self.crop)
        if self.name != "folder" and self._has_folder_keys():
            raise ValueError(
                f"name={self.name}: has its own validation images and takes no patterns; "
                "remove validation.root, validation.group, include and exclude"
            )
        if self.name != "folder" and self.min_size is not None:
            raise ValueError(
                f"min_size={self.min_size}: all images of {self.name} have one size; remove it"
            )

    def _has_folder_keys(self) -> bool:
        validation = self.validation
        return any(
            (self.train.include, self.train.exclude)
            + (validation.root, validation.include, validation.exclude, validation.group)
        )


def check_sides(key: str, sides: Sides | None) -> None:
    """Check a side or [height, width] of the configuration.

    Raises:
        ValueError: It is neither; the message begins with `key`.
    """
    if sides is None:
        return
    shown = as_written(sides)
    if not isinstance(sides, int) and len(sides) != 2:
        raise ValueError(f"{key}={shown}: give one side in pixels, or [height, width]")
    if min(height_and_width(sides)) < 1:
        raise ValueError(f"{key}={shown}: must be at least 1")


def check_crop_fits(resize: int, crop: Sides) -> None:
    """Check that the crop fits into resized images, at least into some that are no squares.

    Raises:
        ValueError: `resize` is less than the short side of `crop`.
    """
    short = min(height_and_width(crop))
    if resize < short:
        raise ValueError(
            f"resize={resize}: smaller than the crop of {as_written(crop)}; set resize to {short} "
            "or more"
        )
