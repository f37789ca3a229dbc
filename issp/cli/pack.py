"""`issp pack`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from issp.cli import common
from issp.utils.files import user_path

if TYPE_CHECKING:
    from issp.ops.keep import Keep
    from issp.sr.models import SuperResolver

HELP = "measure a pruned model in its fastest form, and write what is not zero into one file"
EXAMPLE = "issp pack experiments/run/models/net_g_latest.safetensors -o model.safetensors"

_DTYPES = ("float32", "bfloat16", "float16")
_SIDE = 64  # of the image that is measured
_MEMORY_REMEDY = "give a smaller --size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help=".safetensors of issp, or BasicSR's .pth")
    parser.add_argument("--out", "-o", required=True, metavar="FILE", help="the packed file")
    parser.add_argument("--arch", metavar="NAME", help="architecture of a .pth, such as edsr-l")
    parser.add_argument("--scale", type=int, metavar="S", help="scale of a .pth")
    parser.add_argument(
        "--size",
        metavar="HxW",
        help=f"of the low-resolution image that is measured (default: {_SIDE}x{_SIDE})",
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of the weights in the file; one of 16 bits halves it, and is measured on a CPU too "
        "(default: that of the model)",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        metavar="[LAYERS=]N:OF",
        help="the N:M pattern of the zeros, such as 2:32 or, of four rows, 2:32:4; of all layers "
        "or of those of a name pattern: 'body.*=2:32:4'",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the processor that compute")


def main(args: argparse.Namespace) -> int:
    """Prints the report of `issp.pack` and writes the file."""
    import torch

    from issp.deploy.pack import pack
    from issp.sr import checkpoint
    from issp.utils.errors import explain_out_of_memory

    out = user_path(args.out)
    common.check_output("--out", out, [args.model], "the model")
    height, width = common.image_size(args.size) or (_SIDE, _SIDE)
    keep = _keep(args.keep or ())
    dtype = args.dtype and getattr(torch, args.dtype)
    model = common.load_model(args)
    if not checkpoint.sparsity(model)["zeros"]:
        raise ValueError(
            f"no weight of {args.model} is zero: give a model of `issp train --sparsity`, or save "
            "what pruner.finalize() returns"
        )
    multiple = getattr(model, "pad_multiple", 1)
    height, width = (-(-side // multiple) * multiple for side in (height, width))
    like = next(model.parameters())
    size = (1, model.channels, height, width)
    example = torch.full(size, 0.5, dtype=like.dtype, device=like.device)
    computed = dtype if args.dtype != "float32" and example.device.type == "cpu" else None
    print("measuring which layers are faster sparse ...", file=sys.stderr, flush=True)
    with explain_out_of_memory(_MEMORY_REMEDY):
        packed: Any = pack(model, example, keep or None, dtype=computed)
    print(packed.report())
    facts = checkpoint.saved_facts(args.model)
    checkpoint.save(packed, out, packed=True, dtype=dtype, **facts)
    print(_line(args, model))
    return 0


def _keep(words: Sequence[str]) -> dict[str, Keep]:
    """Name pattern -> N:M pattern."""
    from issp.ops.keep import Keep

    keep: dict[str, Keep] = {}
    for word in words:
        layers, _, numbers = word.rpartition("=")
        if (layers or "*") in keep:
            raise ValueError(f"--keep: {layers or '*'} has two patterns")
        keep[layers or "*"] = Keep.parse(numbers)
    return keep


def _line(args: argparse.Namespace, model: SuperResolver) -> str:
    """The size of the file beside that of the dense tensors."""
    size = user_path(args.out).stat().st_size
    dense = sum(parameter.nbytes for parameter in model.parameters())
    return f"{args.out}: {size:,} bytes, {100 * size / dense:.1f} % of {dense:,} dense ones"
