"""Construction of the training and validation datasets from the configuration."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from kl_vae.data.config import DataConfig, check_crop_fits
from kl_vae.data.dataset import ImageDataset
from kl_vae.data.folder import matcher
from kl_vae.data.named import NamedSource
from kl_vae.data.paths import name_bytes
from kl_vae.data.pixel_format import decide_format
from kl_vae.data.roots import open_root, resolve_root
from kl_vae.data.sources import Source, StoredSource, with_format
from kl_vae.runtime.files import display_name
from kl_vae.runtime.schema import show

logger = logging.getLogger(__name__)


def build_datasets(
    config: DataConfig, channels: int, resolution: int, seed: int
) -> tuple[ImageDataset, ImageDataset | None]:
    """Return the training set and the validation set.

    Args:
        config: the configuration `data`.
        channels: C of the images.
        resolution: default for `config.crop`, in pixels.
        seed: of random crops and augmentations.

    Returns:
        The two datasets; the second is None if the configuration disables validation.

    Raises:
        ValueError: A value is invalid or a root has no images. The message begins with the key.
    """
    if config.train.root is None:
        raise ValueError("data.train.root is not set: set data.train.root=FOLDER")
    crop = config.crop or resolution
    if config.resize is not None:
        try:
            check_crop_fits(config.resize, crop)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None
    training: Source
    validation: Source | None
    if config.name == "folder":
        training, validation = _stored_sources(config, config.train.root, channels)
    else:
        training, validation = _named_sources(config, config.train.root, channels)

    def dataset(source: Source, training: bool) -> ImageDataset:
        return ImageDataset(
            source,
            crop=crop,
            resize=config.resize,
            flip=config.flip,
            seed=seed,
            training=training,
            recolor=config.recolor,
            draft=config.draft,
        )

    return dataset(training, True), None if validation is None else dataset(validation, False)


def _named_sources(
    config: DataConfig, train_root: str, channels: int
) -> tuple[Source, Source | None]:
    with _prefix_errors("data.train.root"):
        root = resolve_root(train_root)
    training = NamedSource(config.name, root, training=True, channels=channels)
    if config.validation.fraction == 0:
        return training, None
    return training, NamedSource(config.name, root, training=False, channels=channels)


def _stored_sources(
    config: DataConfig, train_root: str, channels: int
) -> tuple[StoredSource, StoredSource | None]:
    train, max_pixels = config.train, config.max_pixels
    with _prefix_errors("data.train.root"):
        source = open_root(train_root, channels, train.include, train.exclude, max_pixels)
    training, validation = _split(config, source)
    with _prefix_errors("data.train.root"):
        pixel_format = decide_format(training, config.range, config.pages)
        training = with_format(training, pixel_format)
    if validation is not None:
        with _prefix_errors("data.validation.root"):
            validation = with_format(validation, pixel_format)
    return training, validation


def _split(config: DataConfig, source: StoredSource) -> tuple[StoredSource, StoredSource | None]:
    """Return the training and the validation images."""
    chosen = config.validation
    if chosen.root is not None:
        with _prefix_errors("data.validation.root"):
            validation = open_root(
                chosen.root, source.channels, chosen.include, chosen.exclude, config.max_pixels
            )
        _check_disjoint(source, validation, chosen.root)
        return source, validation
    if chosen.include:
        held_out = _match_validation(source.keys, chosen.include, chosen.exclude)
    else:
        held_out = _hold_out(source.keys, chosen.fraction, chosen.group)
    if not held_out.any():
        return source, None
    return source.subset(np.flatnonzero(~held_out)), source.subset(np.flatnonzero(held_out))


@contextmanager
def _prefix_errors(key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _check_disjoint(training: StoredSource, validation: StoredSource, root: str) -> None:
    """Check that no image is in both sets, as happens if one folder contains the other."""
    shared = set(validation.places()).intersection(training.places())
    if shared:
        raise ValueError(
            f"data.validation.root={display_name(resolve_root(root))}: {len(shared)} of its images "
            f"are also training images, such as {display_name(min(shared))}; "
            "add patterns to data.train.exclude, or remove data.validation.root"
        )


def _match_validation(
    keys: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> NDArray[np.bool_]:
    held_out = np.fromiter(map(matcher(include, exclude), keys), np.bool_, len(keys))
    if held_out.all() or not held_out.any():
        matched = "all" if held_out.any() else "none"
        raise ValueError(
            f"data.validation.include={list(include)}: matches {matched} of the {len(keys)} "
            "images of data.train.root; change the patterns, or set data.validation.root"
        )
    return held_out


def name_hash(key: str) -> float:
    """Return a hash of a relative path, uniform in [0, 1)."""
    digest = blake2b(name_bytes(key), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _hold_out(keys: Sequence[str], fraction: float, group: str | None) -> NDArray[np.bool_]:
    """Return a mask of the images to hold out, chosen by a hash of their keys or groups.

    At least one image or group is held out unless `fraction` is 0 or there is only one image.
    Adding or removing other images does not move an image between the sets. Images with the same
    key, in several shards, are in the same set.

    Raises:
        ValueError: No image is left for training, or there is only one group.
    """
    if not fraction:
        return np.zeros(len(keys), np.bool_)
    names = keys if group is None else _groups(keys, group)
    hashes = np.fromiter(map(name_hash, names), np.float64, len(keys))
    held_out: NDArray[np.bool_] = hashes < fraction
    if held_out.all():
        raise ValueError(
            f"data.validation.fraction={fraction}: leaves none of the {len(keys)} images for "
            "training; lower it, or set data.validation.root"
        )
    if not held_out.any():
        held_out = hashes == hashes.min()  # the image that a larger fraction selects first
        if held_out.all() and group is not None:
            raise ValueError(
                f"data.validation.group={show(group)}: puts all {len(keys)} images into one group, "
                f"such as {display_name(names[0])}; give one that tells groups apart"
            )
        if held_out.all():
            logger.warning("no validation: the only image is used for training")
            return np.zeros(len(keys), np.bool_)
    if group is not None:
        logger.info(
            "data.validation.group: %d of %d groups are held out, %d of %d images",
            len({name for name, chosen in zip(names, held_out, strict=True) if chosen}),
            len(set(names)),
            held_out.sum(),
            len(keys),
        )
    return held_out


def _groups(keys: Sequence[str], group: str) -> list[str]:
    """Return the name of each image's group: of an image that does not match, its key.

    Raises:
        ValueError: No image matches.
    """
    pattern = re.compile(group)
    matches = [pattern.search(key) for key in keys]
    names = [match and match[min(1, pattern.groups)] for match in matches]
    unmatched = names.count(None)
    if unmatched == len(names):
        raise ValueError(
            f"data.validation.group={show(group)}: matches none of the {len(keys)} images of "
            f"data.train.root, such as {display_name(keys[0])}; change it"
        )
    if unmatched:
        logger.info(
            "data.validation.group: %d of %d images do not match, and are a group each",
            unmatched,
            len(keys),
        )
    return [key if name is None else name for key, name in zip(keys, names, strict=True)]
