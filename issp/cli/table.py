"""`issp table`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from issp.cli import common

if TYPE_CHECKING:
    from pathlib import Path

    from issp.sr.results import Result

HELP = "tables of PSNR and SSIM in the layout of the paper's, from results files and studies"
EXAMPLE = "issp table scores.csv --paper -o table.tex"

_FORMATS = ("markdown", "latex", "csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "results",
        nargs="*",
        metavar="RESULTS",
        help="files of `issp test --csv`, or folders of `issp study`",
    )
    parser.add_argument(
        "--paper",
        nargs="?",
        const=True,
        metavar="FILE",
        help="the paper's numbers beside them: those that came with issp, or a results file with "
        "a column `source`",
    )
    parser.add_argument(
        "--format", choices=_FORMATS, help="default: by the ending of --out, else markdown"
    )
    parser.add_argument("--out", "-o", metavar="FILE", help="default: the terminal")


def main(args: argparse.Namespace) -> int:
    """Prints or writes the tables: one for each network, ratio, channel and crop border."""
    from issp.sr import results, table_formats, tables
    from issp.utils.files import atomic_write, user_path

    if not args.results and args.paper is None:
        raise ValueError("give results files of `issp test --csv`, folders of studies, or --paper")
    out = user_path(args.out) if args.out else None
    form = args.format or _form_of(out)
    if out:
        files = args.results + ([args.paper] if isinstance(args.paper, str) else [])
        common.check_output("--out", out, map(results.results_file, files), "the results")
    own = [row for path in args.results for row in results.read(path)]
    if args.results and not own:
        raise ValueError(f"{', '.join(args.results)}: no result in it; `issp test --csv` adds some")
    made = tables.build(own + _of_paper(args))
    if own:
        wanted = {t.key for t in tables.build(own)}
        made = [t for t in made if t.key in wanted]
        if args.paper is not None and not any(row.source for t in made for row in t.rows):
            print("note: --paper has no number for these networks and ratios", file=sys.stderr)
    text = table_formats.FORMATS[form](made)
    if out is None:
        print(text, end="")
        return 0
    atomic_write(out, text.encode(errors="backslashreplace"))
    print(out)
    return 0


def _form_of(out: Path | None) -> str:
    """The form that the ending of --out asks for; markdown where it has none."""
    from issp.sr.table_formats import ENDINGS

    suffix = out.suffix.lower() if out else ""
    if suffix and suffix not in ENDINGS:
        raise ValueError(f"--out {out}: give --format, or an ending of {', '.join(ENDINGS)}")
    return ENDINGS.get(suffix, "markdown")


def _of_paper(args: argparse.Namespace) -> list[Result]:
    """The rows of --paper.

    Raises:
        ValueError: a row does not say its source, so that it would pass for a measurement.
    """
    from issp.sr import results, tables

    if args.paper is None:
        return []
    rows = results.read(tables.PAPER if args.paper is True else args.paper)
    for row in rows:
        if not row.source:
            raise ValueError(
                f"--paper {args.paper}: {row.method} x{row.scale} on {row.set} has no source: "
                "fill in the column, such as 'paper, table 2'"
            )
    return rows
