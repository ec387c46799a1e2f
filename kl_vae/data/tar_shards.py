"""The images of tar shards, read at random.

The layout is WebDataset's: the members of a sample have one name up to the first dot of their
last part, as in `00/0017.jpg`, `00/0017.cls` and `00/0017.json`. N images.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kl_vae.data.decoding import (
    ARRAY_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MAX_PIXELS,
    read_image_from,
    read_size_from,
)
from kl_vae.data.folder import choose_images, image_extensions, is_hidden
from kl_vae.data.paths import PathList, fingerprint_of
from kl_vae.data.pixels import EVERYTHING, Wanted
from kl_vae.runtime.files import display_name

logger = logging.getLogger(__name__)

LABEL = ".cls"  # of the member beside an image that holds its class
MAX_LABEL = 2**24  # bytes
_MAX_HEADER = 2**20  # bytes of an extended header, which holds names
_AT_ONCE = 8  # shards that are indexed: a network's file system is waited for most of the time
_BUFFER = 2**18  # bytes: most images are read at once
_NOWHERE = (-1, 0)
_IMAGES = frozenset(IMAGE_EXTENSIONS + ARRAY_EXTENSIONS)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarSource:
    """Members of tar shards; made by `open_shards`.

    Args:
        shards: the files, as they were when they were indexed.
        keys: the members' names.
        numbers: int32 [N], of each one's shard.
        spans: int64 [N,2], where each begins in its shard and its size, in bytes; it begins at -1
            where the member is a link or something else that has no content.
        labels: int64 [N,2], the same of the `.cls` beside each; -1 where there is none.
        channels: C.
        max_pixels: larger images are refused before they are decoded.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        keys: PathList,
        numbers: NDArray[np.int32],
        spans: NDArray[np.int64],
        labels: NDArray[np.int64],
        channels: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.keys = keys
        self.channels = channels
        self.max_pixels = max_pixels
        self._shards = tuple(shards)
        self._numbers = numbers
        self._spans = spans
        self._labels = labels

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the members' names and sizes: as of a folder of them in this order."""
        return fingerprint_of(self.keys, self._spans[:, 1].data)

    def subset(self, indices: NDArray[np.int64]) -> TarSource:
        """Return the source of these images alone."""
        return TarSource(
            self._shards,
            self.keys.take(indices),
            self._numbers[indices],
            self._spans[indices],
            self._labels[indices],
            self.channels,
            self.max_pixels,
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.keys)

    def read(self, index: int, wanted: Wanted = EVERYTHING) -> Tensor:
        """Decode a member into [C,H,W], uint8 or float32 in [0, 1]; see `read_image`."""
        opened = partial(self._open, index)
        return read_image_from(opened, self.name(index), self.channels, self.max_pixels, wanted)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) from the image's header; see `read_size`."""
        return read_size_from(partial(self._open, index), self.name(index))

    def name(self, index: int) -> str:
        """Return the shard's whole path and the member's name, printable."""
        return display_name(f"{self._shards[self._numbers[index]].path}/{self.keys[index]}")

    def key(self, index: int) -> str:
        """Return the member's name, which members of several shards may have."""
        return self.keys[index]

    def label_text(self, index: int) -> str | None:
        """Return what stands in `KEY.cls`, such as `17`; None where there is none.

        Raises:
            ValueError: it cannot be read, or is no text.
        """
        offset, size = self._labels[index].tolist()
        if offset < 0:
            return None
        try:
            if size > MAX_LABEL:
                raise ValueError(f"{size} bytes are no label: pack it again")
            with _open_part(self._shards[self._numbers[index]], offset, size) as stream:
                return stream.read().decode().strip()
        except (OSError, ValueError) as error:  # UnicodeDecodeError is one
            raise ValueError(f"{self.name(index)}: its {LABEL}: {error}") from error

    def places(self) -> Iterator[str]:
        """Yield where each image is stored, the same for the same image of another source."""
        shards = [shard.path.resolve() for shard in self._shards]
        for number, key in zip(self._numbers.tolist(), self.keys, strict=True):
            yield f"{shards[number]}/{key}"

    @property
    def files(self) -> list[Path]:
        """The shards."""
        return [shard.path for shard in self._shards]

    def _open(self, index: int) -> io.BufferedReader:
        offset, size = self._spans[index].tolist()
        if offset < 0:
            raise ValueError(
                "not a regular file: pack what links lead to, with tar --dereference "
                "--hard-dereference"
            )
        return _open_part(self._shards[self._numbers[index]], offset, size)


def open_shards(
    paths: Sequence[Path],
    channels: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
) -> TarSource:
    """Open tar shards in the layout of WebDataset.

    The images are in the order of `paths` and, of a shard, of the file. Which members are images,
    and what the patterns mean, is as in `list_images`; hidden members are left out.

    Args:
        paths: the shards, one at least.
        channels: C.
        include: patterns of the members to take; none: all.
        exclude: patterns of the members to leave out.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        ValueError: a shard cannot be read, is compressed or no tar file, is damaged or cut, or
            holds sparse members, two members of one name, or one whose name leads out of the
            folder that the shard would be unpacked to; or there is no image.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        indices = list(pool.map(_index_shard, paths))
    keys = PathList.of(key for index in indices for key in index.keys)
    extensions = image_extensions(channels, include)
    where = display_name(paths[0])
    if len(paths) > 1:
        where += f" and {len(paths) - 1} more shards" if len(paths) > 2 else " and another shard"
    others = f"; of other images there are {len(keys)}" if len(keys) else ""
    no_images = f"no images in {where}: looked for {', '.join(extensions)}{others}"
    chosen = choose_images(keys, extensions, include, exclude, where, no_images)
    logger.info("%d images in %d shards", len(chosen), len(paths))
    every = TarSource(
        [index.shard for index in indices],
        keys,
        np.repeat(np.arange(len(paths), dtype=np.int32), [len(index.keys) for index in indices]),
        np.concatenate([index.spans for index in indices]),
        np.concatenate([index.labels for index in indices]),
        channels,
        max_pixels,
    )
    return every if len(chosen) == len(keys) else every.subset(chosen)


# --- reading a part of a shard


class Shard(NamedTuple):
    """A tar file as it was when it was indexed."""

    path: Path
    length: int  # bytes
    modified: int  # st_mtime_ns


class _Part(io.RawIOBase):
    """A part of an open file as a stream; closes the file with itself."""

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
            raise OSError(f"a position of {start + offset}")
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
    """Return a stream of `size` bytes of a shard from `offset` on.

    Raises:
        OSError: the shard cannot be opened.
        ValueError: it has changed.
    """
    file = io.FileIO(shard.path)
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != shard[1:]:
        file.close()
        raise ValueError("the shard has changed since it was listed: start the command again")
    return io.BufferedReader(_Part(file, offset, size), max(1, min(size, _BUFFER)))


# --- where the images of a shard are


class _Index(NamedTuple):
    """The images of a shard in the order of the file, `.npy` arrays among them.

    Attributes:
        shard: the file.
        keys: the members' names, without `./` or `/` before them.
        spans: as in `TarSource`.
        labels: as in `TarSource`.
    """

    shard: Shard
    keys: list[str]
    spans: NDArray[np.int64]
    labels: NDArray[np.int64]


def _index_shard(path: Path) -> _Index:
    """Read the headers of a shard; errors are those of `open_shards`."""
    keys: list[str] = []
    spans: list[tuple[int, int]] = []
    labels: dict[str, tuple[int, int]] = {}  # by the sample's name
    headers: dict[str, int] = {}
    try:
        with _HeaderFile(path) as file:
            status = os.fstat(file.fileno())
            for member in _members(file, status.st_size, path):
                if member.issparse() or "GNU.sparse.major" in member.pax_headers:
                    raise ValueError(
                        f"{display_name(path)}/{display_name(member.name)}: stored with holes; "
                        "pack it without tar's --sparse"
                    )
                key = _key(member, path)
                extension = os.path.splitext(key)[1].lower()
                if member.isdir() or not (extension in _IMAGES or extension == LABEL):
                    continue
                if any(map(is_hidden, key.split("/"))):
                    continue
                if key in headers:
                    raise ValueError(
                        f"{display_name(path)}: two members are named {display_name(key)} (at "
                        f"bytes {headers[key]:,} and {member.offset:,}), of which one would "
                        "replace the other; pack it again"
                    )
                headers[key] = member.offset
                span = (member.offset_data, member.size) if member.isreg() else _NOWHERE
                if extension in _IMAGES:
                    keys.append(key)
                    spans.append(span)
                else:
                    labels[_sample(key)] = span
    except OSError as error:
        raise ValueError(
            f"{display_name(path)}: cannot be read ({error.strerror}); give shards that can"
        ) from error
    found = [labels.get(_sample(key), _NOWHERE) for key in keys]
    return _Index(
        Shard(path, status.st_size, status.st_mtime_ns),
        keys,
        np.array(spans, np.int64).reshape(-1, 2),
        np.array(found, np.int64).reshape(-1, 2),
    )


def _key(member: tarfile.TarInfo, shard: Path) -> str:
    """Return a member's name as a relative path, as tar unpacks it."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in member.name:
        raise ValueError(
            f"{display_name(shard)}: the name of its member {ascii(member.name)} leads out of the "
            "folder that it would be unpacked to; pack it again"
        )
    return "/".join(parts)


def _sample(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


class _HeaderFile(io.FileIO):
    """A tar file for `tarfile` to read headers of, which may lie about their length."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"an extended header of {size} bytes")
        return super().read(size)


def _members(file: _HeaderFile, length: int, shard: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file, or of several one after the other, as `cat` joins them.

    Unlike `tarfile` alone, this ends with an error where the file is damaged or cut.
    """
    start = 0  # of one of the tar files
    while start < length or not start:
        header = start
        file.seek(start)
        try:
            archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                header = member.offset
                if member.size < 0 or archive.offset > length:
                    raise tarfile.ReadError(f"a member of {member.size} bytes, beyond the end")
                yield member
                header = archive.offset
            file.seek(header := archive.offset)
            end = file.read(tarfile.BLOCKSIZE)
            if len(end) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it does not end as tar files do: it was cut")
            if any(end):
                raise tarfile.ReadError("no header of a member")
            start = _skip_zeros(file, header)
        except OSError:
            raise
        except Exception as error:  # of damaged headers tarfile raises nearly every type
            if not header:
                _check_uncompressed(file, shard)
            raise ValueError(
                f"{display_name(shard)}: no tar file, or damaged at byte {header:,} ({error}); "
                "copy or pack it again, or leave it out"
            ) from error


def _skip_zeros(file: _HeaderFile, offset: int) -> int:
    """Return where the first block is that holds anything, or the file's end."""
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
                f"{display_name(shard)}: compressed by {name}, where images can be read one after "
                "the other only; decompress it (images are compressed already)"
            )
