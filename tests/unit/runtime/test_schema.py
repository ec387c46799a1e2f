"""From plain values to a dataclass: conversions, and every kind of error."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from kl_vae.runtime.schema import from_mapping, printable, show, suggest
from tests.messages import mentions


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    steps: int | None = None

    def __post_init__(self) -> None:
        errors = [f"{k}={v}: must be 0 or more" for k, v in vars(self).items() if v and v < 0]
        if errors:
            raise ValueError("\n".join(errors))


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    kind: Literal["a", "b", 3] = "a"
    sizes: tuple[int, ...] = ()
    pairs: tuple[Inner, ...] = ()
    flag: bool = False
    free: dict[str, Any] | None = None
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    texts: tuple[str, ...] = ()
    path: str | Path | None = None


@dataclass(frozen=True, kw_only=True)
class Numbers:
    number: float | None = None
    numbers: tuple[float, ...] = ()
    free: dict[str, Any] | None = None


def test_plain_values_become_a_dataclass() -> None:
    mapping = {
        "name": "x",
        "kind": 3,
        "sizes": [1, 2],
        "pairs": [{"rate": 2}],
        "flag": True,
        "free": {"any": [1, "b"]},
        "inner": {"rate": 1, "steps": 4},
        "maybe": {"steps": None},
    }
    config = from_mapping(Outer, mapping)
    assert config == Outer(
        name="x",
        kind=3,
        sizes=(1, 2),
        pairs=(Inner(rate=2.0),),
        flag=True,
        free={"any": [1, "b"]},
        inner=Inner(rate=1.0, steps=4),
        maybe=Inner(),
    )
    assert type(config.inner.rate) is float


def test_defaults_and_ready_dataclasses_are_taken() -> None:
    inner = Inner(rate=3.0)
    assert from_mapping(Outer, {"name": "x"}) == Outer(name="x")
    assert from_mapping(Outer, {"name": "x", "inner": inner}).inner is inner
    assert from_mapping(Outer, {"name": "x", "maybe": inner}).maybe is inner
    assert from_mapping(Inner, inner) is inner


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"nam": 1}, ("nam=1", "name")),
        ({"zzz": 1}, ("zzz=1", "name, kind, sizes, pairs, flag, free")),
        ({"steps": 1}, ("steps=1", "top.inner.steps", "top.maybe.steps")),
        ({"step": 1}, ("step=1", "top.inner.steps", "top.maybe.steps")),
        ({"inner": {"sizes": 1}}, ("inner.sizes=1", "top.sizes")),
        ({"inner": {"stepps": 1}}, ("inner.stepps=1", "steps")),
        ({7: 1}, ("7=1", "name, kind, sizes, pairs, flag, free")),
        ({"name": 1}, ("name=1",)),
        ({"name": None}, ("name=None",)),
        ({"kind": "c"}, ("kind='c'", "a, b, 3")),
        ({"kind": True}, ("kind=True", "a, b, 3")),
        ({"kind": ["a"]}, ("kind=['a']", "a, b, 3")),
        ({"sizes": [1, "2"]}, ("sizes[1]='2'",)),
        ({"sizes": 1}, ("sizes=1", "list")),
        ({"sizes": [True]}, ("sizes[0]=True",)),
        ({"pairs": [{}, {"rat": 1}]}, ("pairs[1].rat=1", "rate")),
        ({"flag": 1}, ("flag=1", "true", "false")),
        ({"free": [1]}, ("free=[1]", "null")),
        ({"inner": 3}, ("inner=3", "rate: ...")),
        ({"inner": None}, ("inner=None", "rate: ...")),
        ({"inner": {"rate": -1}}, ("inner.rate=-1.0: must be 0 or more",)),  # of Inner
        ({"inner": {"rate": True}}, ("inner.rate=True",)),
        ({"inner": {"rate": float("inf")}}, ("inner.rate=inf",)),
        ({"inner": {"steps": 1.0}}, ("inner.steps=1.0", "null")),
        ({"maybe": {"rate": -1}}, ("maybe.rate=-1.0: must be 0 or more",)),
        ({"maybe": 3}, ("maybe=3", "Inner", "null")),
    ],
)
def test_an_error_names_the_path_of_the_key_and_the_value(
    keys: dict[Any, Any], parts: tuple[str, ...]
) -> None:
    key, *others = parts
    with pytest.raises(ValueError, match=mentions(f"top.{key}", *others)) as caught:
        from_mapping(Outer, {"name": "x"} | keys, path="top")
    assert "\n" not in str(caught.value)


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(ValueError, match=r"\btop\.inner\.rate=1000+\.\.\.") as caught:
        from_mapping(Outer, {"name": "x", "inner": {"rate": 10**400}}, path="top")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("1e5", 1e5), ("-1e-3", -1e-3), ("+1.5e3", 1500.0)]
    + [("1.e4", 1e4), (".5e1", 5.0), ("125e-6", 125e-6)],
)
def test_a_number_that_pyyaml_reads_as_text_is_a_number(text: str, number: float) -> None:
    values = yaml.safe_load(f"{{number: {text}, numbers: [{text}], free: {{a: [{text}]}}}}")
    assert values["number"] == text
    config = from_mapping(Numbers, values)
    assert config == Numbers(number=number, numbers=(number,), free={"a": [number]})
    assert type(config.number) is float


def test_a_whole_number_may_have_an_exponent() -> None:
    config = from_mapping(Inner, {"steps": "1e4"})
    assert config.steps == 10000 and type(config.steps) is int
    assert from_mapping(Inner, {"steps": "2.5e1"}).steps == 25


def test_a_number_is_text_where_text_is_expected() -> None:
    config = from_mapping(Outer, {"name": "1e-5", "texts": ["1e5"], "path": "1e5"})
    assert (config.name, config.texts, config.path) == ("1e-5", ("1e5",), "1e5")


@pytest.mark.parametrize("text", ["1e-5x", "e5", "1e", "1e400", "many"])
def test_other_text_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match=mentions("number", "finite number")):
        from_mapping(Numbers, {"number": text})


def test_the_longer_name_is_suggested_before_one_that_is_spelled_alike() -> None:
    assert suggest("batch_size", ["patch_size", "global_batch_size"]) == (
        "did you mean global_batch_size?"
    )
    assert suggest("x", ["a", "b"]) == "choose one of a, b"


def test_a_fraction_is_no_whole_number() -> None:
    with pytest.raises(ValueError, match="steps='1e-4': is text, expected a whole number or null"):
        from_mapping(Inner, {"steps": "1e-4"})


def test_all_errors_are_named_at_once_in_order() -> None:
    mapping = {
        "extra": 1,
        "kind": "c",
        "sizes": ["1", 2.0],
        "inner": {"rate": -1, "steps": -2},
        "maybe": {"rate": "x", "other": 1},
    }
    with pytest.raises(ValueError) as caught:
        from_mapping(Outer, mapping)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "extra=1",
        "name",
        "kind='c'",
        "sizes[0]='1'",
        "sizes[1]=2.0",
        "inner.rate=-1.0",
        "inner.steps=-2",
        "maybe.other=1",
        "maybe.rate='x'",
    ]


def test_a_config_that_is_not_a_mapping() -> None:
    with pytest.raises(ValueError, match=mentions("Outer=[1]", "name")):
        from_mapping(Outer, [1])


def test_show_is_one_short_line() -> None:
    assert show("a\nb") == r"'a\nb'"
    assert len(show(list(range(1000)))) == 80
    assert show(list(range(1000))).endswith("...")


def test_keys_in_messages_are_printable() -> None:
    assert printable("é\n\x1b[31m\ud800") == "é\\n\\x1b[31m\\ud800"
    with pytest.raises(ValueError, match=mentions("inner.\\x1b[31m\\n=1")) as caught:
        from_mapping(Outer, {"name": "a", "inner": {"\x1b[31m\n": 1}})
    assert str(caught.value).isprintable()
