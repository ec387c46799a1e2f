"""What the pickles of a checkpoint may call: torch's dense tensors, and inert stand-ins.

Checkpoints of trainers hold instances of other packages' classes beside the weights. Those of
well-known packages are read as `StandIn`s; the classes themselves are never imported.
"""

from __future__ import annotations

import pickletools
import re
from collections import OrderedDict
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, BinaryIO, NoReturn

import torch

from kl_vae.checkpoints.stand_ins import StandIn

_PACKAGES = (
    "pytorch_lightning lightning lightning_fabric lightning_utilities torchmetrics omegaconf ldm "
    "sgm taming fsspec easydict ml_collections yacs argparse pathlib typing enum datetime "
    "diffusers.configuration_utils numpy.dtypes"
)
_STAND_INS = re.compile(
    rf"({'|'.join(map(re.escape, _PACKAGES.split()))})\..+"
    r"|numpy\.(core|_core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)"
    r"|numpy\.(dtype|ndarray|bool_?|(u?int|float|complex)\d+)"
    r"|builtins\.(list|dict|tuple|frozenset|int|float|bool|str|bytes|object|slice|range)"
    r"|collections\.(defaultdict|deque)|copyreg\._reconstructor|functools\.partial"
    r"|types\.SimpleNamespace"
)
_OF_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocol 2 writes them
_OF_PYTHON_2 |= {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}
_OF_PYTHON_2 |= {"builtins.xrange": "builtins.range"}

# Of what torch calls with weights_only, what torch.save needs for dense tensors: the kind that it
# makes, and the kinds of arguments. Not bytearray (of any length), sparse or quantised tensors.
_CALLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "collections.OrderedDict": ("dict", ("list of lists",)),
    "collections.Counter": ("dict", ("dict",)),
    "builtins.set": ("set", ("list", "list of lists")),
    "builtins.complex": ("constant", ("constant",)),
    "_codecs.encode": ("constant", ("constant",)),
    "torch.Size": ("constant", ("tuple", "list", "list of lists")),
    "torch.device": ("constant", ("constant",)),
    "torch.nn.parameter.Parameter": ("tensor", ("tensor", "constant")),
}
for _name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state"):
    _CALLS[f"torch._utils._rebuild_{_name}"] = (
        "tensor",
        ("storage", "tensor", "constant", "tuple", "dict", "name"),
    )
_STORAGE = re.compile(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage")
_ITEM_BYTES = {"Untyped": 1, "Bool": 1, "Byte": 1, "Char": 1, "Short": 2, "Half": 2, "BFloat16": 2}
_ITEM_BYTES |= {
    "Int": 4,
    "Float": 4,
    "Long": 8,
    "Double": 8,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
}

_MOST_STEPS = 1_000_000  # of a file; a tensor takes some 50, and a step up to 230 bytes of memory


@dataclass(eq=False, slots=True)
class _Made:
    """What an opcode would make, and the steps that its use as an argument or a key costs."""

    # constant, name, tuple, list, list of lists, dict, set, tensor, storage or stand-in
    kind: str
    value: Any = None  # a constant; a dotted name, also of a stand-in's class; a tuple's items
    cost: int = 1


class PickleCheck:
    """Follow the opcodes of a file's pickles without making anything, and refuse odd ones.

    With weights_only, torch calls nothing but harmless functions, though with any arguments: few
    bytes can ask for any amount of memory or time, and torch 2.6 reads beyond a storage's end.

    Attributes:
        storages: the bytes of each storage that is asked for, by its key.
        makes: the type of the instances, for each name that needs a stand-in: `StandIn`, but
            OrderedDict or list where the pickle fills them, which torch does for no other.
    """

    def __init__(self) -> None:
        self.storages: dict[str, int] = {}
        self.makes: dict[str, type] = {}
        self._not_filled: set[str] = set()  # names: what BUILD gives them is nothing for a dict
        self._stack: list[_Made] = []
        self._steps = 0

    def follow(self, stream: BinaryIO) -> None:
        """Follow one pickle, to its end.

        Raises:
            UnpicklingError: it names what is not allowed, or does what torch.save never does.
            Exception: of any other kind, where it is damaged.
        """
        self._stack = []
        below: list[list[_Made]] = []  # stacks under marks
        memo: dict[Any, _Made] = {}  # by the number that PUT and GET give
        for opcode, argument, _ in pickletools.genops(stream):
            self._spend(1)
            name = opcode.name
            items: list[_Made] = []
            if name in ("APPENDS", "SETITEMS", "TUPLE"):
                self._stack, items = below.pop(), self._stack
            elif name in _OPERANDS:
                items = [self._stack.pop() for _ in range(_OPERANDS[name])][::-1]
            match name:
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = self._stack[-1]
                case "BINGET" | "LONG_BINGET":
                    self._stack.append(memo[argument])
                case "MARK":
                    below.append(self._stack)
                    self._stack = []
                case "APPEND" | "APPENDS":
                    self._fill("list", list, items)
                case "SETITEM" | "SETITEMS":
                    self._fill("dict", OrderedDict, items)
                case "BUILD":
                    self._build(*items)
                case "PROTO" | "STOP":
                    pass
                case _:
                    self._stack.append(self._make(name, argument, items))

    def _make(self, opcode: str, argument: Any, items: list[_Made]) -> _Made:
        match opcode:
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "BININT" | "BININT1" | "BININT2" | "BINFLOAT":
                return _Made("constant", argument)
            case "BINUNICODE" | "SHORT_BINSTRING":
                return _Made("constant", argument, 1 + len(argument) // 64)
            case "LONG1":  # many that hash alike would make a dict slow
                return _Made("constant", argument, 1 if abs(argument) < 2**60 else 1000)
            case "EMPTY_LIST":
                return _Made("list of lists")
            case "EMPTY_DICT" | "EMPTY_SET":
                return _Made(opcode.removeprefix("EMPTY_").lower())
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                return _Made("tuple", items, self._cost(items))
            case "GLOBAL":
                return _Made("name", self._name(argument))
            case "BINPERSID":
                return self._storage(items[0])
            case "REDUCE" | "NEWOBJ":
                return self._call(opcode, *items)
        raise UnpicklingError(f"pickle opcode {opcode}")

    def _name(self, argument: str) -> str:
        """Check the module and name of a GLOBAL, and return them with a dot between."""
        module, _, attribute = argument.partition(" ")
        name = f"{_OF_PYTHON_2.get(module, module)}.{attribute}"
        name = _OF_PYTHON_2.get(name, name)
        known = name in _CALLS or _STORAGE.fullmatch(name) is not None
        if not known and module == "torch":
            known = isinstance(vars(torch).get(attribute), torch.dtype)
        if not known and _STAND_INS.fullmatch(name) and all(map(str.isidentifier, name.split("."))):
            known = self.makes.setdefault(name, StandIn) is not None
        if not known:
            raise UnpicklingError(f"it names {name}")
        return name

    def _storage(self, identity: _Made) -> _Made:
        items = identity.value if identity.kind == "tuple" else []
        match [item.value for item in items]:
            case ["storage", str(name), str(key), str(), int(count), *_] if count >= 0:
                storage = _STORAGE.fullmatch(name)
                item_bytes = _ITEM_BYTES.get(storage[1]) if storage else None
                if items[1].kind == "name" and item_bytes is not None:
                    size = count * item_bytes
                    if self.storages.setdefault(key, size) == size:
                        return _Made("storage")
        _refuse("a storage of no known type, key and size")

    def _call(self, opcode: str, function: _Made, arguments: _Made) -> _Made:
        if function.kind != "name" or arguments.kind != "tuple":
            _refuse(f"{opcode} of a {function.kind} with a {arguments.kind}")
        self._spend(arguments.cost)
        name, items = function.value, arguments.value
        if name in self.makes:
            return _Made("stand-in", name)
        made, kinds = _CALLS.get(name, ("", ()))
        if not made or any(item.kind not in kinds for item in items):
            _refuse(f"{opcode} of {name} with {[item.kind for item in items[:9]]}")
        if name == "_codecs.encode" and items[1].value not in ("latin1", "latin-1"):
            _refuse(f"{name} to {items[1].value}")  # to hex, and again, doubles a string
        return _Made(made, cost=arguments.cost)

    def _fill(self, kind: str, made: type, items: list[_Made]) -> None:
        target = self._stack[-1]
        if target.kind == "list of lists" and any(
            item.kind not in ("list", "list of lists") for item in items
        ):
            target.kind = "list"
        name = target.value if target.kind == "stand-in" else None
        if name and self.makes[name] in (StandIn, made) and name not in self._not_filled:
            self.makes[name] = made
        elif target.kind not in (kind, "list of lists" if kind == "list" else kind):
            _refuse(f"a {target.kind} filled like a {kind}")
        target.cost = self._cost([target, *items])
        if kind == "dict":
            self._spend(self._cost(items[::2]))  # keys are hashed

    def _build(self, state: _Made) -> None:
        target = self._stack[-1]
        if target.kind == "stand-in" and state.kind != "dict":
            self._not_filled.add(target.value)
            right = self.makes[target.value] is StandIn
        else:
            right = target.kind in ("dict", "stand-in") and state.kind == "dict"
        if not right:
            _refuse(f"BUILD of a {target.kind} with a {state.kind}")

    def _cost(self, items: list[_Made]) -> int:
        return min(1 + sum(item.cost for item in items), _MOST_STEPS + 1)

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            _refuse(f"more than {_MOST_STEPS} steps")


_OPERANDS = {"APPEND": 1, "BUILD": 1, "BINPERSID": 1, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OPERANDS |= {"SETITEM": 2, "REDUCE": 2, "NEWOBJ": 2}


def _refuse(what: str) -> NoReturn:
    raise UnpicklingError(f"{what}, which torch.save does not write")
