"""What several commands share: a progress counter, tables, the model options."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Any


class Counter:
    """Progress of a known number of things: a bar with ETA on a terminal, a few lines elsewhere.

    Use as a context manager and call it as counter(done, total).
    """

    def __init__(self, what: str):
        self.what, self._bar, self._last = what, None, time.perf_counter()
        with contextlib.suppress(ImportError):
            if sys.stderr.isatty():
                from rich.console import Console
                from rich.progress import Progress

                self._bar = Progress(console=Console(stderr=True), transient=True)
                self._bar.add_task(what, total=None)

    def __enter__(self) -> Counter:
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
            # A log file wants a sign of life, not a line per image.
            self._last = time.perf_counter()
            print(f"{self.what}: {done} of {total}", file=sys.stderr, flush=True)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model and what a file without an architecture needs."""
    parser.add_argument(
        "--model", required=True, metavar="FILE", help=".safetensors of issp, or BasicSR's .pth"
    )
    parser.add_argument("--arch", metavar="NAME", help="architecture of a .pth, such as edsr-l")
    parser.add_argument("--scale", type=int, metavar="S", help="its scale")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--tile", type=int, metavar="PX", help="work in tiles, to bound memory")


def load_model(args: argparse.Namespace) -> Any:
    """The model that the options of `add_model_arguments` name, on its device."""
    from issp.sr import builders, checkpoint

    model = checkpoint.load(args.model, args.arch, args.scale)
    if args.scale not in (None, model.scale):
        raise ValueError(f"{args.model} is a x{model.scale} model: drop --scale {args.scale}")
    return model.to(builders.device(args.device))
