"""Where the images of a tar shard are in it.

N images. The layout is WebDataset's: the members of a sample have one name up to the first dot of
their last part, as in `00/0017.jpg`, `00/0017.cls` and `00/0017.json`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kl_vae.data.array_cache import load_arrays, save_arrays
from kl_vae.data.images import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS
from kl_vae.data.paths import PathList
from kl_vae.data.tar_headers import Member, read_members
from kl_vae.runtime.files import display_name

CACHED_IMAGES = 100  # with fewer a shard is gone through as fast as its index is read
SIDECARS = (".cls", ".json")  # what stands beside an image: its class, and what else is known
_IMAGES = frozenset(IMAGE_EXTENSIONS + ARRAY_EXTENSIONS)
_KIND = "tar"
_NOWHERE = (-1, 0)


class TarIndex(NamedTuple):
    """The images of a shard in the order of the file, `.npy` arrays among them.

    Attributes:
        keys: the members' names, without `./` or `/` before them.
        spans: int64 [N,2], where each begins in the file and its size, in bytes; it begins at
            -1 where the member is a link or something else that has no content.
        sidecars: int64 [N,2,2], the same of the members beside each, in the order of `SIDECARS`;
            -1 where there is none.
        modified: int, the shard's `st_mtime_ns`, and
        length: its size in bytes, when it was gone through.
    """

    keys: PathList
    spans: NDArray[np.int64]
    sidecars: NDArray[np.int64]
    modified: int
    length: int


def index_shard(shard: Path, cache: bool = True) -> TarIndex:
    """Go through a shard, or take from the cache what was found when it was as it is now.

    Raises:
        ValueError: as `read_members`; or a name leads out of the folder that the shard would be
            unpacked to, or stands twice.
    """
    place = os.path.realpath(shard)
    try:
        status = os.stat(shard)
    except OSError as error:
        raise ValueError(
            f"{display_name(shard)}: cannot be read ({error.strerror}); give shards that can"
        ) from error
    state = {"modified": status.st_mtime_ns, "length": status.st_size}
    stored = load_arrays(_KIND, place) if cache else None
    if stored is not None and stored[0] == state:
        arrays = stored[1]
        keys = PathList(arrays["keys"].tobytes(), arrays["key_ends"])
        return TarIndex(keys, arrays["spans"], arrays["sidecars"], **state)
    keys, spans, sidecars = _go_through(shard)
    if cache and len(keys) >= CACHED_IMAGES:
        columns: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(keys.block, np.uint8),
            "key_ends": keys.ends,
            "spans": spans,
            "sidecars": sidecars,
        }
        save_arrays(_KIND, place, state, columns)
    return TarIndex(keys, spans, sidecars, **state)


def _go_through(shard: Path) -> tuple[PathList, NDArray[np.int64], NDArray[np.int64]]:
    keys: list[str] = []
    spans: list[tuple[int, int]] = []
    beside: dict[str, tuple[int, int]] = {}  # by the sample's name and the extension
    headers: dict[str, int] = {}
    for member in read_members(shard):
        key = _key(member, shard)
        extension = os.path.splitext(key)[1].lower()
        if member.folder or not (extension in _IMAGES or extension in SIDECARS):
            continue
        if _is_hidden(key):
            continue
        if key in headers:
            raise ValueError(
                f"{display_name(shard)}: two members are named {display_name(key)} (at bytes "
                f"{headers[key]:,} and {member.header:,}), of which one would replace the other; "
                "pack it again"
            )
        headers[key] = member.header
        span = (member.offset, member.size) if member.regular else _NOWHERE
        if extension in _IMAGES:
            keys.append(key)
            spans.append(span)
        else:
            beside[_sample(key) + extension] = span
    found = [beside.get(_sample(key) + kind, _NOWHERE) for key in keys for kind in SIDECARS]
    return (
        PathList.of(keys),
        np.array(spans, np.int64).reshape(-1, 2),
        np.array(found, np.int64).reshape(-1, len(SIDECARS), 2),
    )


def _key(member: Member, shard: Path) -> str:
    """Return a member's name as a relative path, as tar unpacks it."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in member.name:
        raise ValueError(
            f"{display_name(shard)}: the name of its member {ascii(member.name)} leads out of the "
            "folder that it would be unpacked to; pack it again"
        )
    return "/".join(parts)


def _is_hidden(key: str) -> bool:
    """Whether a folder's listing would leave the file out: what macOS packs as well, say."""
    return any(part.startswith(".") or part == "__MACOSX" for part in key.split("/"))


def _sample(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


def joined(indices: Sequence[TarIndex]) -> tuple[PathList, NDArray[Any], NDArray[Any]]:
    """Return the keys, spans and sidecars of several shards, one after the other."""
    return (
        PathList.joined([index.keys for index in indices]),
        np.concatenate([index.spans for index in indices]),
        np.concatenate([index.sidecars for index in indices]),
    )
