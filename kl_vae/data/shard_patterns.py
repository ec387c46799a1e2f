"""The files that a pattern of shards names, as `shards/train-{0000..0127}.tar`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from kl_vae.data.paths import name_bytes
from kl_vae.data.scan import SHARD_EXTENSIONS
from kl_vae.runtime.files import display_name

MAX_SHARDS = 1_000_000  # of one pattern: each is a file
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def is_pattern(root: str) -> bool:
    """Whether a root names files by a pattern; what exists under that name is none."""
    return any(sign in root for sign in "*?[{") and not os.path.lexists(root)


def is_shard(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name is that of a tar shard."""
    return os.fspath(path).lower().endswith(SHARD_EXTENSIONS)


def expand_pattern(pattern: str) -> list[Path]:
    """Return the shards that a pattern names, sorted by the bytes of their paths, each once.

    `{0000..0127}` stands for numbers, of as many digits as its ends have, `{a,b}` for each of
    several texts, and `*`, `?` and `[...]` for what the folder holds.

    Raises:
        ValueError: a shard that braces name is not there, nothing matches, or what does is no
            `.tar` file.
    """
    paths: set[str] = set()
    missing: list[str] = []
    for number, name in enumerate(_expand_braces(pattern)):
        if number >= MAX_SHARDS:
            raise ValueError(
                f"{display_name(pattern)}: names more than {MAX_SHARDS:,} files; give fewer"
            )
        found = [name] if os.path.exists(name) else glob.glob(name) * glob.has_magic(name)
        paths.update(found)
        missing += [name] * (not found)
    if missing:
        others = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{display_name(pattern)}: no such file: {display_name(missing[0])}{others}; "
            "name shards that are there"
        )
    shards = sorted(paths, key=name_bytes)
    for path in shards:
        if os.path.isdir(path) or not is_shard(path):
            raise ValueError(
                f"{display_name(pattern)}: {display_name(path)} is no .tar file; a pattern is "
                "for shards, of a folder of images give the folder"
            )
    return [Path(path) for path in shards]


def _expand_braces(pattern: str) -> Iterator[str]:
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    for text in _alternatives(braces[1]):
        for rest in _expand_braces(after):
            yield before + text + rest


def _alternatives(content: str) -> Iterator[str]:
    numbers = _RANGE.fullmatch(content)
    if numbers is None:
        yield from content.split(",")
        return
    first, last = int(numbers[1]), int(numbers[2])
    digits = max(map(len, numbers.groups())) if "0" in (numbers[1][0], numbers[2][0]) else 1
    step = 1 if first <= last else -1
    for number in range(first, last + step, step):
        yield f"{number:0{digits}}"
