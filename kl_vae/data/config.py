"""What a configuration says about data, checked."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from kl_vae.data.decoding import MAX_PIXELS

DatasetName = Literal["folder", "cifar10", "fashion-mnist"]


@dataclass(frozen=True)
class SourceConfig:
    """A folder of images, or tar shards, and which of their images.

    Attributes:
        root: a folder, tar shards (`shards/train-{0000..0127}.tar`), or `package:NAME/FOLDER` in an
            installed package; see `kl_vae.data.open_root`.
        include: patterns over relative paths or file names; empty: all images.
        exclude: patterns of images to leave out.
    """

    root: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class ValidationConfig:
    """Where validation images come from.

    Attributes:
        root: a folder or shards of their own; null: part of the training images.
        fraction: of the training images, chosen by a hash of their paths; 0: no validation.
        include: patterns of the training images to hold out, in place of a fraction.
        exclude: patterns of images to leave out.
    """

    root: str | None = None
    fraction: float = 0.05
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check each value, and that each has an effect."""
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction={self.fraction}: must be at least 0 and less than 1")
        if self.exclude and not (self.include or self.root):
            raise ValueError(
                f"exclude={list(self.exclude)}: has no effect without root or include; "
                "set one of them, or train.exclude"
            )


@dataclass(frozen=True)
class DataConfig:
    """The images of a run and how they are cropped.

    Attributes:
        name: folder, or a data set that torchvision downloads into `train.root` (cifar10,
            fashion-mnist), which has its own validation images and takes no patterns.
        train: the training images.
        validation: the validation images.
        resize: short side in pixels before cropping; null: as it is.
        crop: side of the crop in pixels, at random in training, else the middle; null: the model's
            resolution.
        flip: mirror half of the training crops.
        recolor: blend half of the training crops with a permutation of their channels, which adds
            colours that a small set lacks.
        draft: decode training JPEGs of four times `resize` or more at a half, a quarter or an
            eighth of their size.
        num_workers: processes per rank that decode; at most its cores.
        max_pixels: larger images are refused before they are decoded.
        max_bad_fraction: of all files that may be unusable; with more the run ends, saved.
    """

    name: DatasetName = "folder"
    train: SourceConfig = field(default_factory=SourceConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    resize: int | None = None
    crop: int | None = None
    flip: bool = True
    recolor: bool = False
    draft: bool = True
    num_workers: int = 4
    max_pixels: int = MAX_PIXELS
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        """Check each value, and those that depend on each other."""
        if self.name not in get_args(DatasetName):
            raise ValueError(f"name={self.name}: choose one of {', '.join(get_args(DatasetName))}")
        for key in ("resize", "crop", "max_pixels"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: must be at least 1")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers}: must be 0 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}: must be 0 to 1")
        if self.resize is not None and self.crop is not None:
            check_crop_fits(self.resize, self.crop)
        if self.name != "folder" and self._has_folder_keys():
            raise ValueError(
                f"name={self.name}: has its own validation images and takes no patterns; "
                "leave out validation.root, include and exclude"
            )

    def _has_folder_keys(self) -> bool:
        validation = self.validation
        return any(
            (self.train.include, self.train.exclude)
            + (validation.root, validation.include, validation.exclude)
        )


def check_crop_fits(resize: int, crop: int) -> None:
    """Raise ValueError where an image of short side `resize` has no crop of `crop`."""
    if resize < crop:
        raise ValueError(
            f"resize={resize}: smaller than the crop of {crop}; set resize to {crop} or more"
        )
