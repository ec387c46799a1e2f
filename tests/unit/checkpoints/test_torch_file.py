"""Files of torch.save: what is read, and that no file executes anything or takes much memory."""

import json
import os
import pickle
import random
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_vae.checkpoints.torch_file import check_within_file, one_line, read_torch_file
from tests.hostile_files import (
    ERRORS,
    KEY,
    MARKER,
    call,
    dict_of,
    state_dict,
    tensor,
    text,
    write_hostile_files,
    write_legacy,
    write_pipeline,
    write_zip,
)

WEIGHT = torch.arange(3.0)
REFUSED = [name for name in ERRORS if not name.endswith(".safetensors")]
GIB = 2**30


class Malicious:
    """Makes a folder when it is unpickled."""

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
def test_all_that_a_training_run_saves_is_read(
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
def test_the_suffix_says_nothing(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"weight": WEIGHT}, path)
    assert torch.equal(read_torch_file(path, mmap=mmap)["weight"], WEIGHT)


def test_a_mapped_file_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"weight": WEIGHT}, path)
    read_torch_file(path, mmap=True)["weight"].zero_()
    assert torch.equal(read_torch_file(path, mmap=True)["weight"], WEIGHT)


# --- what is refused


@pytest.mark.parametrize("save", FORMATS)
def test_a_malicious_file_is_refused_and_not_executed(
    tmp_path: Path, save: Callable[[object, Path], None]
) -> None:
    path, folder = tmp_path / "model.ckpt", tmp_path / "made"
    save({"state_dict": {"weight": WEIGHT}, "extra": Malicious(folder)}, path)
    error = (
        f"^{path}: not a checkpoint of tensors and plain values .it names posix.mkdir.; nothing in "
        "it was executed; export its state_dict alone with torch.save$"
    )
    if save is plain_pickle:
        error = error.replace("posix.mkdir", "(torch|posix).*")  # its tensors come first
    with pytest.raises(ValueError, match=error):
        read_torch_file(path)
    assert not folder.exists()
    if save is plain_pickle:
        pickle.loads(path.read_bytes())
        assert folder.exists()  # it would have been


@pytest.mark.parametrize("save", [zip_of_torch, legacy_torch])
def test_a_damaged_file_is_refused_or_read(
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


def test_the_malicious_ones_would_make_the_marker(tmp_path: Path) -> None:
    extra = call("posix.system", text(f"touch '{tmp_path / MARKER}'"))
    pickle.loads(b"\x80\x02" + dict_of((text("extra"), extra)) + b".")
    assert (tmp_path / MARKER).exists()


@pytest.mark.skipif(os.getuid() == 0, reason="root may read any file")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"weight": WEIGHT}, path)
    path.chmod(0)
    with pytest.raises(ValueError, match=f"^{path}: cannot be read .*Permission denied"):
        read_torch_file(path)


def test_a_missing_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "nothing.pt"
    error = f"^no such checkpoint: {path}; give an existing file or run directory$"
    with pytest.raises(ValueError, match=error):
        read_torch_file(path)


def test_what_of_torchs_own_is_not_needed_is_refused(tmp_path: Path) -> None:
    extra = call("torch._tensor._rebuild_from_type_v2")
    write_zip(tmp_path / "model.ckpt", state_dict(extra=extra))
    with pytest.raises(ValueError, match=r"\(it names torch\._tensor\._rebuild_from_type_v2\)"):
        read_torch_file(tmp_path / "model.ckpt")


# --- memory, in processes of their own

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
        assert re.search(ERRORS[name], error), error  # and not for want of memory
    assert grown < 0.4 * GIB
    assert not hostile[MARKER].exists()


def test_of_a_pipeline_only_what_is_used_is_read(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="takes? 192 bytes, the file has 191"):
        check_within_file({"a": x, "b": x.t(), "c": torch.nn.Parameter(x)}, 191, "it")


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.ones(4).to_sparse(), "torch.sparse_coo"),
        (torch.ones(4, device="meta"), "on meta"),
        (torch.ones(4).as_subclass(type("Named", (Tensor,), {})), "a Named"),
        ("text", "a str"),
    ],
)
def test_other_tensors_than_dense_ones_on_the_cpu_are_refused(x: Tensor, what: str) -> None:
    error = f"^it: a is {what}, not a dense tensor on the CPU; convert it before torch.save$"
    with pytest.raises(ValueError, match=error):
        check_within_file({"a": x}, 100, "it")


@pytest.mark.filterwarnings("ignore")  # torch's, that both are on their way out
def test_quantised_and_nested_tensors_are_refused() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for x, what in ((quantised, "quantised"), (nested, "nested")):
        with pytest.raises(ValueError, match=f"^it: a is {what}, not a dense tensor on the CPU"):
            check_within_file({"a": x}, 100, "it")


def test_repeated_values_are_refused() -> None:
    error = (
        r"^it: a\?\[1mb \[9, 4\] repeats values \(its 144 bytes are views of 16\); save its clone$"
    )
    with pytest.raises(ValueError, match=error):
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
def test_errors_are_said_on_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line
