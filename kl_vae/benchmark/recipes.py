"""Training recipes by name: what each says about loss and optimiser."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kl_vae.training.config import RunConfig

# the objective of all that do not say otherwise
_OBJECTIVE = (
    "model.params.lossconfig.target=lpips_with_discriminator",
    "model.params.lossconfig.params={disc_start: 1000000000, kl_weight: 1.0e-6, "
    "learn_logvar: false, perceptual: squeeze, perceptual_linear: false, "
    "perceptual_weight: 0.1, disc_norm: group, disc_weight: 0.5, reduction: mean}",
)
_PLAIN_BLOCKS = "model.params.ddconfig.zero_init_residual=false"
_PERCEPTUAL = "model.params.lossconfig.params.perceptual_features"
_OURS = (
    *_OBJECTIVE,
    _PLAIN_BLOCKS,
    "optimizer={name: muon, learning_rate: 0.02, adamw_learning_rate: 3.0e-3, warmup_steps: 20, "
    "schedule: cosine}",
)
_PUBLISHED = (
    *_OBJECTIVE,
    "model.params.lossconfig.params.reduction=sum",
    _PLAIN_BLOCKS,
    "optimizer={name: adam, betas: [0.5, 0.9], eps: 1.0e-8, clip_grad_norm: null}",
)

# name -> what it says about model and optimiser
RECIPES: dict[str, tuple[str, ...]] = {
    # L1 + perceptual + KL as the first stages were published: Adam(0.5, 0.9) at a constant rate
    "published": _PUBLISHED,
    # the same objective with Muon, warm-up and cosine
    "ours": _OURS,
    "mse": (
        "model.params.lossconfig={target: elbo, params: {kl_weight: 1.0e-6}}",
        *_OURS[len(_OBJECTIVE) :],
    ),
    # as mse, until the perceptual loss and then the discriminator join in
    "gan": (
        *_OURS,
        "model.params.lossconfig.params.reconstruction=mse",
        "model.params.lossconfig.params.perceptual_weight=0.02",
        "model.params.lossconfig.params.disc_num_layers=2",
        "discriminator_optimizer.learning_rate=5.0e-4",
    ),
}
# of the steps of a run of gan
PERCEPTUAL_START, DISC_START = 0.5, 0.6


@dataclass(frozen=True)
class Entry:
    """One recipe of a comparison.

    Attributes:
        recipe: a name in RECIPES.
        steps: optimisation steps.
        learning_rate: None: the recipe's own.
    """

    recipe: str
    steps: int
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """How tables call it."""
        rate = "" if self.learning_rate is None else f" at {self.learning_rate:g}"
        return f"{self.recipe}{rate}"

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read RECIPE:STEPS or RECIPE:STEPS:LEARNING_RATE.

        Raises:
            ValueError: something else, or an unknown recipe.
        """
        name, _, numbers = text.partition(":")
        steps, _, rate = numbers.partition(":")
        try:
            entry = cls(name, int(steps), float(rate) if rate else None)
        except ValueError:
            entry = None
        if name not in RECIPES or entry is None or entry.steps < 1:
            raise ValueError(
                f"recipe {text!r}: write RECIPE:STEPS or RECIPE:STEPS:LEARNING_RATE, "
                f"with one of {', '.join(RECIPES)}"
            )
        return entry


@dataclass(frozen=True)
class Setting:
    """What all entries share.

    Attributes:
        config: whose data and architecture they train.
        overrides: of it, such as data.train.root=FOLDER.
        features: the perceptual network's weights (SqueezeNet 1.1).
        out: where the runs go, one folder each.
        device: as for training.
    """

    config: str
    overrides: tuple[str, ...]
    features: Path
    out: Path
    device: str = "auto"

    def run_config(self, entry: Entry, seed: int) -> RunConfig:
        """The whole config of one run."""
        recipe = [*RECIPES[entry.recipe]]
        if entry.recipe != "mse":
            recipe.append(f"{_PERCEPTUAL}={json.dumps(str(self.features))}")
        if entry.recipe == "gan":
            for key, share in (("perceptual", PERCEPTUAL_START), ("disc", DISC_START)):
                start = round(share * entry.steps)
                recipe.append(f"model.params.lossconfig.params.{key}_start={start}")
        if entry.learning_rate is not None:
            recipe.append(f"optimizer.learning_rate={entry.learning_rate:.12e}")
        length = [
            "model.params.monitor=null",
            f"training.seed={seed}",
            f"training.max_steps={entry.steps}",
            f"training.validate_every_steps={max(1, entry.steps // 6)}",
            f"training.save_every_steps={entry.steps}",
        ]
        return RunConfig.load(self.config, [*recipe, *self.overrides, *length])

    def run_folder(self, entry: Entry, seed: int) -> Path:
        """Where a run is kept."""
        return self.out / f"{entry.name.replace(' at ', '_')}_{entry.steps}_seed{seed}"
