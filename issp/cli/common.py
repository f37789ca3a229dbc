"""Shared by several commands: progress over a number of items, the model options."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from issp.utils.files import user_path

if TYPE_CHECKING:
    from issp.sr.models import SuperResolver


@contextlib.contextmanager
def item_progress(items: str) -> Iterator[Callable[[int, int], None]]:
    """Progress over a known number of items: a bar with ETA on a terminal, some lines elsewhere.

    Args:
        items: what is counted, in the plural.

    Yields:
        A function that is called as progress(done, total).
    """
    bar: Any = None
    last = time.perf_counter()
    with contextlib.suppress(ImportError):
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
            bar.add_task(escape(items), total=None)

    def progress(done: int, total: int) -> None:
        nonlocal last
        if bar:
            bar.update(0, completed=done, total=total)
        elif time.perf_counter() - last > 10:
            # One line every ten seconds: a line per image would fill a log file.
            last = time.perf_counter()
            print(f"{items}: {done} of {total}", file=sys.stderr, flush=True)

    with bar or contextlib.nullcontext():
        yield progress


# Folders inside a data set, whose name says nothing about the set.
_INNER_FOLDERS = re.compile(
    r"HR|GT|GTmod\d+|original|images?|image_SRF_\d|X\d|.*\{\}.*", re.IGNORECASE
)


def named_folders(entries: Sequence[str]) -> dict[str, str]:
    """Name -> folder of every "NAME=DIR"; a plain "DIR" is named after the data set it is of.

    Raises:
        ValueError: no name, one that is no plain name, or one of two folders.
    """
    folders: dict[str, str] = {}
    for entry in entries:
        name, separator, folder = entry.partition("=")
        if not separator or os.sep in name or user_path(entry).is_dir():  # "=" in a folder's name
            name, folder = _set_name(entry), entry
        if name in ("", ".", ".."):
            raise ValueError(f"{entry} gives its images no name: write NAME=DIR")
        if name in folders:
            raise ValueError(
                f"{folders[name]} and {folder} are both called {name!r}: write NAME=DIR for one"
            )
        folders[name] = folder
    return folders


def _set_name(folder: str) -> str:
    """The last part of a path that is no `_INNER_FOLDERS`, as text that a log can hold."""
    parts = Path(os.path.abspath(user_path(folder))).parts[1:]
    telling = [part for part in parts if not _INNER_FOLDERS.fullmatch(part)]
    name = (telling or parts or ("",))[-1]
    return name.encode(errors="backslashreplace").decode()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, and the options for a file that does not hold its architecture."""
    parser.add_argument(
        "--model", required=True, metavar="FILE", help=".safetensors of issp, or BasicSR's .pth"
    )
    parser.add_argument("--arch", metavar="NAME", help="architecture of a .pth, such as edsr-l")
    parser.add_argument("--scale", type=int, metavar="S", help="scale of a .pth")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--tile", type=int, metavar="PX", help="work in tiles, to bound memory")


def name_crowding(args: argparse.Namespace) -> None:
    """One line on stderr when threads compete for the cores with other processes."""
    import torch

    from issp.utils import process

    threads = getattr(args, "threads", None) or torch.get_num_threads()
    sentence = process.crowded(args.load.busy_cores(), threads)
    if sentence:
        print(f"note: {sentence}", file=sys.stderr)


# What to do when `upscale` or `test` runs out of memory.
MEMORY_REMEDY = "use --tile with a smaller size, or --device cpu"


def load_model(args: argparse.Namespace) -> SuperResolver:
    """The model that the options of `add_model_arguments` name, on its device."""
    from issp.sr import builders, checkpoint

    model = checkpoint.load(args.model, args.arch, args.scale)
    name_crowding(args)
    if args.scale not in (None, model.scale):
        raise ValueError(f"{args.model} is a x{model.scale} model: drop --scale {args.scale}")
    return model.to(builders.device(args.device))
