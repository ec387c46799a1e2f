"""What `kl-vae sample` does for each --from."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from kl_vae.data import MAX_PIXELS, JoinedSource, LatentDataset, resolve_root
from kl_vae.inference.coding import encode_images
from kl_vae.inference.images import load_images
from kl_vae.inference.sampling.canvas import GRID_CELLS, Canvas, Drawing, Series
from kl_vae.inference.sampling.fit_latents import EncodedImages, LatentSource, StoredLatents
from kl_vae.inference.sampling.gaussian_fit import Covariance
from kl_vae.inference.sampling.gaussian_work import GaussianWork
from kl_vae.inference.sampling.interpolate import interpolate, path_point
from kl_vae.inference.sampling.posterior_grid import PosteriorGrid
from kl_vae.inference.sampling.prior import prior_latents
from kl_vae.inference.sources import open_sources
from kl_vae.runtime.distributed import Ranks

NUMBER = 16
FIT_IMAGES = 1000
COVARIANCE: Covariance = "low-resolution"
STEPS = 9


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        drawing: the pictures.
        identity: what they depend on, beside what every plan's do.
        fit: what is fitted before anything is drawn.
        inputs: files that must not be overwritten.
        folders: of images, where no output may go.
    """

    drawing: Drawing
    identity: dict[str, Any]
    fit: GaussianWork | None = None
    inputs: Sequence[Path] = ()
    folders: Sequence[Path] = ()


def plan_for(args: argparse.Namespace, canvas: Canvas, ranks: Ranks) -> Plan:
    """The plan of what the arguments ask for; all ranks call this.

    Raises:
        ValueError: images or latents cannot be used.
    """
    plans = {
        "prior": _prior,
        "gaussian": _gaussian,
        "interpolation": _interpolation,
        "posterior": _posterior,
    }
    return plans[args.source](args, canvas, ranks)


def _prior(args: argparse.Namespace, canvas: Canvas, ranks: Ranks) -> Plan:
    def latents(index: int) -> Tensor:
        return prior_latents(canvas.model, canvas.size, args.seed, index)

    return Plan(_samples(args, canvas, latents, "samples"), _number(args))


def _gaussian(args: argparse.Namespace, canvas: Canvas, ranks: Ranks) -> Plan:
    source: LatentSource
    inputs: list[Path] = []
    folders: list[Path] = []
    if args.latents is not None:
        dataset = LatentDataset(resolve_root(args.latents))
        source = StoredLatents(dataset, canvas.model, args.checkpoint)
        if ranks.is_first:
            source.warn_of_other_weights(canvas.model)
    else:
        images, folders = _open(args, canvas, ranks, args.images)
        inputs = images.files
        source = EncodedImages(
            canvas.model, images, canvas.size, canvas.precision, args.num_workers
        )
    covariance: Covariance = args.covariance or COVARIANCE
    number = args.fit_images or FIT_IMAGES
    work = GaussianWork(source, number, covariance, args.batch_size, _notify)

    def latents(index: int) -> Tensor:
        return work.latents(args.seed, index, canvas.latent_side)

    drawing = _samples(args, canvas, latents, f"samples of a Gaussian ({covariance})")
    identity = {
        **_number(args),
        "fitted_to": source.fingerprint,
        "fit_images": number,
        "covariance": covariance,
    }
    return Plan(drawing, identity, work, inputs, folders)


def _interpolation(args: argparse.Namespace, canvas: Canvas, ranks: Ranks) -> Plan:
    opened = [_open(args, canvas, ranks, [root]) for root in args.images]
    ends: list[Tensor] = []  # posterior means, each [z, h, w]
    for source, _ in opened:
        for index in range(min(2, len(source))):
            (loaded,) = load_images(source, [index], resize=canvas.size, crop=canvas.size)
            if loaded.image is None:
                name = source.name(index)
                raise ValueError(f"{name}: {loaded.reason}; give another image to --images")
            posterior = encode_images(
                canvas.model, loaded.image[None], canvas.precision, canvas.tiling
            )
            ends.append(posterior.mode()[0])
    if len(ends) < 2:
        raise ValueError(
            "--images: 1 image, which there is nothing between; give 2 or more, or a folder"
        )
    steps = STEPS if args.steps is None else args.steps

    def latents(index: int) -> Tensor:
        return interpolate(ends, index, steps, args.lerp)

    pairs = len(ends) - 1
    points = [path_point(index, steps) for index in range(pairs * steps)]
    names = [f"pair_{point.pair:05d}_step_{point.step:05d}" for point in points]
    what = f"pictures between {len(ends)} images ({'lerp' if args.lerp else 'slerp'})"
    drawing = Series(canvas, names, latents, args.batch_size, steps, what)
    identity = {
        "images": [source.fingerprint for source, _ in opened],
        "steps": steps,
        "lerp": args.lerp,
    }
    inputs = [file for source, _ in opened for file in source.files]
    folders = [folder for _, folders in opened for folder in folders]
    return Plan(drawing, identity, None, inputs, folders)


def _posterior(args: argparse.Namespace, canvas: Canvas, ranks: Ranks) -> Plan:
    source, folders = _open(args, canvas, ranks, args.images)
    drawing = PosteriorGrid(
        canvas, source, args.number or NUMBER, args.seed, args.batch_size, _notify
    )
    identity = {**_number(args), "images": source.fingerprint}
    return Plan(drawing, identity, None, source.files, folders)


def _number(args: argparse.Namespace) -> dict[str, int]:
    return {"number": args.number or NUMBER}


def _samples(
    args: argparse.Namespace, canvas: Canvas, latents: Callable[[int], Tensor], what: str
) -> Series:
    number = args.number or NUMBER
    columns = math.ceil(math.sqrt(min(number, GRID_CELLS)))
    names = [f"sample_{i:05d}" for i in range(number)]
    return Series(canvas, names, latents, args.batch_size, columns, what)


def _open(
    args: argparse.Namespace, canvas: Canvas, ranks: Ranks, roots: Sequence[str]
) -> tuple[JoinedSource, list[Path]]:
    """The images of `roots`, listed once for all ranks, and the folders among them."""
    channels = canvas.model.config.in_channels
    return ranks.on_first(
        lambda: open_sources(
            roots,
            channels,
            args.include or (),
            args.exclude or (),
            args.max_pixels or MAX_PIXELS,
        )
    )


def _notify(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
