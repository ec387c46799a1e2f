"""Write a file whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.\d+\.tmp")


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, durable: bool = True
) -> None:
    """Write a file so that `path` holds either the whole of it or what it held before.

    Written beside, then renamed; on failure the temporary is removed.

    Args:
        path: the file; its folder exists.
        write: called with the open file.
        durable: wait until file and rename are on the disk, so that they outlive a power cut.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{os.getpid()}.tmp")  # short: `path` may be as long as names get
    try:
        with open(temporary, "wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the rename itself
        finally:
            os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what `write_atomically` left in a folder where its process was killed.

    To be called where no other process writes into the folder.
    """
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for text, as UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))
