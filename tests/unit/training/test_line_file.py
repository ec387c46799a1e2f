"""Lines that a full disk does not lose."""

from pathlib import Path

import pytest
from kl_vae.training.line_file import LineFile


class FullDisk:
    """A file that takes `room` bytes more, and then none."""

    def __init__(self, file: object, room: int) -> None:
        self._file = file
        self.room = room

    def write(self, text: bytes) -> int:
        taken = min(len(text), self.room)
        if not taken:
            raise OSError(28, "No space left on device")
        self.room -= taken
        return int(self._file.write(text[:taken]))  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def test_lines_wait_for_room_and_none_is_written_in_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lines"
    path.write_text("before\n")
    file = LineFile(path)
    disk = FullDisk(file._file, room=8)
    file._file = disk  # type: ignore[assignment]
    file.append("one")
    for line in ("two and more", "three"):
        file.append(line)
        assert path.read_text() == "before\none\n"
    assert caplog.messages == [
        f"{path} cannot be written (No space left on device); its lines wait for room"
    ]
    disk.room = 100
    file.append("four")
    file.close()
    assert path.read_text() == "before\none\ntwo and more\nthree\nfour\n"
