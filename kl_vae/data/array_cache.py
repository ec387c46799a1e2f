"""Arrays that were slow to make, kept in a folder of the user's between runs.

The folder is $KL_VAE_CACHE, else $XDG_CACHE_HOME/kl_vae, else ~/.cache/kl_vae; where
KL_VAE_CACHE is set and empty, nothing is kept. What is in it can be removed at any time.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kl_vae.data.paths import name_bytes
from kl_vae.runtime.files import write_atomically

logger = logging.getLogger(__name__)

VARIABLE = "KL_VAE_CACHE"
VERSION = 1  # of what is kept: raise it with every change of that
_ABOUT = "about"  # the array that holds what the others are of, as JSON


def cache_folder() -> Path | None:
    """Return the folder, which need not exist; None: nothing is to be kept."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return Path(os.path.expanduser(chosen)) if chosen else None
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "kl_vae")


def load_arrays(kind: str, place: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """Return what `save_arrays` was last given; None where there is nothing that can be used."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        # by its checksums a damaged file is an error here
        with open(folder / _file_name(kind, place), "rb") as file:
            stored = np.load(file, allow_pickle=False)
            arrays = {name: stored[name] for name in stored.files}
        about = dict(json.loads(arrays.pop(_ABOUT).tobytes()))
        if about.pop("version") != VERSION or about.pop("place") != place:
            return None
    except Exception:  # of a file that is missing, damaged, or of something else
        return None
    return about, arrays


def save_arrays(
    kind: str, place: str, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> None:
    """Keep arrays of plain numbers; where they cannot be kept the log says so.

    Args:
        kind: a word for what they are.
        place: the whole path of what they were made of; one that is kept is replaced.
        about: plain values to be returned with them, such as what shows that they still hold.
        arrays: by name.
    """
    folder = cache_folder()
    if folder is None:
        return
    text = json.dumps({**about, "version": VERSION, "place": place})
    content = BytesIO()
    named: dict[str, Any] = {_ABOUT: np.frombuffer(text.encode(), np.uint8), **arrays}
    np.savez(content, **named)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            folder / _file_name(kind, place),
            lambda file: file.write(content.getbuffer()),
            durable=False,
        )
    except OSError as error:
        logger.warning(
            "%s: cannot be written (%s), so that the next run lists its images again; set %s to "
            "a folder that can, or to nothing",
            *(ascii(str(folder)), error.strerror or error, VARIABLE),
        )


def _file_name(kind: str, place: str) -> str:
    return f"{kind}-{blake2b(name_bytes(place), digest_size=16).hexdigest()}.npz"
