"""Latency, memory and file size of deployed networks, packed by `issp.pack` and by other runtimes.

Each way to compute is a process of its own: torch's dense ways, onnxruntime, OpenVINO, DeepSparse
(which is the only one besides issp that makes use of zeros) and ours. In each round every process
has its turn, in another order, while the others are stopped. Results are compared with torch's in
float32. A runtime that is not installed is a row that says so.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import issp
from bench.deploy import rounds
from bench.deploy.rounds import BITS_16, PEERS, SPARSE_PEERS, Way
from bench.deploy.torch_ways import DENSE, OURS
from bench.harness import options
from bench.harness.machine import machine_line
from bench.harness.plots import Bars, plot_bars
from bench.harness.table import SCALES as TIME_SCALES
from bench.harness.table import Column, Row, Table, median, percent, ratio
from bench.network import check_multiple, check_size, prune
from bench.sparse import layers
from issp.ops.keep import Unit
from issp.sr import checkpoint, models
from issp.utils.files import user_path

EXAMPLE = """examples:
  python -m bench deploy --model edsr-baseline --scale 2 --size 128 --sparsity 0.95
  python -m bench deploy --deepsparse-python ~/deepsparse/bin/python --out deploy.md
  python -m bench deploy --trained experiments/run/models/net_g_latest.safetensors --size 128"""
MODELS = ("edsr-l", "edsr-baseline", "swinir-light", "cat-r")
SCALES, SPARSITIES = (2, 4), (0.9, 0.95, 0.99)
_MEGABYTES = 1e-6


@dataclass(frozen=True)
class Network:
    """What a table is about.

    Attributes:
        name: heads the table.
        sparsities: rows of ways that make use of zeros.
        build: makes the network, in evaluation mode, of one of the sparsities.
        is_trained: it comes from a file.
    """

    name: str
    sparsities: Sequence[float]
    build: Callable[[float], nn.Module]
    is_trained: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench deploy`."""
    add = parser.add_argument
    names = " ".join(MODELS)
    add("--model", nargs="+", choices=models.names(), help=f"default {names}")
    add("--scale", nargs="+", type=int, choices=models.SCALES, help="default 2 4")
    add(
        "--trained",
        nargs="+",
        type=user_path,
        metavar="FILE",
        help="trained networks with their own zeros, instead of --model, --scale and --sparsity",
    )
    add("--size", nargs="+", default=("128", "256"), help="of the input, default 128 256")
    add("--sparsity", nargs="+", type=float, help="default 0.9 0.95 0.99")
    add("--v", type=int, default=1, help="rows that share a pattern, default 1: unstructured")
    add("--unit", metavar="VxC", help="prune units of V rows x C channels, such as 16x2")
    cores = os.cpu_count() or 1
    add("--threads", nargs="+", type=int, help="default: one, and all cores", default=(1, cores))
    add("--ways", nargs="+", choices=rounds.all_ways(), metavar="WAY", help="default: all")
    add("--rounds", type=int, default=15, help="default 15")
    add("--seconds", type=float, default=10.0, help="of each way in all rounds, default 10")
    add("--seed", type=int, default=0, help="of weights and image, default 0")
    for runtime in PEERS:
        add(
            f"--{runtime}-python",
            type=user_path,
            metavar="FILE",
            default=os.environ.get(_variable(runtime)),
            help=f"interpreter that has {runtime}; default: ${_variable(runtime)}, or this one",
        )
    add("--out", type=user_path, help="also write the tables to this .md file")
    add("--plot", type=user_path, help="also draw them into this .png file")
    add("--samples", type=user_path, help="also write every measured time, .json")


def _variable(runtime: str) -> str:
    return f"ISSP_{runtime.upper()}_PYTHON"


def run(args: argparse.Namespace) -> None:
    """Prints a table for each network, scale, size and number of threads.

    Raises:
        ValueError: an argument that cannot be.
        ParityError: ours computes something else than torch.
        BenchmarkFailed: a process of ours ended.
    """
    _check(args)
    pythons = {runtime: getattr(args, f"{runtime}_python") for runtime in PEERS}
    sizes = [layers.parse_size(size) for size in args.size]
    tables = []
    for network, size, threads in itertools.product(_networks(args, sizes), sizes, args.threads):
        tables.append(_table(args, network, size, threads, pythons))
        print(tables[-1].markdown(), flush=True)
    options.write_outputs(args, tables, lambda path: _plot(tables, path))


def _check(args: argparse.Namespace) -> None:
    options.at_least_one(args, "v", "rounds")
    if args.unit:
        Unit.parse(args.unit)
        if args.v != 1:
            raise ValueError("--unit and --v exclude each other: a unit has its own rows")
    options.check_counts("--threads", args.threads)
    options.check_sparsities(args.sparsity or SPARSITIES)
    options.folders_exist(args.out, args.plot, args.samples)
    if not args.seconds > 0:
        raise ValueError(f"--seconds is {args.seconds}: it must be above 0")
    for runtime in PEERS:
        python = getattr(args, f"{runtime}_python")
        if python and not os.access(python, os.X_OK):
            raise ValueError(f"--{runtime}-python {python} is no program: name an interpreter")
    for option in ("model", "scale", "sparsity", "unit"):
        if args.trained and getattr(args, option):
            raise ValueError(f"--trained and --{option} exclude each other: the file has its own")


def _networks(args: argparse.Namespace, sizes: Sequence[tuple[int, int]]) -> list[Network]:
    """The networks that the arguments name; all are checked before one is measured."""
    if args.trained:
        return [_trained(path, sizes) for path in args.trained]
    names, scales = args.model or MODELS, args.scale or SCALES
    for name, size in itertools.product(names, sizes):
        check_size(name, scales[0], size)
    return [
        Network(
            f"{name} x{scale}",
            args.sparsity or SPARSITIES,
            functools.partial(_random, name, scale, args),
        )
        for name, scale in itertools.product(names, scales)
    ]


def _trained(path: Path, sizes: Sequence[tuple[int, int]]) -> Network:
    """The network of a file."""
    model = issp.load(path).eval()
    for size in sizes:
        check_multiple(path.name, model.pad_multiple, size)
    ratio = checkpoint.sparsity(model)["ratio"]
    return Network(f"{model.arch} x{model.scale}, {path.name}", (ratio,), lambda _: model, True)


def _random(name: str, scale: int, args: argparse.Namespace, sparsity: float) -> nn.Module:
    """A network of random weights, pruned."""
    torch.manual_seed(args.seed)
    model = models.build(name, scale).eval()
    prune(model, sparsity, args.v, Unit.parse(args.unit) if args.unit else None)
    return model


def _table(
    args: argparse.Namespace,
    network: Network,
    size: tuple[int, int],
    threads: int,
    pythons: dict[str, Any],
) -> Table:
    """Measures all ways at all sparsities in one run."""
    with tempfile.TemporaryDirectory() as place:
        folders = []
        for sparsity in network.sparsities:
            folders.append((sparsity, Path(place) / f"{100 * sparsity:g}"))
            _write_case(folders[-1][1], network.build(sparsity), size, args.seed)
        ways = _ways(args.ways or rounds.all_ways(), folders)
        rounds.measure(ways, threads, pythons, args.rounds, args.seconds)
    title = f"{network.name} on 1x3x{size[0]}x{size[1]}, {threads} threads"
    return _table_of(ways, title, _notes(args, network, ways))


def _ways(names: Sequence[str], folders: Sequence[tuple[float, Path]]) -> list[Way]:
    """Each way: once where zeros do not matter, else at every sparsity."""
    ways = []
    for name in names:
        is_sparse = name in OURS or name in SPARSE_PEERS
        for sparsity, folder in folders if is_sparse else folders[:1]:
            ways.append(Way(name, sparsity if is_sparse else None, folder))
    return ways


def _write_case(folder: Path, model: nn.Module, size: tuple[int, int], seed: int) -> None:
    """The network, its input, its result in float32, and the same as ONNX."""
    folder.mkdir()
    x = torch.rand((1, 3, *size), generator=torch.Generator().manual_seed(seed))
    issp.save(model, folder / "model.safetensors")
    np.save(folder / "input.npy", x.numpy())
    with torch.no_grad():
        np.save(folder / "expected.npy", model(x).numpy())
    rounds.export(model, x, folder / "model.onnx")


def _table_of(ways: Sequence[Way], title: str, notes: Sequence[str]) -> Table:
    others = [w for w in ways if w.name not in OURS and w.seconds and not _is_wrong(w)]
    best = min((median(w.seconds) for w in others if w.name in DENSE), default=None)
    peer = min((median(w.seconds) for w in others), default=None)
    columns = [
        Column("way", "way"),
        Column("sparsity", "sparsity"),
        Column("latency", "latency", "ms"),
        Column("spread", "spread", format=percent),
        Column("over dense", "speed over the fastest of torch"),
        Column("over all", "over the fastest of all others"),
        Column("peak", "peak memory, MB", format=lambda x: f"{x:.0f}"),
        Column("file", "file, MB"),
        Column("error", "error", format=percent),
    ]
    rows = []
    for way in ways:
        cells: dict[str, Any] = {"way": way.name, "latency": way.missing or median(way.seconds)}
        cells["sparsity"] = "any" if way.sparsity is None else f"{100 * way.sparsity:.3g} %"
        cells |= {"spread": way.spread(), "error": way.error}
        cells |= {"peak": way.peak and way.peak * _MEGABYTES}
        cells |= {"file": way.file_bytes and way.file_bytes * _MEGABYTES}
        time = None if _is_wrong(way) else median(way.seconds)
        cells["over dense"], cells["over all"] = ratio(best, time), ratio(peer, time)
        rows.append(Row(cells, {"latency": way.seconds}))
    return Table(title, machine_line("cpu"), columns, rows, notes)


def _notes(args: argparse.Namespace, network: Network, ways: Sequence[Way]) -> list[str]:
    versions = {}
    for way in ways:
        versions.setdefault(way.name.split()[0].split(".")[0], way.version)
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    notes = [
        f"Medians of {args.rounds} rounds; each way is a process, one at a time, the others "
        "stopped, in another order each round. Spread: quartile distance over median.",
        f"Versions: {used}.",
        "Peak memory: of the whole process while it computes, libraries and code included. File: "
        "weights of torch's ways, the ONNX file of runtimes, what `issp.save` writes of ours.",
        "Error: root mean square of the difference from torch fp32, over that of the result.",
        "Trained weights, as the file has them."
        if network.is_trained
        else f"Random weights (seed {args.seed}), {_pruned(args)}; dense ways have the zeros of "
        "the first sparsity.",
    ]
    notes += [f"{w.name} at {100 * w.sparsity:.3g} %: {w.report}" for w in ways if w.report]
    wrong = [way.name for way in ways if _is_wrong(way)]
    if wrong:
        notes.append(f"The result of {', '.join(wrong)} is wrong: no time of it counts.")
    return notes


def _is_wrong(way: Way) -> bool:
    return way.error is not None and way.error > BITS_16


def _pruned(args: argparse.Namespace) -> str:
    if args.unit:
        return f"units of {args.unit} weights pruned by their L1 norm in every layer they divide"
    return f"v = {args.v}, pruned by magnitude in every convolution and linear layer"


def _plot(tables: Sequence[Table], path: Path) -> None:
    panels = []
    for table in tables:
        timed = [row for row in table.rows if row.samples["latency"]]
        names = [f"{r['way']}, {r['sparsity']}".removesuffix(", any") for r in timed]
        lengths = [row["latency"] * TIME_SCALES["ms"] for row in timed]
        panels.append(Bars(table.title, "median ms", names, {"": lengths}))
    plot_bars(panels, path)
