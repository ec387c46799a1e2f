"""MkDocs hooks: the reference tables that are generated from the code.

A page holds `<!-- config: model.params.ddconfig kl_vae.ddconfig:DDConfig -->` or
`<!-- command: train -->`, and gets a table of the keys, or the help of the command, in its place.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import textwrap
from typing import Any

import yaml

CONFIG = re.compile(r"<!-- config: (\S*) (\S+):(\S+) -->")
COMMAND = re.compile(r"<!-- command: (\S+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page; MkDocs calls this for each page."""
    markdown = CONFIG.sub(lambda m: config_table(m[1], m[2], m[3]), markdown)
    return COMMAND.sub(lambda m: command_help(m[1]), markdown)


def config_table(path: str, module: str, name: str) -> str:
    """Return a Markdown table: key, default, meaning of each field of a config dataclass.

    Raises:
        ValueError: a field that its class does not describe.
    """
    cls = getattr(importlib.import_module(module), name)
    meanings = described_attributes(cls)
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name not in meanings:
            raise ValueError(f"{module}.{name}.{field.name}: not described under `Attributes:`")
        if dataclasses.is_dataclass(field.default_factory):
            continue  # a section of its own
        key = f"{path}.{field.name}" if path else field.name
        rows.append(f"| `{key}` | {default_of(field)} | {meanings[field.name]} |")
    return "\n".join(rows)


def described_attributes(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of each attribute."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = re.search(r"Attributes:\n((?:    .*\n|\n)+)", textwrap.dedent(doc_of(base)))
        for line in (section[1] if section else "").splitlines():
            found = re.match(r"    (\w+): (.*)", line)
            if found:
                name, meanings[found[1]] = found[1], found[2]
            elif line.strip():
                meanings[name] += " " + line.strip()
    return {name: text.replace("|", "\\|") for name, text in meanings.items()}


def doc_of(cls: type) -> str:
    """Return the docstring of a class with its first line as indented as the others."""
    return " " * 4 + (cls.__dict__.get("__doc__") or "") + "\n"


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as YAML; `required` where there is none."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()
    return f"`{text}`"


def command_help(name: str) -> str:
    """Return the help of `kl-vae NAME` as a block of text."""
    command = importlib.import_module(f"kl_vae.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"kl-vae {name}",
        description=command.__doc__,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=96),
    )
    command.add_arguments(parser)
    return f"```text\n{parser.format_help()}```"
