"""The `issp` command: finds the command's module, turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from issp.sr.interrupt import Interrupted

COMMANDS = ("demo", "train", "test", "upscale", "bench", "plot", "prepare-data", "info")
# What bad input raises here and in the libraries below; anything else is a bug and shows itself.
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which names the nearest option."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def known_options(self) -> list[str]:
        """All option strings."""
        return [name for action in self._actions for name in action.option_strings]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None: the process's.

    Returns:
        Exit status: 0, 2 for bad input, 128 + signal after an interruption.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _top_parser()
    name = next((word for word in argv if not word.startswith("-")), None)
    if name is None or argv[0] != name:
        try:
            parser.parse_args(argv)
        except SystemExit as stop:
            return int(stop.code or 0)
        parser.print_help()
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(COMMANDS)}"
        print(f"issp: error: there is no command {name}: {hint}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"issp.cli.{name.replace('-', '_')}")
    try:
        args = _parse(_command_parser(name, command), argv[1:])
    except SystemExit as stop:
        return int(stop.code or 0)
    return _run(name, command, args)


def _run(name: str, command, args: argparse.Namespace) -> int:
    try:
        return int(command.main(args) or 0)
    except Interrupted as stopped:
        print(f"issp {name}: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print(f"issp {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) is gone; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _EXPECTED as error:
        if args.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"issp {name}: error: {text}", file=sys.stderr)
        return 2


def _top_parser() -> argparse.ArgumentParser:
    lines = [f"  {name:14s}{_help_line(name)}" for name in COMMANDS]
    parser = _Parser(
        prog="issp",
        description="Super-resolution networks that are sparse from the first iteration.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n`issp COMMAND --help` shows an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="issp COMMAND [OPTIONS]",
        allow_abbrev=False,
    )
    from issp.ops.info import version

    parser.add_argument("--version", action="version", version=f"issp {version()}")
    return parser


def _help_line(name: str) -> str:
    return importlib.import_module(f"issp.cli.{name.replace('-', '_')}").HELP


def _command_parser(name: str, command) -> _Parser:
    parser = _Parser(
        prog=f"issp {name}",
        description=command.HELP,
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _parse(parser: _Parser, argv: list[str]) -> argparse.Namespace:
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        option = unknown[0].split("=")[0]
        close = difflib.get_close_matches(option, parser.known_options(), n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        parser.error(f"unknown argument {option}{hint}")
    return args
