"""Variants, shards, names of tensors and of files, and tensors of other models."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_vae import AutoEncoderKL, export
from kl_vae.checkpoints.diffusers import WEIGHTS, to_diffusers
from kl_vae.checkpoints.reading import read_weights
from tests.conftest import TINY_DDCONFIG
from tests.messages import is_about, mentions
from tests.processes import assert_same

INDEX = "index.json"


@pytest.fixture(scope="module")
def model() -> AutoEncoderKL:
    torch.manual_seed(0)
    return AutoEncoderKL(TINY_DDCONFIG, 4, latents={"scale_factor": 0.5})


def assert_same_model(path: Path, model: AutoEncoderKL, **keywords: Any) -> None:
    again = AutoEncoderKL.from_checkpoint(path, **keywords)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert again.latents == model.latents


@pytest.mark.parametrize("variant", [None, "fp16", "bf16", "non_ema", "fp32", "ours"])
@pytest.mark.parametrize("size", [None, "200KB"])
def test_variants_and_shards_are_read_back(
    model: AutoEncoderKL, tmp_path: Path, variant: str | None, size: str | None
) -> None:
    folder = tmp_path / "vae"
    model.save_pretrained(folder, variant=variant, max_shard_size=size)
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    assert all(path.stat().st_size < 310_000 for path in files) == (size is not None)
    assert all((variant is None) or f".{variant}" in path.name for path in files)
    assert_same_model(folder, model)
    for index in folder.glob("*.index*.json"):
        total = sum(x.nbytes for x in model.state_dict().values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total
    if size is None:
        assert_same_model(files[0], model)  # with the config next to it


def test_diffusers_reads_our_variants_and_shards(model: AutoEncoderKL, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    for i, (variant, size) in enumerate([("fp16", 150_000), (None, "0.2MiB"), ("bf16", None)]):
        folder = tmp_path / str(i)
        model.save_pretrained(folder, variant=variant, max_shard_size=size)
        theirs = diffusers.AutoencoderKL.from_pretrained(folder, variant=variant)
        assert_same(dict(theirs.state_dict()), to_diffusers(model.state_dict()))


@pytest.mark.parametrize("size", [0, -1, "", "MB", "5 parsecs", True, 1.5])
def test_an_invalid_size_or_variant_is_an_error(
    model: AutoEncoderKL, tmp_path: Path, size: Any
) -> None:
    with pytest.raises(ValueError, match=mentions("max_shard_size", repr(size))):
        model.save_pretrained(tmp_path / "vae", max_shard_size=size)
    with pytest.raises(ValueError, match=mentions("variant", "../fp16")):
        model.save_pretrained(tmp_path / "vae", variant="../fp16")
    assert not list(tmp_path.iterdir())


def test_raw_weights_are_taken_without_the_average(model: AutoEncoderKL, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "vae")
    raw = AutoEncoderKL(TINY_DDCONFIG, 4, latents={"scale_factor": 0.5})
    raw.save_pretrained(tmp_path / "raw", variant="non_ema")
    name = f"{WEIGHTS}.non_ema.safetensors"
    (tmp_path / "raw" / name).rename(tmp_path / "vae" / name)
    assert_same_model(tmp_path / "vae", model)
    assert_same_model(tmp_path / "vae", raw, ema=False)


def test_files_that_are_there_are_named(model: AutoEncoderKL, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "vae", variant="a")
    (tmp_path / "vae" / f"{WEIGHTS}.b.bin").touch()
    with pytest.raises(ValueError, match=mentions("config.json", f"{WEIGHTS}.a.safetensors")):
        AutoEncoderKL.from_checkpoint(tmp_path / "vae")


def test_an_index_and_a_file_of_any_name_next_to_a_config(
    model: AutoEncoderKL, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert_same_model(tmp_path / "sharded" / f"{WEIGHTS}.safetensors.{INDEX}", model)
    for name, tensors in (("a", model.state_dict()), ("b", to_diffusers(model.state_dict()))):
        folder = tmp_path / name
        model.save_pretrained(folder)
        (folder / f"{WEIGHTS}.safetensors").unlink()
        torch.save(tensors, folder / "vae.pt")
        assert_same_model(folder, model)
        assert_same_model(folder / "vae.pt", model)


NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae.", "model.", "a.b."])
@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_compvis_files_with_the_attention_of_diffusers(
    model: AutoEncoderKL, tmp_path: Path, prefix: str, dimensions: int
) -> None:
    tensors: dict[str, Tensor] = {}
    for key, x in model.state_dict().items():
        path, attention, leaf = key.partition(".attn")
        if attention:
            number, own, kind = leaf.rsplit(".", 2)
            key = f"{path}.attn{number}.{NAMES[own]}.{kind}"
            x = x.reshape(x.shape[: max(1, min(x.ndim, dimensions))]) if x.ndim == 4 else x
        tensors[prefix + key] = x
    torch.save(tensors, tmp_path / "vae.pt")
    again = AutoEncoderKL.from_checkpoint(tmp_path / "vae.pt")
    assert_same(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_tensors_of_other_models_are_set_aside_with_one_line(
    model: AutoEncoderKL, tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    others = ("foundation_model.a", "foundation_model.b", "linear_proj.weight", "discriminator.c")
    extra = {prefix + key: torch.zeros(1) for key in (*others, "encoder_ema.conv_in.weight")}
    own = {prefix + key: x for key, x in model.state_dict().items()}
    torch.save({"state_dict": {**extra, **own}}, tmp_path / "vae.pt")
    with caplog.at_level(logging.INFO):
        tensors = read_weights(tmp_path / "vae.pt").tensors
    assert tensors.keys() == model.state_dict().keys()
    (message,) = caplog.messages
    assert is_about(message, 5, "foundation_model", "linear_proj", "discriminator", "encoder_ema")
    AutoEncoderKL(TINY_DDCONFIG, 4).init_from_ckpt(tmp_path / "vae.pt")


def test_ignore_keys_of_every_loader(model: AutoEncoderKL, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "vae")
    own = model.state_dict()
    for load in (AutoEncoderKL.from_checkpoint, AutoEncoderKL.from_pretrained):
        again = load(tmp_path / "vae", ignore_keys=["decoder.conv_out"]).state_dict()
        different = {key for key in own if not torch.equal(own[key], again[key])}
        assert different == {"decoder.conv_out.weight", "decoder.conv_out.bias"}
        assert not any(x.is_meta for x in again.values())


def test_names_that_are_not_utf_8(model: AutoEncoderKL, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    name = os.fsdecode(b"vae\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system requires UTF-8")
    model.save_compvis(folder / f"{name}.safetensors")
    model.save_pretrained(folder / name, max_shard_size="200KB")
    export(model, folder / f"{name}.pt")
    with open(folder / "legacy.pt", "wb") as file:
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    for saved in (f"{name}.safetensors", name, f"{name}.pt"):
        assert_same_model(folder / saved, model)
    AutoEncoderKL.from_checkpoint(folder / "legacy.pt")
