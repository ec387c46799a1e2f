"""Read files of torch.save without executing anything in them, and within bounds of memory."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kl_vae.checkpoints.pickle_check import PickleCheck
from kl_vae.checkpoints.stand_ins import standing_in
from kl_vae.checkpoints.torch_archive import RefusedError, check_archive, one_line


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


def _load(path: Path, file: BinaryIO, mmap: bool) -> Any:
    check = PickleCheck()
    is_zip = check_archive(file, check)
    file.seek(0)
    # torch maps by path alone, and takes a path with safetensors' suffix for a file of theirs
    mmap = mmap and is_zip and path.suffix != ".safetensors"
    with standing_in(check.makes):
        content = torch.load(
            path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap
        )
    _remove_shadows(content)
    return content


def _other_kind(x: Tensor) -> str | None:
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"a {type(x).__name__}"
    if x.layout != torch.strided:
        return f"{x.layout}"
    if x.is_quantized or x.is_nested:
        return "quantised" if x.is_quantized else "nested"
    return None if x.device.type == "cpu" else f"on {x.device}"


def _remove_shadows(content: object) -> None:
    """Remove attributes of loaded instances that hide methods of their classes."""
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
        if isinstance(x, dict):
            waiting.extend(dict.values(x))
        elif isinstance(x, (list, tuple, set)):
            waiting.extend(x)
