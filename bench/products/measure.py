"""Times the sparse products of layers beside the dense ones and torch's sparse ones."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.harness import options
from bench.harness.bandwidth import Probe
from bench.harness.machine import machine_line
from bench.products import layers as products_layers
from bench.products import targets
from bench.products.calls import (
    DTYPES,
    PASSES,
    Data,
    Dense,
    csr_call,
    dense_call,
    dense_variants,
    set_precision,
    sparse_call,
    switches,
    two_four_call,
)
from bench.products.forms import Form, Sparse, forms, make, unfit
from bench.products.layers import Layer
from bench.products.parity import WHOLE, check
from bench.products.report import Entry, Overview, Report, plot
from issp.sr import shapes
from issp.utils.timing import CpuClock, CudaClock, Mode, Task, interleave

SPARSITIES = (0.5, 0.75, 0.9, 0.9375, 0.95, 0.99)
MODELS = ("swinir-light", "edsr-l", "cat-r")
_SMALLEST_PROBE = 4 << 20  # bytes; on less, the call itself would be what is timed
_WARM_UP, _SLOW = 3e-3, 0.1  # seconds
_WORK = {"forward": 1, "step": 3}  # products: forward, dX, dW


@dataclass(frozen=True)
class Settings:
    """What to time, and how long.

    Attributes:
        sparsities: of the weights.
        forms: see `bench.products.forms`.
        passes: of `PASSES`.
        threads: of the CPU; every layer is timed with each.
        device: "cpu" or "cuda".
        rounds: calls of each entry in each mode.
        seconds: limit per entry and mode; slow ones get fewer calls, at least one.
        peers: torch's sparse products as well.
        flush_bytes, probe_bytes: see `bench.step.Settings`.
        probe_side: of the square matrices whose product gives the roofline.
    """

    sparsities: Sequence[float] = SPARSITIES
    forms: Sequence[Form] = (Form(nm=False), Form(1), Form(4))
    passes: Sequence[str] = PASSES
    threads: Sequence[int] = (1,)
    device: str = "cpu"
    rounds: int = 15
    seconds: float = 1.0
    peers: bool = True
    flush_bytes: int | None = None
    probe_bytes: int | None = None
    probe_side: int | None = None


def add_arguments(parser: argparse.ArgumentParser, conv: bool) -> None:
    """Arguments of `issp bench conv` and `issp bench matmul`."""
    parser.add_argument(
        "--model", nargs="+", choices=shapes.MODELS, help=f"default {' '.join(MODELS)}"
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        help="weights instead of models: " + ("256x256x3x3" * conv or "180x60"),
    )
    parser.add_argument(
        "--size", nargs="+", help="of the low-resolution image, 48 or 48x64; default 48 64"
    )
    parser.add_argument("--sparsity", nargs="+", type=float, help="default: six from 0.5 to 0.99")
    parser.add_argument(
        "--v", nargs="+", type=int, help="rows to a pattern; default 1 4 (GPU: 1 4 8 16 32)"
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, help="default: both")
    parser.add_argument("--scale", type=int, default=4, choices=shapes.SCALES)
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1, and torch's number")
    options.add_pace(parser, "limit per row, default 1 (quick: 0.2)")


def run(args: argparse.Namespace, conv: bool) -> list:
    """Measures and prints what the arguments ask for.

    Raises:
        ValueError: an argument that cannot be, or no GPU for --device cuda.
        ParityError: a product is further from float64 than dense; no figure of its layer is shown.
    """
    options.check_pace(args)
    settings = settings_of(args)
    if "must_show" in args and args.must_show:
        tables = targets.run(args, settings, measure)
        options.deliver(args, tables, targets.plot)
        return tables
    layers = _layers(args, conv)
    tables = []
    for layer in layers:
        for report in measure(layer, settings):
            tables.append(report)
            print(report.markdown(), flush=True)
    overview = Overview(tables) if tables else None
    if overview:
        print(overview.markdown(), flush=True)
        options.deliver(args, [*tables, overview], lambda all_, path: plot(all_[:-1], path))
    return tables


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the arguments ask for.

    Raises:
        ValueError: one of them cannot be.
    """
    quick = {"sparsities": (0.9, 0.95, 0.99), "rounds": 5, "seconds": 0.2} if args.quick else {}
    threads = args.threads
    if threads is None:
        threads = sorted({1, torch.get_num_threads()}) if args.device == "cpu" else [1]
    for name, values in (("--threads", threads), ("--v", args.v or [])):
        if min(values, default=1) < 1:
            raise ValueError(f"{name} is {min(values)}: use at least 1")
    for sparsity in args.sparsity or ():
        if not 0.0 < sparsity < 1.0:
            raise ValueError(f"--sparsity is {sparsity}: it must lie between 0 and 1")
    given = {"sparsities": args.sparsity, "seconds": args.seconds, "passes": args.passes}
    quick |= {name: value for name, value in given.items() if value is not None}
    return Settings(
        forms=forms(args.device, args.v), threads=tuple(threads), device=args.device, **quick
    )


def _layers(args: argparse.Namespace, conv: bool) -> list[Layer]:
    texts = args.size or (["48"] if args.quick else ["48", "64"])
    sizes = [products_layers.size(text) for text in texts]
    if args.shape:
        if args.model:
            raise ValueError("--shape and --model exclude each other: drop one")
        weights = [products_layers.numbers(text) for text in args.shape]
        return products_layers.given(weights, sizes, conv)
    layers = products_layers.of_models(args.model or MODELS, sizes, conv, args.scale)
    for layer in (x for x in layers if x.groups > 1):
        print(f"{layer.name}: not timed, sparse products have no groups.\n", flush=True)
    layers = [x for x in layers if x.groups == 1]
    if not layers:
        raise ValueError("these models have no such layer: choose others")
    return layers


def measure(layer: Layer, settings: Settings) -> list[Report]:
    """Checks and times one layer: a report per number of threads.

    Raises:
        ParityError: a product is further from float64 than dense; nothing was timed.
    """
    data = Data.of(layer, settings.device)
    before = torch.get_num_threads()
    try:
        with switches():
            packed, notes = _checked(data, settings)
            return [_timed(data, packed, settings, n, notes) for n in settings.threads]
    finally:
        torch.set_num_threads(before)


def _checked(data: Data, settings: Settings) -> tuple[dict, list[str]]:
    """The packed weights of all forms and sparsities, found right; and what cannot be."""
    packed: dict[tuple[Form, float], Sparse] = {}
    notes = []
    for form in settings.forms:
        for sparsity in settings.sparsities:
            why = unfit(form, data.layer.weight, sparsity)
            if why:
                notes.append(f"{form.name} at {100 * sparsity:g} %: left out, {why}.")
                continue
            sparse = make(data.weight.to(DTYPES[form.precision]), form, sparsity)
            check(data, sparse, form)
            packed[form, sparsity] = sparse
    return packed, notes


def _timed(data: Data, packed, settings: Settings, threads: int, notes: list[str]) -> Report:
    torch.set_num_threads(threads)
    on_gpu = settings.device == "cuda"
    clock = (CudaClock if on_gpu else CpuClock)(settings.flush_bytes)
    # Warm on a CPU: a layer's input is what the layer before it has just written.
    modes = [m for m in clock.modes if m.name in ("warm", "graph", "eager")]
    modes.sort(key=lambda mode: mode.name == "eager")
    machine = machine_line(settings.device)
    entries, failed = _entries(data, packed, settings)
    nbytes = sum(4 * math.prod(s) for s in (data.layer.x, data.layer.y)) // 2
    probe = Probe(
        settings.device, settings.probe_bytes or (None if on_gpu else max(nbytes, _SMALLEST_PROBE))
    )
    side = settings.probe_side or (4096 if on_gpu else 1024)
    peaks = {p: _matrix_product(p, side, settings) for p in _precisions(entries)}
    for task in probe.tasks:
        task.prepare = task.prepare if on_gpu else _WarmUp(task.call)
    tasks = [*(e.task for e in entries), *probe.tasks, *peaks.values()]
    interleave(tasks, clock, settings.rounds, settings.seconds, modes)
    basis = modes[0].name
    report = Report(
        layer=data.layer,
        threads=threads,
        machine=machine,
        modes=[mode.name for mode in modes],
        roof=probe.roof(basis),
        peaks={p: 2.0 * side**3 / task.best(basis) for p, task in peaks.items()},
        entries=entries,
    )
    report.notes = [*notes, *failed, *_notes(report, settings, modes)]
    return report


def _entries(data: Data, packed, settings: Settings) -> tuple[list[Entry], list[str]]:
    layer, entries = data.layer, []
    activations = math.prod(layer.x) + math.prod(layer.y)
    for pass_ in settings.passes:
        work = _WORK[pass_]
        for variant in dense_variants(layer, settings.device):
            size = DTYPES[variant.precision].itemsize
            entries.append(
                Entry(
                    name=f"dense {variant.name}",
                    pass_=pass_,
                    precision=variant.precision,
                    flops=2.0 * work * math.prod(layer.weight) * layer.applications,
                    nbytes=float(work * size * (activations + math.prod(layer.weight))),
                    task=_dense_task(data, variant, pass_, settings),
                    dense=True,
                )
            )
        for (form, sparsity), sparse in packed.items():
            size = DTYPES[form.precision].itemsize
            entries.append(
                Entry(
                    name=f"issp {form.name}",
                    pass_=pass_,
                    precision=form.precision,
                    flops=2.0 * work * sparse.weights * layer.applications,
                    nbytes=float(work * (size * activations + sparse.nbytes)),
                    task=task(
                        sparse_call(data, sparse, pass_), form.precision, settings.device, True
                    ),
                    sparsity=sparsity,
                    actual=1 - sparse.weights / math.prod(layer.weight),
                    label=sparse.label,
                )
            )
    peers, failed = _peers(data, packed, settings) if "forward" in settings.passes else ([], [])
    return entries + peers, failed


def _peers(data: Data, packed, settings: Settings) -> tuple[list[Entry], list[str]]:
    """torch's sparse products, forward; what cannot be is a note."""
    if not settings.peers:
        return [], []
    layer, entries, failed = data.layer, [], {}
    activations = math.prod(layer.x) + math.prod(layer.y)

    def add(name: str, make_call, precision: str, sparsity: float, kept: float, label: str) -> None:
        try:
            peer = task(make_call(), precision, settings.device)
            peer.capturable = False  # what a failed capture leaves behind would hit the others
        except (ValueError, RuntimeError, NotImplementedError) as error:
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0]
            return
        flops = 2.0 * kept * layer.applications
        size = DTYPES[precision].itemsize
        nbytes = float(size * (activations + kept))
        entries.append(
            Entry(name, "forward", precision, flops, nbytes, peer, False, sparsity, sparsity, label)
        )

    for (form, sparsity), sparse in packed.items():
        if not form.nm:
            name = (
                "torch CSR of unfold" if layer.conv and layer.weight[2:] != (1, 1) else "torch CSR"
            )
            add(
                name,
                lambda s=sparse: csr_call(data, s),
                "fp32",
                sparsity,
                sparse.weights,
                sparse.label,
            )
    if settings.device == "cuda":
        for precision in ("bf16", "fp16"):
            kept = math.prod(layer.weight) / 2
            add(
                f"torch 2:4 {precision}",
                lambda p=precision: two_four_call(data, DTYPES[p]),
                *(precision, 0.5, kept, "2:4 (50 %)"),
            )
    return entries, [f"{name}: left out, {why}." for name, why in failed.items()]


def _dense_task(data: Data, variant: Dense, pass_: str, settings: Settings) -> Task:
    call = dense_call(data, variant, pass_)
    # The plainest dense product must run: it is the yardstick where nothing is better.
    plain = variant == Dense(label=variant.label)
    return task(call, variant.precision, settings.device, plain, variant.search)


def task(
    call: Callable[[], object],
    precision: str,
    device: str,
    required: bool = False,
    search: bool = True,
) -> Task:
    """A call to be timed among others, at its precision and, on a CPU, with warm caches.

    Args:
        call: what is timed.
        precision, search: see `bench.products.calls.set_precision`.
        device: "cpu" or "cuda".
        required: see `issp.utils.timing.Task`.
    """
    # The calls take turns: caches and clock rate are to be as in a loop of this call.
    warm_up = _WarmUp(call) if device == "cpu" else _nothing

    def prepare() -> None:
        set_precision(precision, search)
        warm_up()

    return Task(call, prepare, required)


class _WarmUp:
    """Repeats a call for 3 ms; one that takes far longer is called once and then never again."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self._slow = call, False

    def __call__(self) -> None:
        begin = time.perf_counter()
        while not self._slow and time.perf_counter() - begin < _WARM_UP:
            self._call()
            self._slow = time.perf_counter() - begin > _SLOW


def _nothing() -> None:
    return None


def _precisions(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.precision for entry in entries))


def _matrix_product(precision: str, side: int, settings: Settings) -> Task:
    shape, place = (side, side), {"dtype": DTYPES[precision], "device": settings.device}
    a, b = (torch.ones(shape, **place) for _ in range(2))
    return task(lambda: a @ b, precision, settings.device)


def _notes(report: Report, settings: Settings, modes: Sequence[Mode]) -> list[str]:
    notes = [
        f"Medians, all rows in turn in one run ({modes[0].name}); spread: quartile distance over "
        "median. Ratios are speeds; GFLOP/s and the roofline count the weights that are stored. "
        "A pattern never prunes more than asked.",
        "Checked before: forward, dX and dW against float64, at most twice the error of dense.",
    ]
    if report.layer.cut(WHOLE) != report.layer:
        notes[-1] += f" On a part of the input: {report.layer.cut(WHOLE).name}."
    op, key = ("conv2d" if report.layer.conv else "matmul"), settings.device.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"issp::sparse_{op}", key):
        notes.append("The sparse products ran on their slow reference: no compiled kernel.")
    few = [
        e
        for e in report.entries
        if 0 < len(e.task.samples.get(modes[0].name, ())) < settings.rounds
    ]
    if few:
        least = min(len(e.task.samples[modes[0].name]) for e in few)
        notes.append(f"Slow rows ran less often than {settings.rounds} times, at least {least}.")
    if settings.device == "cuda" and any(not e.task.capturable for e in report.entries):
        notes.append("torch's sparse products were timed eagerly alone; their ratios say so too.")
    failed = {e.name: e.task.error for e in report.entries if e.task.error}
    return notes + [f"{name} could not be timed, {why}." for name, why in failed.items()]
