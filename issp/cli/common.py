"""Shared by several commands: progress over a number of items, the model options."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from issp.sr.models import SuperResolver


class ItemProgress:
    """Progress over a known number of items: a bar with ETA on a terminal, some lines elsewhere.

    It is a context manager that is called as progress(done, total).

    Args:
        items: what is counted, in the plural.
    """

    def __init__(self, items: str):
        self._items, self._last = items, time.perf_counter()
        self._bar: Any = None
        with contextlib.suppress(ImportError):
            if sys.stderr.isatty():
                from rich.console import Console
                from rich.progress import Progress

                self._bar = Progress(console=Console(stderr=True), transient=True)
                self._bar.add_task(items, total=None)

    def __enter__(self) -> ItemProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._bar:
            self._bar.update(0, completed=done, total=total)
        elif time.perf_counter() - self._last > 10:
            # One line every ten seconds: a line per image would fill a log file.
            self._last = time.perf_counter()
            print(f"{self._items}: {done} of {total}", file=sys.stderr, flush=True)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, and the options for a file that does not hold its architecture."""
    parser.add_argument(
        "--model", required=True, metavar="FILE", help=".safetensors of issp, or BasicSR's .pth"
    )
    parser.add_argument("--arch", metavar="NAME", help="architecture of a .pth, such as edsr-l")
    parser.add_argument("--scale", type=int, metavar="S", help="scale of a .pth")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--tile", type=int, metavar="PX", help="work in tiles, to bound memory")


# What to do when `upscale` or `test` runs out of memory.
MEMORY_REMEDY = "use --tile with a smaller size, or --device cpu"


def load_model(args: argparse.Namespace) -> SuperResolver:
    """The model that the options of `add_model_arguments` name, on its device."""
    from issp.sr import builders, checkpoint

    model = checkpoint.load(args.model, args.arch, args.scale)
    if args.scale not in (None, model.scale):
        raise ValueError(f"{args.model} is a x{model.scale} model: drop --scale {args.scale}")
    return model.to(builders.device(args.device))
