"""Whole sparse networks, packed by `issp.pack`, against the same networks dense.

Each network gets random weights, is pruned in every convolution and linear layer, and packed. Dense
runs in every precision and layout of this machine, in turn with the packed ones; the fastest dense
float32 layout is the baseline. Every packed network is compared with float64 first; if its error
is more than twice that of dense, no figure of the network is printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import issp
from bench.harness import options
from bench.harness.errors import ParityError
from bench.harness.machine import machine_line
from bench.harness.plots import Bars, plot_bars
from bench.harness.progress import counted
from bench.harness.settings import TimingSettings
from bench.harness.table import SCALES, Column, Row, Table, percent, ratio, timing_notes
from bench.harness.timing import Task, interleave
from bench.sparse import calls, layers
from bench.sparse import measure as sparse_measure
from bench.sparse.calls import DTYPES
from bench.sparse.forms import nm_pattern
from bench.sparse.layers import Layer
from issp.nn import autotune
from issp.nn import report as layer_report
from issp.ops.keep import Keep, Unit
from issp.sr import checkpoint, models
from issp.utils.errors import InaccurateLayerError

EXAMPLE = """examples:
  python -m bench network --model edsr-baseline --sparsity 0.95
  python -m bench network --model edsr-l --sparsity 0.9 0.95 0.99 --v 1 4 --threads 2
  python -m bench network --model swinir-light --size 64x96 --out network.md --plot network.png"""
MODELS = ("edsr-baseline", "swinir-light")
PRECISIONS = ("fp32", "tf32", "bf16")
_CHECKED = 48  # low-resolution pixels a side that are computed in float64; a larger input is cut
_PROFILED_PASSES = 3  # of the packed network, for where its time goes
_KINDS = nn.Conv2d | nn.Linear
# What a machine offers does not depend on the layer; a 1x1 one would add matrix products.
ANY_LAYER = Layer((8, 8, 3, 3), (1, 8, 8, 8))


@dataclass(frozen=True, kw_only=True)
class Settings(TimingSettings):
    """What to time.

    Attributes:
        sparsities: of every convolution and linear layer.
        rows: values of v, rows that share a pattern; 1: unstructured.
        size: of the low-resolution image, height and width.
        seed: of the weights and the image.
    """

    rounds: int = 15
    seconds: float = 10.0
    sparsities: Sequence[float] = (0.9, 0.95, 0.99)
    rows: Sequence[int] = (1, 4)
    size: tuple[int, int] = (48, 48)
    seed: int = 0


@dataclass(frozen=True)
class TimeShares:
    """Shares of a packed network's time: in sparse layers, in layers left dense, elsewhere."""

    sparse: float
    dense: float
    rest: float


@dataclass
class DenseNetwork:
    """The dense network in one precision and layout.

    Attributes:
        variant: as printed: "fp32 channels_last".
        precision: of its layers.
        task: its times.
    """

    variant: str
    precision: str
    task: Task

    @property
    def name(self) -> str:
        """As printed."""
        return f"dense {self.variant}"


@dataclass
class PackedNetwork:
    """The packed network at one sparsity.

    Attributes:
        v: rows that share a pattern.
        sparsity: asked for.
        weights, kept: of all convolutions and linear layers.
        layers: what packing did to each.
        task: its times.
        shares: of its time; None: not measured.
    """

    v: int
    sparsity: float
    weights: int
    kept: int
    layers: layer_report.LayerReport
    task: Task
    shares: TimeShares | None = None

    @property
    def name(self) -> str:
        """As notes name it."""
        return _form_name(self.v, self.sparsity)


def _form_name(v: int, sparsity: float) -> str:
    return f"v={v} at {100 * sparsity:g} %"


@dataclass
class NetworkTimes:
    """The measurements of one network on one input.

    Attributes:
        model: with its scale: "edsr-l x4".
        shape: of the input.
        mode: name of the timed mode.
        dense, packed: what was timed.
        unshared: reason -> names of the packed networks some layers of which do not share patterns.
    """

    model: str
    shape: str
    mode: str
    dense: list[DenseNetwork]
    packed: list[PackedNetwork]
    unshared: dict[str, list[str]] = field(default_factory=dict)

    def all(self) -> list[DenseNetwork | PackedNetwork]:
        """All that was timed."""
        return [*self.dense, *self.packed]

    def seconds(self, row: DenseNetwork | PackedNetwork | None) -> float | None:
        """Median; None where it could not be timed."""
        return None if row is None else row.task.median(self.mode)

    def best(self, precision: str) -> DenseNetwork | None:
        """The fastest dense network of a precision."""
        same = [row for row in self.dense if row.precision == precision]
        return min(filter(self.seconds, same), key=self.seconds, default=None)

    def others(self) -> list[str]:
        """The precisions of dense other than fp32."""
        return list(dict.fromkeys(row.precision for row in self.dense if row.precision != "fp32"))

    def speed(self, row: PackedNetwork, precision: str = "fp32") -> float | None:
        """How many times faster a packed network is than the fastest dense one of a precision."""
        return ratio(self.seconds(self.best(precision)), self.seconds(row))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench network`."""
    parser.add_argument(
        "--model",
        nargs="+",
        default=list(MODELS),
        choices=models.names(),
        help=f"default {' '.join(MODELS)}",
    )
    parser.add_argument("--scale", type=int, default=4, choices=models.SCALES)
    parser.add_argument(
        "--size", default="48", help="of the low-resolution image, 48 or 48x64; default 48"
    )
    parser.add_argument("--sparsity", nargs="+", type=float, help="default 0.9 0.95 0.99")
    parser.add_argument("--v", nargs="+", type=int, help="rows to a pattern; default 1 4")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--seed", type=int, default=0, help="of weights and image, default 0")
    options.add_pace(parser, "limit per row, default 10 (quick: 2)")


def run(args: argparse.Namespace) -> None:
    """Measures and prints what the arguments ask for.

    Raises:
        ValueError: an argument that cannot be, or no GPU for --device cuda.
        ParityError: a packed network is further from float64 than dense; no figure of it is shown.
    """
    options.check_pace(args)
    settings = settings_of(args)
    for name in args.model:
        check_size(name, args.scale, settings.size)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    all_times, tables = [], []
    for name in args.model:
        torch.manual_seed(settings.seed)
        machine = machine_line(settings.device)
        model = models.build(name, args.scale)
        all_times.append(measure(f"{name} x{args.scale}", model, settings))
        tables.append(table(all_times[-1], machine, settings))
        print(tables[-1].markdown(), flush=True)
    options.write_outputs(args, tables, lambda path: plot(all_times, path))


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the arguments ask for.

    Raises:
        ValueError: one of them cannot be.
    """
    options.at_least_one(args, "threads")
    options.check_counts("--v", args.v)
    options.check_sparsities(args.sparsity)
    quick = {"sparsities": (0.95,), "rounds": 5, "seconds": 2.0}
    chosen = options.overrides(args, ("device", "seed", "seconds"), quick)
    if args.sparsity:
        chosen["sparsities"] = args.sparsity
    if args.v:
        chosen["rows"] = args.v
    return Settings(size=layers.parse_size(args.size), **chosen)


def check_size(name: str, scale: int, size: tuple[int, int]) -> None:
    """Checks that a network takes images of a size.

    Raises:
        ValueError: a side is no multiple of what the network divides it by.
    """
    with torch.device("meta"):
        multiple = models.build(name, scale).pad_multiple
    check_multiple(name, multiple, size)


def check_multiple(name: str, multiple: int, size: tuple[int, int]) -> None:
    """Checks that both sides are multiples of what a network divides an image by.

    Raises:
        ValueError: a side is not.
    """
    if any(side % multiple for side in size):
        raise ValueError(
            f"--size {size[0]}x{size[1]} does not suit {name}: give multiples of {multiple}"
        )


def measure(name: str, model: nn.Module, settings: Settings) -> NetworkTimes:
    """Prunes, packs, checks and times one network.

    Args:
        name: heads the table.
        model: float32, dense, for images of 3 channels; is left as it is.
        settings: see `Settings`.

    Raises:
        ParityError: a packed network is further from float64 than dense; nothing was timed.
    """
    random = torch.Generator().manual_seed(settings.seed)
    x = torch.rand((1, 3, *settings.size), generator=random).to(settings.device)
    model = copy.deepcopy(model).to(settings.device).eval()
    clock = settings.clock()
    packed: list[PackedNetwork] = []
    unshared: dict[str, list[str]] = {}
    with calls.keep_switches(), tempfile.TemporaryDirectory() as folder:
        cache = autotune.Cache(Path(folder) / "choices.json")
        forms = list(itertools.product(settings.rows, settings.sparsities))
        for v, sparsity in counted(forms, "packing network"):
            pruned = copy.deepcopy(model)
            ungrouped = prune(pruned, sparsity, v)
            packed.append(_pack(name, pruned, x, cache, v=v, sparsity=sparsity))
            for reason, names in ungrouped.items():
                what = f"{_shortened(names)}: {reason}"
                unshared.setdefault(what, []).append(packed[-1].name)
        # The zeros do not matter to dense layers, but a GPU's clock rate may depend on them.
        dense = dense_networks(pruned, x)
        # Warm on a CPU, eager on a GPU: as a network is called, launches included.
        first, *_ = clock.modes
        tasks = [row.task for row in (*dense, *packed)]
        interleave(tasks, clock, settings.rounds, settings.seconds, [first])
    shape = "x".join(map(str, x.shape))
    return NetworkTimes(name, shape, first.name, dense, packed, unshared)


def _pack(
    name: str, pruned: nn.Module, x: Tensor, cache: autotune.Cache, *, v: int, sparsity: float
) -> PackedNetwork:
    """Packs a pruned network and checks its output."""
    calls.set_precision("fp32")
    what = f"{name}, {_form_name(v, sparsity)}"
    try:
        packed = issp.pack(pruned, example=x, cache=cache)
    except InaccurateLayerError as error:
        raise ParityError(f"{what}: {error}") from None
    counts = checkpoint.sparsity(pruned)
    row = PackedNetwork(
        v=v,
        sparsity=sparsity,
        weights=counts["weights"],
        kept=counts["weights"] - counts["zeros"],
        layers=packed.report,
        task=sparse_measure.task(_call(packed, x), "fp32", x.device.type, required=True),
    )
    check(what, pruned, packed, x)
    row.shares = None if x.is_cuda else time_shares(packed, x)
    return row


def prune(
    model: nn.Module, sparsity: float, v: int, unit: Unit | None = None
) -> dict[str, list[str]]:
    """Hard zeros in every convolution and linear layer, by magnitude, as `issp.attach` selects.

    What is kept of a layer is scaled to the norm it had: signals neither vanish nor become
    denormal, as little as in a trained network.

    Args:
        model: changed in place.
        sparsity: of each layer, in 0..1.
        v: rows that share a pattern: 1 is unstructured, above it is N:M along the input channels.
        unit: what is pruned at a time, instead of v; layers that it does not divide stay dense.

    Returns:
        For v > 1, reason -> the layers that cannot share a pattern; these are unstructured.
    """
    prunable = {n: m for n, m in model.named_modules() if isinstance(m, _KINDS)}
    if unit:
        unit = replace(unit, tail="dense")
    keeps, ungrouped = {}, {}
    for name, module in prunable.items() if v > 1 else ():
        outputs, inputs = module.weight.shape[:2]
        numbers = nm_pattern(inputs, sparsity)
        if outputs % v:
            ungrouped.setdefault(f"v={v} does not divide {outputs} outputs", []).append(name)
        elif numbers is None:
            ungrouped.setdefault(f"no N:M of {inputs} input channels prunes so much", []).append(
                name
            )
        else:
            keeps[name] = Keep(*numbers, v=v)
    norms = [m.weight.detach().norm() for m in prunable.values()]
    issp.attach(model, sparsity=sparsity, unit=unit, overrides=keeps).finalize()
    with torch.no_grad():
        for module, norm in zip(prunable.values(), norms, strict=True):
            module.weight *= norm / module.weight.norm()
    return ungrouped


@torch.no_grad()
def check(what: str, dense: nn.Module, packed: nn.Module, x: Tensor) -> None:
    """Compares a packed network with float64, on at most 48x48 low-resolution pixels.

    The error (root mean square) may be twice that of the dense network with the same weights, plus
    one rounding of the result.

    Raises:
        ParityError: it is larger; names both errors.
    """
    x = x[..., :_CHECKED, :_CHECKED].contiguous()
    actual, expected = packed(x), dense(x)
    if actual.shape != expected.shape:
        raise ParityError(
            f"{what}: the output has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        )
    exact = copy.deepcopy(dense).double()(x.double())
    error, dense_error = (_rms(y.double() - exact) for y in (actual, expected))
    allowed = 2 * dense_error + torch.finfo(x.dtype).eps * _rms(exact)
    if not error <= allowed:
        raise ParityError(
            f"{what}: the output is off by {error:.3g} from float64, dense by {dense_error:.3g}; "
            f"allowed are {allowed:.3g}: nothing was timed"
        )


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@torch.no_grad()
def time_shares(packed: nn.Module, x: Tensor) -> TimeShares:
    """Measures where the time of a packed network on a CPU goes, over a few passes.

    Args:
        packed: by `issp.pack`.
        x: its input.
    """
    spent, begun = {True: 0.0, False: 0.0}, 0.0

    def begin(*_) -> None:
        nonlocal begun
        begun = time.perf_counter()

    def end(is_sparse: bool) -> Callable[..., None]:
        def add(*_) -> None:
            spent[is_sparse] += time.perf_counter() - begun

        return add

    packed(x)
    hooks = []
    for line in packed.report.lines:
        module = packed.get_submodule(line.name)
        hooks += [
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end(line.is_sparse)),
        ]
    start = time.perf_counter()
    for _ in range(_PROFILED_PASSES):
        packed(x)
    total = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    sparse, dense = spent[True] / total, spent[False] / total
    return TimeShares(sparse, dense, max(0.0, 1 - sparse - dense))


def dense_networks(model: nn.Module, x: Tensor) -> list[DenseNetwork]:
    """The dense network in every precision and layout that this machine offers."""
    rows = []
    for variant in calls.dense_variants(ANY_LAYER, x.device.type):
        if variant.precision not in PRECISIONS:
            continue
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        conversion = {"dtype": DTYPES[variant.precision], "memory_format": layout}
        call = _call(copy.deepcopy(model).to(**conversion), x.to(**conversion))
        required = variant.precision == "fp32"
        task = sparse_measure.task(call, variant.precision, x.device.type, required, variant.search)
        rows.append(DenseNetwork(variant.name, variant.precision, task))
    return rows


def _call(model: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> None:
        model(x)

    return call


def _shortened(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def table(times: NetworkTimes, machine: str, settings: Settings) -> Table:
    """A row per packed network, dense beside it.

    Args:
        times: of one network.
        machine: see `Table`.
        settings: for the notes.
    """
    columns = [Column(key, key) for key in ("model", "input", "v", "sparsity", "kept weights")]
    columns += [Column(d.name, d.name, "ms") for d in times.dense if d.precision == "fp32"]
    columns += [Column("packed", "packed", "ms"), Column("spread", "spread", format=percent)]
    columns += [Column("speed", "speed"), Column("sparse layers", "sparse layers")]
    if any(row.shares for row in times.packed):
        columns.append(Column("sparse share", "time in sparse layers", format=percent))
        columns.append(Column("dense share", "in dense layers", format=percent))
        columns.append(Column("rest share", "the rest", format=percent))
    for precision in times.others():
        best = times.best(precision)
        columns.append(Column(f"best {precision}", best.name if best else precision, "ms"))
        columns.append(Column(f"speed over {precision}", f"speed over {precision}"))
    rows = [_row(times, row) for row in times.packed]
    title = f"{times.model} on {times.shape}, packed and dense"
    return Table(title, machine, columns, rows, notes(times, settings))


def _row(times: NetworkTimes, row: PackedNetwork) -> Row:
    lines = row.layers.lines
    cells: dict[str, Any] = {"model": times.model, "input": times.shape, "v": row.v}
    cells["sparsity"] = f"{100 * row.sparsity:g} %"
    cells["kept weights"] = f"{row.kept:,} ({100 * row.kept / row.weights:.3g} %)"
    cells |= {dense.name: times.seconds(dense) for dense in times.dense}
    cells |= {"packed": times.seconds(row), "spread": row.task.spread(times.mode)}
    cells["speed"] = times.speed(row)
    cells["sparse layers"] = f"{sum(line.is_sparse for line in lines)} of {len(lines)}"
    if row.shares:
        cells |= {"sparse share": row.shares.sparse, "dense share": row.shares.dense}
        cells["rest share"] = row.shares.rest
    for precision in times.others():
        cells[f"best {precision}"] = times.seconds(times.best(precision))
        cells[f"speed over {precision}"] = times.speed(row, precision)
    cells["paths"] = {line.name: line.choice for line in lines}
    samples = {dense.name: dense.task.samples.get(times.mode, []) for dense in times.dense}
    return Row(cells, samples | {"packed": row.task.samples.get(times.mode, [])})


def notes(times: NetworkTimes, settings: Settings) -> list[str]:
    """What has to be known to read the table, and what differs from it."""
    cut = f" On the first {_CHECKED}x{_CHECKED} pixels." if max(settings.size) > _CHECKED else ""
    texts = [
        f"Medians of {settings.rounds} rounds, all rows in turn in one run ({times.mode}). Speed: "
        "time of the fastest dense fp32 layout over that of packed; spread: quartile distance over "
        "median.",
        f"Random weights (seed {settings.seed}), pruned by magnitude in every convolution and "
        "linear layer; v above 1: N:M along the input channels, never more pruned than asked.",
        f"Checked before: the output against float64, at most twice the error of dense.{cut}",
        "The path of each layer was measured anew in this run, see `issp.pack`.",
    ]
    if settings.device == "cpu":
        texts.append(
            f"Shares of the packed network's time are from {_PROFILED_PASSES} passes of their own. "
            "Dense layers: those that packing left dense; the rest: all but convolutions and "
            "linear layers."
        )
    for what, rows in times.unshared.items():
        texts.append(f"{', '.join(rows)}: v = 1 and unstructured in {what}.")
    for row in times.packed:
        if row.layers.whole is None or row.layers.whole.name == "dense":
            texts.append(f"{row.name}: `issp.pack` left it dense. {row.layers.summary()}")
    for precision in times.others():
        slower = [row.name for row in times.packed if (times.speed(row, precision) or 1) < 1]
        if slower:
            texts.append(f"Dense {precision} is faster than packed fp32 at {', '.join(slower)}.")
    if "bf16" not in times.others():
        texts.append("This machine has no fast bfloat16: no such column.")
    return texts + timing_notes(((row.name, row.task) for row in times.all()), settings.rounds)


def plot(all_times: Sequence[NetworkTimes], path: Path) -> None:
    """Bars of the times, one panel per network: dense in gray, packed in colour."""
    panels = []
    for times in all_times:
        timed = [row for row in times.all() if times.seconds(row) is not None]
        names = [r.name if isinstance(r, DenseNetwork) else f"issp {r.name}" for r in timed]
        lengths = [times.seconds(row) * SCALES["ms"] for row in timed]
        title = f"{times.model} on {times.shape}, packed and dense"
        panels.append(Bars(title, f"median ms, {times.mode}", names, {"": lengths}))
    plot_bars(panels, path)
