"""Damage valid files at random: their bytes, their structured values, and the parts inside of them.

Each function takes a `Random`, so that a damaged file can be made again.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import pickletools
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import yaml

from tests.image_kinds import png_chunk

INTEGERS = (0, 1, 2, 3, 7, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 1 << 24, 10**9)
INTEGERS += ((1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
# replaced in JSON and YAML by what Python's writers refuse
DEEP, LONG = "@deep@", "@long@"
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 1 << 20, 10**9, 1 << 31, 1 << 63, -(1 << 63)),
    *(10**30, 10**400, 0.5, 1.5, -0.0, 1e-300, 1e38, 1e308, float("inf"), float("-inf")),
    *(float("nan"), "", "auto", "null", "nan", "1e-4", "1e999", "a" * 10_000, "\x1b[31mred"),
    *("two\nlines", "\ud800", "\0", "é", "../../outside", "/dev/zero", "/proc/self/mem", "."),
    *("${model}", "%s", "[", "*", "**", "(", "{0..9}", "hf://a/b", "package:os", [], {}, [1, 2]),
    *([[]], [None], ["a"], {"a": None}, {"": 0}, {"0": []}, [float("nan")], DEEP, LONG),
)
_DEPTH = 3000


def damaged(name: str, content: bytes, other: bytes, draw: Random) -> bytes:
    """Return a damaged file.

    Args:
        name: of the file; its extension tells JSON and YAML.
        content: of a valid file.
        other: content of another file, to splice with.
        draw: the source of randomness.
    """
    inside = _inside(name, content)
    if inside is not None and draw.random() < 0.65:
        content = inside(content, draw)
        if draw.random() < 0.85:
            return content
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        content = damaged_bytes(content, draw, other)
    return content


def _inside(name: str, content: bytes) -> Callable[[bytes, Random], bytes] | None:
    """Return what damages the parts of a file of this type, and keeps checksums and lengths."""
    if content.startswith(b"\x89PNG"):
        return _png
    if content.startswith(b"II*\0"):
        return _tiff
    if content.startswith(b"PK\3\4"):
        return _zip
    if content[257:262] == b"ustar":
        return _tar
    extension = name.rpartition(".")[2]
    kinds = {"json": _json, "jsonl": _jsonl, "yaml": _yaml, "safetensors": _safetensors}
    return kinds.get(extension)


# --- bytes


def damaged_bytes(content: bytes, draw: Random, other: bytes = b"") -> bytes:
    """Return content with one change: of bits, bytes, an integer, a range, or a splice."""
    size = len(content)

    def place() -> int:
        """Return a position, often near the start or the end, where headers are."""
        near = draw.choice((size, size, 64, 512, -256))
        return (
            max(0, size + draw.randrange(near, 0))
            if near < 0
            else draw.randrange(min(near, size) + 1)
        )

    start, end = sorted((place(), place()))
    end = min(end, start + draw.choice((1, 4, 16, 256, size)))
    kind = draw.randrange(11)
    if kind <= 1:  # flip bits
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            if changed:
                changed[min(place(), size - 1)] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind <= 3:  # an integer
        length = draw.choice((1, 2, 4, 8))
        number = (draw.choice(INTEGERS) & ((1 << 8 * length) - 1)).to_bytes(
            length, draw.choice(("little", "big"))
        )
        return content[:start] + number + content[start + length :]
    inserted = {
        4: b"",  # delete
        5: draw.randbytes(end - start),
        6: bytes(end - start),
        7: content[start:end] * 2,
        8: draw.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"\n", b"\x1b[31m", b"{" * 64)),
    }
    if kind in inserted:
        return content[:start] + inserted[kind] + content[end:]
    if kind == 9:
        return content[:start]
    return content[:start] + other[draw.randrange(len(other) + 1) :]


# --- trees of dicts and lists


def damaged_tree(tree: Any, draw: Random) -> Any:
    """Return nested dicts and lists with one to three values or keys changed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        _collect(tree, places)
        if not places:
            return _odd_value(draw)
        container, key = draw.choice(places)
        _damage_at(container, key, places, draw)
    return _odd_value(draw) if draw.random() < 0.01 else tree


def _odd_value(draw: Random) -> Any:
    return copy.deepcopy(draw.choice(ODD_VALUES))


def _collect(tree: Any, places: list[tuple[Any, Any]]) -> None:
    if isinstance(tree, (dict, list)):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            places.append((tree, key))
            _collect(tree[key], places)


def _damage_at(container: Any, key: Any, places: list[tuple[Any, Any]], draw: Random) -> None:
    value = container[key]
    kind = draw.randrange(9)
    if kind <= 3:
        container[key] = _odd_value(draw)
    elif kind == 4:
        del container[key]
    elif kind == 5:  # the value of another key
        other, name = draw.choice(places)
        container[key] = copy.deepcopy(other[name])
    elif kind == 6 and isinstance(container, dict):
        name = draw.choice((*container, f"{key}x", "", "a.b", "\x1b[31m", "two\nlines", "\ud800"))
        container[name] = container.pop(key)
    elif kind == 6 or isinstance(value, (dict, list)):
        container[key] = draw.choice(([value], {"a": value}, [value, copy.deepcopy(value)]))
    elif isinstance(value, (int, float)) and abs(value) < 1e300:
        container[key] = draw.choice((-value, value * 1000, value + 1, value * 0.5, str(value)))
    else:
        container[key] = draw.choice(([value], f"{value}x", str(value)[1:]))


def _as_text(text: str) -> bytes:
    text = text.replace(json.dumps(DEEP), DEEP).replace(json.dumps(LONG), LONG)
    text = text.replace(f"'{DEEP}'", DEEP).replace(f"'{LONG}'", LONG)
    text = text.replace(DEEP, "[" * _DEPTH + "]" * _DEPTH).replace(LONG, "1" * 5000)
    return text.encode(errors="surrogatepass")


def _json(content: bytes, draw: Random) -> bytes:
    return _as_text(json.dumps(damaged_tree(json.loads(content), draw), indent=1))


def _jsonl(content: bytes, draw: Random) -> bytes:
    lines = content.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    line = _as_text(json.dumps(damaged_tree(json.loads(lines[number]), draw)) + "\n")
    return b"".join([*lines[:number], line, *lines[number + 1 :]])


def _yaml(content: bytes, draw: Random) -> bytes:
    tree = damaged_tree(yaml.safe_load(content), draw)
    return _as_text(yaml.safe_dump(tree, default_flow_style=draw.choice((None, True, False))))


# --- containers


def _png(content: bytes, draw: Random) -> bytes:
    """Damage a chunk or the pixels in it, and write the right lengths and checksums."""
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    number = draw.randrange(len(chunks))
    kind, data = chunks[number]
    action = draw.randrange(8)
    if action == 0:
        del chunks[number]
    elif action == 1:
        chunks.insert(draw.randrange(len(chunks) + 1), chunks[number])
    elif action == 2:
        names = (b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"sBIT", b"gAMA")
        chunks[number] = draw.choice(names), data
    elif kind == b"IDAT" and action <= 5:
        try:
            data = zlib.decompress(data)
        except zlib.error:  # one of several
            pass
        chunks[number] = kind, zlib.compress(damaged_bytes(data, draw))
    else:
        chunks[number] = kind, damaged_bytes(data, draw)
    return content[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def _tiff(content: bytes, draw: Random) -> bytes:
    """Damage a field of an entry of the first directory."""
    (start,) = struct.unpack("<I", content[4:8])
    (count,) = struct.unpack("<H", content[start : start + 2])
    at = start + 2 + 12 * draw.randrange(count)
    fields = list(struct.unpack("<HHII", content[at : at + 12]))
    field = draw.randrange(4)
    near = (fields[field] + draw.choice((-1, 1, 2, 8)), draw.randrange(20), draw.randrange(400))
    limit = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)[field]
    fields[field] = draw.choice((*near, *INTEGERS)) & limit
    return content[:at] + struct.pack("<HHII", *fields) + content[at + 12 :]


def _tar(content: bytes, draw: Random) -> bytes:
    """Damage a header, and write its right checksum."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        offsets = [member.offset for member in archive]
    start = draw.choice(offsets)
    header = content[start : start + 512]
    # name, size, checksum, type, link, magic, prefix
    first, last = draw.choice(
        ((0, 100), (124, 136), (156, 157), (157, 257), (257, 265), (345, 500))
    )
    field = damaged_bytes(header[first:last], draw)[: last - first].ljust(last - first, b"\0")
    if (first, last) == (156, 157):
        field = draw.choice((b"0", b"1", b"2", b"5", b"L", b"K", b"x", b"g", b"S", b"V", b"7"))
    header = header[:first] + field + header[last:]
    total = sum(header[:148]) + sum(header[156:]) + 8 * 32
    header = header[:148] + b"%06o\0 " % total + header[156:]
    return content[:start] + header + content[start + 512 :]


def _safetensors(content: bytes, draw: Random) -> bytes:
    """Damage the header, and write its right length."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    header = _json(header, draw) if draw.random() < 0.8 else damaged_bytes(header, draw)
    return struct.pack("<Q", len(header)) + header + data


def _zip(content: bytes, draw: Random) -> bytes:
    """Damage the values, the pickle or another entry of a torch.save file."""
    if draw.random() < 0.5:
        return _torch_values(content, draw)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickles = [name for name in entries if name.endswith("data.pkl")]
    name = draw.choice([*pickles * len(entries) * 4, *entries])
    entries[name] = (
        damaged_pickle(entries[name], draw)
        if name in pickles
        else damaged_bytes(entries[name], draw)
    )
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
        warnings.simplefilter("ignore")
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()


def _torch_values(content: bytes, draw: Random) -> bytes:
    """Damage the dicts and lists in a torch.save file, and the tensors in them."""
    tree = damaged_tree(torch.load(io.BytesIO(content), weights_only=True), draw)
    places: list[tuple[Any, Any]] = []
    _collect(tree, places)
    tensors = [place for place in places if isinstance(place[0][place[1]], torch.Tensor)]
    if tensors and draw.random() < 0.4:
        container, key = draw.choice(tensors)
        x = container[key]
        x = x if x.ndim else x[None]
        container[key] = draw.choice(
            (x[:1], x[None], x.flatten(), x.half(), x.double(), x.long(), x.bool(), x * torch.nan)
            + (x[:0], x.to(torch.complex64), x.to_sparse(), x.to("meta"), x.mean())
        )
    stream = io.BytesIO()
    torch.save(tree, stream)
    return stream.getvalue()


def damaged_pickle(content: bytes, draw: Random) -> bytes:
    """Change, delete, repeat or swap opcodes of a pickle, or bytes of it."""
    if draw.random() < 0.2:
        return damaged_bytes(content, draw)
    found = list(pickletools.genops(content))
    starts = [at for _, _, at in found] + [len(content)]
    parts = [content[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    for _ in range(draw.choice((1, 1, 2, 3))):
        number = draw.randrange(len(parts))
        opcode, argument, _ = found[number]
        action = draw.randrange(6)
        if type(argument) is int and opcode.name.startswith(("BININT", "LONG")) and action < 4:
            value = draw.choice((*INTEGERS, -1, argument + 1, argument * 1000, 1 << 200))
            parts[number] = pickle.dumps(value, protocol=2)[2:-1]
        elif opcode.name == "BINUNICODE" and action < 3:
            text = draw.choice(("", "cuda:0", "meta", "0", "\x1b[31m", "model", "a" * 1000))
            parts[number] = b"X" + struct.pack("<I", len(text)) + text.encode()
        elif action == 0:
            parts[number] = b""
        elif action == 1:
            parts[number] *= 2
        else:
            other = draw.randrange(len(parts))
            parts[number], parts[other] = parts[other], parts[number]
    return b"".join(parts)
