"""One rank: some GAN steps on fixed images; each rank writes its parameters and figures.

Arguments: where to write, accumulated micro-batches, weighting, precision, and the rank whose
reconstruction becomes infinite in the second step (or -1).
"""

import dataclasses
import sys
from collections.abc import Iterator

import torch
from torch import nn

from kl_vae import AutoEncoderKL
from kl_vae.data import Batch
from kl_vae.runtime.distributed import Ranks, connect
from kl_vae.training.config import RunConfig
from kl_vae.training.guards import BadImages
from kl_vae.training.setup import build_model, build_state, divide_batch
from kl_vae.training.step import TrainingStep

out, accumulate, weighting, precision, broken_rank = sys.argv[1:]
STEPS, GLOBAL = 5, 2 if precision == "fp16" else 8  # which is slow on CPUs

torch.set_num_threads(1)
loss = f"""{{target: lpips_with_discriminator, params: {{disc_start: 1, kl_weight: 1.0e-3,
    disc_weight: 0.5, disc_num_layers: 1, disc_ndf: 32, disc_norm: group, reconstruction: mse,
    disc_weighting: {weighting}, lecam_weight: 0.1, reduction: mean, perceptual: squeeze,
    perceptual_features: squeeze.pth, perceptual_linear: false, perceptual_weight: 0.1}}}}"""
config = RunConfig.load(
    "tiny.yaml",
    [
        f"model.params.lossconfig={loss}",
        "model.params.monitor=null",
        f"training.global_batch_size={GLOBAL}",
        f"training.accumulate_batches={accumulate}",
        f"training.precision={precision}",
        "training.ema_decay=0.9",
        "optimizer.learning_rate=1.0e-4",
        "discriminator_optimizer.learning_rate=1.0e-4",
        "optimizer.eps=1.0e-5",  # rounding of elements without gradient stays small
        "discriminator_optimizer.eps=1.0e-5",
    ],
)
# smooth, and with a smooth pixel error: what flips at a kink would not be the ranks' doing
small = 2 * torch.rand(GLOBAL, 3, 5, 5, generator=torch.Generator().manual_seed(0)) - 1
everything = nn.functional.interpolate(small, (24, 24), mode="bicubic").clamp(-1, 1)


def batches(ranks: Ranks) -> Iterator[Batch]:
    """This rank's share of the same images in each step, in order."""
    _, plan = divide_batch(config.training, ranks.world_size)
    size = plan["micro_batch_size"]
    while True:
        for start in range(ranks.rank * size, GLOBAL, size * ranks.world_size):
            positions = torch.arange(start, start + size)
            names = tuple(f"{i}.png" for i in range(start, start + size))
            yield Batch(everything[start : start + size], positions, names, ())


def inflate(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
    """What inflated weights do to a reconstruction."""
    return output * float("inf")


def soften(module: nn.Module) -> None:
    """Let no activation have a kink, at which rounding would decide about a gradient."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ReLU, nn.LeakyReLU)):
            setattr(module, name, nn.SiLU())
        soften(child)


with connect("cpu") as ranks:
    model: AutoEncoderKL = build_model(config, ranks, resuming=False)
    soften(model)
    state = build_state(config, model, {}, "")
    bad_images = BadImages(None, ranks, GLOBAL, max_fraction=0.0)
    take_step = TrainingStep(state, config, ranks, STEPS, bad_images)
    figures = []
    source = batches(ranks)
    for step in range(STEPS):
        broken = step == 2 and ranks.rank == int(broken_rank)
        hook = model.decoder.register_forward_hook(inflate) if broken else None
        means = ranks.mean(take_step(source).metrics)
        if hook is not None:
            hook.remove()
        figures.append({key: value.tolist() for key, value in means.items()})
    content = {
        "metrics": figures,
        "skips": dataclasses.asdict(state.skips),
        "scales": [network.scaler.get_scale() for network in state.networks],
        "model": model.state_dict(),
        "ema": state.average and state.average.state_dict(),
    }
    torch.save(content, f"{out}_{ranks.rank}.pt")
    del take_step
