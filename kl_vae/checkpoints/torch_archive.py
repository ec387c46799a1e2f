"""The two kinds of files that torch.save writes, checked before anything of them is loaded."""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
from io import BytesIO
from typing import BinaryIO

from kl_vae.checkpoints.pickle_check import PickleCheck

_ZIP = b"PK\x03\x04"
_DIRECTORY_BYTES = 8 * 2**20  # of a zip file; an entry takes some 100
_PICKLE_BYTES = 64 * 2**20  # and of any entry that is no tensor; SDXL's pickle takes 1 MB
_TAR_HEADER_BYTES = 512
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages that follow


class RefusedError(ValueError):
    """What to tell of a file, but for its path."""


def check_archive(file: BinaryIO, check: PickleCheck) -> bool:
    """Check a file's parts and its pickles; return whether it is a zip file, not a legacy one.

    Raises:
        RefusedError: it is not to be loaded.
        UnpicklingError: of its pickles.
        Exception: of any other kind, where it is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    is_zip = file.read(len(_ZIP)) == _ZIP
    if is_zip:
        _check_zip(file, size, check)
    else:
        _check_legacy(file, size, check)
    return is_zip


def one_line(error: object) -> str:
    """Return the first line of an error's text, or its type, without what a terminal acts on."""
    text = "" if isinstance(error, LookupError) else str(error)  # "134", or "pop from empty list"
    text = text.split("WeightsUnpickler error:")[-1].strip()  # before it is torch's advice
    line = text.splitlines()[0] if text else type(error).__name__
    line = "".join(x if x.isprintable() else "?" for x in line[:301])
    return line if len(line) <= 300 else f"{line[:300]}..."


def _check_zip(file: BinaryIO, size: int, check: PickleCheck) -> None:
    """Check a zip file's directory, then its pickle, then that its storages are there."""
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    folder = entries[0].orig_filename.split("/")[0] if entries else ""
    records = {entry.orig_filename.removeprefix(f"{folder}/"): entry for entry in entries}
    if "constants.pkl" in records:
        raise RefusedError("a TorchScript archive; save its state_dict with torch.save")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise RefusedError(_more_than_it_holds(f"{entry.orig_filename} is compressed"))
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise RefusedError(_more_than_it_holds(f"its entries take {total} bytes of {size}"))
    if len({entry.orig_filename.lower() for entry in entries}) < len(entries):
        raise ValueError("a zip file with two entries of one name")
    if "data.pkl" not in records:
        raise ValueError("a zip file without data.pkl")
    for name, entry in records.items():
        if entry.file_size > _PICKLE_BYTES and not name.startswith("data/"):
            raise RefusedError(
                f"{one_line(name)} in it takes {entry.file_size} bytes, more than {_PICKLE_BYTES}; "
                "save the tensors alone, in a dict, with torch.save"
            )
    check.follow(BytesIO(_content(file, records["data.pkl"])))
    for key, asked in check.storages.items():
        held = records[f"data/{key}"].file_size if f"data/{key}" in records else 0
        if asked > held:
            raise ValueError(f"storage {key} takes {asked} bytes, the file holds {held} of it")


def _check_directory(file: BinaryIO, size: int) -> None:
    """Check that a zip file ends in its directory, which then is the only one to be found."""
    file.seek(max(size - 98, 0))
    tail = file.read().rjust(98, b"\0")
    record, locator, last = tail[:56], tail[56:76], tail[76:]
    signature, length, start, comment = struct.unpack("<4s8x2LH", last)
    end = size - 22
    if locator[:4] == b"PK\x06\x07":  # zip64
        end = size - 98
        signature64, length, start = struct.unpack("<4s36x2Q", record)
        if signature64 != b"PK\x06\x06" or struct.unpack("<8xQ4x", locator) != (end,):
            raise ValueError("a zip file with a damaged directory")
    if signature != b"PK\x05\x06" or comment != 0 or start + length != end:
        raise ValueError("a zip file that does not end in its directory")
    if length > _DIRECTORY_BYTES:
        raise ValueError(f"a zip file with a directory of {length} bytes, over {_DIRECTORY_BYTES}")


def _content(file: BinaryIO, entry: zipfile.ZipInfo) -> bytes:
    """Read a stored entry as torch does: its CRC need not be there."""
    file.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<2H", file.read(4))
    file.seek(name + extra, os.SEEK_CUR)
    return file.read(entry.file_size)


def _check_legacy(file: BinaryIO, size: int, check: PickleCheck) -> None:
    """Check the pickles with which a legacy file begins, and that its storages fit into it."""
    file.seek(0)
    head = file.read(_PICKLE_BYTES)
    if not head.startswith(b"\x80"):
        raise ValueError("neither a zip file nor a pickle")
    try:
        tarfile.TarInfo.frombuf(head[:_TAR_HEADER_BYTES], "ascii", "replace")
    except tarfile.HeaderError:
        pass
    else:
        raise ValueError("a tar file")  # of torch 0.1, which torch would unpack in memory
    pickles = BytesIO(head)
    for _ in range(_LEGACY_PICKLES):
        check.follow(pickles)
    total = sum(check.storages.values())
    if total > size:
        raise ValueError(f"its storages take {total} bytes, the file has {size}")


def _more_than_it_holds(how: str) -> str:
    return f"unpacks to more than it holds ({one_line(how)}); torch.save does not write such files"
