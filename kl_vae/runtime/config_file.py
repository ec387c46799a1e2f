"""Read a YAML config strictly, apply `key.path=value` overrides, and find the shipped ones."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kl_vae.runtime.schema import suggest

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 20

# of a CompVis config that states no length, as in the shipped kl-*-published
PUBLISHED_STEPS = 200_000

# the autoencoder's class, by its published dotted names
_TARGETS = (
    "AutoEncoderKL",
    "kl_vae.AutoEncoderKL",
    "ldm.models.autoencoder.AutoencoderKL",
    "sgm.models.autoencoder.AutoencoderKL",
    "sgm.models.autoencoder.AutoencodingEngineLegacy",
)


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys, without aliases, and without Python objects."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ValueError(
                f"line {mark.line + 1}: aliases (*name) are refused; write it out, or quote a "
                'pattern: "*.png"'
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ValueError(f"line {line}: {key} is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path_or_name: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a config file, or a shipped config by its name, and apply overrides.

    Of a CompVis file the `model` section is read. The published optimizer, batch and length are
    the defaults, so that only `data.train.root` is missing.

    Args:
        path_or_name: a YAML file, or the name of a shipped config such as `kl-f8`.
        overrides: `key.path=value`, the value in YAML.

    Raises:
        ValueError: no such file or name, not YAML, or an override that cannot be applied.
    """
    path = find_config(path_or_name)
    config = parse_file(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no keys; see docs/config.md")
    published = _take_published_sections(config)
    apply_overrides(config, overrides)
    if published is not None:
        _fill_in(config, **published)
    return config


def load_model_params(path_or_name: str | Path) -> dict[str, Any]:
    """Read `model.params` of a config (see `load_config`)."""
    config = load_config(path_or_name)
    params = (config.get("model") or {}).get("params")
    if not isinstance(params, dict):
        raise ValueError(f"{path_or_name}: has no model.params; give the config of an autoencoder")
    return params


def find_config(path_or_name: str | Path) -> Path:
    """Return the file of a path or of a shipped config's name."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    name = str(path_or_name).removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    hint = suggest(name, sorted(shipped), "give a YAML file, or one of")
    raise ValueError(f"no such config: {path_or_name}; {hint}")


def shipped_configs() -> dict[str, Path]:
    """Return the configs that come with the package, by name."""
    folder = Path(__file__).resolve().parents[1] / "configs"
    return {path.stem: path for path in folder.glob("*.yaml")}


def parse_file(path: Path) -> Any:
    """Read a YAML file as `parse_yaml` does; ValueError also where it is over 1 MiB or no text."""
    return parse_yaml(_read(path), str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML strictly: no duplicate keys, no aliases, no Python objects.

    Raises:
        ValueError: naming `source`, the line, and the fix.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        if getattr(error, "context", None) == "while scanning an alias":
            line = text.splitlines()[error.context_mark.line]  # type: ignore[attr-defined]
            quoted = re.sub(r"(?<![\w\"'])\*[^\s,\]}]*", r'"\g<0>"', line.strip())
            raise ValueError(
                f"{source}: YAML takes a word that begins with * for an alias; quote it: '{quoted}'"
            ) from None
        raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: {error}") from None


def apply_overrides(config: dict[str, Any], overrides: Iterable[str]) -> None:
    """Apply `key.path=value` one after the other, as `apply_override` does.

    Where they replace a root in an installed package, the `include` of that package's images is
    dropped, unless it is given as well: it names files that another root does not have.
    """
    overrides = list(overrides)
    before = _package_roots(config)
    for override in overrides:
        apply_override(config, override)
    given = {override.partition("=")[0] for override in overrides}
    for key, root in before.items():
        section = _section(config, key)
        now = section.get("root") or _section(config, "data.train").get("root")
        if now == root or not section.get("include"):
            continue
        if given.isdisjoint(("data", key, f"{key}.include")):
            del section["include"]
            logger.info(
                "%s.include is dropped: it names images of %s, and the root is now %s",
                key,
                root,
                now,
            )


def _package_roots(config: Mapping[str, Any]) -> dict[str, str]:
    """Return where the images of training and of validation are, if that is in a package."""
    keys = ("data.train", "data.validation")
    train_root = _section(config, keys[0]).get("root")
    roots = {key: str(_section(config, key).get("root") or train_root) for key in keys}
    return {key: root for key, root in roots.items() if root.startswith("package:")}


def _section(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the section at a key path; empty where there is none."""
    section: Any = config
    for key in path.split("."):
        section = section.get(key) if isinstance(section, Mapping) else None
    return section if isinstance(section, dict) else {}


def apply_override(config: dict[str, Any], override: str) -> None:
    """Set `key.path=value` in nested mappings; the value is YAML.

    Raises:
        ValueError: no `=`, or a key on the way that holds a plain value.
    """
    keys, sign, text = override.partition("=")
    if not sign or not all(keys.split(".")):
        raise ValueError(
            f"{override!r}: write key.path=value, such as optimizer.learning_rate=0.001"
        )
    *parents, last = keys.split(".")
    section = config
    for key in parents:
        inner = section.setdefault(key, {})
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"{override}: {key} holds {inner!r}, which has no keys below it")
        section = inner
    section[last] = parse_yaml(text, override)


def dump_config(config: Mapping[str, Any]) -> str:
    """Write a resolved config as YAML that `load_config` reads back unchanged."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_representer(tuple, lambda d, x: d.represent_sequence("tag:yaml.org,2002:seq", x))
    return yaml.dump(dict(config), Dumper=Dumper, sort_keys=False)


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: over {MAX_BYTES} bytes; a config is a small file of keys")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text ({error})") from None


def _take_published_sections(config: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the sections of an original config that this package lacks.

    Returns:
        The arguments of `_fill_in`; None: it is no original config.
    """
    model, data = _section(config, "model"), _section(config, "data")
    target = model.pop("target", "AutoEncoderKL")
    if target not in _TARGETS:
        raise ValueError(f"model.target={target!r}: not a KL autoencoder; write AutoEncoderKL")
    if _section(config, "model.params").pop("image_key", "image") != "image":
        logger.warning("model.params.image_key is not used; data.train.root names the images")
    if not ("base_learning_rate" in model or "target" in data or "lightning" in config):
        return None
    loader, trainer = _section(config, "data.params"), _section(config, "lightning.trainer")
    if "target" in data:
        logger.warning(
            "data.target=%s: of data only batch_size is used; data.train.root names the images",
            config.pop("data")["target"],
        )
    if config.pop("lightning", None) is not None:
        logger.warning(
            "lightning: only accumulate_grad_batches, max_steps and max_epochs of its trainer are "
            "used; docs/config.md has this package's keys"
        )
    return {
        "base_learning_rate": model.pop("base_learning_rate", None),
        "batch_size": loader.get("batch_size", 32),
        "accumulate": trainer.get("accumulate_grad_batches", 1),
        "length": {
            key: trainer[name]
            for key, name in (("max_steps", "max_steps"), ("epochs", "max_epochs"))
            if trainer.get(name)
        },
    }


def _fill_in(
    config: dict[str, Any],
    *,
    base_learning_rate: Any,
    batch_size: Any,
    accumulate: Any,
    length: dict[str, Any],
) -> None:
    """Set the published defaults of a CompVis config in place; its own keys stay.

    Its learning rate is per image of the global batch: accumulated batches x GPUs x batch_size.
    """
    defaults: dict[str, dict[str, Any]] = {"data": {}, "training": {}, "optimizer": {}}
    resolution = _section(config, "model.params.ddconfig").get("resolution")
    if resolution is not None and _section(config, "data").get("crop") is None:
        defaults["data"] = {"resize": resolution}
    training = _section(config, "training")
    if "global_batch_size" not in training:
        gpus = int(os.environ.get("WORLD_SIZE", "1"))
        images = _whole("data.params.batch_size", batch_size)
        images *= _whole("lightning.trainer.accumulate_grad_batches", accumulate) * gpus
        defaults["training"] = {"global_batch_size": images, "accumulate_batches": accumulate}
    if not {"max_steps", "epochs"} & training.keys():
        defaults["training"] |= dict([*length.items(), ("max_steps", PUBLISHED_STEPS)][:1])
    images = training.get("global_batch_size") or defaults["training"]["global_batch_size"]
    own = _section(config, "optimizer")
    if base_learning_rate is not None and own.get("name", "adam") == "adam":
        try:
            rate = float(base_learning_rate) * float(images)
        except (TypeError, ValueError):
            raise ValueError(
                f"model.base_learning_rate={base_learning_rate!r}: expected a number; write "
                "optimizer.learning_rate=RATE"
            ) from None
        adam = {"learning_rate": rate, "eps": 1e-8, "clip_grad_norm": None}
        defaults["optimizer"] = {"name": "adam", "betas": [0.5, 0.9], **adam}
        defaults["discriminator_optimizer"] = adam
    for key, values in defaults.items():
        section = config.get(key)
        if section is None or isinstance(section, dict):
            config[key] = values | (section or {})
    logger.info(
        "as published: %s",
        "; ".join(f"{key} {values}" for key, values in defaults.items() if values),
    )


def _whole(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{key}={value!r}: expected a whole number; write training keys instead")
    return value
