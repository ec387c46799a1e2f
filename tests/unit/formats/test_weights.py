"""State dicts of any wrapping, and files that are refused."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_vae.formats.weights import read_file, state_dict_of, strip_prefixes

WEIGHT = torch.arange(3.0)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


def plain_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def zip_of_torch(content: object, path: Path) -> None:
    torch.save(content, path)


def legacy_torch(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


FORMATS = [plain_pickle, zip_of_torch, legacy_torch]


@pytest.mark.parametrize("save", FORMATS)
def test_a_malicious_file_is_refused_and_not_executed(
    tmp_path: Path, save: Callable[[object, Path], None]
) -> None:
    path, folder = tmp_path / "model.ckpt", tmp_path / "made"
    save({"state_dict": {"weight": WEIGHT}, "extra": Malicious(folder)}, path)
    with pytest.raises(ValueError, match=f"{path}: not a checkpoint .* nothing in it was executed"):
        read_file(path)
    assert not folder.exists()
    if save is plain_pickle:
        pickle.loads(path.read_bytes())
        assert folder.exists()  # it would have been


@pytest.mark.parametrize("save", [zip_of_torch, legacy_torch])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(
    tmp_path: Path, save: Callable[[object, Path], None], kept: float
) -> None:
    path = tmp_path / "model.ckpt"
    save({"weight": torch.ones(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=f"^{path}: (cannot be read as|not) a checkpoint"):
        read_file(path)


@pytest.mark.parametrize("content", [b"", b"text\n", b"\x80", bytes(range(256)), b"PK\x03\x04"])
def test_what_is_no_file_of_torchs_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: (cannot be read as|not) a checkpoint"):
        read_file(path)


def test_a_missing_file_and_a_directory_are_no_checkpoints(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(ValueError, match=f"no such checkpoint: {path}; give an existing file"):
            read_file(path)


@pytest.mark.parametrize("save", [zip_of_torch, legacy_torch])
def test_both_formats_of_torch_are_read(
    tmp_path: Path, save: Callable[[object, Path], None]
) -> None:
    save({"weight": WEIGHT, "step": 3}, tmp_path / "model.ckpt")
    assert torch.equal(read_file(tmp_path / "model.ckpt")["weight"], WEIGHT)


@pytest.mark.parametrize(
    "content",
    [
        {"encoder.weight": WEIGHT},
        {"state_dict": {"encoder.weight": WEIGHT}, "epoch": 3},
        {"model": {"encoder.weight": WEIGHT}, "optimizer": {"state": {}}},
        {"model": {"state_dict": {"encoder.weight": WEIGHT}}},
        {"encoder.weight": WEIGHT, "epoch": 3},
    ],
)
def test_the_state_dict_is_found_in_its_wrapping(content: object) -> None:
    tensors = state_dict_of(content, "it")
    assert tensors.keys() == {"encoder.weight"}
    assert torch.equal(tensors["encoder.weight"], WEIGHT)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([WEIGHT], "it: holds list, not a state dict"),
        (WEIGHT, "it: holds Tensor, not a state dict"),
        ({"epoch": 3}, "it: holds no tensors; give a file with a state dict"),
        ({"state_dict": {}}, "it: holds no tensors"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(content: object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        state_dict_of(content, "it")


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "first_stage_model.",
        "module.first_stage_model.",
    ],
)
def test_prefixes_are_removed(prefix: str) -> None:
    tensors = {f"{prefix}{key}": WEIGHT for key in ("encoder.module.x", "decoder.y", "loss.z")}
    assert strip_prefixes(tensors).keys() == {"encoder.module.x", "decoder.y", "loss.z"}


def test_of_a_pipeline_only_the_first_stage_is_taken() -> None:
    tensors: dict[str, Tensor] = {
        "first_stage_model.encoder.x": WEIGHT,
        "model.diffusion_model.encoder.x": torch.zeros(1),
        "cond_stage_model.x": torch.zeros(1),
    }
    stripped = strip_prefixes(tensors)
    assert stripped.keys() == {"encoder.x"}
    assert torch.equal(stripped["encoder.x"], WEIGHT)
