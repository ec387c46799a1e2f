"""What checkpoints are called where several stand side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence


def column_names(checkpoints: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """The given names of checkpoints, or their short ones, no two alike.

    Raises:
        ValueError: not one for each, one without letters, or two alike.
    """
    chosen = short_names(checkpoints) if names is None else list(names)
    if len(chosen) != len(checkpoints):
        raise ValueError(
            f"--names: {len(chosen)} for {len(checkpoints)} checkpoints; give one for each"
        )
    for i, name in enumerate(chosen):
        if not name.strip() or not name.isprintable():
            raise ValueError(f"--names: {name!r} cannot head a column; give printable letters")
        if name in chosen[:i]:
            raise ValueError(
                f"two checkpoints are called {name}; give --names, one for each, or leave one out"
            )
    return chosen


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """Each checkpoint by that part of its path in which it differs from the others.

    `runs/a/checkpoints/last.pt` and `runs/b/checkpoints/last.pt` are `a` and `b`; one alone is
    its file's or folder's name. Suffixes that all have are left out.
    """
    paths = [_parts(checkpoint) for checkpoint in checkpoints]
    while _all_agree(paths, 0):
        paths = [path[1:] for path in paths]
    while len(paths) > 1 and _all_agree(paths, -1):
        paths = [path[:-1] for path in paths]
    names = ["/".join(path) for path in paths]
    suffixes = {os.path.splitext(name)[1] for name in names}
    # of a number, such as that of version-1.5, it is no suffix
    if len(suffixes) == 1 and (suffix := suffixes.pop())[1:].isalpha():
        names = [name.removesuffix(suffix) for name in names]
    return names


def _parts(checkpoint: str) -> list[str]:
    parts = [part for part in os.path.normpath(checkpoint).split(os.sep) if part]
    return parts or [checkpoint]


def _all_agree(paths: list[list[str]], position: int) -> bool:
    """Whether one part is the same in all of them, and none would be left empty without it."""
    return min(map(len, paths)) > 1 and len({path[position] for path in paths}) == 1
