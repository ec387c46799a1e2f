"""Devices by name."""

import pytest
import torch

from kl_vae.runtime.device import (
    autocast,
    choose_device,
    copy_to_device,
    deterministic,
    on_cpu,
)
from tests.messages import mentions


def test_the_cpu_is_always_available() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cpu:1", ""])
def test_an_unknown_device_is_an_error_that_names_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match=mentions(f"'{name}'", "auto, cuda, mps, cpu")):
        choose_device(name)


def test_several_ranks_do_not_share_one_gpu() -> None:
    with pytest.raises(ValueError, match=mentions("cuda:0", 2, "CUDA_VISIBLE_DEVICES")):
        choose_device("cuda:0", 1, 2)
    assert choose_device("cpu", 1, 2) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_unavailable_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match=mentions("cuda", "cpu")) as caught:
        choose_device("cuda")
    assert "mps" not in str(caught.value)  # not the error of an unknown name


def test_autocast_casts_in_half_precision_only() -> None:
    x = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (x @ x).dtype == dtype


def test_deterministic_is_restored() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_tensors_are_copied_together_without_a_change() -> None:
    tensors = [
        torch.tensor(0.1, dtype=torch.float64),
        torch.arange(6.0).view(2, 3),
        torch.tensor([2**40 + 1, -1]),
        torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True),
        torch.empty(0),
    ]
    copies = on_cpu(tensors)
    assert len(copies) == len(tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == torch.float64 and not copy.requires_grad
        assert copy.shape == tensor.shape and torch.equal(copy, tensor.detach().double())
    assert on_cpu([]) == []
    assert copy_to_device(tensors[1], torch.device("cpu")) is tensors[1]
