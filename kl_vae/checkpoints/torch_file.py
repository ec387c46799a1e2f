"""Read files of torch.save with `weights_only=True`: nothing in them is executed.

Checkpoints of trainers hold instances of other packages' classes beside the weights. Those of
well-known packages become inert `StandIn`s; the classes themselves are never imported, and a file
that names anything else is refused.
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

# of what torch itself allows, what dense tensors and plain values need; not bytearray (which takes
# any length), nor sparse, quantised and meta tensors
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
# torch fills no other types than these with items
_DICTS = re.compile(r".*(\.defaultdict|Dict|DictConfig|CfgNode)")
_LISTS = re.compile(r"collections\.deque|.*List")
_OF_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocol 2 writes them
_OF_PYTHON_2 |= {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}
_OF_PYTHON_2 |= {"builtins.xrange": "builtins.range"}

_ZIP = b"PK\x03\x04"
_PICKLE_BYTES = 64 * 2**20  # and of any entry that is no tensor; SDXL's pickle takes 1 MB
_OPCODES = 1_000_000  # of a file; a tensor takes some 50, and an opcode up to 230 bytes of memory
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages that follow

_LOCK = threading.Lock()  # torch's list of safe globals belongs to the whole process


class StandIn:
    """An inert instance in place of another package's: takes anything, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_torch_file(path: Path, *, mmap: bool = False) -> Any:
    """Load a file of torch.save, zip or legacy, with `weights_only=True`, on the CPU.

    Instances of well-known packages' classes come as `StandIn`s or, where they are dicts or lists,
    as OrderedDicts and lists.

    Args:
        path: of the file.
        mmap: map a zip file's tensors, to be read when they are used; not one that may be
            overwritten meanwhile. Legacy files are read plainly.

    Raises:
        ValueError: no such file, not a file of torch.save, damaged, or one that holds more than
            tensors and plain values (which is never unpickled).
    """
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}; give an existing file or run directory")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on its own old formats
            return _load(path, file, mmap)
    except RefusedError as error:
        raise ValueError(f"{path}: {error}") from None
    except UnpicklingError as error:
        raise ValueError(
            f"{path}: not a checkpoint of tensors and plain values ({one_line(error)}); nothing in "
            "it was executed; export its state_dict alone with torch.save"
        ) from None
    except Exception as error:  # on damaged bytes torch fails in any way, IndexError too
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({one_line(error)}); is the file whole? "
            "Copy or download it again"
        ) from None


def check_within_file(tensors: Mapping[str, Tensor], size: int, source: str) -> None:
    """Check that tensors are dense ones on the CPU that a file of `size` bytes can hold.

    Raises:
        ValueError: they are not; it names `source` and the tensor.
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
                f"{source}: {one_line(name)} {list(x.shape)} repeats values (its {count} bytes "
                f"are views of {held}); save its clone"
            )
        total += count
    if total > size:
        raise ValueError(
            f"{source}: unpacks to more than it holds (its tensors take {total} bytes, the file "
            f"has {size}); save clones of its tensors"
        )


def one_line(error: object) -> str:
    """Return the first line of an error's text, or its type, without control characters."""
    text = "" if isinstance(error, LookupError) else str(error)  # "134", or "pop from empty list"
    text = text.split("WeightsUnpickler error:")[-1].strip()  # before it is torch's advice
    line = text.splitlines()[0] if text else type(error).__name__
    line = "".join(x if x.isprintable() else "?" for x in line[:301])
    return line if len(line) <= 300 else f"{line[:300]}..."


class RefusedError(ValueError):
    """Why a file is not loaded, in words for its user; without its path."""


def _load(path: Path, file: BinaryIO, mmap: bool) -> Any:
    size = os.fstat(file.fileno()).st_size
    is_zip = file.read(len(_ZIP)) == _ZIP
    names = _check_zip(file, size) if is_zip else _check_legacy(file)
    file.seek(0)
    # torch maps by path alone, and takes a path with safetensors' suffix for a file of theirs
    mapped = is_zip and path.suffix != ".safetensors"
    with _standing_in(name for name in names if _STAND_INS.fullmatch(name)):
        content = torch.load(
            # mapped even if it is to be copied: torch 2.6 otherwise reads beyond a storage's end
            path if mapped else file,
            map_location="cpu",
            weights_only=True,
            mmap=mapped,
        )
    _clean(content, copy=mapped and not mmap)
    return content


def _clean(content: object, copy: bool) -> None:
    """Remove loaded attributes that hide methods, and on request copy mapped tensors to memory."""
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
def _standing_in(names: Iterable[str]) -> Iterator[None]:
    """Let torch.load make a stand-in for each dotted name, within this block only.

    Only a class that this process has itself declared safe may be used in its place.
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


# --- checks before anything is loaded


def _check_zip(file: BinaryIO, size: int) -> set[str]:
    """Check a zip file's directory and its pickle, and return the names in that."""
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
    return _check_pickle(BytesIO(_content(file, records["data.pkl"])))


def _content(file: BinaryIO, entry: zipfile.ZipInfo) -> bytes:
    """Read a stored entry as torch does: without its CRC, which torch.save may leave out."""
    file.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<2H", file.read(4))
    file.seek(name + extra, os.SEEK_CUR)
    return file.read(entry.file_size)


def _check_legacy(file: BinaryIO) -> set[str]:
    """Check the pickles with which a legacy file begins, and return the names in them."""
    file.seek(0)
    head = file.read(_PICKLE_BYTES)
    if not head.startswith(b"\x80"):
        raise ValueError("neither a zip file nor a pickle")
    pickles = BytesIO(head)
    return set().union(*(_check_pickle(pickles) for _ in range(_LEGACY_PICKLES)))


def _check_pickle(stream: BinaryIO) -> set[str]:
    """Check one pickle without unpickling it, and return the names of the globals in it.

    Raises:
        UnpicklingError: it names a global that is not allowed, or takes too much to load.
        Exception: of any other kind, where it is damaged.
    """
    names: set[str] = set()
    texts: set[str] = set()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.proto > 2:  # of another protocol than torch.save's
            raise UnpicklingError(f"pickle opcode {opcode.name}")
        if count > _OPCODES:
            raise UnpicklingError(f"more than {_OPCODES} opcodes")
        if opcode.name == "GLOBAL":
            names.add(_name(str(argument)))
        elif isinstance(argument, str):
            texts.add(argument)
    if "_codecs.encode" in names and any(map(_is_binary_codec, texts)):
        raise UnpicklingError("_codecs.encode to other than text")  # hex of hex doubles a string
    return names


def _name(argument: str) -> str:
    """Return the dotted name of a GLOBAL, if it is allowed."""
    module, _, attribute = argument.partition(" ")
    name = f"{_OF_PYTHON_2.get(module, module)}.{attribute}"
    name = _OF_PYTHON_2.get(name, name)
    is_dtype = module == "torch" and isinstance(vars(torch).get(attribute), torch.dtype)
    if is_dtype or any(known.fullmatch(name) for known in (_PLAIN, _STORAGE, _STAND_INS)):
        return name
    raise UnpicklingError(f"it names {name}")


def _is_binary_codec(text: str) -> bool:
    name = normalize_encoding(text[:32].lower())
    return aliases.aliases.get(name, name).endswith("_codec")


def _more_than_it_holds(how: str) -> str:
    return f"unpacks to more than it holds ({one_line(how)}); torch.save does not write such files"
