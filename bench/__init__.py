"""`issp bench`: tables of what was measured, beside its peers from the same run."""

from __future__ import annotations

import argparse
import sys

from bench.harness import registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one sub-command per benchmark."""
    commands = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, module in registry.benchmarks().items():
        summary, _, details = module.__doc__.partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\n{details}",
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)


def main(args: argparse.Namespace) -> int:
    """Runs one benchmark.

    Returns:
        0; 1 when parity is red (then nothing was timed); 2 for bad
        input.
    """
    try:
        registry.benchmarks()[args.benchmark].run(args)
    except registry.ParityError as error:
        print(f"issp bench: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"issp bench: {error}", file=sys.stderr)
        return 2
    return 0
