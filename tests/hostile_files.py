"""Files of weights that are damaged, that lie, or that would execute something.

Each is to be refused with one line that `ERRORS` matches, while little memory is used, and none
may make the file `MARKER`. Sparse files keep what they take on the disk small.
"""

import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

MARKER = "marker"  # key of the path that the malicious ones would make
KEY = "encoder.conv_in.weight"  # of the tensors in them
PIPELINE_BYTES = 8 * 2**30  # apparent size of `write_pipeline`'s files

_NOT_READ = r"cannot be read as a checkpoint \(%s\)"
_NOT_PLAIN = r"not a checkpoint of tensors .*\(%s\).*torch\.save$"
_UNPACKS = r"unpacks .*\(%s\)"
_NO_SAFETENSORS = r"cannot be read as safetensors \(.*%s\)"

ERRORS = {
    "empty.ckpt": "empty file",
    "text.ckpt": "text .*This is a text",
    "zeros.ckpt": _NOT_READ % "neither a zip file nor a pickle",
    "truncated.ckpt": _NOT_READ % ".*",
    "truncated_legacy.ckpt": _NOT_READ % ".*",
    "cut_pickle.ckpt": _NOT_READ % ".*",
    "tar.ckpt": _NOT_READ % ".*",
    "archive.ckpt": _NOT_READ % r"a zip file without data\.pkl",
    "two_entries.ckpt": _NOT_READ % ".*two entries.*",
    "two_directories.ckpt": _NOT_READ % ".*",
    "zip64.ckpt": _NOT_READ % ".*",
    "many_entries.ckpt": _NOT_READ % ".*",
    "torchscript.pt": r"a TorchScript archive; save its state_dict with torch\.save$",
    "compressed.ckpt": _UNPACKS % "weights/data/0 .*",
    "overlapping.ckpt": _UNPACKS % r".*entries .*\d+ bytes.* \d+",
    "huge_pickle.ckpt": r"data\.pkl .*1073741824 bytes, .*67108864",
    "storage_claims_more.ckpt": _NOT_READ % ".*",
    "legacy_claims_more.ckpt": _NOT_READ % ".*",
    "unknown_storage.ckpt": _NOT_PLAIN % r".*torch\.QInt8Storage",
    "bytearray.ckpt": _NOT_PLAIN % r".*builtins\.bytearray",
    "legacy_bytearray.ckpt": _NOT_PLAIN % r".*builtins\.bytearray",
    "doubled_string.ckpt": _NOT_PLAIN % r"_codecs\.encode .*",
    "call_with_a_tensor.ckpt": _NOT_READ % ".*",
    "many_steps.ckpt": _NOT_PLAIN % "more than 1000000 opcodes",
    "tensor_filled.ckpt": r"(cannot be read as|not) a checkpoint .*[Tt]ensor",
    "sparse_tensor.ckpt": _NOT_PLAIN % r".*torch\.(serialization|_utils)\.\w+",
    "quantised_tensor.ckpt": _NOT_PLAIN % r".*torch\._utils\._rebuild_qtensor",
    "meta_tensor.ckpt": _NOT_PLAIN % r".*torch\._utils\._rebuild_meta_tensor_no_storage",
    "protocol_4.ckpt": _NOT_PLAIN % "pickle opcode FRAME",
    "escape.ckpt": _NOT_PLAIN % r".*os\.\?\[31msystem",
    "system.ckpt": _NOT_PLAIN % r".*posix\.system",
    "legacy_system.ckpt": _NOT_PLAIN % r".*posix\.system",
    "in_a_stand_in.ckpt": _NOT_PLAIN % r".*posix\.system",
    "eval.ckpt": _NOT_PLAIN % r".*builtins\.eval",
    "exec_of_python_2.ckpt": _NOT_PLAIN % r".*builtins\.exec",
    "popen.ckpt": _NOT_PLAIN % r".*subprocess\.Popen",
    "getattr.ckpt": _NOT_PLAIN % r".*builtins\.getattr",
    "hub.ckpt": _NOT_PLAIN % r".*torch\.hub\.load",
    "torch_load.ckpt": _NOT_PLAIN % r".*torch\.load",
    "unknown_class.ckpt": _NOT_PLAIN % r".*somebody\.models\.Autoencoder",
    "expanded.ckpt": r"encoder\.conv_in\.weight \[100000, 1000000\] .*400000000000 .* 16\b.*clone",
    "many_views.ckpt": _UNPACKS % r".*tensors .*4000000 bytes.* \d+",
    "empty.safetensors": "empty file",
    "text.safetensors": "text .*This is a text",
    "zeros.safetensors": _NO_SAFETENSORS % "Expecting value: line 1 column 1 .char 0.",
    "truncated.safetensors": _NO_SAFETENSORS % ".*",
    "header_of_2_to_the_63.safetensors": _NO_SAFETENSORS % "9223372036854775808 .*100.*",
    "header_beyond.safetensors": _NO_SAFETENSORS % "101 .*108.*",
    "huge_header.safetensors": _NO_SAFETENSORS % "209715200 .*16777216.*",
    "no_json.safetensors": _NO_SAFETENSORS % ".*",
    "no_text.safetensors": _NO_SAFETENSORS % ".*",
    "deep.safetensors": _NO_SAFETENSORS % ".*",
    "no_object.safetensors": _NO_SAFETENSORS % "header.*JSON object",
    "two_keys.safetensors": _NO_SAFETENSORS % "header.*key",
    "beyond.safetensors": _NO_SAFETENSORS % ".*",
    "backwards.safetensors": _NO_SAFETENSORS % ".*",
    "overlapping.safetensors": _NO_SAFETENSORS % ".*",
    "hole.safetensors": _NO_SAFETENSORS % ".*",
    "too_small.safetensors": _NO_SAFETENSORS % ".*",
    "overflow.safetensors": _NO_SAFETENSORS % ".*",
    "negative.safetensors": _NO_SAFETENSORS % ".*",
    "unknown_dtype.safetensors": _NO_SAFETENSORS % ".*",
    "metadata_of_numbers.safetensors": _NO_SAFETENSORS % ".*",
    **{
        f"{kind}.{suffix}": r"^no such checkpoint: .*; give an existing file or run directory$"
        for kind in ("directory", "pipe")
        for suffix in ("ckpt", "safetensors")
    },
}


def write_hostile_files(folder: Path) -> dict[str, Path]:
    """Write one file of each kind of `ERRORS`, and return them by name, and the marker's path."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / MARKER
    _write_no_checkpoints(folder)
    _write_zips(folder)
    _write_claims(folder)
    _write_malicious(folder, marker)
    _write_safetensors(folder)
    for suffix in ("ckpt", "safetensors"):
        (folder / f"directory.{suffix}").mkdir()
        os.mkfifo(folder / f"pipe.{suffix}")
    return {**{name: folder / name for name in ERRORS}, MARKER: marker}


# --- pickles, opcode by opcode


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def named(dotted: str) -> bytes:
    module, _, name = dotted.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(dotted: str, *arguments: bytes) -> bytes:
    return named(dotted) + tuple_of(*arguments) + b"R"


def dict_of(*items: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in items) + b"u"


def tensor(
    size: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    storage: tuple[str, int] = ("0", 4),
    kind: str = "torch.FloatStorage",
    legacy: bytes = b"",
) -> bytes:
    """A tensor of the storage `(key, items)`; legacy pickles have one more item, None."""
    key, count = storage
    identity = tuple_of(
        text("storage"), named(kind), text(key), text("cpu"), integer(count), legacy
    )
    return call(
        "torch._utils._rebuild_tensor_v2",
        identity + b"Q",
        integer(0),
        tuple_of(*map(integer, size)),
        tuple_of(*map(integer, stride)),
        b"\x89",
        call("collections.OrderedDict"),
    )


def state_dict(value: bytes | None = None, *, extra: bytes | None = None) -> bytes:
    """A pickle of `{KEY: value, "extra": extra}`."""
    items = [(text(KEY), tensor() if value is None else value)]
    items += [] if extra is None else [(text("extra"), extra)]
    return b"\x80\x02" + dict_of(*items) + b"."


# --- files of torch's


def write_zip(path: Path, content: bytes, storages: Mapping[str, bytes] | None = None) -> None:
    """Write a file as torch.save does, of a pickle and storages by key (default: 4 floats, "0")."""
    records = {"data.pkl": content, "byteorder": b"little", "version": b"3\n"}
    storages = {"0": bytes(16)} if storages is None else storages
    records |= {f"data/{key}": data for key, data in storages.items()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in records.items():
            file.writestr(zipfile.ZipInfo(f"weights/{name}"), data)


def write_legacy(path: Path, content: bytes, keys: tuple[str, ...] = ("0",)) -> None:
    """Write a file as torch.save did before 1.6, with 4 floats in each storage."""
    before = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
    pickles = [*(pickle.dumps(x, protocol=2) for x in before), content]
    storages = [struct.pack("<q", 4) + bytes(16) for _ in keys]
    path.write_bytes(b"".join([*pickles, pickle.dumps(list(keys), protocol=2), *storages]))


def write_sparse_zip(path: Path, sizes: Mapping[str, int], contents: Mapping[str, bytes]) -> None:
    """Write a zip file with entries of zeros that take nothing on the disk; contents come last."""
    directory = b""
    with open(path, "wb") as file:
        for name, size in {**sizes, **{name: len(x) for name, x in contents.items()}}.items():
            start, extra = file.tell(), struct.pack("<2H3Q", 1, 24, size, size, file.tell())
            fields = struct.pack("<5H3I2H", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), 28)
            directory += b"PK\x01\x02" + struct.pack("<H", 45) + fields
            directory += struct.pack("<3H2I", 0, 0, 0, 0, 2**32 - 1) + name.encode() + extra
            file.write(b"PK\x03\x04" + fields + name.encode() + extra)
            file.write(contents.get(name, b""))
            file.truncate(start + 58 + len(name) + size)
            file.seek(0, os.SEEK_END)
        start, count = file.tell(), len(sizes) + len(contents)
        record = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), start)
        end = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(directory), 1)
        end += b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
        file.write(directory + b"PK\x06\x06" + record + end)


def write_pipeline(path: Path) -> None:
    """Write a pipeline's checkpoint of 8 GB, with 4 floats of an autoencoder's: all sparse.

    By its suffix a zip file of torch's or a safetensors file.
    """
    count = PIPELINE_BYTES // 4
    if path.suffix == ".safetensors":
        header = {
            "model.weight": _entry("F32", [count], 0, PIPELINE_BYTES),
            KEY: _entry("F32", [4], PIPELINE_BYTES, PIPELINE_BYTES + 16),
        }
        _safetensors(path, header, b"")
        with open(path, "rb+") as file:
            file.truncate(8 + len(json.dumps(header)) + PIPELINE_BYTES)
            file.seek(0, os.SEEK_END)
            file.write(struct.pack("<4f", 1, 2, 3, 4))
        return
    content = dict_of(
        (text("model.weight"), tensor((count,), storage=("0", count))),
        (text(KEY), tensor(storage=("1", 4))),
    )
    contents = {
        "weights/data/1": struct.pack("<4f", 1, 2, 3, 4),
        "weights/data.pkl": b"\x80\x02" + content + b".",
        "weights/byteorder": b"little",
        "weights/version": b"3\n",
    }
    write_sparse_zip(path, {"weights/data/0": PIPELINE_BYTES}, contents)


def _write_no_checkpoints(folder: Path) -> None:
    """Other things than checkpoints, and parts of one."""
    (folder / "empty.ckpt").write_bytes(b"")
    (folder / "text.ckpt").write_text("This is a text, and not even a long one.\n" * 9)
    with open(folder / "zeros.ckpt", "wb") as file:
        file.truncate(2 * 2**30)
    write_zip(folder / "truncated.ckpt", state_dict())
    torch.save({KEY: torch.ones(1000)}, folder / "cut.ckpt", _use_new_zipfile_serialization=False)
    whole = (folder / "cut.ckpt").read_bytes()
    (folder / "truncated_legacy.ckpt").write_bytes(whole[:-1000])
    (folder / "cut_pickle.ckpt").write_bytes(whole[:200])
    (folder / "cut.ckpt").unlink()
    os.truncate(folder / "truncated.ckpt", (folder / "truncated.ckpt").stat().st_size - 9)
    archive = io.BytesIO()
    with tarfile.open(
        fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT, encoding="ascii"
    ) as tar:
        tar.addfile(tarfile.TarInfo("\udc80"))  # begins like a pickle
    (folder / "tar.ckpt").write_bytes(archive.getvalue())


def _write_zips(folder: Path) -> None:
    """Zip files that torch.save would not write."""
    with zipfile.ZipFile(folder / "archive.ckpt", "w") as file:
        file.writestr("weights/readme.txt", "none here")
    with zipfile.ZipFile(folder / "compressed.ckpt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("weights/data/0", bytes(10**7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting, or the second entry, is a bad idea
        with zipfile.ZipFile(folder / "two_entries.ckpt", "w") as file:
            for name in ("weights/data.pkl", "weights/DATA.pkl"):
                file.writestr(name, state_dict())
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), folder / "torchscript.pt")

    write_zip(folder / "two_directories.ckpt", state_dict())
    with open(folder / "two_directories.ckpt", "rb+") as file:
        file.seek(-6, os.SEEK_END)  # the offset at which C readers look for it
        file.write(struct.pack("<I", 60))
    write_sparse_zip(folder / "zip64.ckpt", {}, {"weights/data.pkl": state_dict()})
    with open(folder / "zip64.ckpt", "rb+") as file:
        file.seek(-34, os.SEEK_END)
        file.write(struct.pack("<Q", 60))
    sizes = {"weights/data/0": 10, "weights/data.pkl": 2**30}
    write_sparse_zip(folder / "huge_pickle.ckpt", sizes, {})
    _write_overlapping_entries(folder / "overlapping.ckpt")
    _write_a_million_entries(folder / "many_entries.ckpt")


def _write_overlapping_entries(path: Path) -> None:
    """Nine entries that share one entry's bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights/data/0", bytes(1000))
    content = path.read_bytes()
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    entries = b"".join(content[start : end - 1] + b"%d" % i for i in range(9))
    last = struct.pack("<4H2IH", 0, 0, 9, 9, len(entries), start, 0)
    path.write_bytes(content[:start] + entries + b"PK\x05\x06" + last)


def _write_a_million_entries(path: Path) -> None:
    """A directory of a million entries of 46 bytes and a name, of which all but the end is zero."""
    length = 10**6 * 47
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(30 + length)
        file.seek(0, os.SEEK_END)
        file.write(b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 65535, 65535, length, 30, 0))


def _write_claims(folder: Path) -> None:
    """Pickles that ask for more memory or time than the file's size allows."""
    big = integer(10**12)
    write_legacy(
        folder / "legacy_claims_more.ckpt", state_dict(tensor(storage=("0", 10**12), legacy=b"N"))
    )
    write_legacy(
        folder / "legacy_bytearray.ckpt",
        state_dict(tensor(legacy=b"N"), extra=call("__builtin__.bytearray", big)),
    )
    grown = call("_codecs.encode", text("ab"), text("latin1"))
    for _ in range(40):
        grown = call("_codecs.encode", grown, text("hex"))
    one = tensor()
    pickles = {
        "storage_claims_more": state_dict(tensor((4000,), storage=("0", 4000))),
        "unknown_storage": state_dict(tensor(kind="torch.QInt8Storage")),
        "bytearray": state_dict(extra=call("builtins.bytearray", big)),
        "doubled_string": state_dict(extra=grown),
        "call_with_a_tensor": state_dict(extra=named("collections.OrderedDict") + one + b"R"),
        "many_steps": state_dict(extra=b"]" + b"(" + b"}" * 1_100_000 + b"e"),
        "tensor_filled": state_dict(extra=one + text("a") + b"Ns"),
        "expanded": state_dict(tensor((10**5, 10**6), (0, 0))),
    }
    for name, content in pickles.items():
        write_zip(folder / f"{name}.ckpt", content)
    views = [(text(f"{KEY}.{i}"), tensor((1000,), storage=("0", 1000))) for i in range(1000)]
    shared = b"\x80\x02" + dict_of(*views) + b"."
    write_zip(folder / "many_views.ckpt", shared, {"0": bytes(4000)})


def _write_malicious(folder: Path, marker: Path) -> None:
    """What would make `marker`, and tensors that are not dense."""
    command = text(f"touch '{marker}'")
    opened = text(f"open({str(marker)!r}, 'w')")
    extras = {
        "system": call("posix.system", command),
        "escape": call("os.\x1b[31msystem", command),
        "in_a_stand_in": call(
            "pytorch_lightning.callbacks.Timer", dict_of((text("a"), call("posix.system", command)))
        ),
        "eval": call("builtins.eval", opened),
        "exec_of_python_2": call("__builtin__.exec", opened),
        "popen": call("subprocess.Popen", text("touch") + text(str(marker)) + b"\x86"),
        "getattr": call("builtins.getattr", named("collections.OrderedDict"), text("fromkeys")),
        "hub": call("torch.hub.load", text(str(marker.parent)), text("model")),
        "torch_load": call("torch.load", text(str(marker.parent / "system.ckpt")), b"NN\x89"),
        "unknown_class": call("somebody.models.Autoencoder", opened),
    }
    for name, extra in extras.items():
        write_zip(folder / f"{name}.ckpt", state_dict(extra=extra))
    legacy = state_dict(tensor(legacy=b"N"), extra=extras["system"])
    write_legacy(folder / "legacy_system.ckpt", legacy)
    (folder / "protocol_4.ckpt").write_bytes(pickle.dumps({KEY: [1.0] * 9}, protocol=4))
    dense = torch.ones(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that quantised tensors are on their way out
        others = {
            "sparse": dense.to_sparse(),
            "quantised": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
            "meta": dense.to("meta"),
        }
        for name, x in others.items():
            torch.save({KEY: x}, folder / f"{name}_tensor.ckpt")


# --- safetensors


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _safetensors(path: Path, header: object, data: bytes) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def _write_safetensors(folder: Path) -> None:
    """Headers that lie; the data are 16 bytes."""
    entry = _entry("F32", [4], 0, 16)
    one = json.dumps(entry)
    headers: dict[str, object] = {
        "no_json": b"{" * 100,
        "no_text": b'{"\xff":1}',
        "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "no_object": [1],
        "two_keys": f'{{"a": {one}, "a": {one}}}'.encode(),
        "beyond": {KEY: _entry("F32", [8], 0, 32)},
        "backwards": {KEY: _entry("F32", [4], 16, 0)},
        "overlapping": {KEY: entry, "b": _entry("F32", [2], 8, 16)},
        "hole": {KEY: _entry("F32", [1], 0, 4), "b": _entry("F32", [1], 12, 16)},
        "too_small": {KEY: _entry("F32", [100], 0, 16)},
        "overflow": {KEY: _entry("F32", [2**33, 2**33], 0, 16)},
        "negative": {KEY: _entry("F32", [-4], 0, 16)},
        "unknown_dtype": {KEY: _entry("F33", [4], 0, 16)},
        "metadata_of_numbers": {"__metadata__": {"a": 1}, KEY: entry},
    }
    for name, header in headers.items():
        _safetensors(folder / f"{name}.safetensors", header, bytes(16))
    whole = struct.pack("<Q", len(one) + 8) + f'{{"abc": {one}}}'.encode()[: len(one) + 8]
    contents = {
        "empty": b"",
        "text": b"This is a text, and not even a long one.\n" * 9,
        "truncated": whole,
        "header_of_2_to_the_63": struct.pack("<Q", 2**63) + b"{" * 92,
        "header_beyond": struct.pack("<Q", 101) + b"{" + b" " * 99,
    }
    for name, content in contents.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    for name, start, size in (
        ("zeros", b"", 2 * 2**30),
        ("huge_header", struct.pack("<Q", 200 * 2**20) + b"{", 300 * 2**20),
    ):
        (folder / f"{name}.safetensors").write_bytes(start)
        os.truncate(folder / f"{name}.safetensors", size)
