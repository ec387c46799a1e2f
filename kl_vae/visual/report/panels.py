"""The plots of a page: which metrics share one, their order and units."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SPLITS = ("train", "val", "val_ema")


@dataclass(frozen=True)
class Panel:
    """A plot.

    Attributes:
        title: over it.
        unit: beside the title; may be empty.
        metrics: names without their split; one plot shows all splits of them.
        log: whether the axis is logarithmic at first.
        smooth: whether the page smooths the metrics of training steps.
        quiet: whether metrics that never change go to the table of constants.
        best: highest or lowest, of a metric that measures quality; else empty.
    """

    title: str
    unit: str
    metrics: tuple[str, ...]
    log: bool = False
    smooth: bool = True
    quiet: bool = False
    best: str = ""


BITS = "kl_bits_per_pixel"  # is made of kl_loss

SKIPPED = ("skipped_steps", "skipped_by_scaler")

PANELS = (
    Panel("Total loss", "", ("total_loss",), log=True, best="lowest"),
    Panel("Reconstruction loss", "", ("rec_loss",), log=True, best="lowest"),
    Panel("PSNR", "dB", ("psnr",), best="highest"),
    Panel("SSIM", "", ("ssim",), best="highest"),
    Panel("KL", "nats per image", ("kl_loss",)),
    Panel("KL", "bits per pixel", (BITS,)),
    Panel("LPIPS", "", ("p_loss",), best="lowest"),
    Panel("Negative log-likelihood", "", ("nll_loss",), log=True, best="lowest"),
    Panel("Adversarial loss of the autoencoder", "", ("g_loss",)),
    Panel("Adaptive weight", "d_weight", ("d_weight",), log=True),
    Panel("Discriminator's logits", "", ("logits_real", "logits_fake")),
    Panel("Discriminator's loss", "", ("disc_loss",)),
    Panel("LeCam penalty", "", ("lecam",)),
    Panel("Gradient norms", "before clipping", ("grad_norm", "disc_grad_norm"), log=True),
    Panel("Learning rates", "", ("learning_rate", "disc_learning_rate"), smooth=False, quiet=True),
    Panel("Throughput", "images per second", ("images_per_second",)),
    Panel("Skipped steps", "so far", SKIPPED, smooth=False, quiet=True),
    Panel("Log-variance of the pixels", "", ("logvar",), smooth=False, quiet=True),
    Panel("KL weight", "", ("kl_weight",), smooth=False, quiet=True),
    Panel("Discriminator's factor", "", ("disc_factor",), smooth=False, quiet=True),
)
NOT_PLOTTED = ("epoch", "images_seen")  # straight lines

_ORDER = [name for panel in PANELS for name in panel.metrics]


def split_of(key: str) -> tuple[str, str]:
    """`val_ema/psnr` -> ("val_ema", "psnr"); without a split: training."""
    split, slash, name = key.partition("/")
    return (split, name) if slash and split in SPLITS else ("train", key)


def panel_of(key: str) -> Panel:
    """Return the plot that a metric belongs to; of the user's own metrics one of its name."""
    name = split_of(key)[1]
    own = Panel(name, "", (name,), quiet=True)
    return next((panel for panel in PANELS if name in panel.metrics), own)


def in_order(keys: Iterable[str]) -> list[str]:
    """Return metrics in the order of their plots, then the user's own by name."""

    def place(key: str) -> tuple[int, str, int]:
        split, name = split_of(key)
        known = _ORDER.index(name) if name in _ORDER else len(_ORDER)
        return known, name, SPLITS.index(split)

    return sorted(keys, key=place)


def panels_of(keys: Iterable[str]) -> list[tuple[Panel, list[str]]]:
    """Return the plots for these metrics, each with the metrics that it shows."""
    keys = in_order(key for key in keys if split_of(key)[1] not in NOT_PLOTTED)
    names = dict.fromkeys(split_of(key)[1] for key in keys)
    others = [Panel(name, "", (name,), quiet=True) for name in names if name not in _ORDER]
    panels = [
        (panel, [key for key in keys if split_of(key)[1] in panel.metrics])
        for panel in (*PANELS, *others)
    ]
    return [(panel, shown) for panel, shown in panels if shown]
