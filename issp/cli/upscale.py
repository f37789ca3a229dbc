"""`issp upscale`."""

from __future__ import annotations

import argparse
from pathlib import Path

from issp.cli.common import MEMORY_REMEDY, add_model_arguments, item_progress, load_model

HELP = "super-resolve images or folders of images"
EXAMPLE = "issp upscale photo.png scans/ --model runs/demo/model.safetensors -o upscaled"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    add_model_arguments(parser)
    parser.add_argument("--out", "-o", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--suffix", help="added to names (default: _x and the scale)")


def main(args: argparse.Namespace) -> int:
    """Writes one PNG per image."""
    from issp.sr import data, evaluate
    from issp.utils.errors import explain_out_of_memory

    files = [Path(f) for name in args.images for f in data.ImageFolder(name).files]
    model = load_model(args)
    suffix = f"_x{model.scale}" if args.suffix is None else args.suffix
    targets = [Path(args.out) / f"{file.stem}{suffix}.png" for file in files]
    _check_targets(files, targets)
    with item_progress("images") as progress, explain_out_of_memory(MEMORY_REMEDY):
        for done, (file, target) in enumerate(zip(files, targets, strict=True), 1):
            sr = evaluate.super_resolve(model, data.read_image(file), args.tile)
            data.write_image(target, sr)
            progress(done, len(files))
            print(f"{target}  {sr.shape[1]} x {sr.shape[0]}")
    return 0


def _check_targets(files: list[Path], targets: list[Path]) -> None:
    sources: dict[Path, Path] = {}
    for file, target in zip(files, targets, strict=True):
        if target in sources:
            raise ValueError(f"{sources[target]} and {file} would both become {target}: rename one")
        if target.exists() and target.samefile(file):
            raise ValueError(f"{file} would be overwritten: choose another folder or --suffix")
        sources[target] = file
