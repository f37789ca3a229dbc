"""`issp test`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from issp.cli import common
from issp.utils.files import check_folder, user_path
from issp.utils.text import table

if TYPE_CHECKING:
    import numpy as np

    from issp.sr.data import EvalDataset
    from issp.sr.evaluate import Protocol, Score
    from issp.sr.models import SuperResolver
    from issp.sr.results import Result

HELP = "PSNR and SSIM of a model on test sets"
EXAMPLE = (
    "issp test --model net_g_latest.safetensors --data Set5 Set14=benchmarks/Set14 --csv scores.csv"
)


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
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="add a row for every set to this results file, of which `issp table` makes tables",
    )
    whose = "of the model in --csv; default: what its file says"
    parser.add_argument("--method", metavar="NAME", help=f"{whose}; such as iss-p")
    parser.add_argument("--sparsity", type=float, metavar="RATIO", help=f"{whose}")
    parser.add_argument("--seed", type=int, metavar="N", help=f"{whose}")


def main(args: argparse.Namespace) -> int:
    """Prints a table with one row per set."""
    from issp.sr import data, evaluate, results
    from issp.utils import process
    from issp.utils.errors import explain_out_of_memory

    process.use_large_pages()
    protocol = evaluate.Protocol(args.crop_border, args.channels == "y")
    _check_csv(args)
    model = common.load_model(args)
    facts = _facts(args, model)
    folders = common.named_folders(args.data)
    pairs = {
        name: data.PairedFolder(folder, model.scale, lr_images)
        for (name, folder), lr_images in zip(folders.items(), _lr_images(args), strict=True)
    }
    sets = {name: data.EvalDataset(pairs[name]) for name in pairs}
    if args.save:
        _check_saved(args, sets)
    tiling = common.tiling(args, model)
    for dataset in sets.values():
        evaluate.check_sizes(dataset, protocol, protocol)
    pixels = sum(h * w for dataset in sets.values() for h, w in dataset.pairs.sizes())
    network = common.packed(args, model, pixels // model.scale**2)
    # Figures are those of whole images: without --tile, only exact tiles are used.
    whole = args.tile is None and not tiling.exact
    upscaler = evaluate.of_model(network, None if whole else tiling.tile)
    rows: list[list[str]] = []
    notes: list[str] = []
    found: list[Result] = []
    try:
        with process.prompt_interrupt(), explain_out_of_memory(common.MEMORY_REMEDY):
            for name, dataset in sets.items():
                scores = _score(args, upscaler, name, dataset, protocol)
                rows += _rows(args, name, dataset, *scores)
                notes += _notes(name, dataset, scores[0])
                if facts:
                    found += _results(facts, protocol, name, dataset, *scores)
    finally:
        if rows:  # of the sets that were finished, whatever happened to another
            _print(args, model, protocol, rows, notes)
        if found:
            results.add(args.csv, found)
    return 0


def _check_csv(args: argparse.Namespace) -> None:
    """Refuses what is no results file, or cannot be written, and options for a missing --csv."""
    from issp.sr import results

    if args.csv:
        results.check(args.csv)
        return
    for name in ("method", "sparsity", "seed"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} goes into a results file: give --csv FILE")


def _facts(args: argparse.Namespace, model: SuperResolver) -> dict[str, Any]:
    """What --csv says of the model; empty without --csv."""
    from issp.sr import results

    if not args.csv:
        return {}
    return results.facts_of_model(model, args.model, args.method, args.sparsity, args.seed)


def _results(
    facts: dict[str, Any],
    protocol: Protocol,
    name: str,
    dataset: EvalDataset,
    scores: list[Score],
    baseline: list[Score],
) -> list[Result]:
    """The rows of --csv for a set: the model's, and the baseline's if it was scored."""
    from issp.sr.evaluate import mean
    from issp.sr.results import Result

    border = protocol.border(dataset.scale)
    shared = {
        "scale": dataset.scale,
        "set": name,
        "channel": "y" if protocol.y_channel else "rgb",
        "images": len(dataset),
        "lr": dataset.pairs.lr_source,
        "crop_border": None if border == dataset.scale else border,
    }
    bicubic = {"method": "bicubic", "arch": "", "sparsity": None, "seed": None}
    return [
        Result(**(of_whom | shared), psnr=mean(values).psnr, ssim=mean(values).ssim)
        for of_whom, values in ((facts, scores), (bicubic, baseline))
        if values
    ]


def _print(
    args: argparse.Namespace,
    model: SuperResolver,
    protocol: Protocol,
    rows: list[list[str]],
    notes: list[str],
) -> None:
    """The table and what is said around it."""
    from issp.sr import checkpoint

    counts = checkpoint.sparsity(model)
    kept = f"{counts['weights'] - counts['zeros']:,} of {counts['weights']:,} weights kept"
    print(f"{args.model}: {model.arch} x{model.scale}, {kept}")
    print(
        f"{args.channels.upper()} channel{'s' * (args.channels == 'rgb')}, crop border "
        f"{protocol.border(model.scale)}\n"
    )
    header = ["set", "images", "LR", "PSNR", "SSIM", "bicubic PSNR", "SSIM"]
    width = 5 if args.no_bicubic else 7
    print(table(header[:width], [row[:width] for row in rows]))
    if notes:
        print("", *notes, sep="\n")


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


def _saved(args: argparse.Namespace, name: str, image: str) -> Path:
    """The file that --save makes of an image of a set."""
    return user_path(args.save) / name / f"{image}.png"


def _check_saved(args: argparse.Namespace, sets: dict[str, EvalDataset]) -> None:
    """Refuses --save where nothing can be written, or would overwrite an image that is read."""
    for name in sets:
        check_folder(user_path(args.save) / name)
    indices = [(dataset, i) for dataset in sets.values() for i in range(len(dataset))]
    read = {
        common.file_identity(Path(path))
        for dataset, i in indices
        for path in dataset.pairs.paths(i)
    }
    for name, dataset in sets.items():
        for target in (_saved(args, name, image) for image in dataset.pairs.names):
            if target.exists() and common.file_identity(target) in read:
                raise ValueError(
                    f"--save {args.save} would overwrite {target}, which is an image of --data: "
                    "choose another folder"
                )


def _score(
    args: argparse.Namespace,
    upscaler: Callable[[np.ndarray], np.ndarray],
    name: str,
    dataset: EvalDataset,
    protocol: Protocol,
) -> tuple[list[Score], list[Score]]:
    """Scores of the model's images, which are written with --save, and of the baseline's."""
    from issp.sr import data, evaluate

    results: list[Score] = []
    with common.item_progress(name) as progress:

        def on_image(image: str, sr: np.ndarray, result: Score) -> None:
            results.append(result)
            progress(len(results), len(dataset))
            if args.save:
                data.write_image(_saved(args, name, image), sr)

        evaluate.evaluate(upscaler, dataset, protocol, protocol, on_image)
        if args.no_bicubic:
            return results, []
        baseline = evaluate.bicubic(dataset.scale)
        return results, evaluate.evaluate(baseline, dataset, protocol, protocol)


def _rows(
    args: argparse.Namespace,
    name: str,
    dataset: EvalDataset,
    results: list[Score],
    baseline: list[Score],
) -> list[list[str]]:
    """With --per-image a row for each image, then the row of the set."""
    from issp.sr.evaluate import mean

    rows = []
    if args.per_image:
        rows = [[f"{name}/{r.name}", "1", "", *_cells(r), "", ""] for r in results]
    cubic = _cells(mean(baseline)) if baseline else []
    rows.append([name, str(len(dataset)), dataset.pairs.lr_source, *_cells(mean(results)), *cubic])
    return rows


def _cells(result: Score) -> list[str]:
    return [f"{result.psnr:.2f}", f"{result.ssim:.4f}"]


def _notes(name: str, dataset: EvalDataset, results: list[Score]) -> list[str]:
    """What the figures of a set do not say."""
    from issp.sr.data import same_files
    from issp.sr.evaluate import mean

    notes = []
    exact = mean(results).exact
    if exact:
        notes.append(
            f"{name}: {exact} of {len(results)} images are reproduced exactly; their PSNR is "
            "infinite and not in the mean"
        )
    notes += [
        f"{name}: {twin.name} is the same file as {file.name}; both count"
        for twin, file in same_files(dataset.pairs.paths(i)[1] for i in range(len(dataset)))
    ]
    return notes
