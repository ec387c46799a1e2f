"""From the configuration of data to the training and validation sets."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kl_vae.data.config import DataConfig, check_crop_fits
from kl_vae.data.dataset import ImageDataset
from kl_vae.data.folder import list_images, resolve_root, select
from kl_vae.data.images import display_name
from kl_vae.data.named import NamedSource
from kl_vae.data.source import FolderSource, Source
from kl_vae.data.split import name_hash, split

logger = logging.getLogger(__name__)


def build_datasets(
    config: DataConfig, channels: int, resolution: int, seed: int
) -> tuple[ImageDataset, ImageDataset | None]:
    """Return the training set and the validation set; no validation set where none is asked for.

    Raises:
        ValueError: a key of `data` that must change, or a folder without images;
            the text begins with the key.
    """
    if config.train.root is None:
        raise ValueError("data.train.root is not set: write data.train.root=FOLDER")
    crop = config.crop or resolution
    if config.resize is not None:
        try:
            check_crop_fits(config.resize, crop)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None
    if config.name == "folder":
        training, validation = _folder_sources(config, config.train.root, channels)
    else:
        training, validation = _named_sources(config, config.train.root, channels)

    def dataset(source: Source, training: bool) -> ImageDataset:
        return ImageDataset(
            source, crop, config.resize, config.flip, seed, training, config.recolor
        )

    return dataset(training, True), None if validation is None else dataset(validation, False)


def _named_sources(
    config: DataConfig, train_root: str, channels: int
) -> tuple[Source, Source | None]:
    with _errors_under("data.train.root"):
        root = resolve_root(train_root)
    training = NamedSource(config.name, root, training=True, channels=channels)
    if config.validation.fraction == 0:
        return training, None
    return training, NamedSource(config.name, root, training=False, channels=channels)


def _folder_sources(
    config: DataConfig, train_root: str, channels: int
) -> tuple[Source, Source | None]:
    chosen = config.validation
    with _errors_under("data.train.root"):
        root = resolve_root(train_root)
        paths = list_images(root, channels, config.train.include, config.train.exclude)
    if chosen.root is not None:
        with _errors_under("data.validation.root"):
            validation_root = resolve_root(chosen.root)
            validation = list_images(validation_root, channels, chosen.include, chosen.exclude)
    elif chosen.include:
        validation_root = root
        paths, validation = _take_included(paths, chosen.include, chosen.exclude)
    else:
        validation_root = root
        paths, validation = _hold_out(paths, chosen.fraction)
    training = FolderSource(root, paths, channels, config.max_pixels)
    if not validation:
        return training, None
    held_out = FolderSource(validation_root, validation, channels, config.max_pixels)
    if chosen.root is not None:
        _check_apart(training, held_out)
    return training, held_out


@contextmanager
def _errors_under(key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _check_apart(training: FolderSource, validation: FolderSource) -> None:
    """Refuse files that are in both, which happens when one folder lies inside the other."""

    def files(source: FolderSource) -> set[str]:
        root = source.root.resolve()
        return {f"{root}/{path}" for path in source.paths}

    shared = files(training) & files(validation)
    if shared:
        raise ValueError(
            f"data.validation.root={display_name(validation.root)}: {len(shared)} of its images "
            f"are training images as well, such as {display_name(min(shared))}; "
            "add patterns to data.train.exclude, or leave data.validation.root out"
        )


def _take_included(
    paths: list[str], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[str], list[str]]:
    validation = select(paths, include, exclude)
    taken = set(validation)
    training = [path for path in paths if path not in taken]
    if not (training and validation):
        matched = "all" if validation else "none"
        raise ValueError(
            f"data.validation.include={list(include)}: matches {matched} of the {len(paths)} "
            "images of data.train.root; change the patterns, or set data.validation.root"
        )
    return training, validation


def _hold_out(paths: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split by hash, and hold out one file at least, so that validation is never silently empty."""
    training, validation = split(paths, fraction)
    if not training:
        raise ValueError(
            f"data.validation.fraction={fraction}: leaves none of {len(paths)} images to train on; "
            "lower it, or set data.validation.root"
        )
    if fraction and not validation:
        if len(paths) == 1:
            logger.warning("no validation: there is one image, and training takes it")
        else:
            validation = [min(paths, key=name_hash)]  # the first that a larger fraction takes
            training.remove(validation[0])
    return training, validation
