"""What a checkpoint states, and no tensor shows, is compared with what is asked, or inherited."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL, export
from kl_vae.checkpoints.diffusers import to_diffusers
from kl_vae.latents import LatentNormalization
from tests.messages import is_about, mentions
from tests.tiny import tiny_ddconfig

Params = dict[str, Any]

LATENTS = {
    "scale": {"scale_factor": 0.13025, "shift_factor": 0.1159},
    "channels": {"mean": [0.5, 1.0], "std": [1.0, 2.0], "per_channel": True},
    "batch norm": {
        "mean": [0.1 * i for i in range(8)],
        "std": [1.0 + i for i in range(8)],
        "per_channel": True,
        "patch_size": 2,
    },
}


def save(layout: str, params: Params, folder: Path, **keywords: Any) -> Path:
    """Write a checkpoint that states `params`."""
    torch.manual_seed(0)
    model = AutoEncoderKL(**params, **keywords)
    suffix = {"diffusers": "", "ours": ".pt", "compvis": ".safetensors"}[layout]
    path = folder / f"vae{suffix}"
    if layout == "ours":
        export(model, path)
    else:
        (model.save_pretrained if layout == "diffusers" else model.save_compvis)(path)
    return path


def params_with(**changes: Any) -> Params:
    return {"ddconfig": tiny_ddconfig(**changes), "embed_dim": 2}


def load_with_params(path: Path, params: Params) -> AutoEncoderKL:
    return AutoEncoderKL.from_checkpoint(path, params)


def fine_tune(path: Path, params: Params) -> AutoEncoderKL:
    return AutoEncoderKL(**params, ckpt_path=path)


def export_with_params(path: Path, params: Params) -> object:
    from kl_vae.checkpoints.export import export_checkpoint

    return export_checkpoint(path, path.parent / "out.pt", given=params)


LOADERS = [load_with_params, fine_tune, export_with_params]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("layout", "stated", "asked"),
    [
        ("diffusers", {"norm_groups": 8}, {}),
        ("diffusers", {}, {"norm_groups": 8}),
        ("diffusers", {}, {"tanh_out": True}),
        ("ours", {"norm_groups": 8}, {}),
        ("ours", {"tanh_out": True}, {}),
        ("compvis", {"norm_groups": 8}, {"norm_groups": 4}),
        ("compvis", {}, {"tanh_out": True}),
    ],
)
def test_another_value_is_an_error_that_names_both(
    load: Callable[[Path, Params], object],
    layout: str,
    stated: Params,
    asked: Params,
    tmp_path: Path,
) -> None:
    path = save(layout, params_with(**stated), tmp_path)
    (key,) = {*stated, *asked}
    values = (
        given.get(key, {"norm_groups": 32, "tanh_out": False}[key]) for given in (stated, asked)
    )
    with pytest.raises(ValueError, match=mentions(path, key, *values)) as caught:
        load(path, params_with(**asked))
    assert "\n" not in str(caught.value)
    load(path, params_with(**stated))


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "asked", [{"attn_type": "none"}, {"use_linear_attn": True}, {"resamp_with_conv": False}]
)
def test_kinds_of_layers_are_compared(
    load: Callable[[Path, Params], object], asked: Params, tmp_path: Path
) -> None:
    path = save("ours", params_with(), tmp_path)
    key = "attn_type" if "use_linear_attn" in asked else next(iter(asked))
    with pytest.raises(ValueError, match=mentions(path, key)):
        load(path, params_with(**asked))


def test_another_epsilon_is_an_error(tmp_path: Path) -> None:
    path = save("diffusers", params_with(), tmp_path)
    config = json.loads((path / "config.json").read_text())
    for value, is_valid in ((1e-6, True), (1e-5, False)):
        (path / "config.json").write_text(json.dumps({**config, "norm_eps": value}))
        if is_valid:
            AutoEncoderKL.from_checkpoint(path)
        else:
            with pytest.raises(ValueError, match=mentions("norm_eps", 1e-5, 1e-6)):
                AutoEncoderKL.from_checkpoint(path)


def test_one_level_has_no_resampling(tmp_path: Path) -> None:
    path = save("ours", params_with(ch_mult=[1], resamp_with_conv=False), tmp_path)
    load_with_params(path, params_with(ch_mult=[1]))


def test_what_a_bare_state_dict_is_assumed_to_have_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoEncoderKL(**params_with())
    for name, tensors in (("a.pt", model.state_dict()), ("b.pt", to_diffusers(model.state_dict()))):
        torch.save(tensors, tmp_path / name)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            AutoEncoderKL.from_checkpoint(tmp_path / name)
        lines = [line for line in caplog.messages if is_about(line, "norm_groups=32", "tanh_out")]
        assert len(lines) == 1 and is_about(lines[0], name)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        AutoEncoderKL.from_checkpoint(tmp_path / "a.pt", params_with())
    assert not is_about(caplog.text, "norm_groups")


@pytest.mark.parametrize("kind", LATENTS)
@pytest.mark.parametrize("layout", ["diffusers", "ours", "compvis"])
def test_the_scale_of_latents_survives_fine_tuning(kind: str, layout: str, tmp_path: Path) -> None:
    path = save(layout, params_with(), tmp_path, latents=LATENTS[kind])
    expected = AutoEncoderKL.from_checkpoint(path).latents
    assert expected is not None
    z = torch.randn(1, 2, 4, 4)
    own = LatentNormalization(**LATENTS[kind])
    torch.testing.assert_close(expected.normalize(z), own.normalize(z))
    tuned = AutoEncoderKL(**params_with(), ckpt_path=path)
    assert tuned.latents == expected
    # the scale is unknown if a part of the encoder is new, and that of a config is kept
    for prefix in ("encoder.conv_in", "quant_conv", ""):
        assert AutoEncoderKL(**params_with(), ckpt_path=path, ignore_keys=[prefix]).latents is None
    kept = AutoEncoderKL(**params_with(), ckpt_path=path, ignore_keys=["decoder."])
    assert kept.latents == expected
    own = LatentNormalization(scale_factor=2.0)
    assert AutoEncoderKL(**params_with(), ckpt_path=path, latents=own).latents == own
