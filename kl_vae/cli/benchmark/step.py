"""`kl-vae benchmark step`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from kl_vae.cli.arguments import positive
from kl_vae.cli.benchmark.shared import (
    add_compute_arguments,
    add_model_arguments,
    prepare,
    report,
    using_threads,
)

if TYPE_CHECKING:
    import torch

    from kl_vae.ddconfig import DDConfig

HELP = "a training step: the plain one against diffusers', the GAN's against the published one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_model_arguments(parser, size=128)
    parser.add_argument(
        "--loss",
        nargs="+",
        choices=("plain", "gan"),
        help="plain: MSE and KL; gan: L1, LPIPS, a discriminator and KL (default: both; with fp16 "
        "plain alone, as the published step has no gradient scaler)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images a step (default: 1)"
    )
    add_compute_arguments(parser)
    parser.add_argument(
        "--perceptual-features",
        metavar="FILE",
        help="torchvision's VGG16 weights (default: random ones, which cost the same)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    ddconfig, embed_dim, device = prepare(args)
    losses = args.loss or (["plain"] if args.precision == "fp16" else ["plain", "gan"])
    if args.precision == "fp16" and "gan" in losses:
        raise ValueError(
            "--precision fp16: the published GAN step has no gradient scaler; give bf16, or "
            "--loss plain"
        )
    with using_threads(args.threads):
        figures: dict[str, Any] = {}
        texts = []
        for loss, measure in (("plain", _plain), ("gan", _gan)):
            if loss in losses:
                text, figures[loss] = measure(args, ddconfig, embed_dim, device)
                texts.append(text)
        heading = (
            f"A training step of {args.config}: {args.batch_size} x {args.size} x {args.size} "
            f"images, {args.precision}, {args.repeats} of each by turns"
        )
        report(args, heading, "\n\n".join(texts), device, figures)
    return 0


def _plain(
    args: argparse.Namespace, ddconfig: DDConfig, embed_dim: int | None, device: torch.device
) -> tuple[str, dict[str, Any]]:
    from kl_vae.benchmark.measurement import table
    from kl_vae.benchmark.plain_comparison import compare_plain_steps
    from kl_vae.benchmark.twin import why_no_twin

    measured = compare_plain_steps(
        ddconfig,
        embed_dim,
        device,
        size=args.size,
        batch_size=args.batch_size,
        repeats=args.repeats,
        precision=args.precision,
        compiled=args.compile,
    )
    without = why_no_twin(ddconfig, embed_dim)
    text = table(measured, "parameters' gradients in fp32, relative to their norm,")
    parts = ["MSE + KL, forward, backward and AdamW:", without, text]
    figures = {"measured": [m.figures for m in measured], "without_diffusers": without}
    return "\n\n".join(part for part in parts if part), figures


def _gan(
    args: argparse.Namespace, ddconfig: DDConfig, embed_dim: int | None, device: torch.device
) -> tuple[str, dict[str, Any]]:
    from kl_vae.benchmark.step import compare_steps

    result = compare_steps(
        ddconfig,
        embed_dim,
        device,
        size=args.size,
        batch_size=args.batch_size,
        repeats=args.repeats,
        precision=args.precision,
        perceptual_features=args.perceptual_features,
    )
    text = f"L1, LPIPS, discriminator and KL, both updates:\n\n{result.markdown()}"
    return text, {**dataclasses.asdict(result), "ratio": result.ratio}
