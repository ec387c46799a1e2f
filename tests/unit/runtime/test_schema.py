"""From plain values to a dataclass: conversions, and every kind of error."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from kl_vae.runtime.schema import from_mapping, show


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
    ("keys", "error"),
    [
        ({"nam": 1}, "nam=1: unknown key; did you mean name?"),
        ({"zzz": 1}, "zzz=1: unknown key; known keys are name, kind, sizes, pairs, flag, free, "),
        ({7: 1}, "7=1: unknown key; known keys are name"),
        ({"name": 1}, "name=1: is a whole number, expected text"),
        ({"name": None}, "name=None: is null, expected text"),
        ({"kind": "c"}, "kind='c': is text, expected one of a, b, 3"),
        ({"kind": True}, "kind=True: is true or false, expected one of a, b, 3"),
        ({"kind": ["a"]}, "kind=['a']: is a list, expected one of a, b, 3"),
        ({"sizes": [1, "2"]}, "sizes[1]='2': is text, expected a whole number"),
        ({"sizes": 1}, "sizes=1: is a whole number, expected a list, each item a whole number"),
        ({"sizes": [True]}, "sizes[0]=True: is true or false, expected a whole number"),
        ({"pairs": [{}, {"rat": 1}]}, "pairs[1].rat=1: unknown key; did you mean rate?"),
        ({"flag": 1}, "flag=1: is a whole number, expected true or false"),
        ({"free": [1]}, "free=[1]: is a list, expected keys and values or null"),
        ({"inner": 3}, "inner=3: expected keys and values, such as rate: ..."),
        ({"inner": None}, "inner=None: expected keys and values, such as rate: ..."),
        ({"inner": {"rate": -1}}, "inner.rate=-1.0: must be 0 or more"),
        ({"inner": {"rate": True}}, "inner.rate=True: is true or false, expected a finite number"),
        ({"inner": {"rate": float("inf")}}, "inner.rate=inf: is a number, expected a finite numb"),
        ({"inner": {"rate": 10**400}}, "inner.rate=1000"),
        (
            {"inner": {"steps": 1.0}},
            "inner.steps=1.0: is a number, expected a whole number or null",
        ),
        ({"maybe": {"rate": -1}}, "maybe.rate=-1.0: must be 0 or more"),
        ({"maybe": 3}, "maybe=3: is a whole number, expected Inner or null"),
    ],
)
def test_a_mistake_is_named_with_its_key_path_value_and_mend(
    keys: dict[Any, Any], error: str
) -> None:
    with pytest.raises(ValueError) as caught:
        from_mapping(Outer, {"name": "x"} | keys, path="top")
    assert str(caught.value).startswith(f"top.{error}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "mend"),
    [
        ("rate", "1e-4", "1.0e-04"),
        ("rate", "125e-6", "125.0e-06"),
        ("rate", "1.25E4", "1.25e+04"),
        ("rate", "-1.e-4", "-1.0e-04"),
        ("steps", "1e4", "10000"),
        ("steps", "2.5e1", "25"),
    ],
)
def test_a_number_that_yaml_reads_as_text_is_written_as_it_must_be(
    key: str, text: str, mend: str
) -> None:
    with pytest.raises(ValueError) as caught:
        from_mapping(Inner, {key: text})
    assert str(caught.value) == (
        f"{key}={text!r}: YAML reads {text} as text, since it has no point or no sign; write {mend}"
    )


def test_a_fraction_is_no_mend_of_a_whole_number() -> None:
    with pytest.raises(ValueError, match="steps='1e-4': is text, expected a whole number or null"):
        from_mapping(Inner, {"steps": "1e-4"})


def test_all_mistakes_are_named_at_once_in_the_files_order() -> None:
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


def test_a_whole_that_is_no_mapping_is_named_by_its_kind() -> None:
    with pytest.raises(ValueError, match=r"Outer=\[1\]: expected keys and values, such as name"):
        from_mapping(Outer, [1])


def test_show_is_one_short_line() -> None:
    assert show("a\nb") == r"'a\nb'"
    assert len(show(list(range(1000)))) == 80
    assert show(list(range(1000))).endswith("...")
