"""`issp cache`."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections import Counter
from pathlib import Path

from issp.utils.files import lock

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
    files = _files(folder)  # other processes add and remove some in the meantime
    print(f"{folder} (ISSP_CACHE names another)\n")
    count, size = Counter(files.values()), Counter[str]()
    for file, kind in files.items():
        with contextlib.suppress(FileNotFoundError):
            size[kind] += file.stat().st_size
    rows = [[kind, str(count[kind]), f"{size[kind] / 1e6:.1f}"] for kind in _KINDS]
    print(table(["files", "number", "MB"], rows))
    if args.clear:
        removed = sum(_remove(file, kind) for file, kind in files.items())
        for parent in {file.parent for file in files} - {folder}:
            with contextlib.suppress(OSError):  # it holds others
                parent.rmdir()
        print(f"\nremoved {removed} files")
    return 0


def _remove(file: Path, kind: str) -> bool:
    """Removes a file, one that a process is writing excepted."""
    with contextlib.suppress(FileNotFoundError):
        if kind != "unfinished files":
            file.unlink()
            return True
        with open(file, "r+b") as opened:
            if lock(opened.fileno()):
                file.unlink()
                return True
    return False


def _files(folder: Path) -> dict[Path, str]:
    """Every file of this program in the folder, and its kind."""
    kinds = {}
    for file in sorted((*folder.glob("*"), *folder.glob("??/*"))):
        name = file.relative_to(folder).as_posix()
        kind = next((kind for kind, form in _KINDS.items() if re.fullmatch(form, name)), None)
        if kind and file.is_file():
            kinds[file] = kind
    return kinds
