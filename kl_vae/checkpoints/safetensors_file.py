"""Reading and writing of safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_vae.checkpoints.torch_file import check_is_weights, one_line
from kl_vae.runtime.files import utf8_name

_SUFFIX = ".safetensors"
_INSTALL = 'pip install "kl-vae[formats]"'
_LENGTH_BYTES = 8  # size of the little-endian header length at the start of a file
_HEADER_BYTES = 16 * 2**20  # maximum; SDXL's header has 300 kB, the format allows 100 MB


class SafetensorsContent(NamedTuple):
    """Content of a file; the tensors are memory-mapped."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def is_safetensors(path: Path) -> bool:
    """Return whether a file is a safetensors file, by its content or else by its suffix."""
    start, size = b"", 0
    if path.is_file():
        try:
            with open(path, "rb") as file:
                start, size = file.read(_LENGTH_BYTES + 1), os.fstat(file.fileno()).st_size
        except OSError:
            pass  # reading the file will raise the error
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if start[_LENGTH_BYTES:] == b"{" and length <= size - _LENGTH_BYTES:
        return True
    return path.suffix.lower() == _SUFFIX and not start.startswith((b"PK", b"\x80"))


def read_safetensors(
    path: Path, choose: Callable[[list[str]], Iterable[str]]
) -> SafetensorsContent:
    """Memory-map some tensors of a file.

    Args:
        path: the file.
        choose: returns the keys to read, given all keys of the file.

    Raises:
        ValueError: The file does not exist or is damaged, or safetensors is not installed.
    """
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}; give an existing file or run directory")
    check_is_weights(path)
    try:
        from safetensors import safe_open
    except ImportError:
        raise ValueError(f"{path}: reading safetensors files needs: {_INSTALL}") from None
    with _reading(path), utf8_name(path) as name:
        _check_header(path)
        opened: Any = safe_open(name, framework="pt", device="cpu")
    with opened as file:
        with _reading(path):
            keys, metadata = list(file.keys()), dict(file.metadata() or {})
        chosen = list(choose(keys))
        with _reading(path):
            return SafetensorsContent({key: file.get_tensor(key) for key in chosen}, metadata)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file; the same for the same arguments.

    Raises:
        ValueError: The package safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise ValueError(f"writing safetensors files needs: {_INSTALL}") from None
    storages: set[int] = set()
    own: dict[str, Tensor] = {}
    for key, x in tensors.items():
        x = x.detach().contiguous()
        storage = x.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != x.numel() * x.element_size():
            x = x.clone(
                memory_format=torch.contiguous_format
            )  # safetensors rejects shared storages
        storages.add(storage.data_ptr())
        own[key] = x
    content = memoryview(save(own))
    if not metadata:
        return bytes(content)
    # safetensors would write several entries of the metadata in an arbitrary order
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = {"__metadata__": dict(metadata), **json.loads(bytes(content[_LENGTH_BYTES:end]))}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, content[end:]])


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # types differ by version; a Rust panic is not an Exception
        raise ValueError(
            f"{path}: cannot be read as safetensors ({one_line(error)}); it may be incomplete, "
            "copy or download it again"
        ) from None


def _check_header(path: Path) -> None:
    """Check that the header is small and has unique keys, which safetensors does not check."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise ValueError(f"its header of {length} bytes exceeds the file size of {size}")
        if length > _HEADER_BYTES:
            raise ValueError(f"its header takes {length} bytes, more than {_HEADER_BYTES}")
        header = file.read(length).decode()
    if not isinstance(json.loads(header, object_pairs_hook=_without_doubles), dict):
        raise ValueError("its header is not a JSON object")


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("its header has a duplicate key")
    return dict(pairs)
