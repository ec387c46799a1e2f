"""Modules that were changed after their class was swapped compute what the plain ones do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune

from kl_vae import AutoEncoderKL, accelerate

Change = Callable[[AutoEncoderKL], Any]


@pytest.fixture
def model(tiny_ddconfig: dict[str, Any]) -> AutoEncoderKL:
    """Channels and maps for which every fast algorithm is taken."""
    torch.manual_seed(0)
    return AutoEncoderKL({**tiny_ddconfig, "ch": 64}, embed_dim=3).eval()


@pytest.fixture
def x() -> Tensor:
    return 2.0 * torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(1)) - 1.0


def run(model: AutoEncoderKL, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decode(model.encode(x).mode())


def block(model: AutoEncoderKL) -> Any:
    return model.decoder.up[0].block[1]


@pytest.mark.filterwarnings("ignore")  # of what the library looks for
@pytest.mark.parametrize("is_accelerated", [False, True])
@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload", "cpu_offload_with_hook"])
def test_offloaded_weights_give_the_plain_models_images(
    kind: str, is_accelerated: bool, model: AutoEncoderKL, x: Tensor, tmp_path: Path
) -> None:
    library = pytest.importorskip("accelerate")
    expected = run(model, x)
    if is_accelerated:
        accelerate(model)
    device = torch.device("cpu")
    if kind == "cpu_offload":
        library.cpu_offload(model, execution_device=device)
    elif kind == "disk_offload":
        library.disk_offload(model, str(tmp_path), execution_device=device)
    else:
        library.cpu_offload_with_hook(model, execution_device=device)
    for found in (run(model, x), model(x, sample_posterior=False)[0].detach()):
        assert (found - expected).abs().max() < 1e-5


def set_reflecting(model: AutoEncoderKL) -> None:
    for conv in (block(model).conv1, model.decoder.up[1].upsample.conv):
        conv.padding_mode = "reflect"
        conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def parametrize_weights(model: AutoEncoderKL) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight

    for module in (block(model).conv1, block(model).norm2, model.decoder.up[1].upsample.conv):
        parametrize.register_parametrization(module, "weight", Doubled())


def prune_weights(model: AutoEncoderKL) -> None:
    prune.l1_unstructured(block(model).conv2, "weight", 0.5)


def replace_forwards(model: AutoEncoderKL) -> None:
    for module in (block(model).conv1, model.decoder.norm_out, model.decoder.up[1].upsample.conv):
        before = module.forward
        module.forward = lambda x, before=before: 2.0 * before(x)


def hook_outputs(model: AutoEncoderKL) -> None:
    for name, module in model.decoder.named_modules():
        if not list(module.children()) and name:
            module.register_forward_hook(lambda module, inputs, out: out.mul(1.1))


def hook_inputs(model: AutoEncoderKL) -> None:
    for module in (block(model).conv2, block(model).dropout, model.decoder.up[0]):
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1, *inputs[1:]))


def regroup(model: AutoEncoderKL) -> None:
    block(model).norm1.num_groups = 16


CHANGES: list[Change] = [
    set_reflecting,
    parametrize_weights,
    prune_weights,
    replace_forwards,
    hook_outputs,
    hook_inputs,
    regroup,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("first", ["changed", "accelerated"])
def test_a_changed_model_gives_the_plain_ones_images(
    change: Change, first: str, model: AutoEncoderKL, x: Tensor
) -> None:
    plain = copy.deepcopy(model)
    before = run(plain, x)
    change(plain)
    expected = run(plain, x)
    assert (expected - before).abs().max() > 1e-3
    for step in (change, accelerate) if first == "changed" else (accelerate, change):
        step(model)  # type: ignore[operator]
    torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", ["norms", "blocks"])
def test_gradients_of_a_changed_model_are_those_of_the_plain_one(
    checkpointing: str, model: AutoEncoderKL, x: Tensor
) -> None:
    gradients = []
    for other in (copy.deepcopy(model), accelerate(model)):
        if other is model:
            model.set_activation_checkpointing(checkpointing)
        replace_forwards(other)
        parametrize_weights(other)
        other(x, sample_posterior=False)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in other.named_parameters()})
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert expected is not None and found is not None
        assert (found - expected).norm() < 1e-4 * expected.norm() + 1e-6, name


def test_every_kind_of_hook_is_called(model: AutoEncoderKL, x: Tensor) -> None:
    accelerate(model)
    model.set_activation_checkpointing("norms")
    part, seen = block(model), []
    part.conv1.register_forward_hook(lambda *_: seen.append("forward"))
    part.conv1.register_forward_pre_hook(lambda *_: seen.append("forward pre"))
    part.conv2.register_full_backward_hook(lambda *_: seen.append("backward"))
    part.norm2.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    model(x)[0].sum().backward()
    assert sorted(seen) == ["backward", "backward pre", "forward", "forward pre"]
    called: set[nn.Module] = set()
    handle = torch_module.register_module_forward_hook(lambda module, *_: called.add(module))
    run(model, x)
    handle.remove()
    assert {part.norm1, part.conv1, part.norm2, part.conv2, model.decoder.up[1]} <= called


def test_weights_on_meta_are_never_computed_with(model: AutoEncoderKL, x: Tensor) -> None:
    accelerate(model)
    meta = copy.deepcopy(model).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(meta, x).sum().item()  # no numbers come of it


@pytest.mark.filterwarnings("ignore")  # of torch, under vmap and jvp
def test_functional_transforms_see_the_plain_code(model: AutoEncoderKL) -> None:
    level, z = model.decoder.up[0], torch.randn(2, 128, 24, 24)
    results = []
    for other in (copy.deepcopy(level), accelerate(model).decoder.up[0]):
        mapped = torch.func.vmap(lambda one, other=other: other(one[None])[0])(z)
        _, forward = torch.func.jvp(other, (z,), (z,))
        model.set_activation_checkpointing("blocks")
        gradient = torch.func.grad(lambda z, other=other: other(z).square().mean())(z)
        results.append((mapped, forward, gradient))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_exports_compute_the_same(model: AutoEncoderKL, x: Tensor) -> None:
    accelerate(model)
    expected = run(model, x)
    model.set_activation_checkpointing("blocks")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(run(other, x), expected)
    z = torch.randn(1, 4, 24, 24)
    size = torch.export.Dim("size", min=4, max=64)
    exported = torch.export.export(model.decoder, (z,), dynamic_shapes=({2: size, 3: size},))
    for side in (24, 32):
        z = torch.randn(1, 4, side, side)
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(z), model.decoder(z), rtol=1e-4, atol=1e-4)
