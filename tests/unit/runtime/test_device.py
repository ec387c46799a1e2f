"""Devices by name."""

import pytest
import torch

from kl_vae.runtime.device import autocast, choose_device, deterministic


def test_the_cpu_is_always_there() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cpu:1", ""])
def test_an_unknown_device_is_named_with_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}': choose one of auto, cuda, mps, cpu"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_said_so() -> None:
    with pytest.raises(ValueError, match="device cuda: not available here; choose cpu"):
        choose_device("cuda")


def test_autocast_casts_in_half_precision_only() -> None:
    x = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (x @ x).dtype == dtype


def test_deterministic_holds_within_and_is_undone() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
