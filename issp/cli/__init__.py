"""The `issp` command: parses arguments, runs a command, prints errors as one line.

Each module of `COMMANDS` has HELP, EXAMPLE, add_arguments(parser) and main(args). It imports what
it needs inside main, so that the help of all commands costs no import of a library.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from issp import __version__
from issp.sr.interrupt import Interrupted
from issp.utils import process
from issp.utils.errors import UserError, one_line
from issp.utils.text import suggest

COMMANDS = (
    "demo",
    "train",
    "study",
    "test",
    "upscale",
    "pack",
    "bench",
    "plot",
    "table",
    "cost",
    "prepare-data",
    "cache",
    "info",
)
# Our checks of arguments and files raise ValueError and OSError. Any other error that is not a
# UserError is a bug and keeps its traceback.
_USER_ERRORS = (UserError, ValueError, OSError)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the nearest option or choice.

    Attributes:
        subcommands: of a command that has some; the first is meant where none is named.
    """

    subcommands: Sequence[str] = ()

    def __init__(self, **options: Any):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; without a sub-command the default one, where there is one."""
        words = list(sys.argv[1:] if args is None else args)
        if self.subcommands:
            place = next((i for i, word in enumerate(words) if word != "--debug"), len(words))
            if not self._names_command(words[place : place + 1]):
                words.insert(place, self.subcommands[0])
        return super().parse_known_args(words, namespace)

    def _names_command(self, word: Sequence[str]) -> bool:
        """A sub-command, --help, or a misspelt sub-command: no file has that name."""
        known = self.subcommands
        if not word or word[0] in ("-h", "--help", *known):
            return bool(word)
        is_close = suggest(word[0], known).startswith("did you mean")
        return is_close and not os.path.exists(word[0])

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Exits with status 2 if there are words that no argument of this parser took."""
        if words:
            known = [name for action in self._actions for name in action.option_strings]
            option = words[0].split("=")[0]
            hint = suggest(option, known)
            nearest = f": {hint}" if hint.startswith("did you mean") else ""
            self.error(f"unknown argument {option}{nearest}")

    def refuse_empty(self, args: argparse.Namespace) -> None:
        """Exits with status 2 if an argument is empty text; only a suffix may be."""
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if action.dest != "suffix" and "" in (value if isinstance(value, list) else [value]):
                name = "/".join(action.option_strings) or action.metavar
                self.error(f"argument {name} is empty")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # argparse's hook for choices, those of subcommands included.
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or action.dest.removesuffix("_command")
            self.error(f"unknown {name} {value!r}: {suggest(value, map(str, action.choices))}")


def command_module(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"issp.cli.{name.replace('-', '_')}")


def build_parser() -> Parser:
    """The parser of `issp` with all its commands."""
    parser = Parser(
        prog="issp",
        description="Super-resolution networks that are sparse from the first iteration.",
        epilog="`issp COMMAND --help` shows an example.",
    )
    parser.add_argument("--version", action="version", version=f"issp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name in COMMANDS:
        add_command(commands, name, command_module(name))
    return parser


def add_command(commands: Any, name: str, module: ModuleType) -> None:
    """Adds the command of a module to what `add_subparsers` gave."""
    command = commands.add_parser(
        name,
        help=module.HELP.replace("%", "%%"),  # argparse formats this text
        description=module.HELP,
        epilog=f"example:\n  {module.EXAMPLE}",
    )
    module.add_arguments(command)
    # Suppressed, or a sub-command's default would replace what stands before it.
    options: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
    command.add_argument("--debug", help="show the traceback of an error", **options)
    command.set_defaults(parser=command)


def add_subcommands(parser: Parser, kind: str, modules: Mapping[str, ModuleType]) -> None:
    """Adds commands within a command; the first is meant where none is named.

    Args:
        parser: of the command.
        kind: what they are, in the singular.
        modules: by name.
    """
    parser.subcommands = tuple(modules)
    commands = parser.add_subparsers(title=f"{kind}s", metavar=kind.upper(), dest=f"{kind}_command")
    for name, module in modules.items():
        add_command(commands, name, module)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None: the process's.

    Returns:
        Exit status: 0, 2 for bad input, 128 + signal after an interruption.
    """
    _prepare_output()
    parser = build_parser()
    try:
        args, unknown = parser.parse_known_args(argv)
        if args.command is None:
            parser.refuse_unknown(unknown)
            parser.print_help()
            return 0
        args.parser.refuse_unknown(unknown)
        args.parser.refuse_empty(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    return _run(args)


def _prepare_output() -> None:
    """Text that the terminal cannot show is escaped, a warning is a line, Pillow's are left out."""
    _replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.formatwarning = _format_warning


def _replace_closed_streams() -> None:
    """Text for a closed stream is dropped, and no file gets the stream's number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"issp: warning: {' '.join(str(message).split())}\n"


def _check_working_folder() -> None:
    """Refuses a working folder that is gone, where MKL ends the process without a reason."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError(
            "the working folder has been removed: change to one that is there"
        ) from None


def _run(args: argparse.Namespace) -> int:
    args.load = process.LoadMeter()
    if args.command != "bench":  # what it measures is a process that nobody has prepared
        process.limit_spinning()
        process.keep_freed_memory()
    try:
        _check_working_folder()
        return int(command_module(args.command).main(args) or 0)
    except Interrupted as stopped:
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            print(f"issp {args.command}: {stopped}", file=sys.stderr, flush=True)
        return stopped.status
    except KeyboardInterrupt:
        print(f"issp {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has ended; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _USER_ERRORS as error:
        if getattr(args, "debug", False):
            raise
        print(f"issp {args.command}: error: {one_line(error)}", file=sys.stderr)
        return 2
