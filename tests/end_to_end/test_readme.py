"""What the README shows is run."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
README = CHECKOUT / "README.md"


COMMANDS = {  # some of those that a page shows
    "README.md": {"train", "report", "reconstruct", "evaluate", "encode", "sample", "convert"},
    "docs/checkpoints.md": {"encode", "convert"},
    "docs/evaluate.md": {"evaluate"},
    "docs/latents.md": {"encode"},
    "docs/sample.md": {"sample"},
}


def blocks(language: str, page: Path = README) -> list[str]:
    # all of them, lest the end of one be taken for the beginning of another
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for its_language, block in found if its_language == language]


def test_the_python_code_runs_in_its_order() -> None:
    names: dict[str, object] = {}
    code = blocks("python")
    assert len(code) >= 4
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
    assert names["total"].requires_grad  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", list(COMMANDS))
def test_the_commands_are_those_of_the_program(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `kl-vae ...` line parses, and its config and overrides load."""
    from kl_vae.cli import main as cli
    from kl_vae.training.config import RunConfig

    parsed = []
    monkeypatch.setattr(cli, "run_command", lambda name, args: parsed.append((name, args)) or 0)
    text = "\n".join(blocks("", CHECKOUT / page)).replace("\\\n", " ")
    commands = [line.split("#")[0] for line in text.splitlines() if line.startswith("kl-vae ")]
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
    assert {name for name, _ in parsed} >= COMMANDS[page]
    for name, args in parsed:
        if name == "train":
            RunConfig.load(args.config, args.overrides)


@pytest.mark.parametrize("page", ["README.md", "docs/large_images.md", "docs/performance.md"])
def test_the_benchmarks_are_those_of_the_scripts(
    page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each `python benchmarks/...` line, in a block or in the text, parses."""
    import importlib

    text = (CHECKOUT / page).read_text().replace("\\\n", " ")
    lines = re.findall(r"^python benchmarks/(\w+)\.py([^#\n]*)", text, re.MULTILINE)
    lines += re.findall(r"`python benchmarks/(\w+)\.py([^`]*)`", text)
    assert len(lines) >= 2
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


def test_every_key_of_the_config_is_in_the_reference() -> None:
    import dataclasses
    import inspect

    from kl_vae.data import DataConfig
    from kl_vae.ddconfig import DDConfig
    from kl_vae.losses import ELBO, LPIPSWithDiscriminator
    from kl_vae.optim.config import OptimizerConfig
    from kl_vae.training.config import ModelParams, TrainingConfig

    reference = README.read_text().split("## Config reference")[1].split("## Extending")[0]
    named = set(re.findall(r"`([a-z_.]+)`", reference))
    for config in (DataConfig, DDConfig, OptimizerConfig, ModelParams, TrainingConfig):
        for field in dataclasses.fields(config):
            nested = any(name.startswith(f"{field.name}.") for name in named)
            assert field.name in named or nested, f"{config.__name__}.{field.name}"
            if isinstance(field.default, bool | int | float | str):
                value = str(field.default).lower()
                rows = [r for r in reference.splitlines() if f"`{field.name}`" in r]
                shown = re.findall(r"`([^`]*)`", " ".join(rows))
                assert any(_same(value, text) for text in shown), f"{rows} do not say {value}"
    for loss in (ELBO, LPIPSWithDiscriminator):
        for name in inspect.signature(loss).parameters:
            assert name in named, name


def _same(value: str, text: str) -> bool:
    try:
        return float(value) == float(text)
    except ValueError:
        return value == text
