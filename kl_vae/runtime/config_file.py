"""Read a YAML config strictly, apply `key.path=value` overrides, and find the shipped ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kl_vae.runtime.schema import suggest

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 20

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

    Of a CompVis file only the `model` section is read; each other section gives a warning that
    names the keys to use instead.

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
    _remove_unsupported_sections(config)
    apply_overrides(config, overrides)
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


def _remove_unsupported_sections(config: dict[str, Any]) -> None:
    """Remove unsupported sections of an original config, each with a warning that names the fix."""
    model, data = config.get("model"), config.get("data")
    if isinstance(model, dict):
        target = model.pop("target", "AutoEncoderKL")
        if target not in _TARGETS:
            raise ValueError(f"model.target={target!r}: not a KL autoencoder; write AutoEncoderKL")
        if "base_learning_rate" in model:
            rate = model.pop("base_learning_rate")
            logger.warning(
                "model.base_learning_rate=%s is not used (it was multiplied by GPUs and batch "
                "size); write optimizer.learning_rate=RATE",
                rate,
            )
        params = model.get("params")
        if isinstance(params, dict) and params.pop("image_key", "image") != "image":
            logger.warning("model.params.image_key is not used; data.train.root names the images")
    if isinstance(data, dict) and "target" in data:
        logger.warning(
            "data.target=%s is not used; write data.train.root=FOLDER and "
            "training.global_batch_size=N",
            data["target"],
        )
        del config["data"]
    if "lightning" in config:
        del config["lightning"]
        logger.warning(
            "lightning is not used; write training.precision, training.accumulate_batches, "
            "training.max_steps and the like (see docs/config.md)"
        )
