"""Find the autoencoder in a folder."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.diffusers import read_json
from kl_vae.checkpoints.reading import find_autoencoder
from kl_vae.checkpoints.safetensors_file import safetensors_bytes
from tests.conftest import TINY_DDCONFIG
from tests.messages import mentions
from tests.processes import assert_same

CONFIG = {"_class_name": "AutoencoderKL"}
NAME = "diffusion_pytorch_model"


def touch(folder: Path, *names: str, config: object = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_found(folder: Path, weights: Path, config: object = CONFIG, ema: bool = True) -> None:
    found = find_autoencoder(folder, ema)
    assert found.weights == [weights]
    assert found.config == config
    assert found.source == (weights.parent if config is not None else weights)


@pytest.mark.parametrize("place", ["", "vae", "autoencoderkl", "autoencoderkl_ema"])
@pytest.mark.parametrize("config", [CONFIG, {}, {"_class_name": "AutoencoderKLFlux2"}])
def test_a_diffusers_folder(tmp_path: Path, place: str, config: object) -> None:
    touch(tmp_path / place, f"{NAME}.safetensors", config=config)
    assert_found(tmp_path, tmp_path / place / f"{NAME}.safetensors", config)


def test_the_best_precision_and_format_is_chosen(tmp_path: Path) -> None:
    names = [f"{NAME}{x}" for x in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")]
    touch(tmp_path, *names, config=CONFIG)
    touch(tmp_path, "diffusion_flax_model.msgpack", "other.safetensors", f"{NAME}.pt", "README.md")
    for name in names:
        assert_found(tmp_path, tmp_path / name)
        (tmp_path / name).unlink()
    expected = f"{NAME}.safetensors, {NAME}.safetensors.index.json, {NAME}.bin"
    with pytest.raises(ValueError, match=mentions(tmp_path, "config.json", expected)):
        find_autoencoder(tmp_path)


def test_a_folder_in_place_of_weights_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, config=CONFIG)
    (tmp_path / f"{NAME}.safetensors").mkdir()
    with pytest.raises(ValueError, match=mentions(tmp_path, "config.json", f"{NAME}.safetensors")):
        find_autoencoder(tmp_path)


@pytest.mark.parametrize(
    "config",
    [None, {"_class_name": "StableDiffusionPipeline"}, {"_class_name": None}, {"_class_name": 3}],
)
def test_the_autoencoder_of_a_pipeline_is_chosen(tmp_path: Path, config: object) -> None:
    """Files of the other models and at the top level are ignored."""
    touch(tmp_path, "model_index.json", "sd.safetensors", f"{NAME}.safetensors", config=config)
    touch(tmp_path / "unet", f"{NAME}.safetensors", config={"_class_name": "UNet2DConditionModel"})
    weights = touch(tmp_path / "vae", f"{NAME}.safetensors", config=CONFIG) / f"{NAME}.safetensors"
    assert_found(tmp_path, weights)


def test_another_autoencoder_class_is_an_error(tmp_path: Path, model: AutoEncoderKL) -> None:
    model.save_pretrained(tmp_path / "vae")
    touch(tmp_path / "vae", config={"_class_name": "VQModel"})
    with pytest.raises(ValueError, match=mentions("config.json", "'VQModel'", "AutoencoderKL")):
        AutoEncoderKL.from_checkpoint(tmp_path)


def test_a_training_folder_gives_the_average_by_default(
    tmp_path: Path,
) -> None:
    touch(tmp_path, "optimizer.bin", "scheduler.bin", "random_states_0.pkl")
    for name in ("autoencoderkl", "autoencoderkl_ema"):
        touch(tmp_path / name, f"{NAME}.safetensors", config=CONFIG)
    for ema, name in ((True, "autoencoderkl_ema"), (False, "autoencoderkl")):
        assert_found(tmp_path, tmp_path / name / f"{NAME}.safetensors", ema=ema)


@pytest.mark.parametrize("ema", [True, False])
def test_a_training_folder_without_an_average(tmp_path: Path, ema: bool) -> None:
    touch(tmp_path / "autoencoderkl", f"{NAME}.safetensors", config=CONFIG)
    assert_found(tmp_path, tmp_path / "autoencoderkl" / f"{NAME}.safetensors", ema=ema)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pt", "a.pth", "a.bin"])
def test_the_only_file_of_a_folder_is_chosen(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, "README.md", "a.yaml", "a.safetensors.sha256", ".123.tmp")
    touch(tmp_path / "b.pt")  # a folder
    assert_found(tmp_path, tmp_path / name, None)


def test_several_files_are_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "b.pt", "a.ckpt")
    with pytest.raises(ValueError, match=mentions(tmp_path, 2, "a.ckpt, b.pt")):
        find_autoencoder(tmp_path)
    touch(tmp_path, *(f"{i}.pt" for i in range(8)))
    with pytest.raises(ValueError, match=mentions(tmp_path, 10, "0.pt", "4.pt")) as caught:
        find_autoencoder(tmp_path)
    assert "5.pt" not in str(caught.value)


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "model.pt")
    touch(tmp_path, "README.md")
    for folder in (tmp_path, tmp_path / "model.pt", tmp_path / "nothing"):
        with pytest.raises(ValueError, match=mentions(folder, "checkpoint")):
            find_autoencoder(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"[1, 2]", "list"),
        (b"null", "NoneType"),
        (b'"text"', "str"),
        (
            b'{"a": "\xff"}',
            "'utf-8' codec can't decode byte 0xff in position 7: invalid start byte",
        ),
        (
            "{}".encode("utf-16"),
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (b"[" * 100_000 + b"]" * 100_000, "maximum recursion depth exceeded"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "maximum recursion depth exceeded"),
        (b" " * (1 << 24) + b"{}", "16777216 bytes"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_an_invalid_json_config_is_an_error(tmp_path: Path, text: bytes, reason: str) -> None:
    touch(tmp_path, f"{NAME}.safetensors")
    (tmp_path / "config.json").write_bytes(text)
    config = tmp_path / "config.json"
    with pytest.raises(ValueError, match=mentions(config, "JSON", reason)) as caught:
        find_autoencoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_json_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.json", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=mentions(path, "JSON", "[Errno")):
            read_json(path)


@pytest.fixture(scope="module")
def model() -> AutoEncoderKL:
    torch.manual_seed(0)
    return AutoEncoderKL(TINY_DDCONFIG, 4, latents={"scale_factor": 0.5})


@pytest.fixture
def sharded(model: AutoEncoderKL, tmp_path: Path) -> Path:
    """A folder of diffusers' with its tensors in two files."""
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    folder = touch(tmp_path / "vae", config=json.loads((whole / "config.json").read_text()))
    tensors = load_file(whole / f"{NAME}.safetensors")
    names = {
        key: f"{NAME}-0000{1 + (i % 3 > 0)}-of-00002.safetensors" for i, key in enumerate(tensors)
    }
    for name in set(names.values()):
        part = {key: x for key, x in tensors.items() if names[key] == name}
        (folder / name).write_bytes(safetensors_bytes(part, {}))
    set_index(folder, {"metadata": {"total_size": 1}, "weight_map": names})
    return folder


def set_index(folder: Path, content: object) -> Path:
    path = folder / f"{NAME}.safetensors.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_shards_are_read_together(model: AutoEncoderKL, sharded: Path) -> None:
    found = find_autoencoder(sharded)
    names = [f"{NAME}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert found.weights == [sharded / name for name in names]
    read = AutoEncoderKL.from_checkpoint(sharded)
    assert_same(read.state_dict(), model.state_dict())
    assert read.latents == model.latents
    # a file that the index does not name is no shard
    (sharded / f"{NAME}-00003-of-00002.safetensors").write_bytes(b"x")
    assert find_autoencoder(sharded).weights == found.weights


def test_one_file_is_preferred_to_shards(sharded: Path) -> None:
    touch(sharded, f"{NAME}.safetensors")
    assert find_autoencoder(sharded).weights == [sharded / f"{NAME}.safetensors"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("missing.safetensors", "'missing.safetensors'"),
        (
            "../whole/diffusion_pytorch_model.safetensors",
            "'../whole/diffusion_pytorch_model.safetensors'",
        ),
        ("/etc/passwd", "'/etc/passwd'"),
        ("./config.json", "'./config.json'"),
        ("sub", "'sub'"),
        ("sub/x.safetensors", "'sub/x.safetensors'"),
        ("..", "'..'"),
        (".", "'.'"),
        ("", "''"),
        ("a\0b", r"'a\x00b'"),
        ("\ud800", r"'\ud800'"),
        ("x" * 300, "'" + "x" * 79),
        ("a\nb", r"'a\nb'"),
        (None, "'None'"),
        (3, "'3'"),
        (["x"], "\"['x']\""),
    ],
)
def test_an_index_that_names_files_elsewhere_is_an_error(
    sharded: Path, name: object, shown: str
) -> None:
    touch(sharded / "sub", "x.safetensors")
    touch(sharded.parent / "checkpoints")  # `..` is then a run directory
    index = set_index(sharded, {"weight_map": {"encoder.conv_in.weight": name}})
    for find in (find_autoencoder, AutoEncoderKL.from_checkpoint):
        with pytest.raises(ValueError, match=mentions(index, "weight_map", shown)) as caught:
            find(sharded)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [{}, {"weight_map": {}}, {"weight_map": None}, {"weight_map": ["a"]}, {"x": 1}]
)
def test_an_empty_index_is_an_error(sharded: Path, content: object) -> None:
    index = set_index(sharded, content)
    with pytest.raises(ValueError, match=mentions(index, "weight_map")):
        find_autoencoder(sharded)


def test_an_invalid_json_index_is_an_error(sharded: Path) -> None:
    index = set_index(sharded, "[]")
    with pytest.raises(ValueError, match=mentions(index, "JSON", "list")):
        find_autoencoder(sharded)


def test_a_shard_without_its_tensors_is_an_error(sharded: Path) -> None:
    index = sharded / f"{NAME}.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    set_index(sharded, {"weight_map": dict.fromkeys(names, next(iter(names.values())))})
    with pytest.raises(ValueError, match=mentions(sharded, "encoder.conv_in.weight")):
        AutoEncoderKL.from_checkpoint(sharded)


def linked(folder: Path, cache: Path) -> Path:
    """The folder as the hub's cache holds it: blobs, and links to them with the names."""
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abc"
    for i, path in enumerate(sorted(folder.rglob("*"))):
        if path.is_file():
            (cache / "blobs" / f"{i}abc").write_bytes(path.read_bytes())
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(cache / "blobs" / f"{i}abc", link.parent))
    return snapshot


def test_links_of_the_hub_cache_are_followed(
    model: AutoEncoderKL, sharded: Path, tmp_path: Path
) -> None:
    whole = linked(tmp_path / "whole", tmp_path / "cache")
    assert (whole / "config.json").is_symlink()
    assert_found(whole, whole / f"{NAME}.safetensors", find_autoencoder(whole).config)
    folders = [whole, linked(sharded, tmp_path / "shards")]
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    sharded.rename(pipeline / "vae")
    folders.append(linked(pipeline, tmp_path / "pipelines"))
    for folder in folders:
        assert_same(AutoEncoderKL.from_checkpoint(folder).state_dict(), model.state_dict())


def test_a_broken_link_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, config=CONFIG)
    (tmp_path / f"{NAME}.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=mentions(tmp_path, "config.json", f"{NAME}.safetensors")):
        find_autoencoder(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"])
def test_file_formats_are_read(model: AutoEncoderKL, tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "vae"
    model.save_pretrained(folder, "fp16" if "fp16" in suffix else "fp32")
    path = folder / f"{NAME}.safetensors"
    if suffix.endswith(".bin"):
        torch.save(load_file(path), folder / (NAME + suffix))
        path.unlink()
    else:
        path.rename(folder / (NAME + suffix))
    read: Any = AutoEncoderKL.from_checkpoint(folder)
    assert read.latents == model.latents
    expected = model.state_dict()
    if "fp16" in suffix:
        expected = {key: x.half().float() for key, x in expected.items()}
    assert_same(read.state_dict(), expected)
