"""`issp plot crops`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from issp.cli import common
from issp.utils.files import user_path
from issp.utils.text import suggest

if TYPE_CHECKING:
    import numpy as np

    from issp.sr.data import PairedFolder
    from issp.sr.models import SuperResolver
    from issp.sr.plots.crops import Box, Crop

HELP = "figures 3 to 12: a box of an image as bicubic and several models see it"
EXAMPLE = (
    "issp plot crops --images Urban100/image_SRF_4 --figure all --models A=a.safetensors -o out\n"
    "  issp plot crops --images photo.png --box 387,204,503,264 --models A=a.safetensors B=b.pth"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--images",
        required=True,
        metavar="FILE|DIR",
        help="an original, or a folder as for `issp test --data`; its low-resolution image is "
        "read where there is one, else made",
    )
    parser.add_argument(
        "--lr-images", metavar="DIR", help="folder, or template, of the low-resolution files"
    )
    parser.add_argument(
        "--figure",
        nargs="+",
        metavar="NAME",
        help="boxes of the paper in Urban100 x4, or all: img_072 img_055 img_061 img_012 "
        "img_012b (there are two) img_032 img_044 img_010 img_023; the images of the paper's two "
        "other figures are not known",
    )
    parser.add_argument("--box", metavar="X1,Y1,X2,Y2", help="in pixels of the original")
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="[NAME=]FILE", help="in the order of the crops"
    )
    common.add_loading_arguments(parser)
    parser.add_argument("--channels", choices=("y", "rgb"), default="y", help="default: y")
    common.add_picture_argument(parser, "crops_NAME.png")


@dataclass
class Job:
    """One picture: what is drawn of which image, and where."""

    pairs: PairedFolder
    index: int
    box: Box
    path: Path
    hr: np.ndarray = field(init=False)
    lr: np.ndarray = field(init=False)
    crops: list[Crop] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the image."""
        return self.pairs.names[self.index]


def main(args: argparse.Namespace) -> int:
    """Writes the pictures and prints their paths."""
    from issp.utils import process
    from issp.utils.errors import explain_out_of_memory

    boxes = _boxes(args)
    common.set_threads(args)
    files = common.named_paths(args.models, "FILE")
    models = {name: common.load_file(file, args) for name, file in files.items()}
    scale = _scale(args, models)
    jobs = _jobs(args, boxes, scale)
    _check_outputs(args, jobs, files)
    with process.prompt_interrupt(), explain_out_of_memory(common.MEMORY_REMEDY):
        common.name_crowding(args)
        _compute(args, jobs, models, scale)
    for job in jobs:
        _draw(args, job, scale)
        print(job.path)
    return 0


def _boxes(args: argparse.Namespace) -> dict[str, Box]:
    """The boxes by figure; one of --box has the name ""."""
    from issp.sr.plots.crops import PAPER_BOXES, parse_box

    if bool(args.figure) == bool(args.box):
        raise ValueError("give --box X1,Y1,X2,Y2, or --figure with boxes of the paper")
    if args.box:
        return {"": parse_box(args.box)}
    names = list(PAPER_BOXES) if args.figure == ["all"] else args.figure
    for name in names:
        if name not in PAPER_BOXES:
            hint = suggest(name, PAPER_BOXES)
            raise ValueError(f"unknown figure {name!r}: {hint}; for another image use --box")
    return {name: PAPER_BOXES[name] for name in names}


def _scale(args: argparse.Namespace, models: dict[str, SuperResolver]) -> int:
    """The one scale of all models, or --scale where there is none."""
    scales = {name: model.scale for name, model in models.items()}
    if not scales and args.scale is None:
        raise ValueError("without --models, bicubic needs --scale")
    for option, default in (("arch", None), ("tile", None), ("device", "auto")):
        if not scales and getattr(args, option) != default:
            raise ValueError(f"--{option} is about models: give --models, or drop it")
    if len(set(scales.values())) > 1:
        listed = ", ".join(f"{name} x{scale}" for name, scale in scales.items())
        raise ValueError(f"the models have different scales ({listed}): draw those of one scale")
    return next(iter(scales.values()), args.scale)


def _jobs(args: argparse.Namespace, boxes: dict[str, Box], scale: int) -> list[Job]:
    """The pictures to draw; their images are read and their boxes checked."""
    from issp.sr import data
    from issp.sr.plots.crops import check_box, paper_image

    path = user_path(args.images)
    if path.is_dir():
        pairs = data.PairedFolder(path, scale, args.lr_images)
    else:
        pairs = data.PairedFolder(path.parent, scale, args.lr_images, only=path.name)
    if args.box and len(pairs) > 1:
        raise ValueError(
            f"{path} holds {len(pairs)} images: name one file, such as {pairs.hr_files[0]}"
        )
    jobs = []
    for figure, box in boxes.items():
        index = paper_image(figure, pairs.names) if figure else 0
        target = common.picture_path(args.out, f"crops_{figure or pairs.names[index]}.png")
        job = Job(pairs, index, box, target)
        job.lr, job.hr = pairs.load(index)
        check_box(box, job.hr, job.name)
        jobs.append(job)
    return jobs


def _check_outputs(args: argparse.Namespace, jobs: list[Job], files: dict[str, str]) -> None:
    """Refuses --out where pictures would overwrite each other, or what is read."""
    if len({job.path for job in jobs}) < len(jobs):
        raise ValueError(f"--out {args.out} is one file for {len(jobs)} figures: name a folder")
    read = {path for job in jobs for path in job.pairs.paths(job.index)} | set(files.values())
    for job in jobs:
        common.check_output("--out", job.path, read, "an image or a model that is read")


def _compute(
    args: argparse.Namespace, jobs: list[Job], models: dict[str, SuperResolver], scale: int
) -> None:
    """Fills in the crops of bicubic and of every model."""
    from issp.sr import evaluate
    from issp.sr.plots.crops import score_crop

    upscalers = {"bicubic": evaluate.bicubic(scale)}
    for name, model in models.items():
        tiling = common.tiling(args, model)
        # As `issp test`: whole images without --tile, unless tiles are exact.
        whole = args.tile is None and not tiling.exact
        upscalers[name] = evaluate.of_model(model, None if whole else tiling.tile)
    done, total = 0, len(jobs) * len(upscalers)
    with common.item_progress("crops") as progress:
        for job in jobs:
            for name, upscaler in upscalers.items():
                sr = upscaler(job.lr)
                y_channel = args.channels == "y"
                job.crops.append(score_crop(name, sr, job.hr, job.box, scale, y_channel))
                done += 1
                progress(done, total)


def _draw(args: argparse.Namespace, job: Job, scale: int) -> None:
    from issp.sr.plots.crops import draw_crops

    note = (
        f"x{scale}; PSNR on {args.channels.upper()}, in the box / in the image without a border of "
        f"{scale} pixels; low-resolution image {job.pairs.lr_source}"
    )
    draw_crops(job.name, job.hr, job.box, job.crops, job.path, note)
