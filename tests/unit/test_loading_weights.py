"""Loading weights: what fits is loaded, all else is named and changes nothing."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.formats.checkpoint import write_checkpoint
from kl_vae.formats.run_checkpoints import BEST, checkpoint_path

Config = dict[str, Any]


@pytest.fixture
def path(tiny_model: AutoEncoderKL, tmp_path: Path) -> Path:
    torch.save({"state_dict": tiny_model.state_dict()}, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def test_a_whole_file_is_loaded_and_counted(
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
    assert caplog.messages == [
        f"{path}: {count} tensors loaded, 0 ignored, 0 missing, 0 unexpected"
    ]


def test_ckpt_path_and_ignore_keys_do_so_at_construction(
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
    assert caplog.messages[0].endswith(
        f"{len(own) - 4} tensors loaded, 4 ignored, 4 missing, 0 unexpected"
    )


def test_a_loss_of_the_file_is_ignored_where_the_model_has_none(
    tiny_model: AutoEncoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tiny_model.state_dict() | {"loss.logvar": torch.zeros(())}
    with caplog.at_level(logging.INFO, "kl_vae"):
        tiny_model.load_weights(tensors, source="it")
    assert "1 ignored, 0 missing" in caplog.text


def test_a_loss_of_the_model_need_not_be_in_the_file(
    tiny_ddconfig: Config, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kl_vae"):
        AutoEncoderKL(tiny_ddconfig, 3, {"target": "elbo"}, ckpt_path=path)
    assert "0 ignored, 1 missing, 0 unexpected" in caplog.text


@pytest.mark.parametrize(
    ("keys", "embed_dim", "error"),
    [
        ({}, None, r"has quant convolutions; set embed_dim=3$"),
        ({}, 5, r"its latents have 3 channels; embed_dim=5 should be 3$"),
        (
            {"ch": 64},
            3,
            r"\d+ tensors of another shape \(encoder\.conv_in\.weight: \[32, 3, 3, 3\] in the "
            r"file, \[64, 3, 3, 3\] in the model\).*; use the config it was trained with",
        ),
        (
            {"num_res_blocks": 2},
            3,
            r": 52 missing \(such as encoder\.down\.0\.block\.1\.norm1\.weight\); use the "
            r"config it was trained with, or name them in ignore_keys$",
        ),
        (
            {"attn_resolutions": []},
            3,
            r": 30 unexpected \(such as encoder\.down\.1\.attn\.0\.norm\.weight\); use the ",
        ),
    ],
)
def test_a_mismatch_is_named_with_its_mend_and_changes_nothing(
    tiny_ddconfig: Config, path: Path, keys: Config, embed_dim: int | None, error: str
) -> None:
    model = AutoEncoderKL(tiny_ddconfig | keys, embed_dim)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=error) as caught:
        model.init_from_ckpt(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_file_without_quant_convolutions_says_so(
    tiny_ddconfig: Config, tiny_model: AutoEncoderKL
) -> None:
    tensors = AutoEncoderKL(tiny_ddconfig, None).state_dict()
    with pytest.raises(ValueError, match="has no quant convolutions; embed_dim=3 should be nu"):
        tiny_model.load_weights(tensors)


def same_weights(model: AutoEncoderKL, other: AutoEncoderKL) -> bool:
    own = other.state_dict()
    return all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


def write_run(run: Path, step: int, model: AutoEncoderKL, ddconfig: Config) -> Path:
    """Write a run's checkpoint; its lossconfig names what must not be imported."""
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


def test_from_checkpoint_takes_any_state_dict_with_params(
    tiny_ddconfig: Config, tiny_model: AutoEncoderKL, path: Path
) -> None:
    params = {"ddconfig": tiny_ddconfig, "embed_dim": 3, "lossconfig": {"target": "no.such.Loss"}}
    assert same_weights(AutoEncoderKL.from_checkpoint(path, params), tiny_model)
    with pytest.raises(ValueError, match="does not say its architecture; give its config as well"):
        AutoEncoderKL.from_checkpoint(path)
    with pytest.raises(ValueError, match="its config lacks ddconfig or embed_dim; give its config"):
        AutoEncoderKL.from_checkpoint(path, {"ddconfig": tiny_ddconfig})


@pytest.mark.parametrize("config", [None, {}, {"model": {"params": None}}])
def test_a_checkpoint_without_a_config_needs_params(
    tiny_ddconfig: Config, tiny_model: AutoEncoderKL, tmp_path: Path, config: object
) -> None:
    path = tmp_path / "model.pt"
    write_checkpoint(path, {"model": tiny_model.state_dict(), "config": config})
    with pytest.raises(ValueError, match="does not say its architecture; give its config as well"):
        AutoEncoderKL.from_checkpoint(path)
    model = AutoEncoderKL.from_checkpoint(path, {"ddconfig": tiny_ddconfig, "embed_dim": 3})
    assert same_weights(model, tiny_model)


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
    with pytest.raises(ValueError, match="does not match its sha256, it is damaged"):
        AutoEncoderKL.from_checkpoint(path)
    with pytest.raises(ValueError, match="none of its checkpoints can be read; copy them from a"):
        AutoEncoderKL.from_checkpoint(tmp_path)
    assert "passing over a checkpoint" in caplog.text


def test_of_a_run_with_a_damaged_checkpoint_another_is_loaded_loudly(
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
    assert "step_00000002.pt: does not match its sha256" in caplog.text


def test_a_directory_without_checkpoints_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint in it; give a run directory or a file"):
        AutoEncoderKL.from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no such checkpoint: .*nothing.pt"):
        AutoEncoderKL.from_checkpoint(tmp_path / "nothing.pt")
