"""What a model gives is the same, however it is computed."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kl_vae import AutoEncoderKL, register_block
from kl_vae.accel.accelerate import accelerate, accelerate_as
from kl_vae.accel.checkpointing import ACTIVATION_CHECKPOINTING
from kl_vae.accel.convolution import WinogradConv2d
from kl_vae.blocks import ResnetBlock
from tests.messages import mentions

VARIANTS = {
    "channels_last": {"winograd": False, "merge_upsampling": False, "channels_last": True},
    "winograd": {"winograd": True, "merge_upsampling": False, "channels_last": False},
    "merge_upsampling": {"winograd": False, "merge_upsampling": True, "channels_last": False},
    "auto": {},
}


@pytest.fixture
def wide_ddconfig(tiny_ddconfig: dict[str, Any]) -> dict[str, Any]:
    """Channels for which Winograd's convolutions are used."""
    return {**tiny_ddconfig, "ch": 64}


@pytest.fixture
def wide_model(wide_ddconfig: dict[str, Any]) -> AutoEncoderKL:
    torch.manual_seed(0)
    return AutoEncoderKL(wide_ddconfig, embed_dim=3).eval()


def images(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2.0 * torch.rand(2, 3, height, width, generator=generator) - 1.0


@torch.no_grad()
def results(model: AutoEncoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    posterior = model.encode(x)
    return posterior.parameters, model.decode(posterior.mode())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(48, 48), (34, 38)])
def test_each_variant_gives_the_same(
    wide_model: AutoEncoderKL, variant: str, size: tuple[int, int]
) -> None:
    expected = results(wide_model, images(*size))
    state = {key: x.clone() for key, x in wide_model.state_dict().items()}
    assert accelerate(wide_model, **VARIANTS[variant]) is wide_model
    tolerance = 1e-4 if variant in ("auto", "winograd") else 1e-5
    for ours, plain in zip(results(wide_model, images(*size)), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    after = wide_model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], x) for key, x in state.items())


def test_it_can_be_undone_and_repeated(wide_model: AutoEncoderKL) -> None:
    expected = results(wide_model, images(32, 32))
    accelerate(accelerate(wide_model))
    assert any(type(module) is WinogradConv2d for module in wide_model.modules())
    assert type(wide_model.encoder.conv_in) is WinogradConv2d
    accelerate_as("off", wide_model)
    classes = {type(module).__module__ for module in wide_model.modules()}
    assert not [name for name in classes if name.startswith("kl_vae.accel")]
    for ours, plain in zip(results(wide_model, images(32, 32)), expected, strict=True):
        assert torch.equal(ours, plain)


def test_maps_are_channels_last_from_end_to_end(wide_model: AutoEncoderKL) -> None:
    accelerate_as("exact", wide_model)
    seen = []
    for module in wide_model.modules():
        if isinstance(module, (ResnetBlock, nn.GroupNorm)):
            module.register_forward_hook(lambda *given: seen.append(given[2]))
    results(wide_model, images(32, 48))
    assert len(seen) > 20
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@pytest.mark.parametrize("checkpointing", [None, *ACTIVATION_CHECKPOINTING])
def test_gradients_are_those_of_the_plain_model(
    wide_model: AutoEncoderKL, checkpointing: str | None
) -> None:
    grads = []
    for model in (copy.deepcopy(wide_model), accelerate(wide_model)):
        torch.manual_seed(2)  # of the posterior's samples
        model.training_step(images(32, 32), 0).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        wide_model.set_activation_checkpointing(checkpointing)
    for name, expected in grads[0].items():
        found = grads[1][name]
        assert expected is not None and found is not None
        # a norm makes the gradient of the bias before it 0 but for rounding
        assert (found - expected).norm() < 1e-4 * expected.norm() + 1e-6, name


def test_copies_and_pickles_compute_the_same(wide_model: AutoEncoderKL) -> None:
    expected = results(accelerate(wide_model), images(32, 32))
    for other in (copy.deepcopy(wide_model), pickle.loads(pickle.dumps(wide_model))):
        assert type(other.decoder.mid.block_1.conv1) is WinogradConv2d
        assert all(map(torch.equal, results(other, images(32, 32)), expected))


def test_half_precision_is_computed_plainly(wide_model: AutoEncoderKL) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(wide_model, images(32, 32))
        accelerated = results(accelerate(wide_model), images(32, 32))
    for ours, plain in zip(accelerated, expected, strict=True):
        assert (ours.float() - plain.float()).abs().max() < 0.03 * plain.float().abs().max()


def test_own_blocks_are_computed_as_they_are_written(wide_ddconfig: dict[str, Any]) -> None:
    @register_block("grouped")
    class Grouped(ResnetBlock):
        def __init__(self, in_channels: int, out_channels: int, **keys: Any) -> None:
            super().__init__(in_channels, out_channels, **keys)
            self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=4)

    model = AutoEncoderKL({**wide_ddconfig, "block_type": "grouped"}, embed_dim=3).eval()
    expected = results(model, images(32, 32))
    accelerate(model)
    assert type(model.decoder.mid.block_1.conv1) is nn.Conv2d
    assert type(model.decoder.mid.block_1.conv2) is WinogradConv2d
    for ours, plain in zip(results(model, images(32, 32)), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_modes_have_names(wide_model: AutoEncoderKL) -> None:
    with pytest.raises(ValueError, match=mentions("fast='fastest'", "auto", "exact", "off")):
        accelerate_as("fastest", wide_model)
    accelerate_as("exact", wide_model)
    assert not any(type(module) is WinogradConv2d for module in wide_model.modules())


def test_compiling_leaves_the_names_of_the_weights(wide_model: AutoEncoderKL) -> None:
    names = list(wide_model.state_dict())
    accelerate(wide_model, compile=True)
    assert list(wide_model.state_dict()) == names
    assert wide_model.decoder._compiled_call_impl is not None
    other = copy.deepcopy(wide_model)
    assert other.decoder._compiled_call_impl is None
    accelerate(wide_model)
    assert wide_model.decoder._compiled_call_impl is None


def test_an_accelerated_model_can_be_traced_as_one_graph(wide_model: AutoEncoderKL) -> None:
    expected = results(wide_model, images(32, 32))[1]
    accelerate(wide_model)
    decoder = torch.compile(wide_model.decoder, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        z = wide_model.encode(images(32, 32)).mode()
        out = decoder(wide_model.post_quant_conv(z))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
