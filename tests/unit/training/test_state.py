"""The content of a checkpoint of a run, and restoring it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.run_files import read_checkpoint, write_checkpoint
from kl_vae.optim.config import OptimizerConfig
from kl_vae.training.state import Network, TrainingState, check_content
from tests.messages import is_about, mentions


def build(ddconfig: dict[str, object], fingerprint: str = "a") -> TrainingState:
    model = AutoEncoderKL(ddconfig, 4)
    network = Network.build(model.own_parameters(), OptimizerConfig(), "fp32")
    return TrainingState(model, network, {}, fingerprint, validation_fingerprint="v")


def test_the_highest_psnr_and_ssim_are_best(tiny_ddconfig: dict[str, object]) -> None:
    for monitor, best in (("val/psnr", 2), ("val/ssim", 2), ("val/kl_loss", 1)):
        state = build(tiny_ddconfig)
        state.model.monitor = monitor
        for step, value in ((1, 10.0), (2, 20.0), (3, 15.0), (4, math.nan), (5, None)):
            state.step = step
            state.note_validation(value)
            assert state.validated_step == step
        assert state.best["step"] == best


def test_only_tensors_and_plain_values_are_saved(
    tmp_path: Path, tiny_ddconfig: dict[str, object]
) -> None:
    state = build(tiny_ddconfig)
    write_checkpoint(tmp_path / "a.pt", state.content())
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["model"].keys() == state.model.state_dict().keys()
    assert {"updaters", "ema", "config", "data_fingerprint", "versions"} <= content.keys()


def test_a_saved_state_is_restored(tmp_path: Path, tiny_ddconfig: dict[str, object]) -> None:
    state = build(tiny_ddconfig)
    state.step, state.images_seen, state.validated_step = 5, 40, 4
    state.skips.total, state.skips.by_scaler = 2, 3
    state.best = {"monitor": "val/psnr", "value": 1.0, "step": 4}
    write_checkpoint(tmp_path / "a.pt", state.content())
    other = build(tiny_ddconfig)
    other.restore(read_checkpoint(tmp_path / "a.pt"), source="a.pt")
    for key in ("step", "images_seen", "validated_step", "skips", "best"):
        assert getattr(other, key) == getattr(state, key)
    for key, x in state.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[key], x)


def test_other_images_are_refused(tiny_ddconfig: dict[str, object]) -> None:
    content = build(tiny_ddconfig, "a").content()
    with pytest.raises(ValueError, match=mentions("x.pt", "images", "model.params.ckpt_path")):
        build(tiny_ddconfig, "b").restore(content, source="x.pt")


def test_a_checkpoint_of_another_version_names_missing_keys(
    tiny_ddconfig: dict[str, object],
) -> None:
    content = build(tiny_ddconfig).content()
    del content["skips"], content["batches"]
    with pytest.raises(ValueError, match=mentions("x.pt", "batches, skips", "ckpt_path")):
        build(tiny_ddconfig).restore(content, source="x.pt")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "5"),
        ("step", -1),
        ("images_seen", 10**30),
        ("ema", [1]),
        ("updaters", None),
        ("model", 3),
        ("skips", {"total": "1"}),
        ("batches", {"accumulated": None}),
        ("best", {"monitor": "val/psnr", "value": 1.0}),
        ("best", {"monitor": "val/psnr", "value": None, "step": 1}),
    ],
)
def test_impossible_values_are_named(
    tiny_ddconfig: dict[str, object], key: str, value: object
) -> None:
    content = {**build(tiny_ddconfig).content(), key: value}
    named = next(iter(value)) if key in ("skips", "batches") else key  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=mentions("x.pt", named, "ckpt_path")) as caught:
        check_content(content, "x.pt")
    assert "\n" not in str(caught.value)


def edited(content: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the content of a checkpoint with one thing that does not fit."""
    content = copy.deepcopy(content)
    optimizer = content["updaters"][0]["optimizer"]
    if kind == "weights":
        content["model"].popitem()
    elif kind == "no tensor":
        content["model"][next(iter(content["model"]))] = "a"
    elif kind == "networks":
        content["updaters"] = []
    elif kind == "no optimizer":
        content["updaters"] = [{}]
    elif kind == "skips":
        content["skips"]["other"] = 1
    elif kind == "shape":
        optimizer["state"][0]["exp_avg"] = torch.zeros(1, 2)
    elif kind == "steps":
        optimizer["state"][0]["step"] = torch.tensor(-1.0)
    elif kind == "moments":
        del optimizer["state"][0]["exp_avg_sq"]
    else:
        optimizer["param_groups"].pop()
    return content


@pytest.mark.parametrize(
    "kind",
    ["weights", "no tensor", "networks", "no optimizer", "skips"]
    + ["shape", "steps", "moments", "groups"],
)
def test_tensors_that_do_not_fit_are_refused(tiny_ddconfig: dict[str, object], kind: str) -> None:
    state = build(tiny_ddconfig)
    for p in state.autoencoder.parameters:
        p.grad = torch.zeros_like(p)
    state.autoencoder.optimizer.step()
    content = state.content()
    build(tiny_ddconfig).restore(copy.deepcopy(content), source="x.pt")
    with pytest.raises(ValueError, match=mentions("x.pt", "--run-dir")) as caught:
        build(tiny_ddconfig).restore(edited(content, kind), source="x.pt")
    assert "\n" not in str(caught.value)


def test_other_software_and_other_validation_images_are_named(
    tiny_ddconfig: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    content = build(tiny_ddconfig).content()
    content["versions"] = {**content["versions"], "torch": "2.0", "device": "H100"}
    content["validation_fingerprint"] = "w"
    content["best"] = {"monitor": "val/psnr", "value": 1.0, "step": 0}
    state = build(tiny_ddconfig)
    state.restore(content, source="x.pt")
    assert len(caplog.messages) == 3
    for parts in (("torch", torch.__version__, "2.0"), ("device", "cpu", "H100"), ("val/",)):
        assert any(is_about(message, *parts) for message in caplog.messages)
    assert state.best == {}


def test_the_same_software_is_not_logged(
    tiny_ddconfig: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    build(tiny_ddconfig).restore(build(tiny_ddconfig).content(), source="x.pt")
    assert caplog.text == ""
