"""Batch norm over ranks: two shares of a batch give what the whole batch does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from kl_vae.losses.batch_norm import BatchNormOverRanks, synchronize_batch_norms
from kl_vae.losses.discriminator import PatchDiscriminator
from tests.processes import TORCHRUN

WORKER = Path(__file__).with_name("batch_norm_worker.py")


def test_two_ranks_normalize_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = (5.0 + torch.randn(4, 3, 6, 5).double()).requires_grad_()
    gradient = torch.randn(4, 3, 6, 5).double()
    content = {"state": norm.state_dict(), "x": x.detach(), "gradient": gradient}
    torch.save(content, "batch.pt")
    command = [*TORCHRUN, "--nproc-per-node=2", str(WORKER), "rank"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(f"rank_{rank}.pt", weights_only=True) for rank in range(2)]

    out = norm(x)
    out.backward(gradient)
    assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    torch.testing.assert_close(torch.cat([rank["out"] for rank in ranks]), out.detach())
    torch.testing.assert_close(torch.cat([rank["x"] for rank in ranks]), x.grad)
    # DistributedDataParallel adds these up
    torch.testing.assert_close(ranks[0]["weight"] + ranks[1]["weight"], norm.weight.grad)
    torch.testing.assert_close(ranks[0]["bias"] + ranks[1]["bias"], norm.bias.grad)
    for rank in ranks:
        torch.testing.assert_close(rank["state"], norm.state_dict())


def test_names_stay_and_evaluation_is_plain() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, 1, ndf=8, norm="batch").eval()
    x = torch.randn(2, 3, 16, 16)
    before, names = discriminator(x), list(discriminator.state_dict())
    synchronize_batch_norms(discriminator)
    assert [type(m) for m in discriminator.modules()].count(BatchNormOverRanks) == 1
    assert list(discriminator.state_dict()) == names
    assert torch.equal(discriminator(x), before)
