"""Parse the command line, run the command, and report a user's mistake in one line."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from io import TextIOWrapper

from kl_vae import __version__
from kl_vae.runtime.errors import RunError
from kl_vae.runtime.imports import allow_import

_UNDER_TORCHRUN = "TORCHELASTIC_ERROR_FILE"  # set by torchrun for each rank
SHARED_SECONDS = 10.0  # within which torchrun ends the other ranks of one that failed

COMMANDS = (
    "train",
    "report",
    "reconstruct",
    "encode",
    "evaluate",
    "sample",
    "export",
    "convert",
)


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Run a command of kl-vae.

    Args:
        argv: the arguments; None: those of this process.
        command: name of the command; None: the first of `argv`.

    Returns:
        The exit code: 0, 1 for a run that failed, 2 for a mistake, each named by the
        message on stderr, or the command's own.
    """
    rank = int(os.environ.get("RANK", "0"))
    name, args = command, argparse.Namespace()
    try:
        name, args = _parse(argv, command)
        if name is None:
            return 0
        _configure_output(rank)
        if args.modules or args.allowed:
            sys.path.insert(0, os.getcwd())
        for prefix in args.allowed:
            allow_import(prefix)
        for module_name in args.modules:
            _import(module_name)
        outcome = run_command(name, args)
        if isinstance(outcome, int):
            return outcome
        raise outcome
    except (ValueError, RunError) as error:
        if args.traceback:
            raise
        if rank and _UNDER_TORCHRUN in os.environ:
            time.sleep(SHARED_SECONDS)  # rank 0 reports an error of all; torchrun ends the others
        where = f"kl-vae {name}" + (f" [rank {rank}]" if rank else "")
        lines = str(error).splitlines() or [type(error).__name__]
        sys.stderr.writelines(f"{where}: error: {line}\n" for line in lines)
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt:
        if rank == 0:
            resume = "; the same command with --resume continues" if hasattr(args, "resume") else ""
            where = f"kl-vae {name}" if name else "kl-vae"
            sys.stderr.write(f"{where}: interrupted{resume}\n")
        return 130


def _parse(
    argv: Sequence[str] | None, command: str | None
) -> tuple[str | None, argparse.Namespace]:
    """Return the command and its arguments; without a command print the help and return None."""
    if command is None:
        parser = argparse.ArgumentParser(prog="kl-vae", description="A KL autoencoder for images.")
        parser.add_argument("--version", action="version", version=f"kl-vae {__version__}")
        commands = parser.add_subparsers(dest="command", metavar="COMMAND")
        for name in COMMANDS:
            _add_arguments(commands.add_parser(name, help=_module(name).HELP), name)
    else:
        parser = argparse.ArgumentParser(prog=f"kl-vae {command}")
        _add_arguments(parser, command)
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and not any(text.startswith("-") for text in rest):
        args.overrides += rest  # argparse takes no second group of them behind an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    chosen = command or args.command
    if chosen is None:
        parser.print_help()
    return chosen, args


def _configure_output(rank: int) -> None:
    if isinstance(sys.stdout, TextIOWrapper):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a code page lacks most characters
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(message)s" if rank == 0 else f"[rank {rank}] %(message)s",
        stream=sys.stderr,
    )
    # all ranks open the same images: rank 0 reports on them
    logging.getLogger("kl_vae.data").setLevel(logging.ERROR if rank > 0 else logging.NOTSET)


def run_command(name: str, args: argparse.Namespace) -> int | ValueError | RunError:
    """Run a command whose arguments are parsed; return its exit code, or its error to report."""

    def run() -> int | ValueError | RunError:
        try:
            return int(_module(name).run(args))
        except (ValueError, RunError) as error:
            return error

    if _UNDER_TORCHRUN in os.environ:  # it then shows the traceback of an unexpected error
        from torch.distributed.elastic.multiprocessing.errors import record

        recorded = record(run)()
        assert recorded is not None  # `record` raises what it records
        return recorded
    return run()


def _module(name: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"kl_vae.cli.{name}")


def _import(name: str) -> None:
    """Import a user's module from the working directory or Python's path."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"--import {name}: {error}; give a module in this folder or on PYTHONPATH"
        ) from error


def _add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    module = _module(name)
    parser.description = module.__doc__
    module.add_arguments(parser)
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module first, to register your own blocks, attention kinds or losses",
    )
    parser.add_argument(
        "--allow-import",
        dest="allowed",
        action="append",
        default=[],
        metavar="PREFIX",
        help="allow the config to name your own loss below this module or package, by its dotted "
        "path; without it nothing that a config names is imported",
    )
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
