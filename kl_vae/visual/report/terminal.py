"""A run in some lines of text."""

from __future__ import annotations

import math
import time

from kl_vae.runtime.files import display_name
from kl_vae.visual.report.metrics import MetricsFile
from kl_vae.visual.report.panels import NOT_PLOTTED, SPLITS, in_order, split_of
from kl_vae.visual.report.run import RunReading, duration

ROWS = (
    *("total_loss", "rec_loss", "p_loss", "psnr", "ssim", "kl_loss", "d_weight", "g_loss"),
    *("disc_loss", "logits_real", "logits_fake", "grad_norm", "learning_rate"),
)


def describe_run(reading: RunReading, metrics: MetricsFile) -> list[str]:
    """Return lines on the state of a run, and its last metrics."""
    now = time.time()
    share = f" ({reading.step / reading.total_steps:.0%})" if reading.total_steps else ""
    head = f"{display_name(reading.run)}: {reading.state}, {reading.progress}{share}"
    if reading.written is not None:
        head += f", wrote last {duration(now - reading.written)} ago"
    lines = [head]
    if reading.remark:
        lines.append(f"remark       {reading.remark}")
    if reading.speed is not None:
        speed = f"speed        {reading.speed:.4g} images/s"
        if reading.seconds_left is not None:
            end = time.strftime("%Y-%m-%d %H:%M", time.localtime(now + reading.seconds_left))
            speed += f", {duration(reading.seconds_left)} left without validations, until {end}"
        lines.append(speed)
    latest = {key: series.latest[1] for key, series in metrics.scalars.items()}
    if "epoch" in latest and "images_seen" in latest:
        lines.append(
            f"seen         {latest['epoch']:.4g} epochs, {latest['images_seen']:.0f} images"
        )
    skipped = latest.get("skipped_steps", 0.0), latest.get("skipped_by_scaler", 0.0)
    if any(skipped):
        lines.append(
            f"left out     {skipped[0]:.0f} steps, {skipped[1]:.0f} by the gradient scaler"
        )
    lines.append(f"best         {describe_best(reading)}")
    newest = f", newest {reading.checkpoints[0][0]}" if reading.checkpoints else ""
    lines.append(f"checkpoints  {len(reading.checkpoints)}{newest}")
    if reading.number_bad:
        lines.append(f"bad images   {reading.number_bad}, in bad_images.txt")
    lines += [f"note         {note}" for note in reading.notes]
    return [*lines, *(_table(metrics) or ["no metrics yet"])]


def describe_best(reading: RunReading) -> str:
    """Return the best checkpoint, its metric and step."""
    best = reading.best
    if not best:
        return "none yet" if reading.setting("model", "params", "monitor") else "no monitor is set"
    value = f"{best['monitor']} {best['value']:.5g} at step {best['step']}"
    kept = any(name == best["checkpoint"] for name, _ in reading.checkpoints)
    return f"{value}, {best['checkpoint']}" + ("" if kept else " (is gone)")


def _table(metrics: MetricsFile) -> list[str]:
    """Return the last metrics, a row per name and a column per split."""
    latest = {split_of(key): series.latest for key, series in metrics.scalars.items()}
    splits = [split for split in SPLITS if any(of == split for of, _ in latest)]
    known = dict.fromkeys(split_of(key)[1] for key in in_order(metrics.scalars))
    own = {name for name in known if split_of(name)[1] not in NOT_PLOTTED}
    names = [name for name in ROWS if name in own]
    if not names:
        names = [name for name in known if name in own][:8]
    if not names:
        return []
    steps = {
        split: max(step for (of, _), (step, _) in latest.items() if of == split) for split in splits
    }
    rows = [["", *splits], ["at step", *(str(steps[split]) for split in splits)]]
    for name in names:
        pairs = [latest.get((split, name)) for split in splits]
        rows.append([name, *("" if pair is None else _shown(pair[1]) for pair in pairs)])
    return [(f"{row[0]:<13}" + "".join(f"{text:>12}" for text in row[1:])).rstrip() for row in rows]


def _shown(value: float) -> str:
    return f"{value:.5g}" if math.isfinite(value) else str(value)
