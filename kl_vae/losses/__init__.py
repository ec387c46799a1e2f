"""Registry of losses, and construction of a loss from a `lossconfig`.

A loss is a callable

    loss(inputs, reconstructions, posterior, global_step, last_layer, split) -> (total, log)

with images [B, C, H, W] in [-1, 1], a DiagonalGaussianDistribution, the number of completed
optimisation steps, the weight of the decoder's last convolution, and "train" or "val". `total` is
the scalar to minimise; `log` contains detached scalars with keys such as "train/rec_loss";
"train/total_loss" is added if it is missing. If the loss is an nn.Module with parameters, they are
trained with the autoencoder, except those of a discriminator (`LPIPSWithDiscriminator`), which has
its own optimiser.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kl_vae.losses.adversarial import LPIPSWithDiscriminator
from kl_vae.losses.elbo import ELBO, default_loss
from kl_vae.runtime.imports import import_named
from kl_vae.runtime.registry import Registry
from kl_vae.runtime.schema import plain, suggest

__all__ = [
    "ELBO",
    "LOSSES",
    "LPIPSWithDiscriminator",
    "Loss",
    "build_loss",
    "default_loss",
    "register_loss",
]

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]

LOSSES = Registry("lossconfig.target")
register_loss = LOSSES.register

register_loss("elbo")(ELBO)
register_loss("lpips_with_discriminator")(LPIPSWithDiscriminator)

# targets in published configs
_PUBLISHED_NAMES = {
    "ldm.modules.losses.LPIPSWithDiscriminator": "lpips_with_discriminator",
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator": "lpips_with_discriminator",
    "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator": "lpips_with_discriminator",
    "sgm.modules.autoencoding.losses.discriminator_loss.GeneralLPIPSWithDiscriminator": (
        "lpips_with_discriminator"
    ),
}
# the optimiser of LDM does not hold logvar; sgm's weights of the KL are empty by default
_LDM_DEFAULTS = {"learn_logvar": False}
_SGM_DEFAULTS = {"learn_logvar": False, "kl_weight": 0.0}
_NO_LOSS = "torch.nn.Identity"


def build_loss(lossconfig: Mapping[str, Any] | Loss | None) -> Loss | None:
    """Build the loss of a `lossconfig`; None and callables are returned unchanged.

    Args:
        lossconfig: `{target: NAME, params: {...}}` with a registered name, or the dotted path of a
            class or function below a prefix given to `allow_import`. The names of LDM and sgm
            mean `lpips_with_discriminator`, without training logvar.

    Raises:
        ValueError: the target cannot be found, its import is not allowed, or it does not accept
            the params.
    """
    if lossconfig is None or callable(lossconfig):
        return lossconfig
    config = plain(lossconfig, "lossconfig")
    keys = set(config) if isinstance(config, dict) else set()
    if "target" not in keys or keys - {"target", "params"}:
        raise ValueError(
            f"lossconfig={config!r}: the keys must be target and params; "
            "use for example lossconfig: {target: elbo, params: {kl_weight: 1.0e-6}}"
        )
    target, params = config["target"], config.get("params") or {}
    if not isinstance(target, str) or not isinstance(params, Mapping):
        raise ValueError(f"lossconfig={config!r}: target must be a name and params a mapping")
    if target == _NO_LOSS:  # used in published inference configs
        return None
    if target in _PUBLISHED_NAMES:
        defaults = _SGM_DEFAULTS if target.startswith("sgm.") else _LDM_DEFAULTS
        params = {**defaults, **params}
    name = _PUBLISHED_NAMES.get(target, target)
    registered = name in LOSSES or "." not in name
    constructor = LOSSES[name] if registered else import_named(target, LOSSES.key)
    signature = inspect.signature(constructor)
    try:
        signature.bind(**params)
    except TypeError as error:
        unknown = next((key for key in params if key not in signature.parameters), "")
        hint = suggest(unknown, signature.parameters, f"{target} accepts")
        raise ValueError(f"lossconfig.params: {error}; {hint}") from None
    loss: Loss = constructor(**params)
    return loss
