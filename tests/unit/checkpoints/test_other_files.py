"""Files and folders that are often given in place of weights are identified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kl_vae import AutoEncoderKL
from tests.conftest import TINY_DDCONFIG
from tests.messages import mentions

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 334643268\n"
FILES = {
    "Git LFS": POINTER,
    "web page": b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>",
    "page": b"\xef\xbb\xbf\n <HTML><body>Sign in</body></HTML>",
    "not weights": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "empty": b"",
    "text": b'{"error": "Repository not found"}',
    "Access denied": b"Access denied\r\n",
}
SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin", "")


def assert_identified(path: Path, *parts: str) -> None:
    for load in (AutoEncoderKL.from_checkpoint, AutoEncoderKL(TINY_DDCONFIG, 4).init_from_ckpt):
        with pytest.raises(ValueError, match=mentions(path, *parts)) as caught:
            load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_are_no_weights(kind: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(FILES[kind])
    assert_identified(tmp_path / f"a{suffix}", kind)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_image_is_identified(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (8, 8)).save(path, format=kind)
    assert_identified(path, "image", "--images")


@pytest.mark.parametrize("length", [0x4D42, 0x2A4949])  # "BM", "II*"
def test_safetensors_whose_length_begins_as_an_image(length: int, tmp_path: Path) -> None:
    model = AutoEncoderKL(TINY_DDCONFIG, 4)
    path = tmp_path / "a.safetensors"
    model.save_compvis(path)
    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    if len(header) > length:
        pytest.skip("the header is longer")
    data = content[8 + len(header) :]
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + data)
    AutoEncoderKL.from_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.embed_tokens.weight", "a language model"),
        ("transformer.wte.weight", "a language model"),
        ("lm_head.weight", "a language model"),
        ("double_blocks.0.img_attn.norm.weight", "a diffusion model"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a diffusion model"),
        ("unet.mid.lora.down.weight", "a LoRA"),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_weights_of_another_model(key: str, kind: str, in_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(2, 2), "other.weight": torch.zeros(1)}, path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert_identified(tmp_path if in_folder else path, kind)


@pytest.mark.parametrize("place", ["a.png", "class/b.JPG"])
def test_a_folder_of_images(place: str, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    assert_identified(tmp_path, "folder of images", Path(place).name)


def test_a_cloned_folder_without_its_large_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    assert_identified(tmp_path, "Git LFS", "git lfs pull")
    (tmp_path / "config.json").write_bytes(POINTER)
    assert_identified(tmp_path, "Git LFS", "config.json")
