"""`issp cache`."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

HELP = "show what the cache folder holds, or clear it"
EXAMPLE = "issp cache --clear"

# What each kind of file in the cache folder is called, relative to it. Others are not ours.
_KINDS = {
    "low-resolution images": r"[0-9a-f]{2}/[0-9a-f]{40}x\d+\.png",
    "measured choices": r"\.?choices\.json(\.lock)?",
    "unfinished files": r"([0-9a-f]{2}/)?\.[^/]+\.\d+-[0-9a-f]{8}\.tmp",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--clear", action="store_true", help="remove these files")


def main(args: argparse.Namespace) -> int:
    """Prints the folder and a table of its files; with --clear removes them."""
    from issp.utils.files import cache_folder
    from issp.utils.text import table

    folder = cache_folder()
    files = _files(folder)
    print(f"{folder} (ISSP_CACHE names another)\n")
    count, size = Counter(files.values()), Counter[str]()
    for file, kind in files.items():
        size[kind] += file.stat().st_size
    rows = [[kind, str(count[kind]), f"{size[kind] / 1e6:.1f}"] for kind in _KINDS]
    print(table(["files", "number", "MB"], rows))
    if args.clear:
        for file in files:
            file.unlink(missing_ok=True)
        for parent in {file.parent for file in files} - {folder}:
            if not any(parent.iterdir()):
                parent.rmdir()
        print(f"\nremoved {len(files)} files")
    return 0


def _files(folder: Path) -> dict[Path, str]:
    """Every file of this program in the folder, and its kind."""
    kinds = {}
    for file in sorted((*folder.glob("*"), *folder.glob("??/*"))):
        name = file.relative_to(folder).as_posix()
        kind = next((kind for kind, form in _KINDS.items() if re.fullmatch(form, name)), None)
        if kind and file.is_file():
            kinds[file] = kind
    return kinds
