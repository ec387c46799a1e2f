"""Read files of torch.save without executing anything in them.

Files are read with `weights_only=True` and in no other way. Checkpoints of trainers hold instances
of other packages' classes beside the weights: those of well-known packages become inert `StandIn`s,
and the classes themselves are never imported. Any other name that a file asks for is refused.
"""

from __future__ import annotations

import pickletools
import re
import struct
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

_ZIP = b"PK\x03\x04"
_PICKLE_BYTES = 64 * 2**20  # of an entry that is not a tensor; SDXL's pickle takes 1 MB
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages that follow
_LOCK = threading.Lock()  # torch's list of safe globals belongs to the whole process

# what torch.save needs for dense tensors, of what torch allows with weights_only
_TENSORS = re.compile(
    r"torch\.(cuda\.|storage\.)?\w+Storage|torch\._utils\._rebuild_(tensor(_v\d)?|parameter\w*)"
    r"|torch\.(Size|device)|torch\.nn\.parameter\.Parameter|_codecs\.encode"
    r"|collections\.(OrderedDict|Counter)|builtins\.(set|complex)"
)
_PACKAGES = (
    "pytorch_lightning lightning lightning_fabric lightning_utilities torchmetrics omegaconf ldm "
    "sgm taming fsspec easydict ml_collections yacs argparse pathlib typing enum datetime "
    "diffusers.configuration_utils numpy.dtypes"
)
_STAND_INS = re.compile(
    rf"({'|'.join(map(re.escape, _PACKAGES.split()))})\.[\w.]+"
    r"|numpy\.(core|_core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)"
    r"|numpy\.(dtype|ndarray|bool_?|(u?int|float|complex)\d+)"
    r"|builtins\.(list|dict|tuple|frozenset|int|float|bool|str|bytes|object|slice|range)"
    r"|collections\.(defaultdict|deque)|copyreg\._reconstructor|functools\.partial"
    r"|types\.SimpleNamespace"
)
# classes whose pickles fill them as a dict or a list, which torch allows for these types alone
_FILLED: dict[str, type] = dict.fromkeys(
    ("dict", "defaultdict", "AttributeDict", "EasyDict", "CfgNode"), OrderedDict
) | dict.fromkeys(("list", "deque"), list)
_OF_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocol 2 writes them
_OF_PYTHON_2 |= {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}
_OF_PYTHON_2 |= {"builtins.xrange": "builtins.range"}


class RefusedError(ValueError):
    """A reason to refuse a file, without its path."""


class StandIn:
    """An inert instance in place of one of another package's class."""

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
        path: the file.
        mmap: map the tensors of a zip file, to be read when they are used; not for a file that may
            be overwritten meanwhile. Legacy files are read plainly.

    Raises:
        ValueError: no such file, not a file of torch.save, damaged, or one that holds more than
            tensors and plain values (which is never unpickled).
    """
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}; give an existing file or run directory")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on its own old formats
            is_zip = file.read(len(_ZIP)) == _ZIP
            names = _names_in_zip(file) if is_zip else _names_in_legacy(file)
            file.seek(0)
            # torch maps by path alone, and takes .safetensors for the suffix of another format
            mmap = mmap and is_zip and path.suffix != ".safetensors"
            with _stand_ins(names):
                return torch.load(
                    path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap
                )
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
    """Return the first line of an error's text, or its type, in printable characters."""
    text = "" if isinstance(error, LookupError) else str(error)  # "134", or "pop from empty list"
    text = text.split("WeightsUnpickler error:")[-1].strip()  # before it is torch's advice
    line = text.splitlines()[0] if text else type(error).__name__
    line = "".join(x if x.isprintable() else "?" for x in line[:301])
    return line if len(line) <= 300 else f"{line[:300]}..."


def _names_in_zip(file: BinaryIO) -> set[str]:
    """Check a zip file's entries; return the names that its pickle asks for.

    Raises:
        RefusedError: it unpacks to more than it holds, or is a TorchScript archive.
        Exception: of any kind, where it is damaged.
    """
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    folder = entries[0].orig_filename.split("/")[0] if entries else ""
    records = {entry.orig_filename.removeprefix(f"{folder}/"): entry for entry in entries}
    if "constants.pkl" in records:
        raise RefusedError("a TorchScript archive; save its state_dict with torch.save")
    stored = all(
        entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        for entry in entries
    )
    total = sum(entry.file_size for entry in entries)
    if not stored or total > size:
        raise RefusedError(
            f"unpacks to more than it holds ({total} bytes of {size}, compressed: {not stored}); "
            "torch.save does not write such files"
        )
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
    # read as torch does: the entry's CRC need not be there
    entry = records["data.pkl"]
    file.seek(entry.header_offset + 26)
    name_length, extra_length = struct.unpack("<2H", file.read(4))
    file.seek(name_length + extra_length, 1)
    return _names(BytesIO(file.read(entry.file_size)))


def _names_in_legacy(file: BinaryIO) -> set[str]:
    """Return the names that the pickles at the beginning of a legacy file ask for."""
    file.seek(0)
    head = file.read(_PICKLE_BYTES)
    if not head.startswith(b"\x80"):
        raise ValueError("neither a zip file nor a pickle")
    pickles = BytesIO(head)
    return set().union(*(_names(pickles) for _ in range(_LEGACY_PICKLES)))


def _names(pickle: BinaryIO) -> set[str]:
    """Return the dotted names in one pickle, as the file writes them.

    Raises:
        UnpicklingError: a name that is neither needed for tensors nor known to be harmless.
    """
    found = set()
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL":
            found.add(str(argument).replace(" ", "."))
        elif opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise UnpicklingError(f"pickle opcode {opcode.name}")
    for name in found:
        today = _name_today(name)
        is_dtype = isinstance(vars(torch).get(name.removeprefix("torch.")), torch.dtype)
        if not (is_dtype or _TENSORS.fullmatch(today) or _STAND_INS.fullmatch(today)):
            raise UnpicklingError(f"it names {today}")
    return found


def _name_today(name: str) -> str:
    module, _, attribute = name.rpartition(".")
    today = f"{_OF_PYTHON_2.get(module, module)}.{attribute}"
    return _OF_PYTHON_2.get(today, today)


@contextmanager
def _stand_ins(names: set[str]) -> Iterator[None]:
    """Let torch.load take a stand-in for each of these names that needs one, and no longer."""
    chosen: list[Any] = []
    for name in filter(_STAND_INS.fullmatch, map(_name_today, names)):
        module, _, attribute = name.rpartition(".")
        body: dict[str, Any] = {"__module__": module}
        made = _FILLED.get(attribute)
        if made is not None:
            body["__new__"] = lambda cls, *args, made=made, **kwargs: made()
        chosen.append((type(attribute, (StandIn,), body), name))
    if not chosen:
        yield
        return
    with _LOCK, torch.serialization.safe_globals(chosen):
        yield


def _other_kind(x: Tensor) -> str | None:
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"a {type(x).__name__}"
    if x.layout != torch.strided:
        return f"{x.layout}"
    if x.is_quantized or x.is_nested:
        return "quantised" if x.is_quantized else "nested"
    return None if x.device.type == "cpu" else f"on {x.device}"
