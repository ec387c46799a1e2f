"""Devices by name."""

import pytest
import torch

from kl_vae.runtime import device as device_module
from kl_vae.runtime.device import (
    autocast,
    choose_device,
    copy_to_device,
    deterministic,
    gpu_settings,
    on_cpu,
)
from tests.messages import is_about, mentions


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


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the allocator is told, instead of a GPU's."""
    told: list[object] = []
    monkeypatch.setattr(device_module, "_set_allocator", told.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device_module.sys, "platform", "linux")
    return told


def state() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("fixed_sizes", "deterministic", "benchmark", "growing"),
    [(True, False, True, False), (True, True, False, False), (False, False, False, True)],
)
def test_settings_of_a_gpu_are_logged_and_restored(
    settings: list[object],
    caplog: pytest.LogCaptureFixture,
    fixed_sizes: bool,
    deterministic: bool,
    benchmark: bool,
    growing: bool,
) -> None:
    caplog.set_level("INFO")
    before = state()
    with (
        pytest.raises(KeyError),
        gpu_settings(torch.device("cuda"), fixed_sizes=fixed_sizes, deterministic=deterministic),
    ):
        assert state() == ("high", benchmark)
        assert settings == ["expandable_segments:True"] * growing
        raise KeyError
    assert state() == before
    assert settings == ["expandable_segments:True", "expandable_segments:False"][: 2 * growing]
    (message,) = caplog.messages
    assert is_about(message, "float32_matmul_precision=high", "pinned memory")
    assert is_about(message, "cudnn.benchmark") == benchmark
    assert is_about(message, "expandable_segments") == growing


def test_settings_of_the_user_prevail(
    settings: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with gpu_settings(torch.device("cuda"), fixed_sizes=False, deterministic=True):
        assert state() == ("highest", True) and settings == []
    assert state() == ("highest", True) and settings == []


def test_nothing_is_set_on_a_cpu(settings: list[object], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = state()
    with gpu_settings(torch.device("cpu"), fixed_sizes=True, deterministic=False):
        assert state() == before
    assert settings == [] and not caplog.messages
