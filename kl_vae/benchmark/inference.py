"""Encoding and decoding, ours against diffusers', with the same weights and the same images.

B batch, C channels, H and W the image's height and width, z latent channels, h and w the latents'
height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kl_vae.accel.accelerate import accelerate_as
from kl_vae.benchmark.flops import MatrixProduct, count_flops
from kl_vae.benchmark.measurement import MATRIX_PRODUCT, Measurement
from kl_vae.benchmark.timing import alternate
from kl_vae.benchmark.twin import twin_of, why_no_twin
from kl_vae.ddconfig import DDConfig
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.device import PRECISIONS, autocast
from kl_vae.runtime.randomness import generator_for

Coding = Literal["encode", "decode"]
Way = Callable[[Any], Any]  # takes the plain module, and may change it

DIFFUSERS = "diffusers"
PLAIN = "ours, plain modules"
OURS = "ours"


def ways(device: torch.device) -> dict[str, Way]:
    """How our modules are arranged for inference, by name."""
    found: dict[str, Way] = {PLAIN: partial(accelerate_as, "off")}
    if device.type == "cpu":
        found["ours, without Winograd"] = partial(accelerate_as, "exact")
    return found | {OURS: partial(accelerate_as, "auto")}


def their_ways(precision: str) -> dict[str, Way]:
    """How diffusers' are: as its users run them, and in the layout that is often faster.

    In half precision also with half-precision weights, which is how its pipelines load them.
    """
    found: dict[str, Way] = {DIFFUSERS: _as_it_is, f"{DIFFUSERS}, channels_last": _channels_last}
    if precision != "fp32":
        found[f"{DIFFUSERS}, {precision} weights"] = partial(_cast, precision=precision)
    return found


def measure_coding(
    ddconfig: DDConfig,
    embed_dim: int | None,
    device: torch.device,
    work: Coding,
    *,
    sizes: Sequence[int],
    batch_sizes: Sequence[int],
    repeats: int,
    precision: str = "fp32",
    compiled: bool = False,
) -> Iterator[list[Measurement]]:
    """Time every way on the same images, by turns with each other and with a matrix product.

    Yields a list for each number and size of images. The weights are those of `random_model`.
    Without diffusers (see `why_no_twin`) there are ours alone.

    Args:
        ddconfig: the architecture.
        embed_dim: channels of the latents; None: no quant convolutions.
        device: where to compute.
        work: encode or decode.
        sizes: sides of the images in pixels, multiples of f.
        batch_sizes: images a call, B.
        repeats: calls of each that are timed.
        precision: fp32, bf16 or fp16, by autocast.
        compiled: time both also as torch.compile makes them.
    """
    model = random_model(ddconfig, embed_dim).to(device)
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    if why_no_twin(ddconfig, embed_dim) is None:
        twin = twin_of(model)
        for name, way in their_ways(precision).items():
            calls[name] = coder(way(copy.deepcopy(twin)), work, device, precision)
    for name, way in ways(device).items():
        calls[name] = coder(way(copy.deepcopy(model)), work, device, precision)
    if compiled:
        calls |= {f"{name}, compiled": torch.compile(call) for name, call in calls.items()}
    product = MatrixProduct(device, precision)
    f, channels = model.downsampling_factor, model.latent_channels
    for size in sizes:
        for batch_size in batch_sizes:
            shape = (batch_size, channels, size // f, size // f)
            if work == "encode":
                shape = (batch_size, ddconfig.in_channels, size, size)
            x = coding_input(work, shape).to(device)
            results = {name: call(x).float() for name, call in calls.items()}
            expected = next(iter(results.values()))
            candidates: dict[str, Callable[[], object]] = {
                name: partial(call, x) for name, call in calls.items()
            }
            timings = alternate({**candidates, MATRIX_PRODUCT: product}, repeats, device)
            flops = count_flops(work, ddconfig, embed_dim, batch_size, size)
            yield [
                Measurement(
                    work,
                    name,
                    batch_size,
                    size,
                    timings[name],
                    flops,
                    product.flops / timings[MATRIX_PRODUCT].median,
                    (result - expected).abs().max().item(),
                )
                for name, result in results.items()
            ]


@torch.no_grad()
def random_model(ddconfig: DDConfig, embed_dim: int | None) -> AutoEncoderKL:
    """Random weights, always the same, that decode latents of unit variance to about [-1, 1].

    A difference of images is then what it is for a trained model.
    """
    torch.manual_seed(0)
    model = AutoEncoderKL(ddconfig, embed_dim).eval()
    z = coding_input("decode", (1, model.latent_channels, 8, 8))
    largest = model.decode(z).abs().max()
    for parameter in model.decoder.conv_out.parameters():
        parameter.div_(largest)
    return model


def coding_input(work: Coding, shape: tuple[int, ...]) -> Tensor:
    """Images [B, C, H, W] in [-1, 1], or latents [B, z, h, w] of unit variance; on the CPU."""
    x = torch.randn(shape, generator=generator_for("benchmark", *shape))
    return x.clamp(-1.0, 1.0) if work == "encode" else x


def coder(
    module: Any, work: Coding, device: torch.device, precision: str
) -> Callable[[Tensor], Tensor]:
    """A function of images or latents, without gradients: our module, or diffusers'."""
    is_ours = isinstance(module, AutoEncoderKL)

    def encode(x: Tensor) -> Tensor:
        posterior = module.encode(x) if is_ours else module.encode(x).latent_dist
        moments: Tensor = posterior.parameters
        return moments

    def decode(z: Tensor) -> Tensor:
        image: Tensor = module.decode(z) if is_ours else module.decode(z).sample
        return image

    compute = encode if work == "encode" else decode
    dtype = next(module.parameters()).dtype

    def call(x: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(device, precision):
            return compute(x.to(dtype))

    return call


def _as_it_is(module: Any) -> Any:
    return module


def _channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)


def _cast(module: nn.Module, precision: str) -> nn.Module:
    return module.to(PRECISIONS[precision])
