"""Writing of latent folders: class labels, shards and index.

Shapes: B batch, N images, z latent channels, h and w latent height and width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from kl_vae.checkpoints.safetensors_file import safetensors_bytes
from kl_vae.data import BadImage, ImageError, Source
from kl_vae.data.latent_format import (
    DTYPES,
    INDEX,
    KEYS,
    SOURCES,
    LatentIndex,
    LatentSettings,
    LatentStatistics,
    ShardEntry,
    SkippedImage,
    read_index,
)
from kl_vae.data.paths import name_bytes
from kl_vae.inference.progress import FOLDER, Progress, differences, units_of
from kl_vae.metrics.moments import RunningMoments, latent_normalization
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.files import display_name, write_atomically
from kl_vae.runtime.schema import from_mapping

logger = logging.getLogger(__name__)

_MAX_CLASS = torch.iinfo(torch.int64).max
Images = list[tuple[int, int, str]] | None  # size, modification time and hash of each; unknown

_SHARDS = "latents-*-of-*.safetensors"
_NAMED = 20  # changed images per line of the log


@dataclass(frozen=True)
class Labels:
    """The class of each image of a source."""

    values: Tensor  # [N], int64, at least 0; -1: unusable
    classes: tuple[str, ...] | None  # names of the classes 0, 1, ...; None: no names
    unusable: Mapping[int, str] = field(default_factory=dict)  # reason by index of the image

    @property
    def checksum(self) -> str:
        """Hash of labels and class names, 32 hex digits."""
        digest = hashlib.blake2b(self.values.numpy().tobytes(), digest_size=16)
        digest.update(b"\0".join(map(name_bytes, self.classes or ())))
        return digest.hexdigest()


def class_labels(source: Source) -> Labels:
    """Return the class labels of a source: stored labels if there are any, otherwise folders.

    Images whose stored label cannot be read, or does not fit into int64, are unusable.

    As in torchvision's ImageFolder, the class is the first folder of an image's relative path;
    classes are numbered in the byte order of their names.

    Raises:
        ValueError: an image has no label or several, or its label is not a non-negative integer.
    """
    unusable: dict[int, str] = {}
    texts = [_label_text(source, i, unusable) for i in range(len(source))]
    if any(text is not None for text in texts):
        values = []
        for i, text in enumerate(texts):
            if text is None or not text.isdecimal():
                problem = "has no label" if text is None else f"its label is {text!r:.40}"
                raise ValueError(
                    f"{source.name(i)}: {problem}; label each image with a non-negative integer, "
                    "or omit --labels"
                )
            digits = text.lstrip("0")
            # the number of digits first, since Python converts a limited number of them
            if len(digits) > len(str(_MAX_CLASS)) or int(digits or 0) > _MAX_CLASS:
                unusable[i] = f"its label {text:.20} of {len(text)} digits is above {_MAX_CLASS}"
            values.append(-1 if i in unusable else int(digits or 0))
        return Labels(torch.tensor(values), None, unusable)
    folders = []
    for i in range(len(source)):
        folder, slash, _ = source.key(i).partition("/")
        if not slash:
            raise ValueError(
                f"{source.name(i)}: has no label, because it is not in a subfolder of --images; "
                "put the images of each class into a subfolder, or omit --labels"
            )
        folders.append(folder)
    classes = tuple(sorted(set(folders), key=name_bytes))
    numbers = {name: number for number, name in enumerate(classes)}
    return Labels(torch.tensor([numbers[folder] for folder in folders]), classes)


def _label_text(source: Source, index: int, unusable: dict[int, str]) -> str | None:
    """Return the stored label of an image; one that cannot be read is noted in `unusable`."""
    try:
        text = source.label_text(index)
    except ImageError as error:
        unusable[index] = str(error).removeprefix(f"{source.name(index)}: ")
        return "0"
    return None if text is None else text.strip()


def names_checksum(source: Source) -> str:
    """Return a hash of the relative paths of a source's images, in order: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(source)):
        digest.update(b"%s\0" % name_bytes(source.key(i)))
    return digest.hexdigest()


@dataclass
class EncodedShard:
    """Encoded images of one shard."""

    moments: RunningMoments  # per channel, of the raw latents of the unflipped images
    latents: list[Tensor] = field(default_factory=list)  # [B, z, h, w] or [B, 2z, h, w] each
    flipped: list[Tensor] = field(default_factory=list)  # same shapes, for the flipped images
    positions: list[int] = field(default_factory=list)  # positions in the source
    bad: list[BadImage] = field(default_factory=list)


class _Record(NamedTuple):
    """What is known of a shard that was already written."""

    entry: ShardEntry
    images: Images


class LatentFolder:
    """Latent folder that is written or verified; all ranks must make the same calls.

    Existing shards are verified by their sha256, and encoded again if it differs, or if one of
    their images has changed since.

    Args:
        out: the folder, which is created if necessary.
        settings: everything that the latents depend on.
        source: source of the images.
        labels: class labels to store; None: no labels.
        ranks: the ranks that share the work.
        resume: continue an unfinished folder, or verify a complete one.
        verify: compare the content of the images, not their size and modification time.
        overwrite: replace the latents in the folder.

    As a context manager, it releases the lock of the folder at the end.

    Attributes:
        units: ranges of images in the source, one per shard.
        todo: units that this rank has to encode.
        verified: the folder was complete and no unit has to be encoded.

    Raises:
        ValueError: the folder contains other latents, or latents without `resume`; or it cannot be
            written to.
    """

    def __init__(
        self,
        out: Path,
        settings: LatentSettings,
        source: Source,
        labels: Labels | None,
        ranks: Ranks,
        *,
        resume: bool,
        verify: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.units = units_of(settings.images, settings.shard_size)
        self._out, self._settings, self._ranks = out, settings, ranks
        self._source, self._labels = source, labels
        self._earlier: LatentIndex | None = None
        unfinished = (out / FOLDER).exists()  # `Progress` creates it

        def open_complete() -> None:
            self._earlier = _open(out, settings, source, resume, unfinished)

        with ExitStack() as stack:
            self._progress = stack.enter_context(
                Progress(
                    out,
                    dataclasses.asdict(settings),
                    resume,
                    ranks,
                    overwrite=overwrite,
                    finished=open_complete,
                )
            )
            if overwrite:
                ranks.on_rank_zero(lambda: _remove_latents(out))
            self._earlier = ranks.on_rank_zero(lambda: self._earlier)
            self.todo = self._find_todo(verify)
            # before the images are read, so that a later change is noticed
            self._states = {unit: list(map(source.state, self.units[unit])) for unit in self.todo}
            self._lock = stack.pop_all()

    def __enter__(self) -> LatentFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.close()

    def _find_todo(self, verify: bool) -> list[int]:
        """Verify existing shards; return the units that this rank has to encode."""
        ranks = self._ranks
        known = ranks.on_rank_zero(lambda: [self._find(unit) for unit in range(len(self.units))])
        if any(known):
            logger.info("verifying existing shards")
        missing = []  # each rank checks its share of the files
        for unit in range(ranks.rank, len(self.units), ranks.world_size):
            record = known[unit]
            if record is None or not self._is_current(unit, record, verify):
                missing.append(unit)
        todo = sorted(unit for units in ranks.gather(missing) for unit in units)
        self.verified = self._earlier is not None and not todo
        return todo[ranks.rank :: ranks.world_size]

    def write(self, unit: int, shard: EncodedShard) -> None:
        """Write the shard of a unit, and record that it is finished.

        Raises:
            ValueError: a file cannot be written.
        """
        # keeps the shape and dtype if the shard has no images
        empty = torch.empty(0, *self._settings.shape, dtype=DTYPES[self._settings.dtype])
        tensors = {"latents": torch.cat([empty, *shard.latents])}
        if self._settings.flipped:
            tensors["flipped"] = torch.cat([empty, *shard.flipped])
        if self._labels is not None:
            tensors["labels"] = self._labels.values[shard.positions]
        # one metadata entry, since safetensors writes several in an order that varies between runs
        keys = json.dumps([self._source.key(i) for i in shard.positions])
        content = safetensors_bytes(tensors, {KEYS: keys})
        path = self._out / self._file(unit)
        _write(path, content)
        entry = ShardEntry(
            file=path.name,
            number=len(shard.positions),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            skipped=tuple(SkippedImage(*image) for image in shard.bad),
            **shard.moments.values(),
        )
        self._record(unit, entry, self._images(unit))

    def finish(self, checkpoint: str) -> LatentIndex:
        """Wait for all ranks, then write and return the index.

        Args:
            checkpoint: name of the model, stored in the index.

        Raises:
            ValueError: no image is usable, or the index cannot be written.
        """
        self._ranks.gather(None)  # wait until all shards are written
        return self._ranks.on_rank_zero(lambda: self._write_index(checkpoint))

    def _find(self, unit: int) -> _Record | None:
        """Return the record of a shard that was already written; None if there is none."""
        record = self._progress.find(unit)
        if record is not None:
            return _Record(from_mapping(ShardEntry, record["entry"]), record["images"])
        if self._earlier is None:
            return None
        entry = self._earlier.shards[unit]
        images = self._recorded[unit] if unit < len(self._recorded) else None
        self._record(unit, entry, images)
        return _Record(entry, images)

    @functools.cached_property
    def _recorded(self) -> list[Images]:
        return _read_sources(self._out / SOURCES)

    def _record(self, unit: int, entry: ShardEntry, images: Images) -> None:
        self._progress.write(unit, {"entry": dataclasses.asdict(entry), "images": images})

    def _images(self, unit: int) -> Images:
        """Return state and hash of each image that was encoded; no hash if it has changed since."""
        images: list[tuple[int, int, str]] = []
        for i, state in zip(self.units[unit], self._states[unit], strict=True):
            digest = self._source.digest(i)
            images.append((*state, digest if self._source.state(i) == state else ""))
        return images

    def _is_current(self, unit: int, record: _Record, verify: bool) -> bool:
        """Return whether a shard is intact, and of the images as they are now."""
        entry, images = record
        if entry.file != self._file(unit) or not entry.is_intact(self._out):
            logger.warning("%s: damaged or missing; it will be encoded again", entry.file)
            return False
        states = list(map(self._source.state, self.units[unit]))
        if images is None or len(images) != len(states):
            if self._earlier is None or self._earlier.settings.source == self._settings.source:
                logger.warning(
                    "%s: %s does not say of which images it is; it will be encoded again",
                    entry.file,
                    SOURCES,
                )
                return False
            # of a version that recorded path and size only, which have been compared
            self._record(unit, entry, [(*state, "") for state in states])
            return True
        if verify:
            digests = map(self._source.digest, self.units[unit])
            same = [now == then[2] != "" for now, then in zip(digests, images, strict=True)]
        else:
            pairs = zip(states, images, strict=True)
            same = [list(now) == list(then[:2]) for now, then in pairs]
        changed = [
            self._source.name(i) for i, x in zip(self.units[unit], same, strict=True) if not x
        ]
        if changed:
            more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
            logger.warning(
                "%s: will be encoded again, since images have changed: %s%s",
                entry.file,
                ", ".join(changed[:_NAMED]),
                more,
            )
        elif verify:  # same content, another time
            pairs = zip(states, images, strict=True)
            self._record(unit, entry, [(*now, then[2]) for now, then in pairs])
        return not changed

    def _file(self, unit: int) -> str:
        return f"latents-{unit:05d}-of-{len(self.units):05d}.safetensors"

    def _write_index(self, checkpoint: str) -> LatentIndex:
        records = list(self._progress.read(len(self.units)))
        entries = tuple(from_mapping(ShardEntry, record["entry"]) for record in records)
        number = sum(entry.number for entry in entries)
        if not number:
            for entry in entries:
                (self._out / entry.file).unlink(missing_ok=True)
            self._progress.close()
            raise nothing_usable(self._settings.images)
        moments = (RunningMoments.from_values(vars(entry)) for entry in entries)
        latents = latent_normalization(functools.reduce(RunningMoments.merge, moments))
        index = LatentIndex(
            checkpoint=checkpoint,
            settings=self._settings,
            classes=None if self._labels is None else self._labels.classes,
            number=number,
            statistics=LatentStatistics(
                scale_factor=latents.scale_factor,
                shift_factor=latents.shift_factor,
                mean=latents.mean or (),
                std=latents.std or (),
            ),
            shards=entries,
        )
        sources = "".join(f"{json.dumps(record['images'])}\n" for record in records).encode()
        path = self._out / SOURCES
        if not path.is_file() or path.read_bytes() != sources:
            _write(path, sources)
        earlier = self._earlier
        if earlier is None or (earlier.shards, earlier.settings) != (entries, self._settings):
            _write(self._out / INDEX, index.to_json().encode())
        self._progress.close()
        return index


def nothing_usable(images: int) -> ValueError:
    """Return the error to raise if all images were skipped."""
    return ValueError(
        f"none of the {images} images can be used, for the reasons logged above; give other images "
        "to --images"
    )


def _read_sources(path: Path) -> list[Images]:
    """Return what a complete folder records of the images of each shard; empty: nothing.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [
            None if line is None else [(int(a), int(b), str(c)) for a, b, c in line]
            for line in lines
        ]
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{display_name(path)}: cannot be read ({error}); remove it to encode all images again"
        ) from None


def _remove_latents(out: Path) -> None:
    """Remove the latents in a folder, the index first.

    Raises:
        ValueError: a file cannot be removed.
    """
    for path in (out / INDEX, out / SOURCES, *out.glob(_SHARDS)):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot remove {display_name(path)} ({error.strerror}); check its permissions, or "
                "give another --out"
            ) from error


def _open(
    out: Path, settings: LatentSettings, source: Source, resume: bool, unfinished: bool
) -> LatentIndex | None:
    """Check that latents may be written to `out`.

    Returns:
        The index of a complete folder; None if the folder is new or unfinished.

    Raises:
        ValueError: the folder contains other latents, or is complete and `resume` is false.
    """
    name = display_name(out)
    if not (out / INDEX).exists():
        stray = sorted(out.glob(_SHARDS))
        if stray and not unfinished:
            raise ValueError(
                f"{name}: contains {display_name(stray[0].name)} but no {INDEX}; give --overwrite "
                "to replace the latents there, or another --out"
            )
        return None
    if not resume:
        raise ValueError(
            f"{name}: already contains latents; give --resume to verify and repair them, "
            "--overwrite to replace them, or another --out"
        )
    index = read_index(out)
    before, now = (
        json.loads(json.dumps(dataclasses.asdict(x))) for x in (index.settings, settings)
    )
    if before["source"] == source.fingerprint:  # of a version that recorded path and size only
        logger.warning("%s: changes of images that keep their size are not noticed", name)
        before["source"] = now["source"]
    changed = differences(before, now)
    if changed:
        raise ValueError(
            f"{name}: contains latents with different settings ({changed}); use the same settings "
            "to verify them, --overwrite to replace them, or another --out"
        )
    return index


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise ValueError(
            f"cannot write {display_name(path)} ({error.strerror}); check free space and "
            "permissions, and continue with --resume"
        ) from error
