"""Checks of the values that a lossconfig gives; each error names the key and the mend."""

from __future__ import annotations

import math


def check_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{key}={value!r}: choose one of {', '.join(map(str, choices))}")


def check_number(key: str, value: object, at_least: float = 0.0) -> None:
    """Raise ValueError unless `value` is a finite number, `at_least` or more."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < at_least:  # type: ignore[arg-type,operator]
        least = "" if at_least == -math.inf else f", {at_least:g} or more"
        raise ValueError(f"{key}={value!r}: a finite number{least} (YAML: 1.0e-6, not 1e-6)")


def check_steps(key: str, value: object) -> None:
    """Raise ValueError unless `value` is a number of optimisation steps."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key}={value!r}: a number of optimisation steps, 0 or more")
