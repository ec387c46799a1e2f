"""Any architecture is shown by its tensors, and survives the way to diffusers and back."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.architecture import Architecture, infer_architecture
from kl_vae.checkpoints.diffusers import from_diffusers, inexpressible, is_diffusers, to_diffusers
from tests.messages import is_about


@st.composite
def models(draw: st.DrawFn) -> AutoEncoderKL:
    """A small model of any architecture, with weights of its own."""
    ch_mult = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    f = 2 ** (len(ch_mult) - 1)
    resolution = f * draw(st.sampled_from([1, 3, 8]))
    levels = [resolution // 2**level for level in range(len(ch_mult))]
    channels = draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 2, 32]))
    ddconfig: dict[str, Any] = {
        "ch": groups if groups == 32 else groups * draw(st.integers(1, 3)),
        "ch_mult": ch_mult,
        "norm_groups": groups,
        "num_res_blocks": draw(st.integers(1, 3)),
        "attn_resolutions": draw(st.lists(st.sampled_from(levels), unique=True)),
        "attn_type": draw(st.sampled_from(["vanilla", "linear", "none"])),
        "in_channels": channels,
        "out_ch": channels,
        "resolution": resolution,
        "z_channels": draw(st.integers(1, 5)),
        "resamp_with_conv": draw(st.booleans()),
        "tanh_out": draw(st.booleans()),
        "context_channels": draw(st.sampled_from([0, 0, 3])),
    }
    latents = draw(st.sampled_from([None, {"scale_factor": 0.18215, "shift_factor": 0.5}]))
    embed_dim = draw(st.sampled_from([None, ddconfig["z_channels"], 6]))
    torch.manual_seed(draw(st.integers(0, 99)))
    model = AutoEncoderKL(ddconfig, embed_dim, latents=latents)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


@st.composite
def expressible_models(draw: st.DrawFn) -> AutoEncoderKL:
    """One that diffusers has a place for: its keys are changed until it has."""
    model = draw(models())
    config = dataclasses.replace(
        model.config,
        ch_mult=(1, *model.config.ch_mult[1:]),
        attn_type="none" if model.config.attn_type == "none" else "vanilla",
        resamp_with_conv=True,
        tanh_out=False,
        context_channels=0,
    )
    embed_dim = None if model.embed_dim is None else config.z_channels
    return AutoEncoderKL(config, embed_dim, latents=model.latents).eval()


def assert_same_model(model: AutoEncoderKL, other: AutoEncoderKL) -> None:
    own, others = model.state_dict(), other.state_dict()
    assert own.keys() == others.keys()
    assert all(torch.equal(x, others[key]) for key, x in own.items())


@settings(deadline=None, max_examples=60)
@given(models())
def test_the_tensors_show_the_architecture(model: AutoEncoderKL) -> None:
    said = Architecture.of_params(dataclasses.asdict(model.config), model.embed_dim)
    shown = infer_architecture(model.state_dict(), "it")
    assert shown == said
    # and with it, and what no tensor shows, the model can be built again
    params = shown.params()
    params["ddconfig"]["norm_groups"] = model.config.norm_groups
    with torch.device("meta"):
        again = AutoEncoderKL(**params)
    shapes = {key: x.shape for key, x in again.state_dict().items()}
    assert shapes == {key: x.shape for key, x in model.state_dict().items()}


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(expressible_models())
def test_to_diffusers_and_back_bit_for_bit(model: AutoEncoderKL) -> None:
    tensors = model.state_dict()
    theirs = to_diffusers(tensors)
    assert is_diffusers(theirs) and not is_diffusers(tensors)
    assert len(theirs) == len(tensors)
    back = from_diffusers(theirs)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(x, tensors[key]) for key, x in back.items())

    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name, "diffusers"), Path(name, "compvis.safetensors")
        model.save_pretrained(folder)
        between = AutoEncoderKL.from_checkpoint(folder)
        between.save_compvis(file)
        again = AutoEncoderKL.from_checkpoint(file)
    for loaded in (between, again):
        assert_same_model(loaded, model)
        assert loaded.config.norm_groups == model.config.norm_groups
        assert loaded.embed_dim == model.embed_dim
        if model.latents is not None:
            assert loaded.latents == model.latents


@settings(deadline=None, max_examples=25)
@given(models())
def test_compvis_files_keep_the_whole_config(model: AutoEncoderKL) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "compvis.safetensors")
        model.save_compvis(file)
        again = AutoEncoderKL.from_checkpoint(file)
    assert again.params == model.params
    assert_same_model(again, model)


@settings(deadline=None, max_examples=25)
@given(models())
def test_models_that_diffusers_cannot_express_are_rejected(
    model: AutoEncoderKL,
) -> None:
    errors = inexpressible(model.params)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "diffusers")
        if errors:
            with pytest.raises(ValueError) as caught:
                model.save_pretrained(folder)
            assert is_about(str(caught.value), "diffusers")
            assert all(error in str(caught.value) for error in errors)
            assert not folder.exists()
        else:
            model.save_pretrained(folder)


@settings(deadline=None, max_examples=10)
@given(expressible_models())
def test_diffusers_own_class_takes_the_folder(model: AutoEncoderKL) -> None:
    diffusers = pytest.importorskip("diffusers")
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that diffusers looks for
        model.save_pretrained(Path(name, "out"))
        theirs, info = diffusers.AutoencoderKL.from_pretrained(
            Path(name, "out"), output_loading_info=True
        )
    assert not any(info.values())
    # in float64, since such narrow norms enlarge what differs by rounding
    model, theirs = model.double(), theirs.double()
    x = torch.rand(1, model.config.in_channels, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        ours, expected = model.encode(x).parameters, theirs.encode(x).latent_dist.parameters
    assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max().clamp_min(1e-3)
