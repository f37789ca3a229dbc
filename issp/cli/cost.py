"""`issp cost`."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from issp.cli import common
from issp.utils.files import atomic_write, user_path
from issp.utils.text import suggest, table

if TYPE_CHECKING:
    from issp.nn.report import Line
    from issp.sr.costs import Costs, Latency, LayerCost
    from issp.sr.models import SuperResolver

HELP = "parameters, kept weights, multiply-accumulates, bytes and time of a model"
EXAMPLE = "issp cost edsr-l --scale 4 --sparsity 0.95 --size 180x320 --csv layers.csv"

_COLUMNS = ("layer", "kind", "shape", "parameters", "weights", "kept", "macs", "macs_kept")
_COLUMNS += ("dense_bytes", "sparse_bytes", "us_dense", "us_sparse", "form")
_MOST = 0.995  # issp.num_pruned never prunes more of a layer
_MEMORY_REMEDY = "give a smaller --size, or leave --latency out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=".safetensors of issp, BasicSR's .pth, or an architecture such as edsr-l",
    )
    parser.add_argument("--arch", metavar="NAME", help="architecture of a .pth, such as edsr-l")
    parser.add_argument(
        "--scale", type=int, metavar="S", help="of an architecture (default: 4) or a .pth"
    )
    parser.add_argument(
        "--sparsity",
        type=float,
        metavar="RATIO",
        help="prune an architecture, with random weights, to this ratio",
    )
    parser.add_argument(
        "--size",
        metavar="HxW",
        help="of the low-resolution image (default: for a result of 1280 x 720 pixels)",
    )
    parser.add_argument("--layers", action="store_true", help="a row for every layer")
    parser.add_argument("--csv", metavar="FILE", help="write a row for every layer there")
    parser.add_argument(
        "--latency", action="store_true", help="measure the model dense and packed (issp.pack)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the processor that compute")


def main(args: argparse.Namespace) -> int:
    """Prints the costs of the model, and with --layers of its layers."""
    from issp.sr import costs
    from issp.utils.errors import explain_out_of_memory

    size = common.image_size(args.size)
    if args.csv:
        common.check_output("--csv", user_path(args.csv), [args.model], "the model")
    model = _model(args)
    found = costs.of_model(model, size or costs.default_size(model))
    measured = None
    if args.latency:
        print("measuring the model dense and packed ...", file=sys.stderr, flush=True)
        with explain_out_of_memory(_MEMORY_REMEDY):
            measured = costs.latency(model, found.size)
    lines = {line.name: line for line in measured.report.lines} if measured else {}
    print(_title(args, model, size or costs.default_size(model), found))
    print("MACs are those of convolutions, linear layers and attention.\n")
    _print(found, measured)
    if args.layers:
        print(f"\n{_layer_table(found, lines)}")
    if measured:
        print(f"\n{measured.report.machine}")
    if args.csv:
        atomic_write(args.csv, _csv(found, lines, measured).encode(errors="backslashreplace"))
    return 0


def _model(args: argparse.Namespace) -> SuperResolver:
    """The model of a file, or a random one of an architecture, pruned with --sparsity."""
    from issp.sr import models

    if user_path(args.model).is_file() or Path(args.model).suffix:
        if args.sparsity is not None:
            raise ValueError(
                f"{args.model} has its zeros: drop --sparsity, or name an architecture"
            )
        return common.load_model(args)
    if args.model not in models.names():
        raise ValueError(
            f"{args.model} is neither a file nor an architecture: "
            f"{suggest(args.model, models.names())}"
        )
    if args.arch:
        raise ValueError(f"{args.model} is an architecture: drop --arch")
    if args.sparsity is not None and not 0 <= args.sparsity <= _MOST:
        raise ValueError(f"--sparsity is {args.sparsity:g}: it must be from 0 to {_MOST}")
    return _random_model(args)


def _random_model(args: argparse.Namespace) -> SuperResolver:
    from issp.pruning.attach import attach
    from issp.sr import builders, models

    common.set_threads(args)
    device = builders.device(args.device)
    model = models.build(args.model, 4 if args.scale is None else args.scale)
    if args.sparsity:
        attach(model, sparsity=args.sparsity).finalize()
    if args.latency:
        common.name_crowding(args)
    return model.eval().to(device)


def _title(
    args: argparse.Namespace, model: SuperResolver, size: tuple[int, int], found: Costs
) -> str:
    """The model and the size that costs are for."""
    name = f"{model.arch} x{model.scale}"
    if args.model != model.arch:
        name = f"{args.model}: {name}"
    padded = "" if found.size == size else f", {size[0]} x {size[1]} padded"
    return f"{name} on {found.size[0]} x {found.size[1]} low-resolution pixels{padded}"


def _print(found: Costs, measured: Latency | None) -> None:
    """What the model costs as a whole."""
    rows = [
        ["parameters", f"{found.parameters:,}", f"{found.kept_parameters:,}"],
        ["weights", f"{found.total('weights'):,}", f"{found.total('kept'):,}"],
    ]
    kinds = list(dict.fromkeys(layer.kind for layer in found.layers))
    for kind in [*kinds, *([""] if len(kinds) > 1 else [])]:
        chosen = [kind] if kind else []
        macs = [found.total(column, *chosen) for column in ("macs", "macs_kept")]
        rows.append([f"GMACs, {kind or 'all'}", *(f"{n / 1e9:,.4f}" for n in macs)])
    stored = [found.total(column) for column in ("dense_bytes", "sparse_bytes")]
    rows.append(["bytes, layers", *(f"{n:,}" for n in stored)])
    if found.other_bytes:
        rows.append(["bytes, other tensors", *[f"{found.other_bytes:,}"] * 2])
    if measured:
        rows.append(["ms", f"{measured.dense:.4g}", f"{measured.packed:.4g}"])
    print(table(["", "dense", "sparse"], rows))
    if measured:
        print(f"\n{measured.report.summary()}")


def _layer_table(found: Costs, lines: dict[str, Line]) -> str:
    header = ["layer", "kind", "shape", "parameters", "kept", "MMACs", "kept", "bytes", "sparse"]
    header += ["us dense", "us sparse", "form"] if lines else []
    rows = []
    for layer in found.layers:
        row = [layer.name, layer.kind, _shape(layer)]
        row += [f"{n:,}" for n in (layer.parameters, layer.kept)]
        row += [f"{n / 1e6:,.3f}" for n in (layer.macs, layer.macs_kept)]
        row += [f"{n:,}" for n in (layer.dense_bytes, layer.sparse_bytes)]
        if lines:
            times = [f"{value:.4g}" if value else "-" for value in _times(lines.get(layer.name))]
            row += [*times, _form(lines.get(layer.name)) or "-"]
        rows.append(row)
    return table(header, rows)


def _csv(found: Costs, lines: dict[str, Line], measured: Latency | None) -> str:
    """A row for every layer, and one for all."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for layer in found.layers:
        numbers = [layer.parameters, layer.weights, layer.kept, layer.macs, layer.macs_kept]
        numbers += [layer.dense_bytes, layer.sparse_bytes, *_times(lines.get(layer.name))]
        form = _form(lines.get(layer.name))
        writer.writerow([layer.name, layer.kind, _shape(layer), *numbers, form])
    sums = [found.total(name) for name in ("weights", "kept", "macs", "macs_kept")]
    stored = [found.total(name) + found.other_bytes for name in ("dense_bytes", "sparse_bytes")]
    times = [measured.dense * 1e3, measured.packed * 1e3] if measured else ["", ""]
    writer.writerow(["(all)", "", "", found.parameters, *sums, *stored, *times, ""])
    return buffer.getvalue()


def _shape(layer: LayerCost) -> str:
    return "x".join(map(str, layer.shape))


def _times(line: Line | None) -> list[float | None]:
    return [line.dense, line.sparse] if line else [None, None]


def _form(line: Line | None) -> str:
    return line.choice if line else ""
