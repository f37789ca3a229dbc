"""Shared by several commands: progress over a number of items, the model options."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from issp.utils.files import check_file, user_path
from issp.utils.text import duration

if TYPE_CHECKING:
    import torch
    from torch import nn

    from issp.sr.models import SuperResolver
    from issp.sr.models.tiling import Tiling


_LINE_SECONDS = 10.0  # between two lines of progress: one per image would fill a log file


class ItemProgress:
    """Progress over a known amount of work: a bar with ETA on a terminal, some lines elsewhere.

    Args:
        items: what is counted, in the plural.
    """

    def __init__(self, items: str):
        self._items, self.bar = items, _rich_bar(items)
        self._start = self._last = time.perf_counter()

    def __call__(self, done: float, total: float, text: str | None = None) -> None:
        """Shows how much of the work is done, and the text in place of the numbers."""
        if self.bar:
            description = _plain(text or self._items)
            self.bar.update(0, completed=done, total=total, description=description)
            return
        now, share = time.perf_counter(), done / total if total else 1.0
        if now - self._last > _LINE_SECONDS:
            self._last = now
            counted = text and f"{text}, {100 * share:.0f} % of all"
            line = counted or f"{self._items}: {done:.0f} of {total:.0f}"
            print(f"{line}{self._eta(now, share)}", file=sys.stderr, flush=True)

    def _eta(self, now: float, share: float) -> str:
        if not share:
            return ""
        return f", ETA {duration((now - self._start) * (1 / share - 1))}"


@contextlib.contextmanager
def item_progress(items: str) -> Iterator[ItemProgress]:
    """An `ItemProgress` that leaves the terminal as it was."""
    progress = ItemProgress(items)
    with progress.bar or contextlib.nullcontext():
        yield progress


def _rich_bar(items: str) -> Any:
    """A bar that goes when it is done; None without a terminal or without rich."""
    with contextlib.suppress(ImportError):
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            # A list of results that is written into a file stays there.
            redirect = sys.stdout.isatty()
            console = Console(stderr=True)
            bar = Progress(console=console, transient=True, redirect_stdout=redirect)
            bar.add_task(_plain(items), total=None)
            return bar
    return None


def _plain(text: str) -> str:
    """Text in which rich sees no markup: names hold brackets."""
    from rich.markup import escape

    return escape(text)


def file_identity(path: Path) -> tuple[int, int] | Path:
    """What two names of one file have in common."""
    try:
        about = path.stat()
    except OSError:
        return path
    return about.st_dev, about.st_ino


def check_output(
    option: str, path: Path, read: Iterable[str | os.PathLike] = (), what: str = "what is read"
) -> None:
    """Refuses a file that cannot be written, or in whose place is one that is read.

    Args:
        option: that names it.
        path: of the file.
        read: the files that are read.
        what: they are.

    Raises:
        OSError: see `check_file`.
        ValueError: it would overwrite one of them.
    """
    check_file(path)
    identities = {file_identity(user_path(file)) for file in read}
    if path.exists() and file_identity(path) in identities:
        raise ValueError(f"{option} {path} would overwrite {what}: choose another file")


# Folders inside a data set, whose name says nothing about the set.
_INNER_FOLDERS = re.compile(
    r"HR|GT|GTmod\d+|original|images?|image_SRF_\d|X\d|.*\{\}.*", re.IGNORECASE
)


def named_folders(entries: Sequence[str]) -> dict[str, str]:
    """As `named_paths`; a plain "DIR" is named after the data set it is of."""
    return named_paths(entries, "DIR", _set_name)


def _own_name(path: str) -> str:
    """The name of a folder, or of a file without its suffix."""
    whole = Path(os.path.abspath(user_path(path)))
    return whole.name if whole.is_dir() else whole.stem


def named_paths(
    entries: Sequence[str], kind: str, name_of: Callable[[str], str] = _own_name
) -> dict[str, str]:
    """Name -> path of every "NAME=PATH", or of a plain "PATH".

    Args:
        entries: as the user gives them.
        kind: what the paths are, for messages: "DIR" or "FILE".
        name_of: the name of a plain path.

    Raises:
        ValueError: no name, one that is no plain name, or one of two paths.
    """
    paths: dict[str, str] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        if not separator or os.sep in name or user_path(entry).exists():  # "=" in a path's name
            name, path = name_of(entry), entry
        if name in ("", ".", ".."):
            raise ValueError(f"{entry} has no name: write NAME={kind}")
        if name in paths:
            raise ValueError(
                f"{paths[name]} and {path} are both called {name!r}: write NAME={kind} for one"
            )
        paths[name] = path
    return paths


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
    add_loading_arguments(parser)
    parser.add_argument(
        "--dense", action="store_true", help="do not use sparse layers, even if they are faster"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="in which parts of a sparse network compute on a CPU, where that is faster; with 16 "
        "bits pixels may be a level off (default: float32)",
    )


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """How `load_model` reads a file and where its network computes."""
    parser.add_argument("--arch", metavar="NAME", help="architecture of a .pth, such as edsr-l")
    parser.add_argument("--scale", type=int, metavar="S", help="scale of a .pth")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PX",
        help="largest side of the tiles that images are cut into; 0: none (default: by the "
        "network and the memory)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of the processor that compute")


# What a picture can be written as; other suffixes of images are refused.
_PICTURES, _OTHER_IMAGES = (".png", ".pdf", ".svg"), (".jpg", ".jpeg", ".tif", ".tiff", ".webp")


def add_picture_argument(parser: argparse.ArgumentParser, name: str) -> None:
    """--out: the file of one picture, or the folder of a file of this name."""
    parser.add_argument(
        "--out", "-o", metavar="FILE|DIR", help=f".png, .pdf or .svg, or a folder of {name}"
    )


def picture_path(out: str | None, name: str) -> Path:
    """The file that --out of `add_picture_argument` means.

    Raises:
        ValueError: a suffix of an image that is not written.
    """
    path = user_path(out or ".")
    suffix = path.suffix.lower()
    if suffix in _OTHER_IMAGES:
        raise ValueError(f"--out {out}: write a {', '.join(_PICTURES)} file, or name a folder")
    return path if suffix in _PICTURES and not path.is_dir() else path / name


def image_size(text: str | None) -> tuple[int, int] | None:
    """Height and width that --size gives."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not all(1 <= int(side) <= 100_000 for side in match.groups()):
        raise ValueError(f"--size is {text!r}: write height and width of the input, such as 64x64")
    return int(match[1]), int(match[2])


def name_crowding(args: argparse.Namespace) -> None:
    """One line on stderr when threads compete for the cores with other processes."""
    import torch

    from issp.utils import process

    threads = getattr(args, "threads", None) or torch.get_num_threads()
    sentence = process.crowded(args.load.busy_cores(), threads)
    if sentence:
        print(f"note: {sentence}", file=sys.stderr)


# OpenMP ends the process when the system refuses it more; no smaller machine gains from them.
_MANY_THREADS = 256

# What to do when `upscale` or `test` runs out of memory.
MEMORY_REMEDY = "use --tile with a smaller size, or --device cpu"


def load_model(args: argparse.Namespace) -> SuperResolver:
    """The model that the options of `add_model_arguments` name, on its device."""
    set_threads(args)
    if getattr(args, "dense", False) and args.dtype != "float32":
        raise ValueError(f"--dense computes in float32: drop it or --dtype {args.dtype}")
    model = load_file(args.model, args)
    name_crowding(args)
    return model


def set_threads(args: argparse.Namespace) -> None:
    """Applies --threads."""
    import torch

    if args.threads is not None:
        most = max(_MANY_THREADS, os.cpu_count() or 1)
        if not 1 <= args.threads <= most:
            raise ValueError(f"--threads is {args.threads}: it must be from 1 to {most}")
        torch.set_num_threads(args.threads)


def load_file(path: str, args: argparse.Namespace) -> SuperResolver:
    """The model in a file, read by the options of `add_loading_arguments`, on its device."""
    from issp.sr import builders, checkpoint

    model = checkpoint.load(path, args.arch, args.scale)
    if args.scale not in (None, model.scale):
        raise ValueError(f"{path} is a x{model.scale} model: drop --scale {args.scale}")
    return model.to(builders.device(args.device))


def tiling(args: argparse.Namespace, model: SuperResolver) -> Tiling:
    """How --tile cuts images, or the network and the memory.

    Raises:
        ValueError: a size that does not suit the network.
    """
    from issp.sr.models import tiling

    if args.tile is None:
        return tiling.fitting_tiling(model, model.channels)
    try:
        return tiling.fixed_tiling(model, args.tile or None)
    except ValueError as error:
        raise ValueError(f"--tile: {error}; 0 cuts nothing") from None


def packed(args: argparse.Namespace, model: SuperResolver, pixels: int) -> nn.Module:
    """The network that computes this many input pixels fastest, which a line names.

    A network with zeros is packed unless --dense is given.
    """
    from issp.sr import upscale

    if args.dense or not pixels:
        return model
    dtype = _reduced_dtype(args)
    side, line = upscale.packing_example(model, pixels, dtype)
    network: nn.Module = model
    if side:
        print("measuring which layers are faster sparse ...", file=sys.stderr, flush=True)
        network, line = upscale.pack_on(model, side, dtype)
    if line:
        print(line, flush=True)
    return network


def _reduced_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """What --dtype asks of `issp.pack`."""
    import torch

    return None if args.dtype == "float32" else getattr(torch, args.dtype)
