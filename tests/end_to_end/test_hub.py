"""`hf://ORG/NAME` where a checkpoint is named, on a hub of this machine and then without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kl_vae import AutoEncoderKL
from tests.hub_server import Hub, hub_environment
from tests.processes import assert_same

pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")


@pytest.mark.slow
def test_a_pipeline_on_the_hub_is_a_checkpoint_online_and_offline(
    tiny_ddconfig: dict[str, Any], tmp_path: Path
) -> None:
    latents = {"scale_factor": 0.25, "shift_factor": 0.5}
    model = AutoEncoderKL(tiny_ddconfig, 4, latents=latents)
    model.save_pretrained(tmp_path / "vae")
    files = {f"vae/{path.name}": path.read_bytes() for path in (tmp_path / "vae").iterdir()}
    hub = Hub()
    commit = hub.commit("org/pipeline", {**files, "unet/diffusion_pytorch_model.bin": b"large"})

    def convert(name: str, out: str, **environment: str) -> None:
        command = [sys.executable, "-m", "kl_vae", "convert", name, out, "--to", "compvis"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=hub_environment(hub.url, tmp_path / "cache", **environment),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    with hub:
        convert("hf://org/pipeline", "online.safetensors")
    assert not [request for request in hub.requests if "unet" in request]
    convert(f"hf://org/pipeline@{commit}/vae", "offline.safetensors", HF_HUB_OFFLINE="1")
    for name in ("online.safetensors", "offline.safetensors"):
        again = AutoEncoderKL.from_checkpoint(tmp_path / name)
        assert_same(dict(again.state_dict()), dict(model.state_dict()))
        assert again.latents == model.latents
