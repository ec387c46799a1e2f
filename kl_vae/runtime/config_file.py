"""Read a YAML config strictly, apply `key.path=value` overrides, and find the shipped ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kl_vae.runtime.published_config import (
    ConfigSource,
    fill_in,
    model_params,
    section_at,
    translate,
)
from kl_vae.runtime.schema import printable, show, suggest

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 19  # of a config; as one list of numbers they take 7 s
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_MAX_DIGITS = 100  # of a number
_MAX_SHOWN = 200  # characters of an override in a message
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys, aliases, tags, dates, and numbers that mean another value.

    YAML 1.1 reads 1:30 as 90 (base 60) and 0256 as 174 (base 8).
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ValueError(
                f"line {mark.line + 1}: aliases (*name) are refused; write it out, or quote a "
                'pattern: "*.png"'
            )
        event = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ValueError(f"line {event.start_mark.line + 1}: tags ({tag}) are refused; drop it")
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        text = node.value
        if node.tag in (_INT, _FLOAT):
            line = node.start_mark.line + 1
            if len(text) > _MAX_DIGITS:
                raise ValueError(
                    f"line {line}: {show(text)}: a number of {len(text)} characters; give at most "
                    f"{_MAX_DIGITS}, or quote a text"
                )
            if ":" in text or (node.tag == _INT and _OCTAL.fullmatch(text)):
                raise ValueError(
                    f"line {line}: {text}: YAML reads another number (base 60 or 8); write it in "
                    "decimal without leading zeros, or quote a text"
                )
        return super().construct_scalar(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ValueError(f"line {line}: {key} is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_config(config: ConfigSource, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a config and apply overrides.

    Of a config of latent-diffusion or generative-models, the autoencoder is read (see `translate`).
    The published optimizer, batch and length are the defaults, so that only `data.train.root` is
    missing.

    Args:
        config: a YAML file, the name of a shipped config such as `kl-f8`, or a mapping, such as an
            OmegaConf object.
        overrides: `key.path=value`, the value in YAML.

    Raises:
        ValueError: no such file or name, not YAML, of another model, or an override that cannot be
            applied.
    """
    values, source = _read_config(config)
    try:
        values, recipe = translate(values)
    except ValueError as error:
        raise ValueError(f"{source}{error}") from None
    apply_overrides(values, overrides)
    if recipe is not None:
        fill_in(values, recipe)
    return values


def load_model_params(config: ConfigSource) -> dict[str, Any]:
    """Read `model.params` of a config (see `load_config`)."""
    values, source = _read_config(config)
    try:
        return model_params(values)
    except ValueError as error:
        raise ValueError(f"{source}{error}") from None


def _read_config(config: ConfigSource) -> tuple[Mapping[str, Any], str]:
    """Return the keys of a config, and the beginning of messages about it."""
    if isinstance(config, Mapping):
        return config, ""
    path = find_config(config)
    values = parse_file(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no keys; see docs/config.md")
    return values, f"{path}: "


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
    """Read a YAML file as `parse_yaml` does; ValueError also if it is too large or no text."""
    return parse_yaml(_read(path), str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML strictly: no duplicate keys, aliases, tags, or numbers in base 60 or 8.

    Raises:
        ValueError: naming `source`, the line, and the fix.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        if getattr(error, "context", None) == "while scanning an alias":
            line = text.splitlines()[error.context_mark.line]  # type: ignore[attr-defined]
            quoted = re.sub(r"(?<![\w\"'])\*[^\s,\]}]*", r'"\g<0>"', line.strip())
            problem = f"YAML takes a word that begins with * for an alias; quote it: '{quoted}'"
        else:
            problem = f"not valid YAML: {' '.join(str(error).split())}"
    except RecursionError:
        problem = "nested too deeply; a config has a few levels"
    except ValueError as error:
        problem = str(error)
    raise ValueError(printable(f"{source}: {problem}"))


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
        section = section_at(config, key)
        now = section.get("root") or section_at(config, "data.train").get("root")
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
    train_root = section_at(config, keys[0]).get("root")
    roots = {key: str(section_at(config, key).get("root") or train_root) for key in keys}
    return {key: root for key, root in roots.items() if root.startswith("package:")}


def apply_override(config: dict[str, Any], override: str) -> None:
    """Set `key.path=value` in nested mappings; the value is YAML.

    Raises:
        ValueError: no `=`, or a key on the way that holds a plain value.
    """
    shown = override if len(override) <= _MAX_SHOWN else f"{override[:_MAX_SHOWN]}..."
    keys, sign, text = override.partition("=")
    if not sign or not all(keys.split(".")):
        raise ValueError(f"{shown!r}: write key.path=value, such as optimizer.learning_rate=0.001")
    *parents, last = keys.split(".")
    section = config
    for key in parents:
        inner = section.setdefault(key, {})
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            raise ValueError(
                printable(f"{shown}: {key} holds {show(inner)}, which has no keys below it")
            )
        section = inner
    section[last] = parse_yaml(text, shown)


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
