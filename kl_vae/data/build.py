"""From the configuration of data to the training and validation sets."""

import logging
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
from kl_vae.data.roots import open_root, resolve_root
from kl_vae.data.sources import Source, StoredSource
from kl_vae.runtime.files import display_name

logger = logging.getLogger(__name__)


def build_datasets(
    config: DataConfig, channels: int, resolution: int, seed: int
) -> tuple[ImageDataset, ImageDataset | None]:
    """Return the training set and the validation set; no validation set where none is asked for.

    Raises:
        ValueError: a key of `data` that must change, or a root without images;
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
    with _errors_under("data.train.root"):
        root = resolve_root(train_root)
    training = NamedSource(config.name, root, training=True, channels=channels)
    if config.validation.fraction == 0:
        return training, None
    return training, NamedSource(config.name, root, training=False, channels=channels)


def _stored_sources(
    config: DataConfig, train_root: str, channels: int
) -> tuple[Source, Source | None]:
    train, chosen, max_pixels = config.train, config.validation, config.max_pixels
    with _errors_under("data.train.root"):
        every = open_root(train_root, channels, train.include, train.exclude, max_pixels)
    if chosen.root is not None:
        with _errors_under("data.validation.root"):
            validation = open_root(
                chosen.root, channels, chosen.include, chosen.exclude, max_pixels
            )
        _check_apart(every, validation, chosen.root)
        return every, validation
    if chosen.include:
        taken = _included(every.keys, chosen.include, chosen.exclude)
    else:
        taken = _held_out(every.keys, chosen.fraction)
    if not taken.any():
        return every, None
    return every.subset(np.flatnonzero(~taken)), every.subset(np.flatnonzero(taken))


@contextmanager
def _errors_under(key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _check_apart(training: StoredSource, validation: StoredSource, root: str) -> None:
    """Refuse images that are in both, which happens when one folder lies inside the other."""
    shared = set(validation.places()).intersection(training.places())
    if shared:
        raise ValueError(
            f"data.validation.root={display_name(resolve_root(root))}: {len(shared)} of its images "
            f"are training images as well, such as {display_name(min(shared))}; "
            "add patterns to data.train.exclude, or leave data.validation.root out"
        )


def _included(
    keys: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> NDArray[np.bool_]:
    taken = np.fromiter(map(matcher(include, exclude), keys), np.bool_, len(keys))
    if taken.all() or not taken.any():
        matched = "all" if taken.any() else "none"
        raise ValueError(
            f"data.validation.include={list(include)}: matches {matched} of the {len(keys)} "
            "images of data.train.root; change the patterns, or set data.validation.root"
        )
    return taken


def name_hash(key: str) -> float:
    """Return a number in [0, 1) that depends on the relative path alone, uniform over paths."""
    digest = blake2b(name_bytes(key), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _held_out(keys: Sequence[str], fraction: float) -> NDArray[np.bool_]:
    """Choose by hash, and hold out one image at least, so that validation is never silently empty.

    An image stays held out, or trained on, when others come and go. Images of one name, in several
    shards, are all held out or all trained on.
    """
    if not fraction:
        return np.zeros(len(keys), np.bool_)
    hashes = np.fromiter(map(name_hash, keys), np.float64, len(keys))
    taken: NDArray[np.bool_] = hashes < fraction
    if taken.all():
        raise ValueError(
            f"data.validation.fraction={fraction}: leaves none of {len(keys)} images to train on; "
            "lower it, or set data.validation.root"
        )
    if not taken.any():
        taken = hashes == hashes.min()  # the first that a larger fraction takes
        if taken.all():
            logger.warning("no validation: there is one image, and training takes it")
            return np.zeros(len(keys), np.bool_)
    return taken
