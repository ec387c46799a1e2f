"""Read, check and write safetensors files."""

import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save, save_file

from kl_vae.checkpoints.safetensors_file import is_safetensors, read_safetensors, safetensors_bytes
from tests.hostile_files import ERRORS, MARKER, write_hostile_files
from tests.messages import mentions

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
REFUSED = [name for name in ERRORS if name.endswith(".safetensors")]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_hostile_files(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


# --- reading


def test_only_chosen_tensors_are_read(path: Path) -> None:
    seen: list[str] = []

    def choose(keys: list[str]) -> list[str]:
        seen.extend(keys)
        return ["b"]

    content = read_safetensors(path, choose)
    assert sorted(seen) == ["a", "b"] and content.tensors.keys() == {"b"}
    assert torch.equal(content.tensors["b"], TENSORS["b"]) and content.metadata == {"format": "pt"}


def test_tensors_remain_when_the_file_is_removed(path: Path) -> None:
    tensors = read_safetensors(path, lambda keys: keys).tensors
    path.unlink()
    for key, x in TENSORS.items():
        assert torch.equal(tensors[key], x) and tensors[key].dtype == x.dtype
    tensors["a"].zero_()


def test_a_file_without_metadata_or_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    assert read_safetensors(tmp_path / "none.safetensors", lambda keys: keys) == ({}, {})


def test_errors_of_the_callback_are_raised(path: Path) -> None:
    def choose(keys: list[str]) -> list[str]:
        raise ValueError("none of these")

    with pytest.raises(ValueError, match="^none of these$"):
        read_safetensors(path, choose)
    with pytest.raises(ValueError, match=mentions(path, " safetensors")):
        read_safetensors(path, lambda keys: ["c"])


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_files_are_refused(hostile: dict[str, Path], name: str) -> None:
    path = hostile[name]
    assert is_safetensors(path)
    with pytest.raises(ValueError, match=ERRORS[name]) as error:
        read_safetensors(path, lambda keys: keys)
    assert str(path) in str(error.value) and str(error.value).isprintable()
    assert not hostile[MARKER].exists()


@pytest.mark.parametrize("kept", [0, 7, 8, 9, 50, 100, -1])
def test_a_truncated_file_is_an_error(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=mentions(path, " safetensors" if kept else "empty")):
        read_safetensors(path, lambda keys: keys)


def test_an_unknown_dtype_is_an_error(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(3))
    with pytest.raises(ValueError, match=mentions(path, " safetensors")):
        read_safetensors(path, lambda keys: keys)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read any file")
def test_a_file_without_permission_is_an_error(path: Path) -> None:
    path.chmod(0)
    assert is_safetensors(path)
    with pytest.raises(ValueError, match=mentions(path, " safetensors", "Permission denied")):
        read_safetensors(path, lambda keys: keys)


@pytest.mark.parametrize("text", ["", 'é\n"quoted" \x01 \x7f', '{"a": 1}'])
def test_metadata_is_written_as_safetensors_does_but_in_its_order(text: str) -> None:
    assert safetensors_bytes(TENSORS, {"text": text}) == save(TENSORS, {"text": text})
    metadata = {"z": text, **{str(i): text for i in range(20)}, "a": "x"}
    content = safetensors_bytes(TENSORS, metadata)
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert list(json.loads(content[8 : 8 + length])["__metadata__"].items()) == list(
        metadata.items()
    )
    loaded = load(content)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[key], x) for key, x in TENSORS.items())


def test_without_safetensors_the_error_names_the_extra(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    install = 'pip install "kl-vae[formats]"'
    with pytest.raises(ValueError, match=mentions(path, install)):
        read_safetensors(path, lambda keys: keys)
    with pytest.raises(ValueError, match=mentions("safetensors", install)):
        safetensors_bytes(TENSORS, {})


# --- detection


def test_safetensors_are_detected_by_content(path: Path) -> None:
    for name in ("model.ckpt", "model.pt", "model"):
        assert is_safetensors(path.rename(path.with_name(name)))
        path.with_name(name).rename(path)
    long = path.with_name("long")
    for length in (0x80, 0x4B50):  # begins like a pickle, or a zip file
        long.write_bytes(struct.pack("<Q", length) + b"{}".ljust(length))
        assert is_safetensors(long)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02}.", b"PK\x03\x04", bytes(100)])
def test_unknown_content_is_detected_by_name(tmp_path: Path, content: bytes) -> None:
    for name, meant in (("a.safetensors", True), ("a.SafeTensors", True), ("a.ckpt", False)):
        (tmp_path / name).write_bytes(content)
        named = meant and not content.startswith((b"PK", b"\x80"))
        assert is_safetensors(tmp_path / name) == named


def test_files_of_torch_save_are_not_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for new in (False, True):
        torch.save(TENSORS, path, _use_new_zipfile_serialization=new)
        assert not is_safetensors(path)


# --- writing


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(TENSORS, {"kl_vae": "{}"}))
    content = read_safetensors(path, lambda keys: keys)
    assert content.metadata == {"kl_vae": "{}"}
    assert all(torch.equal(content.tensors[key], x) for key, x in TENSORS.items())


def test_tensors_that_share_storage_are_written_separately(tmp_path: Path) -> None:
    x = torch.arange(6.0).view(2, 3)
    tensors = {
        "whole": x,
        "again": x,
        "transposed": x.t(),
        "part": x[0],
        "expanded": x[:1, :1].expand(2, 2),
        "parameter": torch.nn.Parameter(x),
        "nothing": x[:0],
        "none": torch.empty(0),
        "no": torch.empty(0),
    }
    before = x.clone()
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(tensors, {}))
    written = read_safetensors(path, lambda keys: keys).tensors
    assert written.keys() == tensors.keys() and torch.equal(x, before)
    for key, value in tensors.items():
        assert torch.equal(written[key], value)
