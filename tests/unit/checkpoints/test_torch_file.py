"""Read files of torch.save without executing code and with limited memory."""

import argparse
import collections
import datetime
import functools
import json
import os
import pathlib
import pickle
import random
import re
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
from torch import Tensor

from kl_vae.checkpoints.torch_file import StandIn, check_within_file, one_line, read_torch_file
from tests.hostile_files import (
    ERRORS,
    KEY,
    MARKER,
    call,
    dict_of,
    integer,
    named,
    state_dict,
    tensor,
    text,
    tuple_of,
    write_hostile_files,
    write_legacy,
    write_pipeline,
    write_zip,
)
from tests.messages import mentions

WEIGHT = torch.arange(3.0)
# the slowest is read in a separate process
REFUSED = [x for x in ERRORS if not x.endswith(".safetensors") and x != "many_steps.ckpt"]
GIB = 2**30


class Malicious:
    """Create a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


def plain_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def zip_of_torch(content: object, path: Path) -> None:
    torch.save(content, path)


def legacy_torch(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


FORMATS = [plain_pickle, zip_of_torch, legacy_torch]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_hostile_files(tmp_path_factory.mktemp("hostile"))


# --- what is read


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("save", [zip_of_torch, legacy_torch])
def test_a_training_checkpoint_is_read(
    tmp_path: Path, save: Callable[[object, Path], None], mmap: bool
) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    marked = torch.nn.Parameter(WEIGHT.clone())
    marked.of = "attention"  # type: ignore[attr-defined]
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
        "plain": [None, True, -1, 2**70, 0.5, 1j, "ü", b"\xff", (1, (2,)), {3}, {4: {}}, b""],
        "torch": [torch.device("cpu"), torch.float16, torch.Size([1, 2])],
        "parameter": marked,
    }
    path = tmp_path / "model.ckpt"
    save(content, path)
    loaded = read_torch_file(path, mmap=mmap)
    assert loaded["plain"][:-1] == content["plain"][:-1]  # type: ignore[index]
    assert [loaded[key] for key in ("schedule", "torch")] == [
        schedule.state_dict(),
        content["torch"],
    ]
    assert loaded["parameter"].of == "attention"
    assert loaded["model"]._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    for key, x in model.state_dict().items():
        assert torch.equal(loaded["model"][key], x)
    assert torch.equal(loaded["rng"], content["rng"])  # type: ignore[arg-type]
    averages = [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
    for x, loaded_state in zip(averages, loaded["optimizer"]["state"].values(), strict=True):
        assert torch.equal(loaded_state["exp_avg"], x)


@pytest.mark.parametrize(
    "dtype",
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 "
    "uint16 float8_e4m3fn".split(),
)
@pytest.mark.parametrize("mmap", [False, True])
def test_dtypes(tmp_path: Path, dtype: str, mmap: bool) -> None:
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to(getattr(torch, dtype))
    torch.save({"x": x, "none": x[:0], "t": x.t(), "scalar": x[0, 1]}, tmp_path / "model.ckpt")
    loaded = read_torch_file(tmp_path / "model.ckpt", mmap=mmap)
    assert loaded["x"].dtype == x.dtype and loaded["none"].shape == (0, 2)
    assert loaded["x"].tolist() == x.tolist() == loaded["t"].t().tolist()
    assert loaded["x"].untyped_storage().data_ptr() == loaded["t"].untyped_storage().data_ptr()
    check_within_file(loaded, (tmp_path / "model.ckpt").stat().st_size, "it")


def test_files_of_python_2_are_read(tmp_path: Path) -> None:
    pair = b"](" + text(KEY) + tensor(legacy=b"N") + b"e"
    content = call("collections.OrderedDict", b"](" + pair + b"e")
    write_legacy(tmp_path / "model.pth", b"\x80\x02" + content + b".")
    loaded = read_torch_file(tmp_path / "model.pth")
    assert type(loaded) is OrderedDict and torch.equal(loaded[KEY], torch.zeros(4))


@pytest.mark.parametrize("mmap", [False, True])
def test_the_suffix_is_ignored(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"weight": WEIGHT}, path)
    assert torch.equal(read_torch_file(path, mmap=mmap)["weight"], WEIGHT)


def test_a_mapped_file_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"weight": WEIGHT}, path)
    read_torch_file(path, mmap=True)["weight"].zero_()
    assert torch.equal(read_torch_file(path, mmap=True)["weight"], WEIGHT)


@pytest.mark.parametrize("save", [zip_of_torch, legacy_torch])
def test_without_mmap_tensors_are_copies(
    tmp_path: Path, save: Callable[[object, Path], None]
) -> None:
    path = tmp_path / "model.ckpt"
    save({"a": WEIGHT, "b": [{"c": (torch.nn.Parameter(WEIGHT[1:]),)}]}, path)
    loaded = read_torch_file(path)
    path.write_bytes(bytes(path.stat().st_size))  # in place: mapped tensors would change
    (inner,) = loaded["b"][0]["c"]
    assert torch.equal(loaded["a"], WEIGHT) and torch.equal(inner, WEIGHT[1:])
    assert type(inner) is torch.nn.Parameter and inner.requires_grad
    assert inner.untyped_storage().data_ptr() == loaded["a"].untyped_storage().data_ptr()


@pytest.mark.parametrize("mmap", [False, True])
def test_attributes_that_hide_methods_are_removed(tmp_path: Path, mmap: bool) -> None:
    three = integer(3)
    attributes = dict_of((text("numel"), three), (text("tag"), three))
    no_hooks = call("collections.OrderedDict")
    weight = call(
        "torch._utils._rebuild_parameter_with_state", tensor(), b"\x89", no_hooks, attributes
    )
    content = call("collections.OrderedDict") + text("weight") + weight + b"s"
    content += dict_of((text("items"), three), (text("_metadata"), three)) + b"b"
    write_zip(tmp_path / "model.ckpt", b"\x80\x02" + content + b".")
    loaded = read_torch_file(tmp_path / "model.ckpt", mmap=mmap)
    assert loaded["weight"].numel() == 4 and loaded["weight"].tag == 3
    assert list(loaded.items()) == [("weight", loaded["weight"])] and loaded._metadata == 3


# --- checkpoints of trainers, whose classes have stand-ins

CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class ModelCheckpoint:
    def __init__(self, monitor: str) -> None:
        self.monitor = monitor

    def __setstate__(self, state: object) -> None:
        raise AssertionError("the class itself was used")


class DictConfig(dict[str, Any]):
    """A dict whose pickle sets items, then attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return DictConfig, ({"flags": None},), {"_parent": None}, None, iter(self.items())


class ListConfig:
    def __init__(self, content: list[Any]) -> None:
        self._content = content


class Metadata:
    __slots__ = ("key",)


def instantiate_from_config(config: object) -> None:
    raise AssertionError("the function itself was called")


class Made:
    def __reduce__(self) -> tuple[Any, ...]:
        return instantiate_from_config, ({"target": "ldm.models.autoencoder.AutoencoderKL"},)


PACKAGES = {
    "pytorch_lightning.callbacks.model_checkpoint": [ModelCheckpoint],
    "omegaconf.dictconfig": [DictConfig, ListConfig, Metadata],
    "ldm.util": [instantiate_from_config],
}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Modules named like those of other packages, with the classes above."""
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
        "hyper_parameters": DictConfig(ch=128, nested=DictConfig(z=4), last=WEIGHT),
        "list": ListConfig([1, DictConfig(a=2)]),
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
            monkeypatch.setitem(sys.modules, name, None)  # importing raises ImportError
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
    stand_ins = [loaded[key] for key in ("metadata", "list", "made", "args", "object")]
    for x in [*stand_ins, *loaded["numpy"], *loaded["dates"], *loaded["builtins"]]:
        name = x.__qualname__ if isinstance(x, type) else type(x).__qualname__
        assert issubclass(x, StandIn) if isinstance(x, type) else isinstance(x, StandIn), name
    names = [type(x).__name__ for x in stand_ins]
    assert names == [
        "Metadata",
        "ListConfig",
        "instantiate_from_config",
        "Namespace",
        "_reconstruct",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "diffusers.configuration_utils.FrozenDict",
        "omegaconf.dictconfig.DictConfig",
        "ml_collections.config_dict.ConfigDict",
        "easydict.EasyDict",
        "yacs.config.CfgNode",
    ],
)
def test_dicts_of_packages_are_read_as_dicts(tmp_path: Path, name: str) -> None:
    state = dict_of((text("items"), integer(3)), (text("_parent"), b"N"))
    extra = named(name) + b")\x81" + text("a") + integer(1) + b"s" + state + b"b"
    write_zip(tmp_path / "last.ckpt", state_dict(extra=extra))
    assert list(read_torch_file(tmp_path / "last.ckpt")["extra"].items()) == [("a", 1)]


def test_stand_ins_accept_any_arguments() -> None:
    assert isinstance(StandIn(1, *[2], a=3), StandIn)
    StandIn().__setstate__({"a": 1})
    assert {StandIn(): 1} and StandIn() != StandIn()
    with pytest.raises(TypeError):
        iter(StandIn())  # type: ignore[call-overload]


def test_packages_are_not_imported(tmp_path: Path) -> None:
    """torchmetrics is installed for the tests."""
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
    ("extra", "name"),
    [
        (named("posix.system"), "posix.system"),
        (named("os.system"), "os.system"),
        (call("builtins.eval", text("1")), "builtins.eval"),
        (call("__builtin__.getattr", text("1"), text("real")), "builtins.getattr"),
        (call("torch.load", text("a")), "torch.load"),
        (call("torch.hub.load", text("a")), "torch.hub.load"),
        (named("torch.nn.modules.conv.Conv2d"), "torch.nn.modules.conv.Conv2d"),
        (named("pytorch_lightning_.Trainer"), "pytorch_lightning_.Trainer"),
        (named("numpy.load"), "numpy.load"),
        (named("pathlib.os.system b"), "pathlib.os.system b"),
        (
            call("omegaconf.DictConfig", dict_of((text("a"), call("posix.system", text("b"))))),
            "posix.system",
        ),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_other_globals_are_an_error(tmp_path: Path, extra: bytes, name: str, legacy: bool) -> None:
    path = tmp_path / "last.ckpt"
    before = torch.serialization.get_safe_globals()
    if legacy:
        extra = extra.replace(tensor(), tensor(legacy=b"N"))
        write_legacy(path, state_dict(tensor(legacy=b"N"), extra=extra))
    else:
        write_zip(path, state_dict(extra=extra))
    with pytest.raises(ValueError, match=mentions(path, name, "state_dict", "torch.save")):
        read_torch_file(path)
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_arguments_of_stand_ins_are_ignored(tmp_path: Path) -> None:
    """A huge length is not allocated and a tensor is not iterated over."""
    arguments = [integer(10**12), tensor(), named("builtins.list"), dict_of((text("a"), b"N"))]
    extra = call("numpy.ndarray", *arguments) + tuple_of(*arguments) + b"b"
    write_zip(tmp_path / "last.ckpt", state_dict(extra=extra))
    loaded = read_torch_file(tmp_path / "last.ckpt")
    assert isinstance(loaded["extra"], StandIn) and torch.equal(loaded[KEY], torch.zeros(4))


def test_concurrent_reads(tmp_path: Path) -> None:
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


# --- what is refused


@pytest.mark.parametrize("save", FORMATS)
def test_a_malicious_file_is_refused_and_not_executed(
    tmp_path: Path, save: Callable[[object, Path], None]
) -> None:
    path, folder = tmp_path / "model.ckpt", tmp_path / "made"
    save({"state_dict": {"weight": WEIGHT}, "extra": Malicious(folder)}, path)
    name = (
        "torch.storage._load_from_bytes" if save is plain_pickle else "posix.mkdir"
    )  # the first global
    with pytest.raises(ValueError, match=mentions(path, name, "state_dict", "torch.save")):
        read_torch_file(path)
    assert not folder.exists()
    if save is plain_pickle:
        pickle.loads(path.read_bytes())
        assert folder.exists()  # the file is indeed malicious


@pytest.mark.parametrize("save", [zip_of_torch, legacy_torch])
def test_a_damaged_file_is_read_or_a_value_error(
    tmp_path: Path, save: Callable[[object, Path], None]
) -> None:
    path = tmp_path / "model.ckpt"
    save({"weight": torch.ones(50), "step": 3}, path)
    whole, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for cut in (0.0, 0.01, 0.2, 0.5, 0.9, 0.999, *[1.0] * 300):
        content = bytearray(whole[: int(cut * len(whole))])
        for _ in range(draw.choice([1, 1, 5]) if cut == 1.0 else 0):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            read_torch_file(path, mmap=draw.random() < 0.5)
        except ValueError as error:
            assert re.match(rf"{path}: \S.*", str(error)) and "\n" not in str(error)
            refused += 1
        else:
            assert cut == 1.0
    assert refused > 100


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_files_are_refused(hostile: dict[str, Path], name: str) -> None:
    path = hostile[name]
    with pytest.raises(ValueError, match=ERRORS[name]) as error:
        content = read_torch_file(path)
        check_within_file(content, path.stat().st_size, str(path))
    assert str(path) in str(error.value) and str(error.value).isprintable()
    assert not hostile[MARKER].exists()


def test_pickle_executes_the_malicious_files(tmp_path: Path) -> None:
    extra = call("posix.system", text(f"touch '{tmp_path / MARKER}'"))
    pickle.loads(b"\x80\x02" + dict_of((text("extra"), extra)) + b".")
    assert (tmp_path / MARKER).exists()


@pytest.mark.skipif(os.getuid() == 0, reason="root may read any file")
def test_a_file_without_permission_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"weight": WEIGHT}, path)
    path.chmod(0)
    with pytest.raises(ValueError, match=mentions(path, "Permission denied")):
        read_torch_file(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "nothing.pt"
    with pytest.raises(ValueError, match=mentions(path, "checkpoint")):
        read_torch_file(path)


def test_unneeded_globals_of_torch_are_an_error(tmp_path: Path) -> None:
    extra = call("torch._tensor._rebuild_from_type_v2")
    write_zip(tmp_path / "model.ckpt", state_dict(extra=extra))
    with pytest.raises(ValueError, match=mentions("torch._tensor._rebuild_from_type_v2")):
        read_torch_file(tmp_path / "model.ckpt")


# --- memory, in separate processes

_MEMORY = """
import json, resource, sys
from pathlib import Path
from kl_vae.checkpoints.safetensors_file import is_safetensors, read_safetensors
from kl_vae.checkpoints.torch_file import check_within_file, read_torch_file

def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def read(path, choose=lambda keys: keys):
    if is_safetensors(path):
        return read_safetensors(path, choose).tensors
    content = read_torch_file(path, mmap=True)
    return {key: content[key] for key in choose(list(content))}

virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
before, said = resident(), {}
"""


def in_a_process(code: str, *arguments: object) -> Any:
    command = [sys.executable, "-c", _MEMORY + code, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def test_hostile_files_take_little_memory(hostile: dict[str, Path]) -> None:
    code = f"""
resource.setrlimit(resource.RLIMIT_AS, (virtual + {GIB},) * 2)
for path in map(Path, sys.argv[1:]):
    try:
        check_within_file(read(path), path.stat().st_size, str(path))
    except ValueError as error:
        said[path.name] = str(error)
print(json.dumps([said, resident() - before]))
"""
    said, grown = in_a_process(code, *(hostile[name] for name in ERRORS))
    assert said.keys() == ERRORS.keys()
    for name, error in said.items():
        assert re.search(ERRORS[name], error), error  # not MemoryError
    assert grown < 0.4 * GIB
    assert not hostile[MARKER].exists()


def test_only_used_tensors_of_a_pipeline_are_read(tmp_path: Path) -> None:
    paths = [tmp_path / "pipeline.ckpt", tmp_path / "pipeline.safetensors"]
    for path in paths:
        write_pipeline(path)
    code = f"""
for path in map(Path, sys.argv[1:]):
    said[path.name] = read(path, lambda keys: ["{KEY}"])["{KEY}"].tolist()
print(json.dumps([said, resident() - before]))
"""
    said, grown = in_a_process(code, *paths)
    assert said == {path.name: [1.0, 2.0, 3.0, 4.0] for path in paths}
    assert grown < 0.2 * GIB  # of 8


# --- tensors within a file


def test_tensors_within_a_file(tmp_path: Path) -> None:
    x = torch.ones(4, 4)
    check_within_file({"a": x, "b": x.t(), "c": torch.nn.Parameter(x), "d": x[:0]}, 192, "it")
    with pytest.raises(ValueError, match=mentions("it:", "192 bytes", 191)):
        check_within_file({"a": x, "b": x.t(), "c": torch.nn.Parameter(x)}, 191, "it")


@pytest.mark.parametrize(
    ("x", "part"),
    [
        (torch.ones(4).to_sparse(), "torch.sparse_coo"),
        (torch.ones(4, device="meta"), "meta"),
        (torch.ones(4).as_subclass(type("Named", (Tensor,), {})), "Named"),
        ("text", "str"),
    ],
)
def test_tensors_must_be_dense_and_on_the_cpu(x: Tensor, part: str) -> None:
    with pytest.raises(ValueError, match=mentions("it:", "key.x", part, "dense", "torch.save")):
        check_within_file({"key.x": x}, 100, "it")


@pytest.mark.filterwarnings("ignore")  # deprecation warnings of torch
def test_quantised_and_nested_tensors_are_an_error() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for x, part in ((quantised, "quantised"), (nested, "nested")):
        with pytest.raises(ValueError, match=mentions("it:", "key.x", part, "dense")):
            check_within_file({"key.x": x}, 100, "it")


def test_expanded_tensors_are_an_error() -> None:
    parts = ("a?[1mb", "[9, 4]", "144 bytes", 16, "clone")
    with pytest.raises(ValueError, match=mentions("it:", *parts)):
        check_within_file({"a\x1b[1mb": torch.ones(4).expand(9, 4)}, 1000, "it")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\nb"), "a"),
        (ValueError("a\x1b[1mb\x07"), "a?[1mb?"),
        (ValueError(""), "ValueError"),
        (KeyError(134), "KeyError"),
        (ValueError("Do this.\n\tWeightsUnpickler error: Not that\nbut"), "Not that"),
        (ValueError("x" * 500), "x" * 300 + "..."),
    ],
)
def test_errors_are_shortened_to_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line
