"""The choice of the tiling mode, and invalid settings."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from kl_vae import AutoEncoderKL
from kl_vae.inference.tiling import Tiling, check_tiling, decode_tiled, encode_tiled, modes
from kl_vae.inference.tiling.modes import Work, choose
from tests.messages import is_about, mentions

GIB = 2**30


@pytest.fixture(autouse=True)
def unwarned() -> Iterator[None]:
    modes.warned_of_blending.clear()
    yield
    modes.warned_of_blending.clear()


def work(model: AutoEncoderKL, side: int, decoding: bool = True, batch: int = 1) -> Work:
    return Work(model.config, decoding, batch, side, side)


def test_whole_then_strips_then_tiles_as_memory_shrinks(model: AutoEncoderKL) -> None:
    small, large = work(model, 512), work(model, 4096)
    assert choose(small, 8 * GIB, True) == ["whole", "exact", "blend"]
    assert choose(small, small.exact_bytes * 5 // 4 + 1, True) == ["exact", "blend"]
    assert choose(small, small.exact_bytes, True) == ["blend"]
    assert choose(large, 1000 * GIB, True) == ["exact", "blend"]


def test_the_size_decides_if_the_free_memory_is_unknown(model: AutoEncoderKL) -> None:
    assert choose(work(model, 2048), None, True)[0] == "whole"
    assert choose(work(model, 2048, batch=2), None, True)[0] == "exact"


def test_a_model_without_strips_is_whole_as_long_as_it_fits(model: AutoEncoderKL) -> None:
    large = work(model, 4096)
    assert choose(large, 1000 * GIB, False) == ["whole", "blend"]
    assert choose(large, large.whole_bytes, False) == ["blend"]


def test_estimates_follow_size_batch_precision_and_attention(model: AutoEncoderKL) -> None:
    fixed, approx = work(model, 0).whole_bytes, partial(pytest.approx, abs=2)
    one = work(model, 256)
    assert work(model, 512).whole_bytes - fixed == approx(4 * (one.whole_bytes - fixed))
    assert work(model, 256, batch=3).exact_bytes - fixed == approx(3 * (one.exact_bytes - fixed))
    assert one.exact_bytes < one.whole_bytes
    half = Work(model.config, True, 1, 256, 256, itemsize=2)
    assert half.exact_bytes - fixed == approx((one.exact_bytes - fixed) / 2)
    scores = Work(model.config, True, 1, 256, 256, scores=True)
    assert scores.whole_bytes - one.whole_bytes == 2 * 4 * 64**4


@torch.inference_mode()
def test_auto_takes_the_mode_that_fits_and_warns_once_of_tiles(
    model: AutoEncoderKL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    images, z = torch.randn(1, 3, 64, 32), torch.randn(1, 2, 16, 8)
    ways = {}
    for free in (8 * GIB, 2**28 * 5 // 4 + 2**24, 0):
        monkeypatch.setattr(modes, "free_memory", lambda device, free=free: free)
        tiling = Tiling(tile=32, overlap=16)
        ways[free] = decode_tiled(model, z, tiling)
        encode_tiled(model, images, tiling)
    whole, exact, blended = ways.values()
    assert torch.equal(whole, model.decode(z))
    assert not torch.equal(exact, whole)  # a different order of summation
    torch.testing.assert_close(exact, whole, rtol=0, atol=1e-4)
    assert torch.equal(blended, decode_tiled(model, z, Tiling("blend", 32, 16)))
    (warning,) = caplog.messages
    assert is_about(warning, "0.3 GiB", "memory", "tiles")


class OutOfMemory(nn.Module):
    """Raises an out-of-memory error for maps of more than `most` positions."""

    def __init__(self, inner: nn.Module, most: int, text: str) -> None:
        super().__init__()
        self.inner, self.most, self.text = inner, most, text

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if x.shape[2] * x.shape[3] > self.most:
            raise RuntimeError(self.text)
        out: Tensor = self.inner(x)
        return out


@torch.inference_mode()
def test_auto_falls_back_to_tiles_when_out_of_memory(
    model: AutoEncoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    z, tiling = torch.randn(1, 2, 16, 8), Tiling(tile=32, overlap=16)
    blended = decode_tiled(model, z, Tiling("blend", 32, 16))
    model.decoder.mid.attn_1 = OutOfMemory(model.decoder.mid.attn_1, 64, "not enough memory: 9")
    assert torch.equal(decode_tiled(model, z, tiling), blended)
    (warning,) = caplog.messages
    assert is_about(warning, "memory", "tiles") and not is_about(warning, "GiB")
    with pytest.raises(RuntimeError, match="not enough memory"):
        decode_tiled(model, z, Tiling("whole"))
    model.decoder.mid.attn_1.text = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        decode_tiled(model, z, tiling)


def test_auto_computes_a_custom_norm_on_the_whole_image(model: AutoEncoderKL) -> None:
    model.decoder.norm_out = nn.InstanceNorm2d(32)
    z = torch.randn(1, 2, 5, 4)
    assert torch.equal(decode_tiled(model, z, Tiling()), model.decode(z))


def test_nothing_is_kept_for_gradients(model: AutoEncoderKL) -> None:
    for mode in modes.MODES:
        z = torch.randn(1, 2, 5, 4, requires_grad=True)
        assert not decode_tiled(model, z, Tiling(mode)).requires_grad  # type: ignore[arg-type]


def test_invalid_tilings_are_rejected() -> None:
    with pytest.raises(
        ValueError, match=mentions("mode='tiles'", "auto", "whole", "exact", "blend")
    ):
        Tiling("tiles")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=mentions("tile=0", 1)):
        Tiling(tile=0)
    for overlap in (-8, 512):
        with pytest.raises(ValueError, match=mentions(f"overlap={overlap}", 0, "tile=512")):
            Tiling(overlap=overlap)


def test_inputs_invalid_for_the_model_are_rejected(model: AutoEncoderKL) -> None:
    for mode in modes.MODES:
        tiling = Tiling(mode)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=mentions("30 x 32", 4)):
            encode_tiled(model, torch.zeros(1, 3, 32, 30), tiling)
        with pytest.raises(ValueError, match=mentions("[1, 3, 8, 8]", "[B, 2, h, w]")):
            decode_tiled(model, torch.zeros(1, 3, 8, 8), tiling)
    with torch.device("meta"):
        params = {**model.params["ddconfig"], "context_channels": 5}
        with_context = AutoEncoderKL(params, 2)
    text = mentions("context=None", "[B, 5]")
    with pytest.raises(ValueError, match=text):
        encode_tiled(with_context, torch.zeros(1, 3, 8, 8), Tiling())
    with pytest.raises(ValueError, match=text):
        decode_tiled(with_context, torch.zeros(1, 2, 8, 8), Tiling())


PEAK = """
import json, os, resource, torch
from kl_vae import AutoEncoderKL
from kl_vae.inference.tiling import Tiling, decode_tiled, exact

exact.STRIP_BYTES["cpu"] = 2**21  # as small as the feature maps of this test

def peak(mode):
    # in a child process: the peak resident size of a process never shrinks
    read, write = os.pipe()
    if os.fork() == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with torch.inference_mode():
            decode_tiled(model, torch.zeros(1, 4, 160, 160), Tiling(mode))
        os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(read, 100)) * 1024

torch.set_num_threads(1)
ddconfig = dict(ch=32, ch_mult=[1, 2, 2], num_res_blocks=1, attn_resolutions=[], in_channels=3)
ddconfig |= dict(out_ch=3, resolution=1024, z_channels=4, attn_type="none")
model = AutoEncoderKL(ddconfig, 4).eval()
# the memory that the allocator keeps varies
print(json.dumps({"whole": peak("whole"), "exact": min(peak("exact"), peak("exact"))}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read as Linux gives them")
def test_strips_take_about_two_maps() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    largest = 4 * 64 * 640**2  # channels of the upsampled map
    assert peaks["exact"] < 0.6 * peaks["whole"], peaks
    assert peaks["exact"] < 2.5 * largest, peaks


def test_check_tiling_rejects_invalid_tilings_beforehand(model: AutoEncoderKL) -> None:
    check_tiling(model, Tiling("whole", tile=30, overlap=1))
    for mode in ("auto", "blend"):
        check_tiling(model, Tiling(mode))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=mentions("tile=30", 4, 32)):
            check_tiling(model, Tiling(mode, tile=30, overlap=4))  # type: ignore[arg-type]
    check_tiling(model, Tiling("exact"))
    model.encoder.norm_out = nn.Identity()
    with pytest.raises(ValueError, match=mentions("mode='exact'", "encoder.norm_out", "Identity")):
        check_tiling(model, Tiling("exact"))
