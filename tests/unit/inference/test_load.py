"""Loading the model of a command, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kl_vae import AutoEncoderKL
from kl_vae.accel.convolution import WinogradConv2d
from kl_vae.checkpoints.run_files import write_checkpoint
from kl_vae.inference.load import load_model, load_model_on, model_fingerprint
from kl_vae.runtime.distributed import Ranks
from tests.messages import mentions


def test_ranks_that_read_different_weights_are_an_error(
    tiny_model: AutoEncoderKL, tiny_ddconfig: dict[str, Any], tmp_path: Path
) -> None:
    """As when a run saves a checkpoint between the reads of two ranks."""
    path = tmp_path / "model.pt"
    params = {"ddconfig": tiny_ddconfig, "embed_dim": 3}
    content = {"model": tiny_model.state_dict(), "config": {"model": {"params": params}}, "step": 1}
    write_checkpoint(path, content)

    class Second(Ranks):
        def on_rank_zero(self, work: Callable[[], Any]) -> Any:
            return "fingerprint of rank 0"

    with pytest.raises(ValueError, match=mentions(path, "rank 1", "rank 0", "checkpoint")):
        load_model_on(Second(1, 2, torch.device("cpu")), str(path), None)
    model = load_model_on(Ranks(0, 1, torch.device("cpu")), str(path), None)
    assert model_fingerprint(model) == model_fingerprint(tiny_model)


def test_the_fingerprint_covers_weights_and_architecture(
    tiny_model: AutoEncoderKL, tiny_ddconfig: dict[str, Any]
) -> None:
    before = model_fingerprint(tiny_model)
    other = AutoEncoderKL({**tiny_ddconfig, "tanh_out": True}, embed_dim=3)
    other.load_state_dict(tiny_model.state_dict())
    assert model_fingerprint(other) != before
    with torch.no_grad():
        tiny_model.decoder.conv_out.bias[0] += 1e-3
    assert model_fingerprint(tiny_model) != before


@pytest.mark.parametrize("fast, kind", [("auto", WinogradConv2d), ("exact", nn.Conv2d)])
def test_fast_selects_the_convolution(
    tiny_model: AutoEncoderKL, tmp_path: Path, fast: str, kind: type[nn.Module]
) -> None:
    path = tmp_path / "model.safetensors"
    tiny_model.save_compvis(path)
    model = load_model(str(path), None, torch.device("cpu"), fast=fast)
    assert type(model.decoder.mid.block_1.conv1) is kind
    assert model_fingerprint(model) == model_fingerprint(
        load_model(str(path), None, torch.device("cpu"))
    )
    with pytest.raises(ValueError, match=mentions("fast='fastest'", "auto", "exact", "off")):
        load_model(str(path), None, torch.device("cpu"), fast="fastest")
