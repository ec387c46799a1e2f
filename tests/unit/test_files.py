"""Files are written whole or not at all."""

from pathlib import Path
from typing import BinaryIO

import pytest

from kl_vae.files import write_atomically, write_text_atomically


def test_a_failed_write_leaves_what_was_there_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text_atomically(path, "before")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    write_atomically(path, lambda file: file.write(b"after"), durable=durable)
    assert path.read_bytes() == b"after"
