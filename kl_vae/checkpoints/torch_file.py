"""Safe loading of torch.save files with `weights_only=True`; no code in them is executed.

Checkpoints of trainers contain instances of other packages' classes in addition to the weights.
Instances of classes of well-known packages are replaced by inert `StandIn` objects, without
importing the classes. A file that refers to any other class or function is rejected.
"""

from __future__ import annotations

import os
import pickletools
import re
import struct
import threading
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from encodings import aliases, normalize_encoding
from io import BytesIO
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kl_vae.runtime.files import utf8_name

# the globals allowed by torch that dense tensors and plain values need; without bytearray (of any
# length) and without sparse, quantised and meta tensors
_PLAIN = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.(set|complex)|_codecs\.encode"
    r"|torch\.(Size|device|nn\.parameter\.Parameter)"
    r"|torch\._utils\._rebuild_(tensor(_v[23])?|parameter(_with_state)?)"
)
_STORAGE = re.compile(
    r"torch\.(cuda\.|storage\.)?"
    r"(Untyped|Bool|Byte|Char|Short|Int|Long|Half|BFloat16|Float|Double|Complex(Float|Double))Storage"
)
_STAND_INS = re.compile(
    r"(pytorch_lightning|lightning(_fabric|_utilities)?|torchmetrics|omegaconf|ldm|sgm|taming|fsspec"
    r"|easydict|ml_collections|yacs|argparse|pathlib|typing|enum|datetime"
    r"|diffusers\.configuration_utils|numpy\.dtypes)\.[\w.]+"
    r"|numpy\.(core|_core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)"
    r"|numpy\.(dtype|ndarray|bool_?|(u?int|float|complex)\d+)"
    r"|builtins\.(list|dict|tuple|frozenset|int|float|bool|str|bytes|object|slice|range)"
    r"|collections\.(defaultdict|deque)|copyreg\._reconstructor|functools\.partial"
    r"|types\.SimpleNamespace"
)
# torch adds items only to dicts and lists
_DICTS = re.compile(r".*(\.defaultdict|Dict|DictConfig|CfgNode)")
_LISTS = re.compile(r"collections\.deque|.*List")
_PYTHON_2_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # names that protocol 2 writes
_PYTHON_2_NAMES |= {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}
_PYTHON_2_NAMES |= {"builtins.xrange": "builtins.range"}

_ZIP = b"PK\x03\x04"
_PICKLE_BYTES = 64 * 2**20  # maximum size of an entry other than a tensor; SDXL's pickle has 1 MB
_OPCODES = 1_000_000  # maximum per pickle; about 50 per tensor, each up to 230 bytes of memory
_LEGACY_PICKLES = 5  # magic number, protocol, system information, content, storage keys

_LOCK = threading.Lock()  # torch's list of safe globals is global to the process


class StandIn:
    """An inert replacement for an instance of another package's class; ignores its arguments."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_torch_file(path: Path, *, mmap: bool = False) -> Any:
    """Load a torch.save file, in the zip or legacy format, with `weights_only=True` to the CPU.

    Instances of classes of well-known packages are replaced by `StandIn` objects. Subclasses of
    dict and list are replaced by OrderedDict and list.

    Args:
        path: the file.
        mmap: memory-map the tensors of a zip file, which must not be overwritten while they are in
            use; ignored for legacy files.

    Raises:
        ValueError: The file does not exist, is not a torch.save file, is damaged, or contains more
            than tensors and plain values; in the last case nothing is unpickled.
    """
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}; give an existing file or run directory")
    check_is_weights(path)
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about old formats
            return _load(path, file, mmap)
    except RefusedError as error:
        raise ValueError(f"{path}: {error}") from None
    except UnpicklingError as error:
        raise ValueError(
            f"{path}: not a checkpoint of tensors and plain values ({one_line(error)}); no code in "
            "it was executed; save only its state_dict with torch.save"
        ) from None
    except Exception as error:  # torch raises many different types for damaged files
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({one_line(error)}); it may be incomplete; "
            "copy or download it again"
        ) from None


def check_is_weights(path: Path) -> None:
    """Check that a file is not of a kind that is often in the place of weights.

    Raises:
        ValueError: It is empty, a Git LFS pointer, a web page, text or an image; the message names
            the kind.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return  # reading the weights will raise the error
    if start[8:9] == b"{":
        return  # safetensors, whose length may begin as an image does
    kinds = {
        "an empty file; download it again": not start,
        "a Git LFS pointer, not the weights; download them with `git lfs pull`": start.startswith(
            b"version https://git-lfs"
        ),
        "a web page, not weights; log in if it needs an account, and download the file itself": (
            re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|\?xml|!--)", start, re.I)
        ),
        "an image, not weights; give images with --images": _IMAGE.match(start),
        f"text ({one_line(ascii(start[:40].decode(errors='replace')))}), not weights; download "
        "the file itself": _is_text(start),
    }
    kind = next((words for words, is_kind in kinds.items() if is_kind), None)
    if kind is not None:
        raise ValueError(f"{path}: {kind}")


# PNG, JPEG, GIF, BMP, TIFF, WebP, JPEG XL, AVIF and HEIC
_IMAGE = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|BM.{4}\0{4}|II\*\0|MM\0\*|RIFF.{4}WEBP|\xff\x0a"
    rb"|\0\0\0\x0cJXL |.{4}ftyp(avif|avis|heic|heix|mif1)",
    re.S,
)


def _is_text(start: bytes) -> bool:
    printable = bytes(range(32, 127)) + b"\t\r\n"
    return not start.translate(None, printable)


def check_within_file(tensors: Mapping[str, Tensor], size: int, source: str) -> None:
    """Check that tensors are dense, on the CPU, and not larger than their file.

    Args:
        tensors: the tensors of the file, by name.
        size: size of the file in bytes.
        source: name of the file in error messages.

    Raises:
        ValueError: A tensor is not dense or not on the CPU, or the tensors take more memory than
            their storages or the file.
    """
    total = 0
    for name, x in tensors.items():
        kind = _other_kind(x)
        if kind is not None:
            raise ValueError(
                f"{source}: {one_line(name)} is {kind}, not a dense tensor on the CPU; convert it "
                "before torch.save"
            )
        count, held = prod(x.shape) * x.element_size(), x.untyped_storage().nbytes()
        if count > held:
            raise ValueError(
                f"{source}: {one_line(name)} {list(x.shape)} repeats values ({count} bytes in a "
                f"storage of {held} bytes); save a clone of it"
            )
        total += count
    if total > size:
        raise ValueError(
            f"{source}: unpacks to more than its size (its tensors take {total} bytes, the file "
            f"has {size}); save clones of its tensors"
        )


def one_line(error: object) -> str:
    """Return the first line of an error message, or the type, printable, up to 300 characters."""
    # the message of a LookupError is not helpful: "134", or "pop from empty list"
    text = "" if isinstance(error, LookupError) else str(error)
    text = text.split("WeightsUnpickler error:")[-1].strip()  # removes torch's general advice
    line = text.splitlines()[0] if text else type(error).__name__
    line = "".join(x if x.isprintable() else "?" for x in line[:301])
    return line if len(line) <= 300 else f"{line[:300]}..."


class RefusedError(ValueError):
    """Error for a rejected file; the message is for the user and does not contain the path."""


def _load(path: Path, file: BinaryIO, mmap: bool) -> Any:
    size = os.fstat(file.fileno()).st_size
    is_zip = file.read(len(_ZIP)) == _ZIP
    names = _check_zip(file, size) if is_zip else _check_legacy(file)
    file.seek(0)
    # torch maps files only by path, and reads a path that ends in .safetensors as safetensors
    mapped = is_zip and path.suffix != ".safetensors"
    stand_ins = (name for name in names if _STAND_INS.fullmatch(name))
    with _allow_stand_ins(stand_ins), utf8_name(path) as name:
        content = torch.load(
            # mapped even if the tensors are copied: otherwise torch 2.6 may read beyond the end of
            # a storage
            name if mapped else file,
            map_location="cpu",
            weights_only=True,
            mmap=mapped,
        )
    _clean(content, copy=mapped and not mmap)
    return content


def _clean(content: object, copy: bool) -> None:
    """Remove loaded attributes that shadow methods; if `copy`, copy mapped tensors to memory."""
    copies: dict[int, torch.UntypedStorage] = {}  # by address
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, (OrderedDict, Counter, Tensor)):
            for name in [name for name in vars(x) if hasattr(type(x), name)]:
                del vars(x)[name]
        if copy and isinstance(x, Tensor):
            storage = x.untyped_storage()
            if storage.data_ptr() not in copies:
                copies[storage.data_ptr()] = storage.clone()  # type: ignore[no-untyped-call]
            own = torch.empty(0, dtype=x.dtype)
            own.set_(copies[storage.data_ptr()], x.storage_offset(), x.shape, x.stride())
            x.data = own
        if isinstance(x, dict):
            waiting.extend(dict.values(x))
        elif isinstance(x, (list, tuple, set)):
            waiting.extend(x)


@contextmanager
def _allow_stand_ins(names: Iterable[str]) -> Iterator[None]:
    """Context manager in which torch.load creates a `StandIn` for each dotted name.

    A class that this process has registered as a safe global takes precedence.
    """
    stand_ins: list[Any] = [(_stand_in(name), name) for name in names]
    with _LOCK, torch.serialization.safe_globals(stand_ins):
        yield


def _stand_in(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    body: dict[str, Any] = {"__module__": module}
    for pattern, kind in ((_DICTS, OrderedDict), (_LISTS, list)):
        if pattern.fullmatch(name):
            body["__new__"] = lambda cls, *args, kind=kind, **kwargs: kind()
    return type(attribute, (StandIn,), body)


def _other_kind(x: Tensor) -> str | None:
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"a {type(x).__name__}"
    if x.layout != torch.strided:
        return f"{x.layout}"
    if x.is_quantized or x.is_nested:
        return "quantised" if x.is_quantized else "nested"
    return None if x.device.type == "cpu" else f"on {x.device}"


# --- checks before loading


def _check_zip(file: BinaryIO, size: int) -> set[str]:
    """Check the directory and the pickle of a zip file, and return the globals in the pickle."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    folder = entries[0].orig_filename.split("/")[0] if entries else ""
    records = {entry.orig_filename.removeprefix(f"{folder}/"): entry for entry in entries}
    if "constants.pkl" in records:
        raise RefusedError("a TorchScript archive; save its state_dict with torch.save")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise RefusedError(_unpacks_to_more(f"{entry.orig_filename} is compressed"))
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise RefusedError(_unpacks_to_more(f"its entries take {total} bytes, the file has {size}"))
    if len({entry.orig_filename.lower() for entry in entries}) < len(entries):
        raise ValueError("a zip file with two entries of the same name")
    if "data.pkl" not in records:
        raise ValueError("a zip file without data.pkl")
    for name, entry in records.items():
        if entry.file_size > _PICKLE_BYTES and not name.startswith("data/"):
            raise RefusedError(
                f"its entry {one_line(name)} takes {entry.file_size} bytes, more than "
                f"{_PICKLE_BYTES}; save only a dict of tensors with torch.save"
            )
    return _check_pickle(BytesIO(_content(file, records["data.pkl"])))


def _content(file: BinaryIO, entry: zipfile.ZipInfo) -> bytes:
    """Read a stored entry without checking its CRC, which torch.save may omit."""
    file.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<2H", file.read(4))
    file.seek(name + extra, os.SEEK_CUR)
    return file.read(entry.file_size)


def _check_legacy(file: BinaryIO) -> set[str]:
    """Check the pickles at the start of a legacy file, and return the globals in them."""
    file.seek(0)
    head = file.read(_PICKLE_BYTES)
    if not head.startswith(b"\x80"):
        raise ValueError("neither a zip file nor a pickle")
    pickles = BytesIO(head)
    return set().union(*(_check_pickle(pickles) for _ in range(_LEGACY_PICKLES)))


def _check_pickle(stream: BinaryIO) -> set[str]:
    """Check one pickle without unpickling it, and return the dotted names of its globals.

    Raises:
        UnpicklingError: The pickle contains a global that is not allowed, or is too large.
        Exception: The pickle is damaged; any type is possible.
    """
    names: set[str] = set()
    texts: set[str] = set()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.proto > 2:  # torch.save uses protocol 2
            raise UnpicklingError(f"pickle opcode {opcode.name}")
        if count > _OPCODES:
            raise UnpicklingError(f"more than {_OPCODES} opcodes")
        if opcode.name == "GLOBAL":
            names.add(_name(str(argument)))
        elif isinstance(argument, str):
            texts.add(argument)
    if "_codecs.encode" in names and any(map(_is_binary_codec, texts)):
        raise UnpicklingError("_codecs.encode with a binary codec")  # each hex doubles the size
    return names


def _name(argument: str) -> str:
    """Return the dotted name of a GLOBAL opcode.

    Raises:
        UnpicklingError: The name is not allowed.
    """
    module, _, attribute = argument.partition(" ")
    name = f"{_PYTHON_2_NAMES.get(module, module)}.{attribute}"
    name = _PYTHON_2_NAMES.get(name, name)
    is_dtype = module == "torch" and isinstance(vars(torch).get(attribute), torch.dtype)
    if is_dtype or any(known.fullmatch(name) for known in (_PLAIN, _STORAGE, _STAND_INS)):
        return name
    raise UnpicklingError(f"it refers to {name}")


def _is_binary_codec(text: str) -> bool:
    name = normalize_encoding(text[:32].lower())
    return aliases.aliases.get(name, name).endswith("_codec")


def _unpacks_to_more(reason: str) -> str:
    return (
        f"unpacks to more than its size ({one_line(reason)}); torch.save does not write such "
        "files: save its tensors again"
    )
