"""The plain training step of every way, timed by turns, after a look at their gradients.

B batch, C channels, H and W the image's height and width, z latent channels, h and w the latents'
height and width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from kl_vae.benchmark.flops import MatrixProduct, count_flops
from kl_vae.benchmark.measurement import MATRIX_PRODUCT, Measurement
from kl_vae.benchmark.plain_step import (
    KL_WEIGHT,
    RATE,
    STEP_WAYS,
    PlainStep,
    build_ours,
    build_way,
    our_forward,
    our_optimizer,
    step_input,
    their_steps,
)
from kl_vae.benchmark.published import gradient_difference
from kl_vae.benchmark.timing import alternate, synchronisations
from kl_vae.benchmark.twin import why_no_twin
from kl_vae.checkpoints.diffusers import to_diffusers
from kl_vae.data import Batch
from kl_vae.ddconfig import DDConfig
from kl_vae.optim.config import OptimizerConfig
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.errors import RunError
from kl_vae.training.config import ModelConfig, ModelParams, RunConfig, TrainingConfig
from kl_vae.training.guards import BadImages
from kl_vae.training.prepare import build_model, build_state, wrap
from kl_vae.training.step import TrainingStep

MAX_DIFFERENCE = 1e-4  # of float32 gradients; above it the steps are not the same step
WHOLE_STEP = "ours, a step of kl-vae train"


def compare_plain_steps(
    ddconfig: DDConfig,
    embed_dim: int | None,
    device: torch.device,
    *,
    size: int = 128,
    batch_size: int = 1,
    repeats: int = 5,
    precision: str = "fp32",
    compiled: bool = False,
) -> list[Measurement]:
    """Time a plain step of every way by turns, on equal models and the same images.

    The differences are relative, of float32 gradients to the first way's (`gradient_difference`).

    Args:
        ddconfig: the architecture.
        embed_dim: channels of the latents; None: no quant convolutions.
        device: where to compute.
        size: side of the images in pixels, a multiple of f.
        batch_size: images a step, B.
        repeats: steps of each that are timed.
        precision: fp32, bf16 or fp16 (the gradients are compared in fp32 all the same).
        compiled: time all also with a forward that torch.compile makes.

    Raises:
        RunError: gradients differ; the times would be those of different things.
    """
    steps: dict[str, PlainStep] = {}
    differences: dict[str, float] = {}
    plain = build_ours(ddconfig, embed_dim, device)
    images, noise = step_input(ddconfig, embed_dim, batch_size, size, device)
    expected: dict[str, Tensor] = {}
    has_twin = why_no_twin(ddconfig, embed_dim) is None
    if has_twin:
        for name, (module, step) in their_steps(plain, device, precision).items():
            steps[name], found = step, _gradients(module, step, images, noise)
            expected = expected or found
            differences[name] = _difference(found, expected, name)
    del plain
    for name in STEP_WAYS:
        model = build_way(name, ddconfig, embed_dim, device)
        steps[name] = PlainStep(our_forward(model), our_optimizer(model), device, precision)
        found = _gradients(model, steps[name], images, noise)
        found = to_diffusers(found) if has_twin else found
        expected = expected or found
        differences[name] = _difference(found, expected, name)
    del found, expected
    if compiled:
        for name in list(steps):
            step = dataclasses.replace(steps[name], forward=torch.compile(steps[name].forward))
            steps[f"{name}, compiled"] = step
    product = MatrixProduct(device, precision)
    candidates: dict[str, Callable[[], object]] = {
        name: partial(step, images, noise) for name, step in steps.items()
    }
    whole = build_training_step(ddconfig, embed_dim, device, batch_size, precision)
    batch = Batch(images.cpu(), torch.arange(batch_size), ("-",) * batch_size, ())
    candidates[WHOLE_STEP] = lambda: whole(repeat(batch))
    timings = alternate({**candidates, MATRIX_PRODUCT: product}, repeats, device)
    flops = count_flops("step", ddconfig, embed_dim, batch_size, size)
    rate = product.flops / timings[MATRIX_PRODUCT].median
    return [
        Measurement(
            "step",
            name,
            batch_size,
            size,
            timings[name],
            flops,
            rate,
            differences.get(name),
            synchronisations(call, device),
        )
        for name, call in candidates.items()
    ]


def build_training_step(
    ddconfig: DDConfig,
    embed_dim: int | None,
    device: torch.device,
    batch_size: int,
    precision: str,
) -> TrainingStep:
    """Build the step of a run, with its draws of noise, its checks, its clipping and its figures.

    Its loss is MSE and KL, on the same weights as `build_ours`.
    """
    params = ModelParams(
        ddconfig=dataclasses.replace(ddconfig, dropout=0.0),
        embed_dim=embed_dim,
        lossconfig={"target": "elbo", "params": {"kl_weight": KL_WEIGHT}},
    )
    config = RunConfig(
        model=ModelConfig(params=params),
        optimizer=OptimizerConfig(learning_rate=RATE),
        training=TrainingConfig(global_batch_size=batch_size, max_steps=1, precision=precision),  # type: ignore[arg-type]
    )
    ranks = Ranks(0, 1, device)
    model = build_model(config, ranks, resuming=False)
    state = build_state(config, model, {}, "")
    bad_images = BadImages(None, ranks, number=batch_size, max_fraction=0.0)
    return TrainingStep(state, *wrap(model, ranks), config, ranks, 1, bad_images)


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor], way: str) -> float:
    ours, theirs = ([x[key].flatten() for key in expected] for x in (found, expected))
    difference = gradient_difference(ours, theirs)
    if not difference < MAX_DIFFERENCE:  # so is NaN
        raise RunError(
            f"{way}: its gradients differ by {difference:.1e}, which is more than rounding "
            f"({MAX_DIFFERENCE:.0e}): times of different things do not compare"
        )
    return difference


def _gradients(
    module: nn.Module, step: PlainStep, images: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """The float32 gradients of all parameters."""
    in_full = dataclasses.replace(step, precision="fp32")
    in_full.loss(images, noise).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    step.optimizer.zero_grad(set_to_none=True)
    return found
