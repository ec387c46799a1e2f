"""What diffusers tests of its AutoencoderKL, on ours: precision, determinism, tiles, gradients.

The properties are those of diffusers' `test_models_autoencoder_kl.py` and of its tests that all
models share; where a number is expected, diffusers' class computes it here.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_vae import AutoEncoderKL, accelerate
from kl_vae.inference.tiling import Mode, Tiling, decode_tiled, encode_tiled
from tests.messages import mentions
from tests.parity.test_diffusers import TINY, of_diffusers

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that diffusers looks for

HALF = (torch.float16, torch.bfloat16)
# largest error in images, whose values are of order 1
TOLERANCES = {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float64: 1e-4}


@pytest.fixture
def model() -> AutoEncoderKL:
    torch.manual_seed(0)
    return AutoEncoderKL(TINY, 4, latents={"scale_factor": 0.5}).eval()


@pytest.fixture
def x() -> Tensor:
    return 2.0 * torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) - 1.0


def posterior_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
def test_every_precision_goes_in_and_comes_out(
    model: AutoEncoderKL, x: Tensor, dtype: torch.dtype, accelerated: bool
) -> None:
    with torch.no_grad():
        expected, posterior = model(x, sample_posterior=False)
        model = model.to(dtype)
        if accelerated:
            accelerate(model, channels_last=True, winograd=True, merge_upsampling=True)
        for given in (dtype, torch.float32, torch.float16, torch.float64):
            out, found = model(x.to(given), sample_posterior=False)
            assert out.dtype == dtype
            assert found.mean.dtype == found.kl().dtype == posterior_dtype(dtype)
            tolerance = max(TOLERANCES[dtype], TOLERANCES.get(given, 0.0))
            assert (out - expected).abs().max() < tolerance
            assert (found.mean - posterior.mean).abs().max() < tolerance
            assert model.decode(found.sample().to(given)).dtype == dtype
            assert model.reconstruct(x.to(given)).dtype == dtype


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_has_the_error_of_diffusers(
    x: Tensor, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = of_diffusers(TINY, 4)
    theirs.save_pretrained(tmp_path)
    ours = AutoEncoderKL.from_checkpoint(tmp_path)
    with torch.no_grad():
        exact = ours.double().decode(ours.encode(x.double()).mode())
        own = ours.to(dtype)(x.to(dtype), sample_posterior=False)[0]
        other = theirs.to(dtype)(x.to(dtype)).sample
    assert own.dtype == other.dtype == dtype
    assert (own - exact).abs().mean() <= 1.5 * (other - exact).abs().mean()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mode", ["exact", "blend"])
@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
def test_tiles_in_every_precision(
    model: AutoEncoderKL, x: Tensor, dtype: torch.dtype, mode: Mode, accelerated: bool
) -> None:
    model = model.to(dtype)
    if accelerated:
        accelerate(model)
    for given in (dtype, torch.float32):
        # tiles of the whole image, so that both modes give its values
        posterior = encode_tiled(model, x.to(given), Tiling(mode, tile=32, overlap=8))
        image = decode_tiled(model, posterior.mode(), Tiling(mode, tile=32, overlap=8))
        with torch.no_grad():
            expected, of_whole = model(x, sample_posterior=False)
        assert image.dtype == dtype and posterior.mean.dtype == posterior_dtype(dtype)
        assert (image - expected).abs().max() < TOLERANCES[dtype]
        assert (posterior.mean - of_whole.mean).abs().max() < TOLERANCES[dtype]
        tiled = decode_tiled(model, posterior.mode(), Tiling("blend", tile=12, overlap=4))
        assert tiled.dtype == dtype and tiled.shape == image.shape


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", [None, "none", "norms"])
def test_autocast_of_weights_of_another_precision(
    model: AutoEncoderKL, x: Tensor, dtype: torch.dtype, kind: str | None
) -> None:
    with torch.no_grad():
        expected, _ = model(x, sample_posterior=False)
    model = model.to(dtype)
    model.set_activation_checkpointing(kind)
    for layout in (False, True):
        accelerate(model, channels_last=layout)
        with torch.autocast("cpu", torch.bfloat16):
            out, posterior = model(x, sample_posterior=False)
        assert (out - expected).abs().max() < TOLERANCES[torch.bfloat16]
        assert posterior.mean.dtype == posterior_dtype(dtype)
        out.float().square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(g is not None and g.dtype == dtype and g.isfinite().all() for g in gradients)


def test_the_context_has_the_precision_of_the_weights(x: Tensor) -> None:
    model = AutoEncoderKL({**vars(TINY), "context_channels": 5}, 4).half()
    assert model(x, context=torch.zeros(2, 5))[0].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_images_of_integers_name_the_fix(model: AutoEncoderKL, dtype: torch.dtype) -> None:
    for half in (model, model.half()):
        with pytest.raises(ValueError, match=mentions(dtype, "kl_vae.load_image")):
            half.encode(torch.zeros(1, 3, 32, 32, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_same_call_gives_the_same_bits(
    model: AutoEncoderKL, x: Tensor, dtype: torch.dtype
) -> None:
    model = model.to(dtype)

    def call() -> Tensor:
        torch.manual_seed(3)
        out: Tensor = model(x)[0].detach()
        return out

    first = call()
    assert first.isfinite().all() and torch.equal(first, call())
    torch.manual_seed(4)
    assert not torch.equal(first, model(x)[0])


def test_a_batch_is_its_images_one_at_a_time(model: AutoEncoderKL, x: Tensor) -> None:
    with torch.no_grad():
        whole = model.double()(x, sample_posterior=False)[0]
        slices = [model(image[None], sample_posterior=False)[0] for image in x]
    torch.testing.assert_close(torch.cat(slices), whole, rtol=0.0, atol=1e-12)


def test_activation_checkpointing_keeps_loss_and_gradients(model: AutoEncoderKL, x: Tensor) -> None:
    def gradients(kind: str | None) -> dict[str, Tensor]:
        model.set_activation_checkpointing(kind)
        model.zero_grad()
        out, posterior = model(x, sample_posterior=False)
        (out.square().mean() + posterior.kl().mean()).backward()
        found: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
        return {name: gradient.clone() for name, gradient in found.items()}

    model = model.double().train()
    every = [gradients(kind) for kind in (None, "none", "norms", "blocks", None)]
    assert all(x is not None for x in every[0].values())
    for before, after in pairwise(every):
        torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-12)
    model.set_activation_checkpointing("blocks")
    assert "blocks" in {getattr(m, "activation_checkpointing", None) for m in model.modules()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_changes_every_parameter(
    model: AutoEncoderKL, x: Tensor, dtype: torch.dtype
) -> None:
    model = model.to(dtype).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.training_step(x.to(dtype), 0).backward()
    optimizer.step()
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    # softmax ignores a constant added to all keys
    assert all(name.endswith((".k.bias", ".q.bias")) for name in same)
