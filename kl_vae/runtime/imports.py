"""Import of what a config names, only below prefixes that the user allowed."""

from __future__ import annotations

import importlib
import re
from typing import Any

_PREFIXES: set[str] = set()
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def allow_import(prefix: str) -> None:
    """Allow configs to name classes and functions of a module or package, in this process.

    Args:
        prefix: dotted name of the module or package, such as my_package.

    Raises:
        ValueError: it is not a dotted name.
    """
    if not _DOTTED.fullmatch(prefix):
        raise ValueError(f"allow_import {prefix!r}: give a module or package, such as my_package")
    _PREFIXES.add(prefix)


def import_named(path: str, key: str) -> Any:
    """Return the class or function with a dotted path below an allowed prefix.

    Nothing is imported unless the path is below such a prefix. An object that the module took from
    elsewhere (`from os import system`) is refused.

    Args:
        path: dotted path of a class or function.
        key: the config key that names it, for errors.

    Raises:
        ValueError: no prefix allows the path, or there is no such class or function.
    """
    module, _, name = path.rpartition(".")
    if not module or not _DOTTED.fullmatch(path):
        raise ValueError(f"{key}={path!r}: not the dotted path of a class, such as my_package.Loss")
    if not _is_allowed(path):
        raise ValueError(
            f"{key}={path}: not imported, as no allowed prefix covers it; if you trust this code, "
            f"give --allow-import {module} (Python: kl_vae.allow_import({module!r}))"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{key}={path}: cannot be imported ({error}); give the dotted path of a class in this "
            "folder or on PYTHONPATH"
        ) from None
    if not callable(found):
        raise ValueError(f"{key}={path}: not callable; give a class or function")
    origin = str(getattr(found, "__module__", None))
    if not _is_allowed(origin):
        raise ValueError(f"{key}={path}: comes from {origin}; name one of {module} itself")
    return found


def _is_allowed(path: str) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in _PREFIXES)
