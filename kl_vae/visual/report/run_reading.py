"""A run at a moment, as a report tells of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class RunReading:
    """A run at a moment.

    Attributes:
        run: its directory.
        state: running, finished, stopped, failed, lost (killed) or unknown.
        remark: why it ended so, or what to think of it; may be empty.
        step: optimisation steps so far.
        total_steps: of the whole run; None where nothing says it.
        written: when it wrote something last, in seconds since 1970.
        speed: images a second of late, while it trained.
        seconds_left: at that speed, without validations; None unless it is running.
        config_text: config.yaml.
        config: the same, parsed; empty where it cannot be.
        best: of best.json: checkpoint, monitor, value, step; may be empty.
        checkpoints: name and bytes, newest first.
        bad_images: path and reason of the first.
        number_bad: of all bad images.
        pictures: the steps of samples/NAME_STEP.png by name, in order.
        notes: what could not be read.
    """

    run: Path
    state: str = "unknown"
    remark: str = ""
    step: int = 0
    total_steps: int | None = None
    written: float | None = None
    speed: float | None = None
    seconds_left: float | None = None
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[tuple[str, int]] = field(default_factory=list)
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    number_bad: int = 0
    pictures: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def progress(self) -> str:
        """Such as "step 1200 of 2000"."""
        return f"step {self.step}" + (f" of {self.total_steps}" if self.total_steps else "")

    def setting(self, *keys: str) -> Any:
        """The config's value at a path; None where it has none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def pixels(self) -> int | None:
        """Of a training crop; None where the config does not say."""
        crop = self.setting("data", "crop")
        side = crop or self.setting("model", "params", "ddconfig", "resolution")
        return side * side if type(side) is int and side > 0 else None
