"""Encoder and decoder as wholes: what they hold on to, and what trains."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kl_vae import AutoEncoderKL, Decoder, Encoder, accelerate
from kl_vae.blocks import Downsample, ResnetBlock, Upsample


def test_any_size_that_f_divides_is_taken(tiny_ddconfig: dict[str, Any]) -> None:
    moments = Encoder(**tiny_ddconfig)(torch.zeros(1, 3, 6, 20))
    assert moments.shape == (1, 8, 3, 10)
    assert Decoder(**tiny_ddconfig)(moments[:, :4]).shape == (1, 3, 6, 20)


@pytest.mark.parametrize("module", [Encoder, Decoder])
@torch.no_grad()
def test_without_gradients_no_level_outlives_the_next(
    tiny_ddconfig: dict[str, Any], module: type[nn.Module]
) -> None:
    network = module(**tiny_ddconfig | {"ch_mult": [1, 1, 1]})
    levels = list(network.down if module is Encoder else reversed(network.up))
    outputs: list[weakref.ref[Any]] = []
    alive: list[list[bool]] = []

    def note(*arguments: Any) -> None:
        outputs.append(weakref.ref(arguments[2]))
        alive.append([output() is not None for output in outputs])

    for level in levels:
        level.register_forward_hook(note)
    network.conv_out.register_forward_hook(note)
    network(torch.zeros(1, 3 if module is Encoder else 4, 16, 16))
    # while a hook runs its module's input is held
    assert alive[2] == [False, True, True]
    assert alive[3][:2] == [False, False]
    assert not any(output() is not None for output in outputs)


@pytest.mark.parametrize("attn_type", ["vanilla", "linear", "none"])
def test_every_trainable_parameter_receives_gradient(
    tiny_ddconfig: dict[str, Any], attn_type: str
) -> None:
    torch.manual_seed(0)
    # 64 channels: with one channel a group, the bias before a norm would change nothing
    ddconfig = tiny_ddconfig | {"ch": 64, "attn_type": attn_type}
    lossconfig = {"target": "elbo", "params": {"learn_logvar": True, "kl_weight": 1.0}}
    model = AutoEncoderKL(ddconfig, 3, lossconfig)
    model.training_step(torch.rand(2, 3, 16, 16), 0).backward()
    parameters = dict(model.named_parameters())
    assert "loss.logvar" in parameters
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # the same summand in all scores of a query leaves the softmax as it is
        if not name.endswith(".k.bias"):
            assert parameter.grad.abs().max() > 1e-7, name


def test_narrow_models_want_few_groups_to_tell_the_colour_of_a_plane(
    tiny_ddconfig: dict[str, Any],
) -> None:
    """A group of one channel takes the channel's mean away."""
    for groups, told in ((32, False), (8, True)):
        torch.manual_seed(0)
        decoder = Decoder(**tiny_ddconfig | {"norm_groups": groups})
        norms = [m for m in decoder.modules() if isinstance(m, nn.GroupNorm)]
        assert {norm.num_groups for norm in norms} == {groups}
        features = torch.ones(1, 32, 4, 4) * torch.randn(1, 32, 1, 1)  # a plane
        assert (decoder.norm_out(features).abs().max() > 0.1) == told


@pytest.mark.parametrize("module", [Encoder, Decoder])
def test_zero_init_residual_reaches_every_block(module: Any, tiny_ddconfig: dict[str, Any]) -> None:
    for zero in (False, True):
        built = module(**tiny_ddconfig | {"zero_init_residual": zero})
        blocks = [block for block in built.modules() if isinstance(block, ResnetBlock)]
        assert blocks
        assert all((not block.conv2.weight.any()) == zero for block in blocks)


@pytest.mark.parametrize("module", [Encoder, Decoder])
@torch.no_grad()
def test_without_gradients_no_map_outlives_the_block_that_it_goes_into(
    tiny_ddconfig: dict[str, Any], module: type[nn.Module]
) -> None:
    network = accelerate(module(**tiny_ddconfig | {"num_res_blocks": 3, "attn_resolutions": []}))
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(*arguments: Any) -> None:
        alive.append(sum(output() is not None for output in outputs))
        outputs.append(weakref.ref(arguments[2]))

    for part in network.modules():
        if isinstance(part, (ResnetBlock, Downsample, Upsample)):
            part.register_forward_hook(note)
    network(torch.zeros(1, 3 if module is Encoder else 4, 16, 16))
    assert len(alive) > 8 and max(alive) == 1  # the input of what has just run


@torch.no_grad()
def test_hooks_of_levels_are_called_without_gradients_as_well(tiny_model: AutoEncoderKL) -> None:
    seen: list[tuple[int, ...]] = []
    accelerate(tiny_model)
    tiny_model.decoder.up[0].register_forward_hook(lambda *given: seen.append(given[2].shape))
    expected = tiny_model.decode(torch.zeros(1, 3, 4, 4))
    assert len(seen) == 1 and seen[0][2:] == expected.shape[2:]
