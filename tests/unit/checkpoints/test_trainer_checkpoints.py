"""Checkpoints of trainers: what stands in for their classes, and what does not."""

import argparse
import collections
import datetime
import functools
import pathlib
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from kl_vae.checkpoints.torch_file import StandIn, read_torch_file
from tests.hostile_files import (
    KEY,
    call,
    dict_of,
    integer,
    named,
    state_dict,
    tensor,
    text,
    tuple_of,
    write_legacy,
    write_zip,
)

WEIGHT = torch.arange(3.0)
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class ModelCheckpoint:
    def __init__(self, monitor: str) -> None:
        self.monitor = monitor

    def __setstate__(self, state: object) -> None:
        raise AssertionError("the class itself was used")


class AttributeDict(dict[str, Any]):
    """Of the kind whose pickle fills it, then sets its attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return AttributeDict, ({"flags": None},), {"_parent": None}, None, iter(self.items())


class Metadata:
    __slots__ = ("key",)


def instantiate_from_config(config: object) -> None:
    raise AssertionError("the function itself was called")


class Made:
    def __reduce__(self) -> tuple[Any, ...]:
        return instantiate_from_config, ({"target": "ldm.models.autoencoder.AutoencoderKL"},)


PACKAGES = {
    "pytorch_lightning.callbacks.model_checkpoint": [ModelCheckpoint],
    "omegaconf.base": [Metadata],
    "pytorch_lightning.utilities.parsing": [AttributeDict],
    "ldm.util": [instantiate_from_config],
}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Modules of the names that other packages have, with our classes in them."""
    modules = {}
    with monkeypatch.context() as patch:
        for name, members in PACKAGES.items():
            modules[name] = ModuleType(name)
            for member in members:
                patch.setattr(member, "__module__", name)
                setattr(modules[name], member.__name__, member)
            for part in range(1, name.count(".") + 1):
                parent = ".".join(name.split(".")[:part])
                patch.setitem(sys.modules, parent, ModuleType(parent))
            patch.setitem(sys.modules, name, modules[name])
        yield modules


def of_a_trainer() -> dict[str, Any]:
    metadata = Metadata()
    metadata.key = "a"
    return {
        "epoch": 3,
        "state_dict": {"weight": WEIGHT},
        "callbacks": {ModelCheckpoint: {"best": torch.tensor(0.5)}},
        "callback": ModelCheckpoint("val/rec_loss"),
        "hyper_parameters": AttributeDict(ch=128, nested=AttributeDict(z=4), last=WEIGHT),
        "metadata": metadata,
        "made": Made(),
        "args": argparse.Namespace(lr=1e-4, path=pathlib.PosixPath("/data")),
        "numpy": [np.float64(0.5), np.int64(3), np.bool_(True), np.arange(3.0), np.dtype("f4")],
        "object": np.array([1, "a"], dtype=object),
        "dates": [datetime.datetime(2022, 8, 10), datetime.timedelta(1)],
        "default": collections.defaultdict(list, a=[1]),
        "builtins": [range(3), slice(1), frozenset([1]), int, str, functools.partial(int, "1")],
        "deque": collections.deque([1, 2]),
    }


def zip_of_torch(content: object, path: Path) -> None:
    torch.save(content, path)


def legacy_torch(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("save", [zip_of_torch, legacy_torch])
def test_checkpoints_of_trainers_are_read(
    tmp_path: Path,
    packages: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[[object, Path], None],
    mmap: bool,
    installed: bool,
) -> None:
    path = tmp_path / "last.ckpt"
    save(of_a_trainer(), path)
    if not installed:
        for name in packages:
            monkeypatch.setitem(sys.modules, name, None)  # an ImportError, should it be imported
    before = torch.serialization.get_safe_globals()
    loaded = read_torch_file(path, mmap=mmap)
    assert set(torch.serialization.get_safe_globals()) == set(before)

    assert loaded["epoch"] == 3 and torch.equal(loaded["state_dict"]["weight"], WEIGHT)
    ((callback, state),) = loaded["callbacks"].items()
    assert issubclass(callback, StandIn) and state == {"best": torch.tensor(0.5)}
    assert f"{callback.__module__}.{callback.__qualname__}" == CALLBACK
    assert type(loaded["callback"]) is callback and not vars(loaded["callback"])
    filled = loaded["hyper_parameters"]
    assert type(filled) is OrderedDict and filled.keys() == {"ch", "nested", "last"}
    assert filled["nested"] == {"z": 4} and torch.equal(filled["last"], WEIGHT)
    assert loaded["default"] == {"a": [1]} and loaded["deque"] == [1, 2]
    stand_ins = [loaded[key] for key in ("metadata", "made", "args", "object")]
    for x in [*stand_ins, *loaded["numpy"], *loaded["dates"], *loaded["builtins"]]:
        name = x.__qualname__ if isinstance(x, type) else type(x).__qualname__
        assert issubclass(x, StandIn) if isinstance(x, type) else isinstance(x, StandIn), name
    names = [type(x).__name__ for x in stand_ins]
    assert names == ["Metadata", "instantiate_from_config", "Namespace", "_reconstruct"]


def test_stand_ins_take_anything() -> None:
    assert isinstance(StandIn(1, *[2], a=3), StandIn)
    StandIn().__setstate__({"a": 1})
    assert {StandIn(): 1} and StandIn() != StandIn()
    with pytest.raises(TypeError):
        iter(StandIn())  # type: ignore[call-overload]


def test_the_packages_are_not_imported(tmp_path: Path) -> None:
    """Where they are installed: torchmetrics is, for the tests."""
    extra = call("torchmetrics.Metric", text("a"))
    write_zip(tmp_path / "last.ckpt", state_dict(extra=extra))
    code = f"""
import sys
from pathlib import Path
from kl_vae.checkpoints.torch_file import read_torch_file
content = read_torch_file(Path({str(tmp_path / "last.ckpt")!r}))
assert type(content["extra"]).__module__ == "torchmetrics"
assert "torchmetrics" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (named("posix.system"), "it names posix.system"),
        (named("os.system"), "it names os.system"),
        (call("builtins.eval", text("1")), "it names builtins.eval"),
        (call("__builtin__.getattr", text("1"), text("real")), "it names builtins.getattr"),
        (call("torch.load", text("a")), "it names torch.load"),
        (call("torch.hub.load", text("a")), "it names torch.hub.load"),
        (named("torch.nn.modules.conv.Conv2d"), "it names torch.nn.modules.conv.Conv2d"),
        (named("pytorch_lightning_.Trainer"), "it names pytorch_lightning_.Trainer"),
        (named("numpy.load"), "it names numpy.load"),
        (
            call("omegaconf.DictConfig", dict_of((text("a"), call("posix.system", text("b"))))),
            "it names posix.system",
        ),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_what_nothing_stands_in_for_is_refused(
    tmp_path: Path, extra: bytes, reason: str, legacy: bool
) -> None:
    path = tmp_path / "last.ckpt"
    before = torch.serialization.get_safe_globals()
    if legacy:
        extra = extra.replace(tensor(), tensor(legacy=b"N"))
        write_legacy(path, state_dict(tensor(legacy=b"N"), extra=extra))
    else:
        write_zip(path, state_dict(extra=extra))
    error = rf"^{path}: .*{reason}.*nothing in it was executed"
    with pytest.raises(ValueError, match=error):
        read_torch_file(path)
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_nasty_arguments_of_stand_ins_do_nothing(tmp_path: Path) -> None:
    """Neither a length that a real class would allocate, nor a tensor that it would walk."""
    arguments = [integer(10**12), tensor(), named("builtins.list"), dict_of((text("a"), b"N"))]
    extra = call("numpy.ndarray", *arguments) + tuple_of(*arguments) + b"b"
    write_zip(tmp_path / "last.ckpt", state_dict(extra=extra))
    loaded = read_torch_file(tmp_path / "last.ckpt")
    assert isinstance(loaded["extra"], StandIn) and torch.equal(loaded[KEY], torch.zeros(4))


def test_threads_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_zip(path, state_dict(extra=call(CALLBACK) + dict_of((text("a"), b"N")) + b"b"))
    before = set(torch.serialization.get_safe_globals())
    read: list[Any] = []

    def read_often() -> None:
        read.extend(read_torch_file(path)["extra"] for _ in range(20))

    threads = [threading.Thread(target=read_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 80 and all(isinstance(x, StandIn) for x in read)
    assert set(torch.serialization.get_safe_globals()) == before
