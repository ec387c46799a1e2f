"""How many operations a piece of work takes, and how many a second the machine can do.

B batch, C channels, H and W the image's height and width, z latent channels, h and w the latents'
height and width.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kl_vae.accel.accelerate import set_algorithms
from kl_vae.ddconfig import DDConfig
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.device import PRECISIONS

Work = Literal["encode", "decode", "step"]

# large enough for the full rate, small enough to take its turn: 17 GFLOP, on a GPU 1.1 TFLOP
_SIDES = {"cuda": 8192}
_SIDE = 2048


def count_flops(
    work: Work, ddconfig: DDConfig, embed_dim: int | None, batch_size: int, size: int
) -> int:
    """Floating point operations of B images of size x size pixels, two a multiply-add.

    Counted are the convolutions and matrix products of the plain modules, whatever does the work in
    the end: an algorithm that needs fewer operations then has a higher rate, not less work. A step
    is forward and backward; its loss and its update, which are no products, are not in it. Nothing
    is computed, so that any size takes no time and no memory.
    """
    with FakeTensorMode():
        model = AutoEncoderKL(dataclasses.replace(ddconfig, dropout=0.0), embed_dim)
        _make_plain(model)
        images = torch.empty(batch_size, ddconfig.in_channels, size, size)
        side = size // model.downsampling_factor
        latents = torch.empty(batch_size, model.latent_channels, side, side)
        counter = _Counter()
        # the attention as two products, which every version of torch counts alike
        with counter, sdpa_kernel(SDPBackend.MATH):
            if work == "step":
                reconstruction, posterior = model(images, noise=latents)
                (reconstruction.mean() + posterior.kl().mean()).backward()  # type: ignore[no-untyped-call]
            else:
                with torch.no_grad():
                    model.encode(images) if work == "encode" else model.decode(latents)
    return counter.flops


def _make_plain(model: AutoEncoderKL) -> None:
    """Let a model compute as it is written."""
    model.set_activation_checkpointing(None)
    set_algorithms(model, winograd=False, merge_upsampling=False)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's formulas; its own FlopCounterMode cannot take a gradient at an input."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class MatrixProduct:
    """A large square matrix product, whose rate is what a device can do in a precision.

    It is meant to be timed by turns with what it is compared with. On CUDA, fp32 means TF32 where
    torch lets convolutions use that.

    Args:
        device: where it is computed.
        precision: fp32, bf16 or fp16.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        side = _SIDES.get(device.type, _SIDE)
        generator = torch.Generator().manual_seed(0)
        self._a, self._b = (
            torch.randn(side, side, generator=generator).to(device, PRECISIONS[precision])
            for _ in range(2)
        )
        self._out = torch.empty_like(self._a)
        self.flops = 2 * side**3

    def __call__(self) -> None:
        """Multiply once."""
        if self._a.device.type != "cuda":
            torch.mm(self._a, self._b, out=self._out)
            return
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        try:
            torch.mm(self._a, self._b, out=self._out)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def count_gan_flops(model: AutoEncoderKL, batch_size: int, size: int) -> int:
    """Those of our GAN step: autoencoder, LPIPS and discriminator, forward and backward.

    `model` has an adversary that learns and counts from the first step on. It stays as it is.
    """
    with FakeTensorMode() as shapes_alone:
        tensors = (*model.parameters(), *model.buffers())
        copied = copy.deepcopy(model, {id(x): shapes_alone.from_tensor(x) for x in tensors})
        images = torch.empty(batch_size, model.config.in_channels, size, size)
        side = size // model.downsampling_factor
        noise = torch.empty(batch_size, model.latent_channels, side, side)
        _make_plain(copied)
        adversary = copied.adversary
        assert adversary is not None
        counter = _Counter()
        with counter, sdpa_kernel(SDPBackend.MATH):
            out = copied.step(images, 0, "train", noise=noise)
            out.total.backward()  # type: ignore[no-untyped-call]
            loss, _ = adversary.discriminator_loss(out.target, out.reconstruction.detach())
            loss.backward()  # type: ignore[no-untyped-call]
    return counter.flops
