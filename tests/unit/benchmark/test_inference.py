"""Encoding and decoding of every way: the same results, and what is measured of them."""

import copy
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.benchmark import flops
from kl_vae.benchmark.inference import (
    coder,
    coding_input,
    measure_coding,
    random_model,
    their_ways,
    ways,
)
from kl_vae.benchmark.twin import build_twin, twin_of, why_no_twin
from kl_vae.ddconfig import DDConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_SIDE", 64)


@pytest.fixture
def ddconfig(tiny_ddconfig: dict[str, Any]) -> DDConfig:
    return DDConfig.from_dict(tiny_ddconfig)


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_every_way_gives_the_same(ddconfig: DDConfig, work: Any) -> None:
    pytest.importorskip("diffusers")
    ((theirs, *others),) = measure_coding(
        ddconfig, 4, CPU, work, sizes=[32], batch_sizes=[2], repeats=1
    )
    assert theirs.way == "diffusers" and theirs.difference == 0.0
    assert [m.way for m in others] == ["diffusers, channels_last", *ways(CPU)]
    for m in others:
        assert m.difference is not None and m.difference < 1e-5
    for m in (theirs, *others):
        assert (m.work, m.batch_size, m.size) == (work, 2, 32)
        assert m.timing.median > 0.0 and m.product_rate > 0.0 and m.flops == theirs.flops


def test_without_diffusers_ours_come_alone(
    ddconfig: DDConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kl_vae.benchmark.twin.find_spec", lambda _: None)
    text = "Ours alone: diffusers is not installed (pip install diffusers)."
    assert why_no_twin(ddconfig, 4) == text
    ((first, *_),) = measure_coding(
        ddconfig, 4, CPU, "encode", sizes=[16], batch_sizes=[1], repeats=1
    )
    assert first.way == "ours, plain modules"


def test_a_model_that_diffusers_cannot_express_comes_alone(ddconfig: DDConfig) -> None:
    pytest.importorskip("diffusers")
    said = why_no_twin(ddconfig, 3)
    assert said is not None
    assert said.startswith("Ours alone: diffusers cannot express this model: embed_dim=3: it has")
    with pytest.raises(ValueError, match="diffusers cannot express this model: embed_dim=3"):
        build_twin(ddconfig, 3)


def test_images_of_random_weights_have_the_size_of_images(ddconfig: DDConfig) -> None:
    model = random_model(ddconfig, 3)
    image = model.decode(coding_input("decode", (1, 3, 16, 16)))
    assert 0.5 < image.abs().max() < 2.0
    again = random_model(ddconfig, 3).get_last_layer()
    assert torch.equal(again, model.get_last_layer())


def test_sizes_and_numbers_are_swept(ddconfig: DDConfig) -> None:
    found = measure_coding(
        ddconfig, 3, CPU, "decode", sizes=[16, 32], batch_sizes=[1, 2], repeats=1
    )
    shapes = [(m.batch_size, m.size) for m, *_ in found]
    assert shapes == [(1, 16), (2, 16), (1, 32), (2, 32)]


def test_half_precision_has_a_row_with_half_precision_weights(ddconfig: DDConfig) -> None:
    pytest.importorskip("diffusers")
    assert list(their_ways("bf16"))[-1] == "diffusers, bf16 weights"
    model = AutoEncoderKL(ddconfig, 4).eval()
    twin = twin_of(model)
    x = coding_input("encode", (1, 3, 16, 16))
    expected = coder(twin, "encode", CPU, "fp32")(x)
    for way in their_ways("bf16").values():
        result = coder(way(copy.deepcopy(twin)), "encode", CPU, "bf16")(x)
        assert (result.float() - expected).abs().max() < 0.1
