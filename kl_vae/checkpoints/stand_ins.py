"""Inert stand-ins for the instances of other packages' classes that lie beside weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

_LOCK = threading.Lock()  # torch's list of safe globals is the whole process's


class StandIn:
    """In place of an instance of another package's class: takes anything, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@contextmanager
def standing_in(makes: Mapping[str, type]) -> Iterator[None]:
    """Let torch.load with weights_only take a stand-in for each dotted name, and no longer.

    Only where this process has itself allowed a class may torch take that in its place.

    Args:
        makes: as of `PickleCheck`.
    """
    if not makes:
        yield
        return
    stand_ins: list[Any] = [(_stand_in(name, made), name) for name, made in makes.items()]
    with _LOCK, torch.serialization.safe_globals(stand_ins):
        yield


def _stand_in(name: str, made: type) -> type:
    module, _, attribute = name.rpartition(".")
    body: dict[str, Any] = {"__module__": module}
    if made is not StandIn:
        body["__new__"] = lambda cls, *args, **kwargs: made()
    return type(attribute, (StandIn,), body)
