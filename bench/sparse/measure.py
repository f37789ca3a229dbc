"""Times sparse convolutions and linear layers beside dense ones and torch's sparse ones."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.harness import options
from bench.harness.machine import machine_line
from bench.harness.progress import counted
from bench.harness.settings import TimingSettings
from bench.harness.table import timing_notes
from bench.harness.timing import Mode, Task, interleave
from bench.sparse import layers as sparse_layers
from bench.sparse import tables, targets
from bench.sparse.calls import (
    DTYPES,
    PASSES,
    DenseVariant,
    LayerTensors,
    csr_call,
    dense_call,
    dense_variants,
    keep_switches,
    set_precision,
    sparse_call,
    two_four_call,
)
from bench.sparse.forms import Form, SparseWeight, forms, make, unsupported_reason
from bench.sparse.layer_times import Entry, LayerTimes
from bench.sparse.layers import Layer
from bench.sparse.parity import WHOLE_FLOPS, check
from issp.sr import shapes

SPARSITIES = (0.5, 0.75, 0.9, 0.9375, 0.95, 0.99)
MODELS = ("swinir-light", "edsr-l", "cat-r")
SMALLEST_PROBE = 4 << 20  # bytes; on less, the call itself would be what is timed
_WARM_UP, SLOW = 3e-3, 0.1  # seconds
_OPS = {"forward": 1, "step": 3}  # forward, dX, dW

Packed = dict[tuple[Form, float], SparseWeight]


@dataclass(frozen=True, kw_only=True)
class Settings(TimingSettings):
    """What to time.

    Attributes:
        sparsities: of the weights.
        forms: see `bench.sparse.forms`.
        passes: of `PASSES`.
        threads: of the CPU; every layer is timed with each.
        baselines: torch's sparse ops as well.
        probe_side: of the square matrices whose product gives the roofline.
    """

    rounds: int = 15
    seconds: float = 1.0
    sparsities: Sequence[float] = SPARSITIES
    forms: Sequence[Form] = (Form(nm=False), Form(1), Form(4))
    passes: Sequence[str] = PASSES
    threads: Sequence[int] = (1,)
    baselines: bool = True
    probe_side: int | None = None


def add_arguments(parser: argparse.ArgumentParser, conv: bool) -> None:
    """Arguments of `python -m bench conv` and `matmul`."""
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
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("fp32", "fp16", "bf16"),
        default=["fp32"],
        help="of the sparse ops; default fp32",
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, help="default: both")
    parser.add_argument("--scale", type=int, default=4, choices=shapes.SCALES)
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1, and torch's number")
    options.add_pace(parser, "limit per row, default 1 (quick: 0.2)")


def run(args: argparse.Namespace, conv: bool) -> None:
    """Measures and prints what the arguments ask for.

    Raises:
        ValueError: an argument that cannot be, or no GPU for --device cuda.
        ParityError: a sparse op is further from float64 than dense; no figure of its layer is
            shown.
    """
    options.check_pace(args)
    settings = settings_of(args)
    if "must_show" in args and args.must_show:
        targets.run(args, settings, measure)
        return
    all_times, printed = [], []
    for layer in _layers(args, conv):
        for times in measure(layer, settings):
            all_times.append(times)
            for table in tables.layer_tables(times):
                printed.append(table)
                print(table.markdown(), flush=True)
    if all_times:
        title = "Speed over the best dense fp32 layout, and break-even, all layers"
        printed.append(tables.speed_table(all_times, title))
        print(printed[-1].markdown(), flush=True)
        options.write_outputs(args, printed, lambda path: tables.plot(all_times, path))


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the arguments ask for.

    Raises:
        ValueError: one of them cannot be.
    """
    threads = args.threads
    if threads is None:
        threads = sorted({1, torch.get_num_threads()}) if args.device == "cpu" else [1]
    options.check_counts("--threads", threads)
    options.check_counts("--v", args.v)
    options.check_sparsities(args.sparsity)
    quick = {"sparsities": (0.9, 0.95, 0.99), "rounds": 5, "seconds": 0.2}
    chosen = options.overrides(args, ("device", "seconds", "passes"), quick)
    if args.sparsity:
        chosen["sparsities"] = args.sparsity
    return Settings(
        forms=forms(args.device, args.v, args.precisions), threads=tuple(threads), **chosen
    )


def _layers(args: argparse.Namespace, conv: bool) -> list[Layer]:
    texts = args.size or (["48"] if args.quick else ["48", "64"])
    sizes = [sparse_layers.parse_size(text) for text in texts]
    if args.shape:
        if args.model:
            raise ValueError("--shape and --model exclude each other: drop one")
        weights = [sparse_layers.parse_numbers(text) for text in args.shape]
        return sparse_layers.from_shapes(weights, sizes, conv)
    layers = sparse_layers.of_models(args.model or MODELS, sizes, conv, args.scale)
    for layer in (x for x in layers if x.groups > 1):
        print(f"{layer.name}: not timed, sparse ops have no groups.\n", flush=True)
    layers = [x for x in layers if x.groups == 1]
    if not layers:
        raise ValueError("these models have no such layer: choose others")
    return layers


def measure(layer: Layer, settings: Settings) -> list[LayerTimes]:
    """Checks and times one layer: its times with each number of threads.

    Raises:
        ParityError: a sparse op is further from float64 than dense; nothing was timed.
    """
    data = LayerTensors.of(layer, settings.device)
    before = torch.get_num_threads()
    try:
        with keep_switches():
            packed, notes = _checked(data, settings)
            return [_timed(data, packed, settings, n, notes) for n in settings.threads]
    finally:
        torch.set_num_threads(before)


def _checked(data: LayerTensors, settings: Settings) -> tuple[Packed, list[str]]:
    """The packed weights that pass the check, by form and sparsity, and notes on those left out."""
    packed: Packed = {}
    notes = []
    for form in counted(settings.forms, "parity of form"):
        for sparsity in settings.sparsities:
            reason = unsupported_reason(form, data.layer.weight, sparsity)
            if reason:
                notes.append(f"{form.name} at {100 * sparsity:g} %: left out, {reason}.")
                continue
            sparse = make(data.weight.to(DTYPES[form.precision]), form, sparsity)
            check(data, sparse, form)
            packed[form, sparsity] = sparse
    return packed, notes


def _timed(
    data: LayerTensors, packed: Packed, settings: Settings, threads: int, notes: list[str]
) -> LayerTimes:
    torch.set_num_threads(threads)
    on_gpu = settings.device == "cuda"
    clock = settings.clock()
    # Warm on a CPU: a layer's input is what the layer before it has just written.
    modes = [m for m in clock.modes if m.name in ("warm", "graph", "eager")]
    modes.sort(key=lambda mode: mode.name == "eager")
    machine = machine_line(settings.device)
    entries = [e for pass_ in settings.passes for e in _entries(data, packed, settings, pass_)]
    others, failed = _baselines(data, packed, settings)
    entries += others
    nbytes = sum(4 * math.prod(s) for s in (data.layer.x, data.layer.y)) // 2
    probe = settings.probe(None if on_gpu else max(nbytes, SMALLEST_PROBE))
    side = settings.probe_side or (4096 if on_gpu else 1024)
    precisions = list(dict.fromkeys(entry.precision for entry in entries))
    peaks = {p: _matrix_product(p, side, settings) for p in precisions}
    for each in probe.tasks:
        each.prepare = each.prepare if on_gpu else WarmUp(each.call)
    tasks = [*(e.task for e in entries), *probe.tasks, *peaks.values()]
    interleave(tasks, clock, settings.rounds, settings.seconds, modes)
    first = modes[0]
    times = LayerTimes(
        layer=data.layer,
        threads=threads,
        machine=machine,
        modes=[mode.name for mode in modes],
        bandwidth=probe.result(first.name),
        peaks={p: 2.0 * side**3 / each.best(first.name) for p, each in peaks.items()},
        entries=entries,
    )
    times.notes = [*notes, *failed, *_notes(times, settings, first)]
    return times


def _entries(data: LayerTensors, packed: Packed, settings: Settings, pass_: str) -> list[Entry]:
    """Dense ops of every precision and layout, and ours of every form and sparsity."""
    layer, device, ops = data.layer, settings.device, _OPS[pass_]
    numel = math.prod(layer.weight)
    activations = math.prod(layer.x) + math.prod(layer.y)
    entries = []
    for variant in dense_variants(layer, device):
        precision, call = variant.precision, dense_call(data, variant, pass_)
        # The plainest dense op must run: it is the baseline where nothing is better.
        plain = variant == DenseVariant(label=variant.label)
        entry = Entry(
            name=f"dense {variant.name}",
            pass_=pass_,
            precision=precision,
            flops=2.0 * ops * numel * layer.applications,
            nbytes=float(ops * DTYPES[precision].itemsize * (activations + numel)),
            task=task(call, precision, device, plain, variant.search),
            dense=True,
        )
        entries.append(entry)
    for (form, sparsity), sparse in packed.items():
        size, call = DTYPES[form.precision].itemsize, sparse_call(data, sparse, pass_)
        entry = Entry(
            name=f"issp {form.name}",
            pass_=pass_,
            precision=form.precision,
            flops=2.0 * ops * sparse.weights * layer.applications,
            nbytes=float(ops * (size * activations + sparse.nbytes)),
            task=task(call, form.precision, device, True),
            sparsity=sparsity,
            actual=1 - sparse.weights / numel,
            label=sparse.label,
        )
        entries.append(entry)
    return entries


def _baselines(
    data: LayerTensors, packed: Packed, settings: Settings
) -> tuple[list[Entry], list[str]]:
    """torch's sparse ops, forward, and notes on those that cannot run."""
    if not settings.baselines or "forward" not in settings.passes:
        return [], []
    layer, entries, failed = data.layer, [], {}
    activations = math.prod(layer.x) + math.prod(layer.y)

    def add(
        make_call: Callable[[], Callable], stored: float, *, name: str, precision: str, **more
    ) -> None:
        try:
            timed = task(make_call(), precision, settings.device)
            timed.capturable = False  # what a failed capture leaves behind would hit the others
        except (ValueError, RuntimeError, NotImplementedError) as error:
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0]
            return
        nbytes = float(DTYPES[precision].itemsize * (activations + stored))
        flops = 2.0 * stored * layer.applications
        shared = {"pass_": "forward", "flops": flops, "nbytes": nbytes, "task": timed}
        entries.append(Entry(name=name, precision=precision, **shared, **more))

    unfolded = layer.conv and layer.weight[2:] != (1, 1)
    for (form, sparsity), sparse in packed.items():
        if not form.nm:
            add(
                lambda s=sparse: csr_call(data, s),
                sparse.weights,
                name="torch CSR of unfold" if unfolded else "torch CSR",
                precision="fp32",
                sparsity=sparsity,
                actual=sparsity,
                label=sparse.label,
            )
    for precision in ("bf16", "fp16") if settings.device == "cuda" else ():
        add(
            lambda p=precision: two_four_call(data, DTYPES[p]),
            math.prod(layer.weight) / 2,
            name=f"torch 2:4 {precision}",
            precision=precision,
            sparsity=0.5,
            actual=0.5,
            label="2:4 (50 %)",
        )
    return entries, [f"{name}: left out, {reason}." for name, reason in failed.items()]


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
        precision, search: see `bench.sparse.calls.set_precision`.
        device: "cpu" or "cuda".
        required: see `bench.harness.timing.Task`.
    """
    # The calls take turns: caches and clock rate are to be as in a loop of this call.
    warm_up = WarmUp(call) if device == "cpu" else (lambda: None)

    def prepare() -> None:
        set_precision(precision, search)
        warm_up()

    return Task(call, prepare, required)


class WarmUp:
    """Repeats a call for 3 ms; one that takes far longer is called once and then never again."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self._slow = call, False

    def __call__(self) -> None:
        begin = time.perf_counter()
        while not self._slow and time.perf_counter() - begin < _WARM_UP:
            self._call()
            self._slow = time.perf_counter() - begin > SLOW


def _matrix_product(precision: str, side: int, settings: Settings) -> Task:
    shape, options = (side, side), {"dtype": DTYPES[precision], "device": settings.device}
    a, b = (torch.ones(shape, **options) for _ in range(2))
    return task(lambda: a @ b, precision, settings.device)


def _notes(times: LayerTimes, settings: Settings, mode: Mode) -> list[str]:
    notes = [
        f"Medians, all rows in turn in one run ({mode.name}); spread: quartile distance over "
        "median. Ratios are speeds; GFLOP/s and the roofline count the weights that are stored. "
        "A pattern never prunes more than asked.",
        "Checked before: forward, dX and dW against float64, at most twice the error of dense.",
    ]
    part = times.layer.cut(WHOLE_FLOPS)
    if part != times.layer:
        notes[-1] += f" On a part of the input: {part.name}."
    op, key = ("conv2d" if times.layer.conv else "matmul"), settings.device.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"issp::sparse_{op}", key):
        notes.append("The sparse ops ran on their slow reference: no compiled kernel.")
    if settings.device == "cuda" and any(not e.task.capturable for e in times.entries):
        notes.append("torch's sparse ops were timed eagerly only, and so are their ratios.")
    return notes + timing_notes(((e.name, e.task) for e in times.entries), settings.rounds)
