"""Shared by several commands: progress over a number of items, the model options."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
            bar.add_task(items, total=None)

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


def named_folder(entry: str) -> tuple[str, str]:
    """The name and the folder in "NAME=DIR"; for a plain "DIR" the name of the folder."""
    name, separator, folder = entry.partition("=")
    return (name, folder) if separator else (Path(entry).name, entry)


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
