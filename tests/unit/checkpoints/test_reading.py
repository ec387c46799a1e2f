"""Read weights of any layout and format."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.diffusers import to_diffusers
from kl_vae.checkpoints.reading import read_weights
from tests.messages import mentions
from tests.processes import assert_same

safetensors = pytest.importorskip("safetensors.torch")

Tensors = dict[str, Tensor]


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}{key}": x for key, x in tensors.items()}


def pipeline(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors of a pipeline, most of which are of other models."""
    others = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1000, 1000),
        "cond_stage_model.transformer.text_model.encoder.layers.0.weight": torch.zeros(9),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(9),
    }
    return {**others, **prefixed(tensors, prefix)}


def save_torch(content: Any, path: Path) -> None:
    torch.save(content, path)


def save_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_safetensors(content: Any, path: Path) -> None:
    safetensors.save_file({key: x.contiguous() for key, x in content.items()}, path)


FILES: list[tuple[str, Callable[[Any, Path], None]]] = [
    ("weights.pt", save_torch),
    ("weights.pth", save_torch),
    ("weights.ckpt", save_legacy),
    ("weights.bin", save_torch),
    ("weights.safetensors", save_safetensors),
    ("renamed.ckpt", save_safetensors),  # a converted file with its old name
]
LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "compvis": dict,
    "diffusers": to_diffusers,
    "ddp": lambda x: prefixed(x, "module."),
    "compiled": lambda x: prefixed(x, "_orig_mod."),
    "compiled ddp": lambda x: prefixed(x, "module._orig_mod."),
    "stable diffusion": lambda x: pipeline(x, "first_stage_model."),
    "pipeline of diffusers'": lambda x: pipeline(to_diffusers(x), "vae."),
    "lightning": lambda x: prefixed(x, "autoencoder.model."),
}


@pytest.mark.parametrize(("name", "save"), FILES, ids=[name for name, _ in FILES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_and_layout(
    tiny_model: AutoEncoderKL,
    tmp_path: Path,
    layout: str,
    name: str,
    save: Callable[[Any, Path], None],
) -> None:
    save(LAYOUTS[layout](tiny_model.state_dict()), tmp_path / name)
    model = AutoEncoderKL.from_checkpoint(tmp_path / name)
    assert_same(dict(model.state_dict()), dict(tiny_model.state_dict()))
    assert not model.training and model.latents is None
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("ema", [True, False])
def test_averages_are_taken_unless_told_otherwise(
    tiny_model: AutoEncoderKL, tmp_path: Path, ema: bool
) -> None:
    raw = tiny_model.state_dict()
    average = {key: x + 1.0 for key, x in raw.items()}
    litema = {"model_ema." + key.replace(".", ""): x for key, x in average.items()}
    litema |= {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    files = {
        "llamagen.pt": {"model": raw, "ema": average, "discriminator": {"x": torch.ones(1)}},
        "sgm.ckpt": {"state_dict": {**raw, **litema}, "global_step": 3},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        model = AutoEncoderKL.from_checkpoint(tmp_path / name, ema=ema)
        assert_same(dict(model.state_dict()), average if ema else dict(raw))
    torch.save({"ema_state_dict": average}, tmp_path / "average alone.pt")
    model = AutoEncoderKL.from_checkpoint(tmp_path / "average alone.pt", ema=ema)
    assert_same(dict(model.state_dict()), average)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32(
    tiny_model: AutoEncoderKL, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {key: x.to(dtype) for key, x in tiny_model.state_dict().items()}
    save_safetensors(tensors, tmp_path / "half.safetensors")
    model = AutoEncoderKL.from_checkpoint(tmp_path / "half.safetensors")
    assert_same(dict(model.state_dict()), {key: x.float() for key, x in tensors.items()})


@pytest.mark.parametrize(("name", "save"), [("a.pt", save_torch), ("a.st", save_safetensors)])
def test_a_model_with_mapped_weights_can_be_trained(
    tiny_model: AutoEncoderKL, tmp_path: Path, name: str, save: Callable[[Any, Path], None]
) -> None:
    path = tmp_path / name
    save(tiny_model.state_dict(), path)
    content = path.read_bytes()
    model = AutoEncoderKL.from_checkpoint(path)
    # training and saving the model leave its file unchanged
    model.training_step(torch.rand(2, 3, 16, 16), 0).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    trained = {key: x.clone() for key, x in model.state_dict().items()}
    assert not torch.equal(trained["quant_conv.weight"], tiny_model.quant_conv.weight)
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    assert (tmp_path / "trained.pt").stat().st_size < 1.2 * len(content)
    assert path.read_bytes() == content
    # the file can be removed or replaced
    path.unlink()
    path.write_bytes(b"another")
    assert_same(dict(model.state_dict()), trained)
    assert_same(dict(AutoEncoderKL.from_checkpoint(tmp_path / "trained.pt").state_dict()), trained)


def test_folders_of_diffusers_within_a_pipeline(
    tiny_ddconfig: dict[str, Any], tmp_path: Path
) -> None:
    model = AutoEncoderKL(tiny_ddconfig, None, latents={"scale_factor": 0.3, "shift_factor": 0.1})
    model.save_pretrained(tmp_path / "pipeline" / "vae", "bf16")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    for place in ("pipeline", "pipeline/vae"):
        loaded = AutoEncoderKL.from_checkpoint(tmp_path / place)
        assert loaded.latents == model.latents
        assert loaded.config.resolution == 16
        expected = {key: x.bfloat16().float() for key, x in model.state_dict().items()}
        assert_same(dict(loaded.state_dict()), expected)


def test_a_config_is_checked_against_the_tensors(
    tiny_ddconfig: dict[str, Any], tmp_path: Path
) -> None:
    AutoEncoderKL(tiny_ddconfig, None).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "latent_channels": 16, "layers_per_block": 10**9}))
    parts = (tmp_path / "a", "num_res_blocks=1", 10**9, "z_channels=4", 16, "config")
    with pytest.raises(ValueError, match=mentions(*parts)):
        AutoEncoderKL.from_checkpoint(tmp_path / "a")


def test_our_files_hold_what_tensors_do_not_show(
    tiny_ddconfig: dict[str, Any], tmp_path: Path
) -> None:
    ddconfig = tiny_ddconfig | {"ch": 24, "norm_groups": 8, "tanh_out": True, "dropout": 0.5}
    model = AutoEncoderKL(ddconfig, 3, latents={"scale_factor": 2.0}, monitor="val/psnr")
    model.save_compvis(tmp_path / "a.safetensors")
    again = AutoEncoderKL.from_checkpoint(tmp_path / "a.safetensors")
    assert again.params == model.params
    # files of other packages have no such metadata
    save_safetensors(model.state_dict(), tmp_path / "b.safetensors")
    parts = (tmp_path / "b.safetensors", 24, "norm_groups", "config")
    with pytest.raises(ValueError, match=mentions(*parts)):
        AutoEncoderKL.from_checkpoint(tmp_path / "b.safetensors")
    params = {"ddconfig": ddconfig, "embed_dim": 3}
    given = AutoEncoderKL.from_checkpoint(tmp_path / "b.safetensors", params)
    assert given.config == model.config


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', "9" * 5000, "[" * 100_000])
def test_unknown_metadata_is_ignored(tiny_model: AutoEncoderKL, tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.save_file(dict(tiny_model.state_dict()), path, {"kl_vae": text})
    model = AutoEncoderKL.from_checkpoint(path)
    assert_same(dict(model.state_dict()), dict(tiny_model.state_dict()))


def test_a_lying_config_is_refused_before_anything_is_built(
    tiny_model: AutoEncoderKL, tmp_path: Path
) -> None:
    params = copy.deepcopy(tiny_model.params)
    params["ddconfig"]["num_res_blocks"] = 10**12
    path = tmp_path / "a.safetensors"
    metadata = {"kl_vae": json.dumps({"model": {"params": params}})}
    safetensors.save_file(dict(tiny_model.state_dict()), path, metadata)
    with pytest.raises(ValueError, match=mentions("num_res_blocks=1", 10**12, "config")):
        AutoEncoderKL.from_checkpoint(path)
    params["ddconfig"] = {"ch": "wide"}
    safetensors.save_file(
        dict(tiny_model.state_dict()), path, {"kl_vae": json.dumps({"model": {"params": params}})}
    )
    with pytest.raises(ValueError, match=mentions(path, "ddconfig.ch='wide'")):
        AutoEncoderKL.from_checkpoint(path)


def test_registered_modules_are_loaded(tiny_ddconfig: dict[str, Any], tmp_path: Path) -> None:
    from kl_vae import register_normalization

    @register_normalization("scaled")
    class Scaled(torch.nn.Module):
        """Its buffer is not in the state dict, so that it is computed again."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(channels))
            self.register_buffer("factor", torch.tensor(0.5), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain[:, None, None] * self.factor

    model = AutoEncoderKL(tiny_ddconfig | {"norm_type": "scaled"}, 3).eval()
    model.save_compvis(tmp_path / "a.safetensors")
    again = AutoEncoderKL.from_checkpoint(tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.encode(x).mean, model.encode(x).mean)


def test_weights_name_their_source(tiny_ddconfig: dict[str, Any], tmp_path: Path) -> None:
    AutoEncoderKL(tiny_ddconfig, 4).save_pretrained(tmp_path / "folder")
    weights = read_weights(tmp_path / "folder")
    assert weights.source == str(tmp_path / "folder")
    assert weights.files == (tmp_path / "folder" / "diffusion_pytorch_model.safetensors",)
    assert weights.step is None and not weights.averaged
