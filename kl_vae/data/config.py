"""What a configuration says about data, checked."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from kl_vae.data.decoding import MAX_PIXELS

DatasetName = Literal["folder", "cifar10", "fashion-mnist"]


@dataclass(frozen=True)
class SourceConfig:
    """A folder of images, or tar shards, and which of their images.

    `root` is as in `kl_vae.data.open_root`; `include` and `exclude` are patterns as in
    `kl_vae.data.select`.
    """

    root: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class ValidationConfig:
    """Where validation images come from.

    Of a folder or shards of their own, where `root` is set; else of the training ones:
    the files that `include` names, which training then leaves out, or, where it
    is empty, a `fraction` of the files, chosen by their names' hashes.
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

    A named data set is kept in `train.root`, brings its own validation images,
    and takes no patterns. `resize` is the length of the short side before
    cropping (None: as it is), `crop` that of a crop's sides (None: the model's
    resolution), both in pixels. `recolor` blends half of the training crops with
    a permutation of their channels: to a small set of images it adds the colours
    that they lack. `draft` decodes training images that are JPEGs at a half, a quarter or an
    eighth of their size, where that is twice `resize` or more.
    Of a run's files at most `max_bad_fraction` may be unusable.
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
