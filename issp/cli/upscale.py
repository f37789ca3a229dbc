"""`issp upscale`."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from issp.cli import common
from issp.utils import process
from issp.utils.errors import (
    OutOfMemoryError,
    UserError,
    explain_out_of_memory,
    import_optional,
    one_line,
)
from issp.utils.files import check_folder, user_path
from issp.utils.text import byte_text, parse_bytes

if TYPE_CHECKING:
    from torch import nn

    from issp.sr.contact_sheet import ContactSheet
    from issp.sr.memory_limit import MemoryLimit
    from issp.sr.models import SuperResolver
    from issp.sr.models.tiling import Tiling

HELP = "super-resolve images or folders of images"
EXAMPLE = "issp upscale photo.png scans/ --model runs/demo/model.safetensors -o upscaled"
FORMATS = ("png", "jpg", "webp", "tif", "bmp")
# Of a file that cannot be read or written.
_FILE_ERRORS = (UserError, ValueError, OSError)
# Errors of writing that all further files would meet as well.
_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.ENOTDIR)

_Result = TypeVar("_Result")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    common.add_model_arguments(parser)
    parser.add_argument(
        "--out",
        "-o",
        required=True,
        metavar="PATH",
        help="folder of the results, in which sub-folders are mirrored; or, for one image, a file",
    )
    parser.add_argument("--format", choices=FORMATS, help="of the results (default: png)")
    parser.add_argument("--suffix", help="added to names (default: _x and the scale)")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="most that the process may hold, such as 2G; tiles are cut to suit",
    )
    parser.add_argument(
        "--compare",
        metavar="WHAT",
        help="also write a contact sheet (PNG): the results beside bicubic, or beside bicubic "
        "and the model in a FILE, such as a dense one",
    )
    parser.add_argument(
        "--skip-existing", action="store_true", help="leave out images whose result is there"
    )


@dataclass(frozen=True)
class Job:
    """An image and the file that its result becomes."""

    source: Path
    target: Path


@dataclass
class Failures:
    """Images that could not be read or written. Of one image alone, the error ends the command."""

    several: bool
    sources: list[Path] = field(default_factory=list)

    def attempt(
        self, job: Job, call: Callable[[], _Result], errors: tuple = _FILE_ERRORS
    ) -> _Result | None:
        """What a call returns, or None where it fails in one of these ways, which is printed."""
        try:
            return call()
        except errors as error:
            if not self.several or getattr(error, "errno", None) in _HOPELESS:
                raise
            self.sources.append(job.source)
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            return None


def main(args: argparse.Namespace) -> int:
    """Writes one image per image; returns 1 if some of several could not be read or written."""
    from issp.sr import upscale

    process.use_large_pages()
    out = user_path(args.out)
    memory = _memory(args)
    images = _images(args.images, out)
    model = common.load_model(args)
    upscale.check_channels(model)
    jobs = _jobs(args, images, f"_x{model.scale}" if args.suffix is None else args.suffix)
    sheet, sheet_path = _sheet(args, model, jobs)
    tiling = None if memory else common.tiling(args, model)
    if args.skip_existing:
        jobs = _waiting(jobs)
    failures = Failures(several=len(images) > 1)
    sizes = _sizes(jobs, model.scale, failures)
    with process.prompt_interrupt():
        network = common.packed(args, model, sum(h * w for h, w in sizes.values()))
    if memory:
        tiling, sizes = _tiling_within(memory, model, jobs, sizes, failures)
    assert tiling is not None  # one of the two has been chosen
    if not tiling.exact and any(tiling.cuts(*size) for size in sizes.values()):
        print(_seams_note(tiling, model), file=sys.stderr)
    run = Run(network, tiling, sizes, failures, bool(memory), sheet)
    with process.prompt_interrupt():
        run.upscale_all([job for job in jobs if job.source in sizes])
    if sheet is not None and sheet_path and len(sheet):
        sheet.write(sheet_path)
        print(f"{sheet_path}  the first {len(sheet)} of {len(jobs)} images side by side")
    if failures.sources:
        print(f"{len(failures.sources)} of {len(jobs)} images failed:", file=sys.stderr)
        print(*failures.sources, sep="\n", file=sys.stderr)
    return 1 if failures.sources else 0


def _images(names: Sequence[str], out: Path) -> list[tuple[Path, Path]]:
    """Every image, and its place below the folder that was named; nothing in `out` is one."""
    from issp.sr import data

    images: list[tuple[Path, Path]] = []
    results = out.resolve() if out.is_dir() else None
    for name in names:
        path = user_path(name)
        if path.is_dir():
            files = data.list_images(path, subfolders=True)
            if results is not None and results != path.resolve():
                files = [file for file in files if results not in file.resolve().parents]
            images += [(file, file.relative_to(path)) for file in files]
        elif path.exists() or path.is_symlink():
            images.append((path, Path(path.name)))
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    return list(dict.fromkeys(images))


def _jobs(args: argparse.Namespace, images: list[tuple[Path, Path]], suffix: str) -> list[Job]:
    """What becomes of every image.

    Raises:
        ValueError: a result would overwrite an image or another result, or no file can hold it.
    """
    if Path(f"a{suffix}").name != f"a{suffix}":
        raise ValueError(f"--suffix {suffix} holds a path: it can only be a part of a name")
    out, file = user_path(args.out), _file_named(args)
    if file and len(images) != 1:
        raise ValueError(f"-o {out} names one file for {len(images)} images: name a folder")
    if not file and out.exists() and not out.is_dir():
        raise ValueError(f"-o {out} is a file: name a folder, or a file such as result.png")
    check_folder(out.parent if file else out)
    extension = args.format or "png"
    jobs = [
        Job(source, out if file else out / place.with_name(f"{place.stem}{suffix}.{extension}"))
        for source, place in images
    ]
    if args.skip_existing:  # results beside their images are no images of an earlier run's rest
        targets = {job.target for job in jobs}
        jobs = [job for job in jobs if job.source not in targets]
    _check_targets(jobs)
    return jobs


def _waiting(jobs: list[Job]) -> list[Job]:
    """The jobs whose result is not there, or is not a whole image; a line says how many are."""
    waiting, damaged = [], 0
    with common.item_progress("results read") as progress:
        for number, job in enumerate(jobs):
            progress(number, len(jobs))
            there = job.target.exists()
            if not (there and _is_whole(job.target)):
                waiting.append(job)
                damaged += there
    done = f"{len(jobs) - len(waiting)} of {len(jobs)} results are there already"
    again = f", {damaged} damaged: made again" if damaged else ""
    print(f"{done}{again}", file=sys.stderr)
    return waiting


def _is_whole(path: Path) -> bool:
    """Whether an image can be read to its end."""
    from issp.sr import data

    try:
        data.read_image(path)
    except ValueError:
        return False
    return True


def _file_named(args: argparse.Namespace) -> bool:
    """Whether -o names a file, by its suffix.

    Raises:
        ValueError: a format that cannot be written, or another than --format.
    """
    from issp.sr.data.pictures import WRITABLE, is_picture_name

    out = user_path(args.out)
    if out.is_dir() or args.out.endswith(("/", os.sep)) or not is_picture_name(out):
        return False
    suffix = out.suffix.lower()
    if suffix not in WRITABLE:
        raise ValueError(f"cannot write {out}: use one of the suffixes {', '.join(WRITABLE)}")
    same = {".jpeg": ".jpg", ".tiff": ".tif"}
    if args.format and same.get(suffix, suffix) != f".{args.format}":
        raise ValueError(f"-o {out} and --format {args.format} differ: drop one of them")
    return True


def _check_targets(jobs: Sequence[Job]) -> None:
    identities = {common.file_identity(job.source): job.source for job in jobs}
    sources: dict[Path, Path] = {}
    for job in jobs:
        if job.target in sources:
            raise ValueError(
                f"{sources[job.target]} and {job.source} would both become {job.target}: rename "
                "one, or upscale them into two folders"
            )
        sources[job.target] = job.source
        if job.target.is_dir():
            raise ValueError(f"the result {job.target} is a folder: choose another --suffix")
        overwritten = job.target.exists() and identities.get(common.file_identity(job.target))
        if overwritten:
            raise ValueError(
                f"{overwritten} would be overwritten: choose another folder or --suffix"
            )


def _sizes(jobs: Sequence[Job], scale: int, failures: Failures) -> dict[Path, tuple[int, int]]:
    """Height and width of the images, from their headers; of those that can be upscaled."""
    from issp.sr import data
    from issp.sr.data.pictures import check_writable

    def size(job: Job) -> tuple[int, int]:
        height, width = data.image_size(job.source)
        check_writable(job.target, height * scale, width * scale)
        return height, width

    sizes = {job.source: failures.attempt(job, lambda job=job: size(job)) for job in jobs}
    return {source: size for source, size in sizes.items() if size}


def _memory(args: argparse.Namespace) -> int | None:
    """Bytes that --memory means.

    Raises:
        ValueError: no size, or beside what it cannot bound.
    """
    if args.memory is None:
        return None
    try:
        memory = parse_bytes(args.memory)
    except ValueError as error:
        raise ValueError(f"--memory: {error}") from None
    if args.tile is not None:
        raise ValueError("--memory chooses the tiles' size, and --tile sets it: drop one of them")
    if args.device.startswith("cuda"):
        raise ValueError("--memory bounds the processor's memory: use --tile with --device cuda")
    args.device = "cpu"  # "auto" could be a GPU
    return memory


def _sheet(
    args: argparse.Namespace, model: SuperResolver, jobs: Sequence[Job]
) -> tuple[ContactSheet | None, Path | None]:
    """The contact sheet that --compare asks for, and its file.

    Raises:
        ValueError: a model of another scale, or an image is in the sheet's place.
    """
    if args.compare is None:
        return None, None
    from issp.sr.contact_sheet import ContactSheet
    from issp.sr.upscale import check_channels

    import_optional("matplotlib", "matplotlib", "the contact sheet")
    out = user_path(args.out)
    path = out.with_name(f"{out.stem}_compare.png") if _file_named(args) else out / "compare.png"
    others: dict[str, nn.Module] = {}
    if args.compare != "bicubic":
        other = common.load_file(args.compare, args)
        if other.scale != model.scale:
            raise ValueError(
                f"--compare {args.compare} is a x{other.scale} model and --model a x{model.scale} "
                "one: compare models of one scale"
            )
        check_channels(other)
        others[Path(args.compare).name] = other
    common.check_output("--compare: the sheet", path, [job.source for job in jobs], "an image")
    if path in [job.target for job in jobs]:
        raise ValueError(f"the sheet of --compare and a result would both become {path}: rename")
    return ContactSheet(model.scale, Path(args.model).name, others), path


def _tiling_within(
    memory: int,
    model: SuperResolver,
    jobs: Sequence[Job],
    sizes: dict[Path, tuple[int, int]],
    failures: Failures,
) -> tuple[Tiling, dict[Path, tuple[int, int]]]:
    """The largest tiles that suit all images within so many bytes, and the images that do fit."""
    from issp.sr.memory_limit import MemoryLimit
    from issp.sr.models import tiling

    process.return_freed_memory()
    limit = MemoryLimit.of(memory, model)
    waiting = [job for job in jobs if job.source in sizes]
    budgets = {
        job.source: failures.attempt(job, lambda job=job: _budget(limit, job, sizes))
        for job in waiting
    }
    fitting = {source: budget for source, budget in budgets.items() if budget is not None}
    least = min(fitting.values(), default=limit.least_tile)
    chosen = tiling.fitting_tiling(model, model.channels, least)
    return chosen, {source: sizes[source] for source in fitting}


def _budget(limit: MemoryLimit, job: Job, sizes: dict[Path, tuple[int, int]]) -> int:
    try:
        return limit.tile_bytes(*sizes[job.source], job.target.suffix)
    except UserError as error:
        raise UserError(f"{job.source}: {error}") from None


def _seams_note(chosen: Tiling, model: SuperResolver) -> str:
    from issp.sr.models import tiling

    exact = tiling.exact_bytes(model, model.channels)
    remedy = f"; exact ones take {byte_text(exact)} for a tile" if exact else ""
    return (
        f"note: tiles of {chosen.tile} pixels overlap by {chosen.overlap}, but the network "
        f"sees further: results may differ a little at their seams; --tile sets their size{remedy}"
    )


@dataclass(frozen=True)
class Run:
    """What all images of a command share.

    Attributes:
        network, tiling: see `issp.sr.upscale`.
        sizes: of the images that can be upscaled.
        failures: gets those that cannot.
        is_bounded: memory that is freed goes back to the system at once.
        sheet: gets the results; None: nobody asked for one.
    """

    network: nn.Module
    tiling: Tiling
    sizes: dict[Path, tuple[int, int]]
    failures: Failures
    is_bounded: bool
    sheet: ContactSheet | None

    def upscale_all(self, jobs: Sequence[Job]) -> None:
        """Reads, computes and writes one image after the other."""
        pixels = [h * w for h, w in (self.sizes[job.source] for job in jobs)]
        written = 0
        try:
            with common.item_progress("images") as progress:
                for number, job in enumerate(jobs):
                    on_share = functools.partial(
                        _show_share,
                        progress,
                        done=sum(pixels[:number]),
                        now=pixels[number],
                        total=sum(pixels),
                        text=f"{job.source.name} ({number + 1} of {len(jobs)})",
                    )
                    written += self._upscale(job, on_share)
        except KeyboardInterrupt:
            print(f"{written} of {len(jobs)} images are done", file=sys.stderr)
            raise

    def _upscale(self, job: Job, on_share: Callable[[float], None]) -> bool:
        """Whether the result of an image was written."""
        from issp.sr import data, upscale
        from issp.sr.data.pictures import lost_in_reading, write_picture

        done = 0

        def on_part(total: int) -> None:
            nonlocal done
            done += 1
            on_share(done / total)

        def compute(picture: data.Picture) -> data.Picture:
            with explain_out_of_memory(common.MEMORY_REMEDY):
                return upscale.upscale_picture(self.network, picture, self.tiling, on_part)

        on_share(0)
        attempt = self.failures.attempt
        picture = attempt(job, lambda: data.read_picture(job.source))
        self._return_memory()
        if picture is None:
            return False
        result = attempt(job, lambda: compute(picture), (OutOfMemoryError,))
        self._return_memory()
        if result is None:
            return False
        lost = attempt(job, lambda: write_picture(job.target, result))
        if lost is None:
            return False
        if self.sheet is not None:
            self.sheet.add(job.source.name, picture.rgb, result.rgb)
        height, width = result.rgb.shape[:2]
        print(f"{job.target}  {width} x {height}", flush=True)
        lost = lost_in_reading(picture) + lost
        if lost:
            print(f"note: {job.target} is without {', '.join(lost)}", file=sys.stderr)
        return True

    def _return_memory(self) -> None:
        if self.is_bounded:
            process.return_freed_memory()


def _show_share(
    progress: common.ItemProgress, share: float, *, done: int, now: int, total: int, text: str
) -> None:
    progress(done + share * now, total, text)
