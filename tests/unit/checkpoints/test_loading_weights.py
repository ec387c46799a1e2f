"""Load weights into a model; a mismatch names the keys and changes nothing."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.run_files import BEST, checkpoint_path, write_checkpoint
from tests.messages import is_about, mentions

Config = dict[str, Any]


@pytest.fixture
def path(tiny_model: AutoEncoderKL, tmp_path: Path) -> Path:
    torch.save({"state_dict": tiny_model.state_dict()}, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def test_all_tensors_are_loaded_and_counted(
    tiny_ddconfig: Config,
    tiny_model: AutoEncoderKL,
    path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = AutoEncoderKL(tiny_ddconfig, 3)
    with caplog.at_level(logging.INFO, "kl_vae"):
        model.init_from_ckpt(path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, tiny_model.state_dict()[key]), key
    count = len(tiny_model.state_dict())
    (message,) = caplog.messages
    assert is_about(message, path, count)
    assert "not used" not in message and "keep" not in message


def test_ckpt_path_and_ignore_keys_at_construction(
    tiny_ddconfig: Config,
    tiny_model: AutoEncoderKL,
    path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "kl_vae"):
        model = AutoEncoderKL(
            tiny_ddconfig, 3, ckpt_path=path, ignore_keys=["decoder.conv_in", "quant_conv"]
        )
    own, saved = model.state_dict(), tiny_model.state_dict()
    different = {key for key in own if not torch.equal(own[key], saved[key])}
    assert different == {
        f"{name}.{part}"
        for name in ("decoder.conv_in", "quant_conv")
        for part in ("weight", "bias")
    }
    assert f"{len(own) - 4} tensors loaded; 4 of the file not used" in caplog.text
    assert is_about(caplog.text, "4 of the model", "decoder.conv_in.weight", "ignore_keys")


def test_loss_tensors_are_ignored_without_a_loss(
    tiny_model: AutoEncoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tiny_model.state_dict() | {"loss.logvar": torch.zeros(())}
    with caplog.at_level(logging.INFO, "kl_vae"):
        tiny_model.load_weights(tensors, source="it")
    assert is_about(caplog.text, "1 of the file", "loss.logvar", "this model does not have")
    assert "of the model keep" not in caplog.text


def test_loss_tensors_may_be_missing(
    tiny_ddconfig: Config, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kl_vae"):
        AutoEncoderKL(tiny_ddconfig, 3, {"target": "elbo"}, ckpt_path=path)
    assert is_about(caplog.text, "1 of the model", "loss.logvar", "the file does not have")
    assert "not used" not in caplog.text


@pytest.mark.parametrize(
    ("keys", "embed_dim", "parts"),
    [
        ({}, None, ("embed_dim=3", "null")),
        ({}, 5, ("embed_dim=3", 5)),
        ({"ch": 64, "num_res_blocks": 2}, 3, ("ch=32", 64, "num_res_blocks=1", 2)),
        ({"attn_resolutions": []}, 3, ("attention_levels=[1]", "[]")),
        ({"ch_mult": [1, 2, 2], "attn_resolutions": []}, 3, ("ch_mult=[1, 2]", "[1, 2, 2]")),
    ],
)
def test_a_mismatch_is_an_error_and_changes_nothing(
    tiny_ddconfig: Config,
    path: Path,
    keys: Config,
    embed_dim: int | None,
    parts: tuple[object, ...],
) -> None:
    model = AutoEncoderKL(tiny_ddconfig | keys, embed_dim)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=mentions(path, *parts, "config")):
        model.init_from_ckpt(path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    params = {"ddconfig": tiny_ddconfig | keys, "embed_dim": embed_dim}
    with pytest.raises(ValueError, match=mentions(path, *parts)):
        AutoEncoderKL.from_checkpoint(path, params)


def test_a_mismatch_of_single_tensors_names_them(
    tiny_ddconfig: Config, tiny_model: AutoEncoderKL
) -> None:
    tensors = tiny_model.state_dict()
    tensors["more"] = torch.zeros(1)
    tensors["decoder.conv_in.bias"] = torch.zeros(7)
    del tensors["encoder.conv_in.weight"], tensors["encoder.norm_out.bias"]
    model = AutoEncoderKL(tiny_ddconfig, 3)
    parts = ("decoder.conv_in.bias", "[7]", "[64]", "2 missing", "encoder.conv_in.weight")
    parts += ("1 unexpected", "more", "config", "ignore_keys")
    with pytest.raises(ValueError, match=mentions("it:", *parts)):
        model.load_weights(tensors, source="it")


def same_weights(model: AutoEncoderKL, other: AutoEncoderKL) -> bool:
    own = other.state_dict()
    return all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


def write_run(run: Path, step: int, model: AutoEncoderKL, ddconfig: Config) -> Path:
    """Write a run's checkpoint, whose lossconfig names a module that cannot be imported."""
    params = {
        "ddconfig": ddconfig,
        "embed_dim": 3,
        "lossconfig": {"target": "no_such_module.Loss"},
        "ckpt_path": "no_such_file.ckpt",
        "monitor": "val/rec_loss",
    }
    path = checkpoint_path(run, step)
    tensors = model.state_dict() | {"loss.logvar": torch.zeros(())}
    write_checkpoint(path, {"model": tensors, "config": {"model": {"params": params}}})
    return path


def test_from_checkpoint_takes_a_runs_best_else_its_newest(
    tiny_ddconfig: Config, tiny_model: AutoEncoderKL, tmp_path: Path
) -> None:
    other = AutoEncoderKL(tiny_ddconfig, 3)
    best = write_run(tmp_path, 9, tiny_model, tiny_ddconfig)
    write_run(tmp_path, 10, other, tiny_ddconfig)
    assert same_weights(AutoEncoderKL.from_checkpoint(tmp_path), other)
    (best.parent / BEST).write_text('{"checkpoint": "step_00000009.pt"}')
    model = AutoEncoderKL.from_checkpoint(tmp_path)
    assert same_weights(model, tiny_model)
    assert not model.training
    assert model.monitor == "val/rec_loss"
    assert model.loss is None
    assert same_weights(AutoEncoderKL.from_checkpoint(str(best)), tiny_model)


def test_from_checkpoint_reads_any_state_dict_with_params(
    tiny_ddconfig: Config, tiny_model: AutoEncoderKL, path: Path
) -> None:
    params = {"ddconfig": tiny_ddconfig, "embed_dim": 3, "lossconfig": {"target": "no.such.Loss"}}
    assert same_weights(AutoEncoderKL.from_checkpoint(path, params), tiny_model)
    assert same_weights(AutoEncoderKL.from_checkpoint(path), tiny_model)
    with pytest.raises(ValueError, match=mentions(path, "ddconfig", "embed_dim")):
        AutoEncoderKL.from_checkpoint(path, {"ddconfig": tiny_ddconfig})


@pytest.mark.parametrize("config", [None, {}, {"model": {"params": None}}])
def test_a_checkpoint_without_a_config_is_inferred(
    tiny_ddconfig: Config, tiny_model: AutoEncoderKL, tmp_path: Path, config: object
) -> None:
    path = tmp_path / "model.pt"
    write_checkpoint(path, {"model": tiny_model.state_dict(), "config": config})
    model = AutoEncoderKL.from_checkpoint(path)
    assert same_weights(model, tiny_model)
    assert model.config.ch == 32 and model.config.has_attention(1) and model.embed_dim == 3


def test_from_checkpoint_refuses_weights_that_do_not_match_their_sha256(
    tiny_ddconfig: Config,
    tiny_model: AutoEncoderKL,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write_run(tmp_path, 1, tiny_model, tiny_ddconfig)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=mentions(path, "sha256")):
        AutoEncoderKL.from_checkpoint(path)
    assert not caplog.messages
    with pytest.raises(ValueError, match=mentions(tmp_path, "checkpoints")):
        AutoEncoderKL.from_checkpoint(tmp_path)
    assert is_about(caplog.text, path.name, "sha256")


def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    tiny_ddconfig: Config,
    tiny_model: AutoEncoderKL,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_run(tmp_path, 1, tiny_model, tiny_ddconfig)
    damaged = write_run(tmp_path, 2, tiny_model, tiny_ddconfig)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    (tmp_path / "checkpoints" / BEST).write_text(f'{{"checkpoint": "{damaged.name}"}}')
    assert same_weights(AutoEncoderKL.from_checkpoint(tmp_path), tiny_model)
    assert is_about(caplog.text, "step_00000002.pt", "sha256")


def test_a_directory_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=mentions(tmp_path, "checkpoint")):
        AutoEncoderKL.from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=mentions(tmp_path / "nothing.pt", "checkpoint")):
        AutoEncoderKL.from_checkpoint(tmp_path / "nothing.pt")
