"""`issp test`."""

from __future__ import annotations

import argparse
from pathlib import Path

from issp.cli.common import Counter, add_model_arguments, load_model
from issp.utils.text import table

HELP = "PSNR and SSIM of a model on test sets"
EXAMPLE = "issp test --model net_g_latest.safetensors --data Set5 Set14=benchmarks/Set14 --save out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="[NAME=]DIR",
        help="folders of originals, or with HR and LR_bicubic/X4 inside",
    )
    parser.add_argument("--channels", choices=("y", "rgb"), default="y", help="default: y")
    parser.add_argument("--crop-border", type=int, metavar="PX", help="default: the scale")
    parser.add_argument("--save", metavar="DIR", help="write the upscaled images there")
    parser.add_argument("--per-image", action="store_true", help="a row for every image")
    parser.add_argument("--no-bicubic", action="store_true", help="leave the baseline out")


def main(args: argparse.Namespace) -> int:
    """Prints a table with one row per set."""
    from issp.sr import checkpoint, data, evaluate

    model = load_model(args)
    folders = dict(_named(entry) for entry in args.data)
    sets = {
        name: data.EvalDataset(data.PairedFolder(folder, model.scale))
        for name, folder in folders.items()
    }
    options = {"crop_border": args.crop_border, "y_channel": args.channels == "y"}
    rows = []
    for name, dataset in sets.items():
        with Counter(name) as counter:
            results: list[evaluate.Score] = []

            def on_image(image, sr, result, name=name, counter=counter, done=results, n=dataset):
                done.append(result)
                counter(len(done), len(n))
                if args.save:
                    data.write_image(Path(args.save) / name / f"{image}.png", sr)

            upscaler = evaluate.of_model(model, args.tile)
            evaluate.evaluate(upscaler, dataset, **options, on_image=on_image)
            cubic = None
            if not args.no_bicubic:
                baseline = evaluate.bicubic(model.scale)
                cubic = evaluate.mean(evaluate.evaluate(baseline, dataset, **options))
        if args.per_image:
            rows += [[f"{name}/{r.name}", "1", *_cells(r), "", ""] for r in results]
        rows.append([name, str(len(dataset)), *_cells(evaluate.mean(results)), *_cells(cubic)])
    about = checkpoint.sparsity(model)
    kept = about["weights"] - about["zeros"]
    print(
        f"{args.model}: {model.arch} x{model.scale}, {kept:,} of {about['weights']:,} weights kept"
    )
    print(
        f"{args.channels.upper()} channel{'s' * (args.channels == 'rgb')}, crop border "
        f"{model.scale if args.crop_border is None else args.crop_border}\n"
    )
    header = ["set", "images", "PSNR", "SSIM", "bicubic PSNR", "SSIM"]
    width = 4 if args.no_bicubic else 6
    print(table(header[:width], [row[:width] for row in rows]))
    return 0


def _named(entry: str) -> tuple[str, str]:
    name, found, folder = entry.partition("=")
    return (name, folder) if found else (Path(entry).name, entry)


def _cells(result) -> list[str]:
    return ["", ""] if result is None else [f"{result.psnr:.2f}", f"{result.ssim:.4f}"]
