"""Random access to the images of tar shards in the WebDataset layout.

The members of a sample have the same path up to the last dot, for example `00/0017.jpg` and
`00/0017.cls`, or up to the first dot of the file name, for example `00/0017.input.jpg` and
`00/0017.cls`.

Shapes: N images.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kl_vae.data.decoding import (
    MAX_PIXELS,
    ImageError,
    inspect_from,
    open_below,
    read_image_from,
    read_size_from,
)
from kl_vae.data.file_types import KNOWN_EXTENSIONS, how_to_read
from kl_vae.data.folder import choose_images, image_extensions, is_hidden
from kl_vae.data.paths import PathList, fingerprint_of, hash_of
from kl_vae.data.pixel_format import Inspected, PixelFormat
from kl_vae.data.pixels import WHOLE_IMAGE, Wanted
from kl_vae.runtime.files import display_name

logger = logging.getLogger(__name__)

LABEL = ".cls"  # extension of the member that contains the class of an image
MAX_LABEL = 2**24  # bytes
_MAX_HEADER = 2**20  # bytes of an extended header
MAX_MEMBERS = 3_000_000  # per shard, whose headers take about 60 s
_INDEX_THREADS = 8  # indexing mostly waits for the file system
_BUFFER = 2**18  # bytes; most images fit into it
_NO_SPAN = (-1, 0)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarSource:
    """Images in tar shards; create it with `open_shards`.

    Args:
        shards: the shards, with size and modification time at indexing.
        keys: the names of the members.
        shard_indices: int32 [N], index of each member's shard.
        spans: int64 [N,2], offset in the shard and size of each member, in bytes; the offset is -1
            for members without content, such as links.
        labels: int64 [N,2], offset and size of each sample's `.cls` member; offset -1: no label.
        channels: C.
        max_pixels: maximum number of pixels, checked before decoding.
        ambiguous: the names of the `.cls` members that may belong to an image, by index of the
            shard and key of the image, for images with several.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        keys: PathList,
        shard_indices: NDArray[np.int32],
        spans: NDArray[np.int64],
        labels: NDArray[np.int64],
        channels: int,
        max_pixels: int,
        ambiguous: Mapping[tuple[int, str], Sequence[str]],
    ) -> None:
        self.keys = keys
        self.channels = channels
        self.max_pixels = max_pixels
        self.pixel_format = PixelFormat()
        self._shards = tuple(shards)
        self._shard_indices = shard_indices
        self._spans = spans
        self._labels = labels
        self._ambiguous = ambiguous

    @cached_property
    def fingerprint(self) -> str:
        """Hash of member names and sizes, as of a folder with these files in this order."""
        return fingerprint_of(self.keys, self._spans[:, 1].data)

    def subset(self, indices: NDArray[np.int64]) -> TarSource:
        """Return a source of the images at these indices."""
        part = TarSource(
            self._shards,
            self.keys.take(indices),
            self._shard_indices[indices],
            self._spans[indices],
            self._labels[indices],
            self.channels,
            self.max_pixels,
            self._ambiguous,
        )
        part.pixel_format = self.pixel_format
        return part

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.keys)

    def read(self, index: int, wanted: Wanted = WHOLE_IMAGE) -> Tensor:
        """Decode a member into [C,H,W], uint8 or float32 in [0, 1]; see `read_image`."""
        return read_image_from(
            partial(self._open, index),
            self.name(index),
            self.channels,
            self.max_pixels,
            wanted,
            self.pixel_format,
        )

    def inspect(self, index: int) -> Inspected:
        """Return what the file of an image states about its numbers."""
        return inspect_from(partial(self._open, index), self.name(index), self.max_pixels)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) from the image's header; see `read_size`."""
        return read_size_from(partial(self._open, index), self.name(index))

    def name(self, index: int) -> str:
        """Return the path of the shard and the name of the member, printable."""
        return display_name(f"{self._shards[self._shard_indices[index]].path}/{self.keys[index]}")

    def key(self, index: int) -> str:
        """Return the name of the member; it is unique within a shard only."""
        return self.keys[index]

    def label_text(self, index: int) -> str | None:
        """Return the content of the image's `.cls` member, such as `17`; None: no such member.

        The member's name differs from the image's in the last extension only. Without one, it is
        the member with the same path up to the first dot of the file name.

        Raises:
            ImageError: The label cannot be read, is too large, or is not UTF-8 text.
            ValueError: Several members may be the label.
        """
        candidates = self._ambiguous.get((int(self._shard_indices[index]), self.keys[index]))
        if candidates:
            raise ValueError(
                f"{self.name(index)}: its {LABEL} may be {display_name(candidates[0])} or "
                f"{display_name(candidates[1])}; rename one to the image's name with {LABEL} as "
                "its last extension"
            )
        offset, size = self._labels[index].tolist()
        if offset < 0:
            return None
        try:
            if size > MAX_LABEL:
                raise ValueError(f"{size} bytes are too large for a label: pack the shard again")
            with _open_part(self._shards[self._shard_indices[index]], offset, size) as stream:
                return stream.read().decode().strip()
        except (OSError, ValueError) as error:  # includes UnicodeDecodeError
            raise ImageError(f"{self.name(index)}: cannot read its {LABEL}: {error}") from error

    def state(self, index: int) -> tuple[int, int]:
        """Return size (bytes) and modification time (ns) of the image's shard."""
        shard = self._shards[self._shard_indices[index]]
        return shard.length, shard.modified

    def digest(self, index: int) -> str:
        """Return a hash of the member; empty: it cannot be read."""
        try:
            with self._open(index) as stream:
                return hash_of(stream)
        except (OSError, ValueError):
            return ""

    def places(self) -> Iterator[str]:
        """Yield the location of each image: the resolved path of the shard and the member name."""
        shards = [shard.path.resolve() for shard in self._shards]
        for number, key in zip(self._shard_indices.tolist(), self.keys, strict=True):
            yield f"{shards[number]}/{key}"

    @property
    def files(self) -> list[Path]:
        """Paths of the shards."""
        return [shard.path for shard in self._shards]

    def _open(self, index: int) -> io.BufferedReader:
        offset, size = self._spans[index].tolist()
        if offset < 0:
            raise ValueError(
                "not a regular file: pack the targets of links with tar --dereference "
                "--hard-dereference"
            )
        shard = self._shards[self._shard_indices[index]]
        return open_below(shard.path.parent, partial(_open_part, shard, offset, size))


def open_shards(
    paths: Sequence[Path],
    channels: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
) -> TarSource:
    """Open tar shards in the WebDataset layout.

    Images are ordered by shard, then by position in the shard. Image extensions and patterns are
    those of `list_images`; hidden members are ignored.

    Args:
        paths: the shards, at least one.
        channels: C.
        include: patterns of the members to include; empty: all.
        exclude: patterns of the members to exclude.
        max_pixels: maximum number of pixels, checked before decoding.

    Raises:
        ValueError: A shard cannot be read, is compressed, is not a tar file, or is damaged or
            truncated; it contains sparse members, two members of the same name, or a name with
            `..`; or there is no image.
    """
    with ThreadPoolExecutor(_INDEX_THREADS) as pool:
        indices = list(pool.map(_index_shard, paths))
    keys = PathList.of(key for index in indices for key in index.keys)
    extensions = image_extensions(channels, include)
    where = display_name(paths[0])
    if len(paths) > 1:
        where += f" and {len(paths) - 1} more shards" if len(paths) > 2 else " and another shard"
    no_images = f"no images in {where}: looked for {', '.join(extensions)}"
    if len(keys):
        kinds = sorted({os.path.splitext(key)[1].lower() for key in keys})
        found = f"{len(keys)} images have other extensions ({', '.join(kinds)})"
        no_images = "; ".join([no_images, found, *how_to_read(kinds)])
    chosen = choose_images(keys, extensions, include, exclude, where, no_images)
    logger.info("%d images in %d shards", len(chosen), len(paths))
    source = TarSource(
        [index.shard for index in indices],
        keys,
        np.repeat(np.arange(len(paths), dtype=np.int32), [len(index.keys) for index in indices]),
        np.concatenate([index.spans for index in indices]),
        np.concatenate([index.labels for index in indices]),
        channels,
        max_pixels,
        {
            (number, key): candidates
            for number, index in enumerate(indices)
            for key, candidates in index.ambiguous.items()
        },
    )
    return source if len(chosen) == len(keys) else source.subset(chosen)


# --- read a part of a shard


class Shard(NamedTuple):
    """A tar file, with size and modification time at indexing."""

    path: Path
    length: int  # bytes
    modified: int  # st_mtime_ns


class _Part(io.RawIOBase):
    """A stream over a part of an open file; closing it closes the file."""

    def __init__(self, file: io.FileIO, offset: int, size: int) -> None:
        self._file = file
        self._offset = offset
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(f"negative seek position {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        number = self._file.readinto(memoryview(buffer)[: max(0, self._size - self._position)])
        self._position += number
        return number

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_part(shard: Shard, offset: int, size: int) -> io.BufferedReader:
    """Return a stream over `size` bytes of a shard, starting at `offset`.

    Raises:
        OSError: The shard cannot be opened.
        ValueError: The shard has changed since it was indexed.
    """
    file = io.FileIO(shard.path)
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != shard[1:]:
        file.close()
        raise ValueError("the shard has changed since it was listed: run the command again")
    return io.BufferedReader(_Part(file, offset, size), max(1, min(size, _BUFFER)))


# --- index of a shard


class _Index(NamedTuple):
    """The images and `.npy` arrays of a shard, in file order.

    Attributes:
        shard: the file.
        keys: the names of the members, without a leading `./` or `/`.
        spans: as in `TarSource`.
        labels: as in `TarSource`.
        ambiguous: the names of the `.cls` members that may belong to an image, by its key.
    """

    shard: Shard
    keys: list[str]
    spans: NDArray[np.int64]
    labels: NDArray[np.int64]
    ambiguous: dict[str, list[str]]


def _index_shard(path: Path) -> _Index:
    """Read the headers of a shard; raises the errors of `open_shards`."""
    keys: list[str] = []
    spans: list[tuple[int, int]] = []
    labels: dict[str, tuple[int, int]] = {}  # by name
    headers: dict[str, int] = {}
    try:
        with _HeaderFile(path) as file:
            status = os.fstat(file.fileno())
            for number, member in enumerate(_members(file, status.st_size, path)):
                if number >= MAX_MEMBERS:
                    raise ValueError(
                        f"{display_name(path)}: more than {MAX_MEMBERS:,} members; pack them into "
                        "several shards"
                    )
                if member.issparse() or "GNU.sparse.major" in member.pax_headers:
                    raise ValueError(
                        f"{display_name(path)}/{display_name(member.name)}: a sparse member; "
                        "pack the shard without tar --sparse"
                    )
                key = _key(member, path)
                extension = os.path.splitext(key)[1].lower()
                if member.isdir() or not (extension in KNOWN_EXTENSIONS or extension == LABEL):
                    continue
                if any(map(is_hidden, key.split("/"))):
                    continue
                if key in headers:
                    raise ValueError(
                        f"{display_name(path)}: two members are named {display_name(key)} (at "
                        f"bytes {headers[key]:,} and {member.offset:,}); pack the shard again with "
                        "unique names"
                    )
                headers[key] = member.offset
                span = (member.offset_data, member.size) if member.isreg() else _NO_SPAN
                if extension in KNOWN_EXTENSIONS:
                    keys.append(key)
                    spans.append(span)
                else:
                    labels[key] = span
    except OSError as error:
        raise ValueError(
            f"{display_name(path)}: cannot be read ({error.strerror}); check the path and its "
            "permissions"
        ) from error
    label_keys, ambiguous = _pair_labels(keys, list(labels))
    found = [labels.get(key, _NO_SPAN) for key in label_keys]
    return _Index(
        Shard(path, status.st_size, status.st_mtime_ns),
        keys,
        np.array(spans, np.int64).reshape(-1, 2),
        np.array(found, np.int64).reshape(-1, 2),
        ambiguous,
    )


def _pair_labels(
    keys: Sequence[str], labels: Sequence[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the name of each image's label, and the candidates of images that have several.

    The label's name differs from the image's in the last extension only: `22.05.png` and
    `22.05.cls`. For an image without one, it is the label of the sample in the sense of WebDataset,
    unless that is the label of another image with dots in its name.

    Args:
        keys: names of the images.
        labels: names of the `.cls` members.

    Returns:
        A name per image, empty without a label; and two or more names per ambiguous image.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    by_sample: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        by_stem[_stem(label)].append(label)
        by_sample[_sample_name(label)].append(label)
    stems = set(map(_stem, keys))
    found: list[str] = []
    ambiguous: dict[str, list[str]] = {}
    for key in keys:
        sample = _sample_name(key)
        candidates = by_stem.get(_stem(key), [])
        if not candidates:
            candidates = by_sample.get(sample, [])
            owner = _stem(candidates[0]) if len(candidates) == 1 else sample
            if owner != sample and owner in stems:
                candidates = []
        if len(candidates) > 1:
            ambiguous[key] = candidates
        found.append(candidates[0] if len(candidates) == 1 else "")
    return found, ambiguous


def _key(member: tarfile.TarInfo, shard: Path) -> str:
    """Return the name of a member as the relative path to which tar unpacks it."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in member.name:
        raise ValueError(
            f"{display_name(shard)}: its member {ascii(member.name)} has an unsafe path; pack the "
            "shard again with relative paths without .."
        )
    return "/".join(parts)


def _stem(key: str) -> str:
    return os.path.splitext(key)[0]


def _sample_name(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


class _HeaderFile(io.FileIO):
    """A tar file that limits the length of extended headers, which may be damaged."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"an extended header of {size} bytes")
        return super().read(size)


def _members(file: _HeaderFile, length: int, shard: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file or of several concatenated tar files.

    Unlike `tarfile`, this raises an error if the file is damaged or truncated.
    """
    start = 0  # offset of the current tar file
    while start < length or not start:
        header = start
        file.seek(start)
        try:
            archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # to free memory
                header = member.offset
                if member.size < 0 or archive.offset > length:
                    raise tarfile.ReadError(
                        f"a member of {member.size} bytes extends beyond the end of the file"
                    )
                yield member
                header = archive.offset
            file.seek(header := archive.offset)
            end = file.read(tarfile.BLOCKSIZE)
            if len(end) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("no end-of-archive marker: the file is truncated")
            if any(end):
                raise tarfile.ReadError("not a member header")
            start = _skip_zeros(file, header)
        except OSError:
            raise
        except Exception as error:  # tarfile raises many different types for damaged headers
            if not header:
                _check_uncompressed(file, shard)
            raise ValueError(
                f"{display_name(shard)}: not a tar file, or damaged at byte {header:,} ({error}); "
                "copy or pack it again, or exclude it"
            ) from error


def _skip_zeros(file: _HeaderFile, offset: int) -> int:
    """Return the offset of the first nonzero block at or after `offset`, or the end of the file."""
    file.seek(offset)
    while content := file.read(_MAX_HEADER):
        if rest := content.lstrip(b"\0"):
            zeros = len(content) - len(rest)
            return offset + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        offset += len(content)
    return offset


def _check_uncompressed(file: _HeaderFile, shard: Path) -> None:
    file.seek(0)
    first = file.read(tarfile.BLOCKSIZE)
    for magic, name in _COMPRESSED.items():
        if first.startswith(magic):
            raise ValueError(
                f"{display_name(shard)}: compressed with {name}, which does not support random "
                "access; decompress the shard"
            )
