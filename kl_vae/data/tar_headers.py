"""The members of a tar file, by reading their headers alone.

POSIX ustar and pax, GNU and old tar files (POSIX.1-2008, pax: extended header; GNU tar's manual,
"Basic Tar Format"). Unlike tarfile's, this ends with an error where the file is damaged or cut.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kl_vae.runtime.files import display_name

BLOCK = 512  # bytes; a header is one, and contents begin at a multiple of it
MAX_EXTENDED = 2**20  # bytes of an extended header, which holds names
_ZEROS_AT_ONCE = 2**20
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENDS = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_PASSED_OVER = (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)  # of links, and of the whole file
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A member of a tar file; its content is `size` bytes from `offset` on."""

    name: str  # as it is stored
    header: int  # where its header begins, in bytes
    offset: int
    size: int
    regular: bool  # else a link, a folder, or what else there may be
    folder: bool


def read_members(shard: Path) -> Iterator[Member]:
    """Yield the members in their order.

    Several tar files one after the other (`tar --concatenate` or `cat`) are read as one.

    Raises:
        ValueError: it cannot be read, is compressed or no tar file, is damaged or cut, or holds
            sparse members; the text names the file and, of damage, the byte.
    """
    try:
        with open(shard, "rb", buffering=0) as file:
            yield from _members(file.fileno(), os.fstat(file.fileno()).st_size, shard)
    except OSError as error:
        raise ValueError(
            f"{display_name(shard)}: cannot be read ({error.strerror}); give shards that can"
        ) from error


def _members(descriptor: int, length: int, shard: Path) -> Iterator[Member]:
    offset = 0
    ended = False  # by a block of zeros
    extended: dict[str, str] = {}  # of the next member
    while offset < length:
        block = os.pread(descriptor, BLOCK, offset)
        if len(block) < BLOCK:
            break
        if not any(block):
            ended = True
            offset = _skip_zeros(descriptor, offset + BLOCK)
            continue
        ended = False
        header = _parse(block, offset, shard)
        start, size = offset + BLOCK, header.size
        if header.type in _EXTENDS:
            if size > MAX_EXTENDED:
                raise _damaged(shard, offset, f"an extended header of {size} bytes")
            content = os.pread(descriptor, size, start)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = _text(content.split(b"\0", 1)[0])
            else:
                extended |= _parse_records(content, offset, shard)
        elif header.type not in _PASSED_OVER:
            yield (member := _member(header, offset, extended, shard))
            extended = {}
            # links and folders may have a size that stands for nothing
            has_content = member.regular or header.type not in tarfile.SUPPORTED_TYPES
            size = member.size if has_content else 0
        if start + size > length:
            raise _damaged(shard, offset, f"a member's {size} bytes reach beyond the file's end")
        offset = start + -(-size // BLOCK) * BLOCK
    if not ended or extended:
        raise _damaged(shard, min(offset, length), "it does not end as tar files do: it was cut")


def _parse(block: bytes, offset: int, shard: Path) -> tarfile.TarInfo:
    header = None
    with contextlib.suppress(tarfile.HeaderError, ValueError):
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if header is not None and header.size >= 0:
        return header
    if offset:
        raise _damaged(shard, offset, "no header of a member")
    for magic, name in _COMPRESSED.items():
        if block.startswith(magic):
            raise ValueError(
                f"{display_name(shard)}: compressed by {name}, where images can be read one after "
                "the other only; decompress it (images are compressed already)"
            )
    raise ValueError(f"{display_name(shard)}: not a tar file; give shards that are")


def _member(header: tarfile.TarInfo, offset: int, extended: dict[str, str], shard: Path) -> Member:
    sparse = header.type == tarfile.GNUTYPE_SPARSE
    if sparse or any(key.startswith("GNU.sparse.") for key in extended):
        name = display_name(extended.get("GNU.sparse.name", header.name))
        raise ValueError(
            f"{display_name(shard)}/{name}: stored with holes; pack it without tar's --sparse"
        )
    size = header.size
    if "size" in extended:
        digits = extended["size"]
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
            raise _damaged(shard, offset, f"a size of {ascii(digits)}")
        size = int(digits)
    return Member(
        extended.get("path", header.name),
        offset,
        offset + BLOCK,
        size,
        header.type in _REGULAR,
        header.isdir(),
    )


def _parse_records(content: bytes, offset: int, shard: Path) -> dict[str, str]:
    """Parse the `LENGTH KEY=VALUE` lines of a pax header."""
    records = {}
    while content:
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = content[len(digits) + 1 : length - 1]
        key, equals, value = record.partition(b"=")
        if not equals or content[length - 1 : length] != b"\n":
            raise _damaged(shard, offset, "an extended header that cannot be read")
        records[_text(key)] = _text(value)
        content = content[length:]
    return records


def _skip_zeros(descriptor: int, offset: int) -> int:
    """Return where the first block is that holds anything, or the file's end."""
    while content := os.pread(descriptor, _ZEROS_AT_ONCE, offset):
        if any(content):
            zeros = len(content) - len(content.lstrip(b"\0"))
            return offset + zeros // BLOCK * BLOCK
        offset += len(content)
    return offset


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _damaged(shard: Path, offset: int, reason: str) -> ValueError:
    return ValueError(
        f"{display_name(shard)}: damaged at byte {offset:,} ({reason}); copy or pack it again, "
        "or leave it out"
    )
