"""One training step: ours against diffusers' modules, and against the published GAN step.

plain: MSE + KL, forward, backward and AdamW, with our modules and with diffusers'.
gan: L1, LPIPS, discriminator and KL with both updates (`AutoEncoderKL.training_step`), against the
operations that latent-diffusion's training code runs, with our modules and with diffusers'.

Before they are timed, the gradients of all are compared in fp32; a difference beyond rounding ends
the benchmark.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    DTYPES,
    Architecture,
    alternate,
    argument_parser,
    autocast,
    check_difference,
    parse,
    random_images,
    random_latents,
    reference_model,
    report,
)
from operations import count_operations
from torch import Tensor, nn

from kl_vae import AutoEncoderKL, accelerate
from kl_vae.checkpoints.diffusers import to_diffusers
from kl_vae.losses import LPIPSWithDiscriminator
from kl_vae.optim.config import OptimizerConfig, build_optimizer

KL_WEIGHT = 1e-6
LEARNING_RATE = 1e-6  # so small that all timed steps work on the same weights
PLAIN_BOUND, GAN_BOUND = 1e-4, 1e-3  # of relative differences of gradients in fp32

# our variants: arguments of `accelerate`, and what is computed again in the backward pass
OWN_STEPS: dict[str, tuple[dict[str, bool], str | None]] = {
    "ours, plain modules": (
        {"channels_last": False, "winograd": False, "merge_upsampling": False},
        None,
    ),
    "ours, without Winograd": ({"winograd": False}, "norms"),
    "ours, checkpointing none": ({}, "none"),
    "ours": ({}, "norms"),  # as a run trains by default
    "ours, checkpointing blocks": ({}, "blocks"),
}
PLAIN_COLUMNS = {
    "MSE + KL": "{variant}",
    "median s": "{median:.4g}",
    "low to high s": "{low:.4g} to {high:.4g}",
    "speed": "{speed:.2f}",
    "difference of gradients": "{difference:.1e}",
}
GAN_COLUMNS = {
    "L1, LPIPS, GAN, KL": "{variant}",
    "median s": "{median:.4g}",
    "low to high s": "{low:.4g} to {high:.4g}",
    "times ours": "{times_ours:.2f}",
    "autoencoder": "{autoencoder}",
    "LPIPS": "{LPIPS}",
    "discriminator": "{discriminator}",
    "GFLOP": "{gflop:.0f}",
    "difference of gradients": "{difference:.1e}",
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and report; return the rows."""
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--loss", choices=("plain", "gan"), default="plain")
    parser.add_argument("--size", type=int, default=128, help="side of the images, pixels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--compile", action="store_true", help="plain: also by torch.compile")
    parser.add_argument(
        "--perceptual-features",
        type=Path,
        help="gan: VGG16's weights (default: random ones, which cost the same)",
    )
    args = parse(parser, argv)
    if args.loss == "gan" and args.precision == "fp16":
        parser.error("--precision fp16: the published step has no gradient scaler; give bf16")

    architecture = Architecture.of(args.config)
    columns, measure = PLAIN_COLUMNS, plain_rows
    if args.loss == "gan":
        columns, measure = GAN_COLUMNS, gan_rows
    rows = measure(architecture, args)
    images = f"{args.batch_size} x {args.size} x {args.size}"
    notes = ["Difference: the largest relative one of a parameter's gradient in fp32, by its norm."]
    if args.loss == "gan":
        notes.append("Of networks: forward + backward passes of a step, counted by hooks.")
    heading = (
        f"A step of {args.config}, {images}, {args.precision}, {args.repeats} of each, interleaved"
    )
    report(args, heading, columns, rows, notes)
    return rows


# ---- plain ----


class PlainStep:
    """Forward, MSE + KL_WEIGHT * KL, backward and update; of our model or diffusers'."""

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, precision: str, *, compile: bool = False
    ) -> None:
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self.device = next(model.parameters()).device
        self.forward = torch.compile(self._forward) if compile else self._forward
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def _forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return pass_images(self.model, images, noise)

    def loss(self, images: Tensor, noise: Tensor, precision: str) -> Tensor:
        """Return the scalar of images [B, C, H, W] and the posterior's noise [B, z, h, w]."""
        with autocast(self.device, precision):
            reconstruction, kl = self.forward(images, noise)
        return F.mse_loss(reconstruction.float(), images) + KL_WEIGHT * kl.float().mean()

    def __call__(self, images: Tensor, noise: Tensor) -> None:
        """Take a step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(self.loss(images, noise, self.precision)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def gradients(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return the gradients in fp32 by diffusers' names of the parameters."""
        self.loss(images, noise, "fp32").backward()
        found = own_gradients(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        return found


def own_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of an autoencoder's parameters by diffusers' names, each flattened."""
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not name.startswith("loss.")
    }
    found = to_diffusers(found) if isinstance(model, AutoEncoderKL) else found
    return {name: gradient.flatten() for name, gradient in found.items()}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest relative difference of a parameter's gradient, by its norm.

    A gradient below a thousandth of the whole counts as large as that: it is partly rounding (of a
    bias before a norm, for one).
    """
    whole = torch.stack([x.norm() for x in expected.values()]).norm()
    ratios = [
        (found[name] - x).norm() / torch.maximum(x.norm(), 1e-3 * whole)
        for name, x in expected.items()
    ]
    return torch.stack(ratios).max().item()


def pass_images(model: Any, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the reconstruction [B, C, H, W] and KL [B] in nats, of our model or diffusers'.

    `noise` of the posterior's sample is [B, z, h, w]; None: drawn from torch's generator.
    """
    if isinstance(model, AutoEncoderKL):
        reconstruction, posterior = model(images, noise=noise)
        return reconstruction, posterior.kl()
    posterior = model.encode(images).latent_dist
    noise = torch.randn_like(posterior.mean) if noise is None else noise
    z = posterior.mean + posterior.std * noise
    return model.decode(z).sample, posterior.kl()


def own_model(variant: str, architecture: Architecture, device: torch.device) -> AutoEncoderKL:
    """Build our model as one of OWN_STEPS has it; the same weights always."""
    return arrange(architecture.build().to(device), variant)


def arrange(model: AutoEncoderKL, variant: str) -> AutoEncoderKL:
    """Accelerate a model as one of OWN_STEPS says; return it."""
    options, checkpointing = OWN_STEPS[variant]
    accelerate(model, **options)
    model.set_activation_checkpointing(checkpointing)
    return model


def own_optimizer(model: AutoEncoderKL) -> torch.optim.Optimizer:
    """Return AdamW as training builds it."""
    return build_optimizer(model.parameters(), OptimizerConfig(learning_rate=LEARNING_RATE))


def plain_rows(architecture: Architecture, args: Any) -> list[dict[str, Any]]:
    """Measure a plain step of each variant."""
    models = {name: own_model(name, architecture, args.device) for name in OWN_STEPS}
    images = random_images(models["ours"], args.batch_size, args.size)
    noise = random_latents(models["ours"], args.batch_size, args.size)
    reference = reference_model(models["ours"]).train()
    faster = copy.deepcopy(reference).to(memory_format=torch.channels_last)
    fused = args.device.type in ("cuda", "cpu")
    steps = {
        "diffusers": PlainStep(
            reference,
            torch.optim.AdamW(reference.parameters(), lr=LEARNING_RATE),
            args.precision,
        ),
        "diffusers, channels_last, fused AdamW": PlainStep(
            faster,
            torch.optim.AdamW(faster.parameters(), lr=LEARNING_RATE, fused=fused),
            args.precision,
        ),
    }
    for name, model in models.items():
        steps[name] = PlainStep(model, own_optimizer(model), args.precision)
    expected = steps["diffusers"].gradients(images, noise)
    differences = {}
    for name, step in steps.items():
        differences[name] = largest_difference(step.gradients(images, noise), expected)
        check_difference(differences[name], PLAIN_BOUND, name)
    if args.compile:
        for name, step in list(steps.items()):
            steps[f"{name}, compiled"] = PlainStep(
                step.model, step.optimizer, args.precision, compile=True
            )
    calls = {name: partial(step, images, noise) for name, step in steps.items()}
    timings = alternate(calls, args.repeats, args.device)
    return [
        {
            "variant": name,
            **timing._asdict(),
            "speed": timings["diffusers"].median / timing.median,
            "difference": differences.get(name),
        }
        for name, timing in timings.items()
    ]


# ---- GAN ----


class OwnGanStep:
    """`training_step`, one backward, both updates."""

    def __init__(self, model: AutoEncoderKL, precision: str) -> None:
        self.model, self.precision = model, precision
        self.optimizers = gan_optimizers(model.own_parameters(), adversary_of(model))

    def __call__(self, images: Tensor) -> None:
        """Take a step on images [B, C, H, W]."""
        with autocast(images.device, self.precision):
            total = self.model.training_step(images, 0)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        for optimizer in self.optimizers:
            optimizer.step()


class PublishedGanStep:
    """The operations of a step of Rombach et al. (2022) under Lightning, in their order.

    Two phases, one per optimiser, each with a forward of the autoencoder and of LPIPS: their loss
    begins with both, whichever optimiser's turn it is. In each phase the parameters of the other
    optimiser take no gradient. The adaptive weight takes two backward passes to the last layer, and
    the backward of the total goes through LPIPS and the discriminator once more. Copies that make
    tensors contiguous and logging are left out.

    Args:
        model: our autoencoder, or diffusers'.
        loss: LPIPS, discriminator and weights; the formula is the published one: L1, sums over an
            image's values, hinge, adaptive weighting.
        precision: fp32 or bf16, by autocast.
    """

    def __init__(self, model: Any, loss: LPIPSWithDiscriminator, precision: str) -> None:
        self.model, self.loss, self.precision = model, loss, precision
        is_ours = isinstance(model, AutoEncoderKL)
        self.own = model.own_parameters() if is_ours else list(model.parameters())
        self.discriminators = list(loss.discriminator.parameters())
        self.optimizers = gan_optimizers(self.own, loss)
        self.last_layer = model.decoder.conv_out.weight

    def __call__(self, images: Tensor, noise: Tensor | None = None) -> None:
        """Take a step on images [B, C, H, W]; `noise` [B, z, h, w] or drawn by each forward."""
        phases = (
            (self._autoencoder_loss, self.own, self.discriminators),
            (self._discriminator_loss, self.discriminators, self.own),
        )
        for optimizer, (loss, learning, resting) in zip(self.optimizers, phases, strict=True):
            for parameter in resting:
                parameter.requires_grad_(False)
            for parameter in learning:
                parameter.requires_grad_(True)
            with autocast(images.device, self.precision):
                total = loss(images, noise)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()

    def _likelihood(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction [B, C, H, W], nll and KL: what either phase begins with."""
        loss, batch = self.loss, len(images)
        x_rec, kl = pass_images(self.model, images, noise)
        error = loss.pixelloss_weight * (images - x_rec).abs()
        error = error + loss.perceptual_weight * loss.perceptual_loss(images, x_rec)
        nll = (error / loss.logvar.exp() + loss.logvar).sum() / batch
        return x_rec, nll, kl.sum() / batch

    def _autoencoder_loss(self, images: Tensor, noise: Tensor | None) -> Tensor:
        loss = self.loss
        x_rec, nll, kl = self._likelihood(images, noise)
        adversarial = -loss.discriminator(x_rec).mean()
        (a,) = torch.autograd.grad(nll, self.last_layer, retain_graph=True)
        (b,) = torch.autograd.grad(adversarial, self.last_layer, retain_graph=True)
        weight = loss.disc_weight * (a.norm() / (b.norm() + 1e-4)).clamp(0.0, 1e4).detach()
        total: Tensor = nll + loss.kl_weight * kl + weight * loss.disc_factor * adversarial
        return total

    def _discriminator_loss(self, images: Tensor, noise: Tensor | None) -> Tensor:
        x_rec, *_ = self._likelihood(images, noise)
        real = self.loss.discriminator(images.detach())
        fake = self.loss.discriminator(x_rec.detach())
        hinge: Tensor = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        return self.loss.disc_factor * hinge


def adversary_of(model: AutoEncoderKL) -> LPIPSWithDiscriminator:
    """Return the loss of a model that has a discriminator."""
    assert model.adversary is not None
    return model.adversary


def gan_optimizers(
    own: list[nn.Parameter], loss: LPIPSWithDiscriminator
) -> list[torch.optim.Optimizer]:
    """Return Adam as published, of the autoencoder and of the discriminator."""
    config = OptimizerConfig(
        name="adam", betas=(0.5, 0.9), eps=1e-8, learning_rate=LEARNING_RATE, clip_grad_norm=None
    )
    return [build_optimizer(p, config) for p in (own, loss.discriminator.parameters())]


def gan_rows(architecture: Architecture, args: Any) -> list[dict[str, Any]]:
    """Measure the GAN step of each variant."""
    model = gan_model(architecture, args.perceptual_features).to(args.device)
    published = copy.deepcopy(model)
    reference = reference_model(model).train()
    steps: dict[str, OwnGanStep | PublishedGanStep] = {
        "published, diffusers' modules": PublishedGanStep(
            reference, copy.deepcopy(adversary_of(model)), "fp32"
        ),
        "published": PublishedGanStep(published, adversary_of(published), "fp32"),
        "ours": OwnGanStep(model, "fp32"),
    }
    images = random_images(model, args.batch_size, args.size)
    # what training_step draws from torch's generator
    torch.manual_seed(0)
    noise = torch.randn_like(random_latents(model, args.batch_size, args.size))
    arguments = {name: (images,) if name == "ours" else (images, noise) for name in steps}

    own = (model, published)
    for autoencoder in own:
        arrange(autoencoder, "ours")
    rows: dict[str, dict[str, Any]] = {}
    expected: dict[str, Tensor] = {}
    for name, step in steps.items():
        torch.manual_seed(0)
        step(*arguments[name])
        found = own_gradients(step.model)
        expected = expected or found
        difference = largest_difference(found, expected)
        check_difference(difference, GAN_BOUND, name)
        rows[name] = {"variant": name, "difference": difference}

    for autoencoder in own:  # operations are those of the plain modules
        arrange(autoencoder, "ours, plain modules")
    for name, step in steps.items():
        loss = adversary_of(model) if isinstance(step, OwnGanStep) else step.loss
        networks = {
            "autoencoder": step.model.encoder,
            "LPIPS": loss.perceptual_loss.features[0],  # which sees each image once
            "discriminator": loss.discriminator,
        }
        with count_passes(networks) as passes, count_operations() as counts:
            step(*arguments[name])
        rows[name] |= {**passes(), "gflop": counts.total() / 1e9}

    for autoencoder in own:
        arrange(autoencoder, "ours")
    for step in steps.values():
        step.precision = args.precision
    timings = alternate(
        {name: partial(step, images) for name, step in steps.items()}, args.repeats, args.device
    )
    for name, timing in timings.items():
        rows[name] |= timing._asdict()
        rows[name]["times_ours"] = timing.median / timings["ours"].median
    return list(rows.values())


def gan_model(architecture: Architecture, features: Path | None) -> AutoEncoderKL:
    """Build our model with LPIPS and a discriminator that counts from the first step on."""
    with tempfile.TemporaryDirectory() as folder:
        params = {
            "disc_start": 0,
            "disc_in_channels": architecture.ddconfig["out_ch"],
            "disc_weight": 0.5,
            "kl_weight": KL_WEIGHT,
            "learn_logvar": False,  # which no published optimiser holds
            "perceptual_linear": False,
            "perceptual_features": str(features or write_random_vgg(Path(folder, "vgg16.pth"))),
        }
        return architecture.build({"target": "lpips_with_discriminator", "params": params})


def write_random_vgg(path: Path) -> Path:
    """Write random weights of VGG16's features (He et al. 2015), as LPIPS reads them."""
    import torchvision

    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).features.state_dict()
    torch.manual_seed(0)
    tensors = {
        key: torch.randn(x.shape) * math.sqrt(2.0 / x[0].numel())
        if x.ndim == 4
        else torch.zeros(x.shape)
        for key, x in shapes.items()
    }
    torch.save(tensors, path)
    return path


@contextmanager
def count_passes(networks: Mapping[str, nn.Module]) -> Iterator[Callable[[], dict[str, str]]]:
    """Count the passes of networks with one output; yields what says "forward + backward"."""
    counts = {name: [0, 0] for name in networks}

    def hook(count: list[int]) -> Callable[[nn.Module, object, Tensor], None]:
        def count_backward(_: Tensor) -> None:
            count[1] += 1

        def count_forward(_: nn.Module, __: object, output: Tensor) -> None:
            count[0] += 1
            if output.requires_grad:
                output.register_hook(count_backward)

        return count_forward

    handles = [x.register_forward_hook(hook(counts[name])) for name, x in networks.items()]
    try:
        yield lambda: {name: f"{a} + {b}" for name, (a, b) in counts.items()}
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
