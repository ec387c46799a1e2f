"""The code and the commands of README and docs are run or parsed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[2]
README = CHECKOUT / "README.md"


PAGES = [README, *sorted((CHECKOUT / "docs").rglob("*.md"))]


def blocks(language: str, page: Path = README) -> list[str]:
    # all of them, lest the end of one be taken for the beginning of another
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for its_language, block in found if its_language == language]


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_code_runs_in_its_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (70, 50), (200, 80, 30)).save("photo.png")
    names: dict[str, object] = {}
    code = blocks("python", CHECKOUT / page)
    assert code
    for block in code:
        exec(compile(block, page, "exec"), names)
    assert "reconstruction" in names


def commands_of(page: Path) -> list[str]:
    """The arguments of each `kl-vae` command, also under torchrun and as a script."""
    text = "\n".join([*blocks("", page), *blocks("bash", page)])
    lines = text.replace("\\\n", " ").splitlines()
    found = [
        re.match(r"(?:torchrun .*-m kl_vae|srun torchrun .*-m kl_vae|kl-vae) (.*)", line)
        for line in lines
    ]
    return [match[1].split("#")[0] for match in found if match]


def test_every_command_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of each command parse, and configs and overrides load."""
    from kl_vae.cli import main as cli
    from kl_vae.training.config import RunConfig

    parsed = []
    monkeypatch.setattr(cli, "run_command", lambda name, args: parsed.append((name, args)) or 0)
    for page in PAGES:
        for command in commands_of(page):
            assert cli.main(shlex.split(command)) == 0, (page.name, command)
    assert {name for name, _ in parsed} == set(cli.COMMANDS)
    for name, args in parsed:
        if name == "train":
            # a run has the keys of the config that it was started with
            config = "kl-f8" if args.config.startswith("runs/") else args.config
            RunConfig.load(config, args.overrides)


def test_every_benchmark_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `python benchmarks/...` line, in a block or in the text, parses."""
    lines = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        lines += re.findall(r"^python benchmarks/(\w+)\.py([^#\n]*)", text, re.MULTILINE)
        lines += re.findall(r"`python benchmarks/(\w+)\.py([^`]*)`", text)
    assert len(lines) > 10
    monkeypatch.syspath_prepend(str(CHECKOUT / "benchmarks"))
    common = importlib.import_module("common")
    for name, arguments in lines:
        script = importlib.import_module(name)
        monkeypatch.setattr(script, "parse", _parse_and_stop)
        with pytest.raises(_ParsedError):
            script.main(shlex.split(arguments))
        monkeypatch.setattr(script, "parse", common.parse)


class _ParsedError(Exception):
    pass


def _parse_and_stop(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.parse_args(argv)
    raise _ParsedError


def generate(page: str) -> str:
    """A reference page as the site shows it."""
    hooks = runpy.run_path(str(CHECKOUT / "docs" / "hooks.py"))
    generated: str = hooks["on_page_markdown"]((CHECKOUT / page).read_text())
    return generated


@pytest.mark.parametrize("page", ["docs/config.md", "docs/losses.md"])
def test_every_key_of_the_config_is_in_the_reference(page: str) -> None:
    text = (CHECKOUT / page).read_text()
    generated = generate(page)
    assert "<!--" not in generated
    for path, module, name in re.findall(r"<!-- config: (\S*) (\S+):(\S+) -->", text):
        for field in dataclasses.fields(getattr(importlib.import_module(module), name)):
            if not dataclasses.is_dataclass(field.default_factory):
                assert f"| `{path}.{field.name}` |" in generated


def test_the_reference_has_every_section_of_the_config() -> None:
    from kl_vae.training.config import RunConfig

    text = (CHECKOUT / "docs" / "config.md").read_text()
    for field in dataclasses.fields(RunConfig):
        assert f"<!-- config: {field.name}" in text


def test_the_reference_has_every_command() -> None:
    from kl_vae.cli.main import COMMANDS as NAMES

    text = (CHECKOUT / "docs" / "commands.md").read_text()
    assert re.findall(r"<!-- command: (\S+) -->", text) == list(NAMES)
    generated = generate("docs/commands.md")
    assert all(f"usage: kl-vae {name}" in generated for name in NAMES)
