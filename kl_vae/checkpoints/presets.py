"""Presets of published autoencoders: architecture, latent normalisation, weights and licence.

Sources: the configs of latent-diffusion (Rombach et al. 2022), and the model cards and config files
at the locations in `weights`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any

from kl_vae.checkpoints.architecture import Architecture, infer_architecture
from kl_vae.checkpoints.hub import is_hub_name
from kl_vae.checkpoints.pretrained import complete_params, stated_latents
from kl_vae.checkpoints.reading import Weights
from kl_vae.ddconfig import DDConfig
from kl_vae.latents import LatentNormalization
from kl_vae.runtime.files import sha256_of
from kl_vae.runtime.schema import from_mapping, suggest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published autoencoder.

    Attributes:
        name: name of the preset.
        ddconfig: the architecture.
        embed_dim: channels of the latents; None: z_channels, without quant convolutions.
        latents: normalisation of the latents; None: not published, or stored in the weights.
        weights: location of the weights: `hf://ORG/NAME[/SUBFOLDER]`, or a URL.
        licence: licence of the weights.
        sha256: SHA-256 of known files with these weights; the list may be incomplete.
    """

    name: str
    ddconfig: DDConfig
    embed_dim: int | None
    latents: LatentNormalization | None
    weights: str
    licence: str
    sha256: tuple[str, ...] = ()

    @property
    def architecture(self) -> Architecture:
        """The architecture that `infer_architecture` returns for these weights."""
        return Architecture.of_params(dataclasses.asdict(self.ddconfig), self.embed_dim)

    @property
    def location(self) -> str:
        """The name of the weights on the Hugging Face Hub.

        Raises:
            ValueError: The weights must be downloaded manually.
        """
        if not is_hub_name(self.weights):
            raise ValueError(
                f"{self.name}: download {self.weights}, unpack it and set weights=FILE"
            )
        return self.weights

    def params_of(self, weights: Weights) -> dict[str, Any]:
        """Check that the weights belong to this preset, and return its `model.params`.

        Raises:
            ValueError: The architecture or the latent normalisation differs, or the SHA-256 is that
                of another preset.
        """
        shown = infer_architecture(weights.tensors, weights.source)
        if shown != self.architecture:
            others = [name for name, preset in PRESETS.items() if preset.architecture == shown]
            self._refuse(
                weights,
                f"its tensors have {shown.differences(self.architecture)}"
                + (f", as those of {', '.join(others)}" if others else ""),
            )
        self._check_files(weights)
        said = stated_latents(weights)
        if said and self.latents is not None:
            self._check_latents(weights, from_mapping(LatentNormalization, said, "latents"))
        own = {"ddconfig": self.ddconfig, "embed_dim": self.embed_dim, "latents": self.latents}
        return complete_params(weights, own)

    def _check_files(self, weights: Weights) -> None:
        """Compare the SHA-256 of the files with those of all presets."""
        owners = {digest: preset.name for preset in PRESETS.values() for digest in preset.sha256}
        found = {owners.get(sha256_of(path)) for path in weights.files}
        if found == {self.name}:
            logger.info("%s: the published file of %s", weights.source, self.name)
        elif found == {None}:
            logger.info(
                "%s: has the architecture of %s, but an unknown sha256",
                weights.source,
                self.name,
            )
        else:
            names = ", ".join(sorted(name for name in found if name))
            self._refuse(weights, f"by its sha256 it is {names}")

    def _check_latents(self, weights: Weights, said: LatentNormalization) -> None:
        assert self.latents is not None
        for key in ("scale_factor", "shift_factor"):
            value, own = getattr(said, key), getattr(self.latents, key)
            if not math.isclose(value, own, rel_tol=1e-3):
                self._refuse(weights, f"its latents have {key}={value} (not {own})")

    def _refuse(self, weights: Weights, reason: str) -> None:
        raise ValueError(
            f"{weights.source}: not {self.name}: {reason}; use another preset or from_checkpoint"
        )


def find_preset(name: str) -> Preset:
    """Return the preset with this name.

    Raises:
        ValueError: The name is unknown.
    """
    if name in PRESETS:
        return PRESETS[name]
    raise ValueError(f"preset {name!r}: unknown; {suggest(name, PRESETS)}")


def _architecture(
    z_channels: int,
    ch_mult: tuple[int, ...] = (1, 2, 4, 4),
    attn_resolutions: tuple[int, ...] = (),
) -> DDConfig:
    """Return the architecture of a preset; the parameters are the values that differ."""
    return DDConfig(
        ch=128,
        out_ch=3,
        ch_mult=ch_mult,
        num_res_blocks=2,
        attn_resolutions=attn_resolutions,
        in_channels=3,
        resolution=256,
        z_channels=z_channels,
    )


def _latent_diffusion(name: str, ddconfig: DDConfig) -> Preset:
    return Preset(
        name=name,
        ddconfig=ddconfig,
        embed_dim=ddconfig.z_channels,
        latents=None,
        weights=f"https://ommer-lab.com/files/latent-diffusion/{name}.zip",
        licence="MIT",
    )


def _later(
    name: str,
    z_channels: int,
    latents: LatentNormalization | None,
    weights: str,
    licence: str,
    *sha256: str,
    has_quant_conv: bool = True,
) -> Preset:
    """Return a preset with the width and depth of kl-f8, for weights on the Hugging Face Hub."""
    return Preset(
        name=name,
        ddconfig=_architecture(z_channels),
        embed_dim=z_channels if has_quant_conv else None,
        latents=latents,
        weights=f"hf://{weights}",
        licence=licence,
        sha256=sha256,
    )


_SD = LatentNormalization(scale_factor=0.18215)
_SDXL = LatentNormalization(scale_factor=0.13025)

PRESETS = {
    preset.name: preset
    for preset in (
        _latent_diffusion("kl-f4", _architecture(3, (1, 2, 4))),
        _latent_diffusion("kl-f8", _architecture(4)),
        _latent_diffusion("kl-f16", _architecture(16, (1, 1, 2, 2, 4), (16,))),
        _latent_diffusion("kl-f32", _architecture(64, (1, 1, 2, 2, 4, 4), (16, 8))),
        _later("sd-v1", 4, _SD, "CompVis/stable-diffusion-v1-4/vae", "CreativeML OpenRAIL-M"),
        _later(
            "sd-vae-ft-ema",
            4,
            _SD,
            "stabilityai/sd-vae-ft-ema",
            "MIT",
            "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
        ),
        _later(
            "sd-vae-ft-mse",
            4,
            _SD,
            "stabilityai/sd-vae-ft-mse",
            "MIT",
            "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75",
            "c6a580b13a5bc05a5e16e4dbb80608ff2ec251a162311590c1f34c013d7f3dab",
            "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        ),
        _later(
            "sdxl-vae",
            4,
            _SDXL,
            "stabilityai/sdxl-vae",
            "MIT",
            "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e",
        ),
        _later(
            "sdxl-vae-fp16-fix",
            4,
            _SDXL,
            "madebyollin/sdxl-vae-fp16-fix",
            "MIT",
            "235745af8d86bf4a4c1b5b4f529868b37019a10f7c0b2e79ad0abca3a22bc6e1",
        ),
        _later(
            "sd3",
            16,
            LatentNormalization(scale_factor=1.5305, shift_factor=0.0609),
            "stabilityai/stable-diffusion-3-medium-diffusers/vae",
            "Stability AI Community License",
            "f9b67a279283625caee39d61eacb5324243848477b4eb535355eaaa8423d4e09",
            has_quant_conv=False,
        ),
        _later(
            "flux.1",
            16,
            LatentNormalization(scale_factor=0.3611, shift_factor=0.1159),
            "black-forest-labs/FLUX.1-schnell/vae",
            "Apache-2.0",
            "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38",
            has_quant_conv=False,
        ),
        _later(
            "flux.2",
            32,
            None,  # a batch norm among the weights
            "black-forest-labs/FLUX.2-klein-4B/vae",
            "Apache-2.0",
            "d64f3a68e1cc4f9f4e29b6e0da38a0204fe9a49f2d4053f0ec1fa1ca02f9c4b5",
        ),
    )
}
