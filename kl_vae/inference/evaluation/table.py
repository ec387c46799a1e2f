"""An evaluation of several models as a table: one column a model, one row a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kl_vae.inference.evaluation.results import Evaluation, Mean

NONE = "none"
Rows = list[tuple[str, list[str]]]

# the figures' rows, in this order: name, digits
_FIGURES = {
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 4),
    "ms_ssim": ("MS-SSIM", 4),
    "lpips": ("LPIPS", 4),
    "kl_nats": ("KL (nats an image)", 1),
    "kl_bits_per_pixel": ("KL (bits a pixel)", 4),
}


def rows_of(evaluations: Sequence[Evaluation], lpips_net: str = "") -> Rows:
    """The rows of the table: a label, and a cell for each model; `mean ± standard error`."""
    rows: Rows = []

    def add(label: str, cell: Callable[[Evaluation], str]) -> None:
        rows.append((label, [cell(evaluation) for evaluation in evaluations]))

    for key, (label, digits) in _FIGURES.items():
        if key == "kl_nats" and evaluations[0].rfid is not None:
            add("rFID", lambda x: _number(x.rfid, 2))
        if key not in evaluations[0].figures:
            continue
        if key == "lpips" and lpips_net:
            label = f"{label} ({lpips_net})"
        add(label, lambda x, k=key, d=digits: _mean(x.figures[k], d))  # type: ignore[misc]
        if key == "psnr":
            add("PSNR of mean MSE (dB)", lambda x: _number(x.psnr_of_mean_mse, 2))
    add("active channels", lambda x: f"{x.active_channels} of {len(x.variances)}")
    add("scale_factor", lambda x: f"{x.latents.scale_factor:.4g}")
    add("shift_factor", lambda x: f"{x.latents.shift_factor:.4g}")
    return rows


def as_text(names: Sequence[str], rows: Rows) -> str:
    """A table for a terminal."""
    lines = [["", *names], *([label, *cells] for label, cells in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_markdown(names: Sequence[str], rows: Rows) -> str:
    """The same in Markdown."""
    head = [_line(["", *names]), "|---|" + "---:|" * len(names)]
    return "\n".join([*head, *(_line([label, *cells]) for label, cells in rows)])


def channel_rows(evaluation: Evaluation) -> Rows:
    """A row for each latent channel: mean, std, variance of the posteriors' means."""
    latents = evaluation.latents
    values = zip(latents.mean or (), latents.std or (), evaluation.variances, strict=True)
    return [(str(i), [f"{value:.4g}" for value in row]) for i, row in enumerate(values)]


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _mean(figure: Mean, digits: int) -> str:
    if figure.mean is None:
        return NONE
    cell = f"{figure.mean:.{digits}f}"
    error = figure.standard_error
    return cell if error is None else f"{cell} ± {error:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
