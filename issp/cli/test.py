"""`issp test`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from issp.cli import common
from issp.utils.text import table

if TYPE_CHECKING:
    import numpy as np

    from issp.sr.data import EvalDataset
    from issp.sr.evaluate import Score
    from issp.sr.models import SuperResolver

HELP = "PSNR and SSIM of a model on test sets"
EXAMPLE = "issp test --model net_g_latest.safetensors --data Set5 Set14=benchmarks/Set14 --save out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    common.add_model_arguments(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="[NAME=]DIR",
        help="folders of originals, or with HR and LR_bicubic/X4, or NAME_HR and NAME_LR, inside; "
        "or templates of their files: 'DIR/{}_GT'",
    )
    parser.add_argument(
        "--lr-images",
        nargs="+",
        metavar="DIR",
        help="folder, or template such as 'DIR/{}x4' or '{}_LR', of the low-resolution files of "
        "every --data, or one template for all; without it they are found, or made from the "
        "originals",
    )
    parser.add_argument("--channels", choices=("y", "rgb"), default="y", help="default: y")
    parser.add_argument("--crop-border", type=int, metavar="PX", help="default: the scale")
    parser.add_argument("--save", metavar="DIR", help="write the upscaled images there")
    parser.add_argument("--per-image", action="store_true", help="a row for every image")
    parser.add_argument("--no-bicubic", action="store_true", help="leave the baseline out")


def main(args: argparse.Namespace) -> int:
    """Prints a table with one row per set."""
    from issp.sr import checkpoint, data
    from issp.utils.errors import explain_out_of_memory

    model = common.load_model(args)
    folders = common.named_folders(args.data)
    pairs = {
        name: data.PairedFolder(folder, model.scale, lr_images)
        for (name, folder), lr_images in zip(folders.items(), _lr_images(args), strict=True)
    }
    rows = []
    with explain_out_of_memory(common.MEMORY_REMEDY):
        for name in pairs:
            rows += _rows(args, model, name, data.EvalDataset(pairs[name]))
    counts = checkpoint.sparsity(model)
    kept = f"{counts['weights'] - counts['zeros']:,} of {counts['weights']:,} weights kept"
    print(f"{args.model}: {model.arch} x{model.scale}, {kept}")
    print(
        f"{args.channels.upper()} channel{'s' * (args.channels == 'rgb')}, crop border "
        f"{model.scale if args.crop_border is None else args.crop_border}\n"
    )
    header = ["set", "images", "LR", "PSNR", "SSIM", "bicubic PSNR", "SSIM"]
    width = 5 if args.no_bicubic else 7
    print(table(header[:width], [row[:width] for row in rows]))
    return 0


def _lr_images(args: argparse.Namespace) -> list[str | None]:
    """What --lr-images says for each --data."""
    given, count = args.lr_images or [None], len(args.data)
    if len(given) == 1 and (given[0] is None or "{}" in given[0]):
        given = given * count
    if len(given) != count:
        raise ValueError(
            f"--lr-images names {len(given)} for {count} folders of --data: name one for each, or "
            "a template such as '{}_LR' for all"
        )
    return given


def _rows(
    args: argparse.Namespace, model: SuperResolver, name: str, dataset: EvalDataset
) -> list[list[str]]:
    """Scores one set: with --per-image a row for each image, then the row of the set."""
    from issp.sr import data, evaluate

    results: list[evaluate.Score] = []
    with common.item_progress(name) as progress:

        def on_image(image: str, sr: np.ndarray, result: evaluate.Score) -> None:
            results.append(result)
            progress(len(results), len(dataset))
            if args.save:
                data.write_image(Path(args.save) / name / f"{image}.png", sr)

        options = {"crop_border": args.crop_border, "y_channel": args.channels == "y"}
        upscaler = evaluate.of_model(model, args.tile)
        evaluate.evaluate(upscaler, dataset, **options, on_image=on_image)
        cubic = None
        if not args.no_bicubic:
            baseline = evaluate.bicubic(model.scale)
            cubic = evaluate.mean(evaluate.evaluate(baseline, dataset, **options))
    rows = []
    if args.per_image:
        rows = [[f"{name}/{r.name}", "1", "", *_cells(r), "", ""] for r in results]
    source = "made" if dataset.pairs.lr_files is None else "read"
    total = _cells(evaluate.mean(results))
    rows.append([name, str(len(dataset)), source, *total, *_cells(cubic)])
    return rows


def _cells(result: Score | None) -> list[str]:
    return ["", ""] if result is None else [f"{result.psnr:.2f}", f"{result.ssim:.4f}"]
