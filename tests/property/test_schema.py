"""Configs are read back as written, and any value is either accepted or a clear error."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_vae import DDConfig
from kl_vae.optim.config import OptimizerConfig
from kl_vae.runtime.config_file import dump_config, parse_yaml
from kl_vae.runtime.schema import from_mapping

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abc.:"), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text("abc -:#{}1"), values, max_size=5))
def test_a_dumped_config_is_read_back_unchanged(config: dict[str, Any]) -> None:
    assert parse_yaml(dump_config(config), "it") == config


@st.composite
def ddconfigs(draw: st.DrawFn) -> DDConfig:
    ch_mult = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    resolution = draw(st.integers(1, 8)) << (len(ch_mult) - 1)
    levels = [resolution >> level for level in range(len(ch_mult))]
    return DDConfig(
        ch=32 * draw(st.integers(1, 4)),
        out_ch=draw(st.integers(1, 5)),
        ch_mult=tuple(ch_mult),
        num_res_blocks=draw(st.integers(1, 3)),
        attn_resolutions=tuple(draw(st.lists(st.sampled_from(levels), max_size=3))),
        in_channels=draw(st.integers(1, 5)),
        resolution=resolution,
        z_channels=draw(st.integers(1, 64)),
        dropout=draw(st.floats(0.0, 1.0, exclude_max=True)),
        attn_type=draw(st.sampled_from(["vanilla", "linear", "none"])),
        tanh_out=draw(st.booleans()),
    )


@given(ddconfigs())
def test_a_ddconfig_survives_yaml(config: DDConfig) -> None:
    text = dump_config(dataclasses.asdict(config))
    assert DDConfig.from_dict(parse_yaml(text, "it")) == config


PUBLISHED = DDConfig(
    ch=128,
    out_ch=3,
    ch_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    attn_resolutions=(),
    in_channels=3,
    resolution=256,
    z_channels=4,
)


@pytest.mark.parametrize("valid", [PUBLISHED, OptimizerConfig()], ids=["ddconfig", "optimizer"])
@given(data=st.data())
def test_values_of_any_kind_are_taken_or_named(
    valid: DDConfig | OptimizerConfig, data: st.DataObject
) -> None:
    keys = st.sampled_from([field.name for field in dataclasses.fields(valid)])
    changes = data.draw(st.dictionaries(keys, values, min_size=1, max_size=3))
    try:
        config = from_mapping(type(valid), dataclasses.asdict(valid) | changes, path="section")
    except ValueError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.startswith("section.") and ": " in line for line in lines)
    else:
        # what was taken is what was given, lists as tuples
        for key, value in changes.items():
            taken = getattr(config, key)
            assert (list(taken) if isinstance(taken, tuple) else taken) == value
