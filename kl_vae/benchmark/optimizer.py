"""What an update by Muon adds to a training step, against one by Adam."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from kl_vae.benchmark.timing import Timing, alternate
from kl_vae.ddconfig import DDConfig
from kl_vae.model import AutoEncoderKL
from kl_vae.optim.config import OptimizerConfig, build_optimizer
from kl_vae.runtime.randomness import generator_for
from kl_vae.training.step import to_device

SHARING_RANKS = 8  # that Muon's update is divided among, in the last row


@dataclass(frozen=True)
class OptimizerCost:
    """What was measured, and the cost of a step that follows from it.

    Attributes:
        size: side of the image in pixels.
        images: a step and device.
        image: forward and backward of one image through the autoencoder, L1 loss, fp32.
        adam: an update of all parameters by fused Adam.
        muon: by Muon, on one device.
    """

    size: int
    images: int
    image: Timing
    adam: Timing
    muon: Timing

    def step_seconds(self) -> dict[str, float]:
        """The computed seconds of a step of `images` images, by the kind of update."""
        images = self.images * self.image.median
        return {
            "Adam": images + self.adam.median,
            "Muon": images + self.muon.median,
            f"Muon, its update / {SHARING_RANKS}": images + self.muon.median / SHARING_RANKS,
        }

    def markdown(self) -> str:
        """A table of what was measured, and one of what is computed from it."""
        steps = self.step_seconds()
        return "\n".join(
            [
                "| measured | median s | low to high s |",
                "|---|---|---|",
                f"| one image of {self.size} x {self.size}, forward and backward | "
                f"{self.image.cells} |",
                f"| an update by Adam (fused) | {self.adam.cells} |",
                f"| an update by Muon | {self.muon.cells} |",
                "",
                f"| computed: a step of {self.images} images on a device | s | times Adam |",
                "|---|---|---|",
                *(f"| {k} | {s:.4g} | {s / steps['Adam']:.3f} |" for k, s in steps.items()),
                "",
                f"Computed is {self.images} x the median of one image + the median of the update; "
                "no step of that size was run. Where a batch is faster than its images one by one, "
                "the update weighs more.",
                f"The last row divides Muon's update by {SHARING_RANKS}, as if as many ranks shared"
                " it evenly; the time of exchanging their results is not in it.",
                "The loss is plain L1 in fp32: LPIPS, a discriminator and data loading, which cost "
                "the same with either, are not in it.",
            ]
        )


def compare_optimizers(
    ddconfig: DDConfig,
    embed_dim: int | None,
    device: torch.device,
    *,
    size: int = 256,
    images: int = 12,
    repeats: int = 5,
) -> OptimizerCost:
    """Time the pass of an image, an update by Adam and one by Muon, by turns.

    Both optimisers update the same parameters, which have random gradients.

    Args:
        ddconfig: the architecture.
        embed_dim: channels of the latents; None: no quant convolutions.
        device: where to compute.
        size: side of the image in pixels, a multiple of f.
        images: a step and device, for what is computed.
        repeats: how often each is timed.

    Raises:
        ValueError: an image that the model cannot take.
    """
    torch.manual_seed(0)
    model = AutoEncoderKL(ddconfig, embed_dim).to(device).to(memory_format=torch.channels_last)
    values = torch.rand(
        1, ddconfig.in_channels, size, size, generator=generator_for("benchmark", size)
    )
    image = to_device(2.0 * values - 1.0, device, channels_last=True)

    def pass_image() -> None:
        reconstruction, _ = model(image)
        (image - reconstruction).abs().mean().backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    updated = copy.deepcopy(model)  # so that the updates keep their gradients
    randomize_gradients(updated)
    # rates so small that the weights stay as they are
    adam, muon = (
        build_optimizer(
            updated.parameters(),
            OptimizerConfig(name=name, learning_rate=1e-6, adamw_learning_rate=1e-6),
        )
        for name in ("adam", "muon")
    )
    timings = alternate(
        {"image": pass_image, "adam": adam.step, "muon": muon.step}, repeats, device
    )
    return OptimizerCost(size, images, timings["image"], timings["adam"], timings["muon"])


def randomize_gradients(model: nn.Module) -> None:
    """Give each parameter a standard normal gradient."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
