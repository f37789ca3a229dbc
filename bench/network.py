"""Whole sparse networks, packed by `issp.pack`, against the same networks dense.

Each network gets random weights, is pruned in every convolution and linear layer, and packed. Dense
runs in every precision and layout of this machine, in turn with the packed ones; the fastest dense
float32 layout is the yardstick. Every packed network is compared with float64 first; if its error
is more than twice that of dense, no figure of the network is printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import issp
from bench.harness import options
from bench.harness.machine import machine_line
from bench.harness.registry import ParityError
from bench.network_report import Dense, Packed, Report, Where, plot
from bench.products import calls, layers
from bench.products import measure as products
from bench.products.calls import DTYPES
from bench.products.forms import pattern
from bench.products.layers import Layer
from issp.deploy import autotune
from issp.ops.keep import Keep
from issp.sr import checkpoint, models
from issp.utils.timing import CpuClock, CudaClock, interleave

EXAMPLE = """examples:
  issp bench network --model edsr-baseline --sparsity 0.95
  issp bench network --model edsr-l --sparsity 0.9 0.95 0.99 --v 1 4 --threads 2
  issp bench network --model swinir-light --size 64x96 --out network.md --plot network.png"""
MODELS = ("edsr-baseline", "swinir-light")
PRECISIONS = ("fp32", "tf32", "bf16")
_CHECKED = 48  # low-resolution pixels a side that are computed in float64; a larger input is cut
_PASSES = 3  # of the packed network, for where its time goes
_KINDS = nn.Conv2d | nn.Linear
# What a machine offers does not depend on the layer; a 1x1 one would add matrix products.
_ANY = Layer((8, 8, 3, 3), (1, 8, 8, 8))


@dataclass(frozen=True)
class Settings:
    """What to time, and how long.

    Attributes:
        sparsities: of every convolution and linear layer.
        rows: values of v, rows that share a pattern; 1: unstructured.
        size: of the low-resolution image, height and width.
        device: "cpu" or "cuda".
        rounds: calls of each network.
        seconds: limit per row; slow ones get fewer calls, at least one.
        seed: of the weights and the image.
        flush_bytes: see `bench.step.Settings`.
    """

    sparsities: Sequence[float] = (0.9, 0.95, 0.99)
    rows: Sequence[int] = (1, 4)
    size: tuple[int, int] = (48, 48)
    device: str = "cpu"
    rounds: int = 15
    seconds: float = 10.0
    seed: int = 0
    flush_bytes: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `issp bench network`."""
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


def run(args: argparse.Namespace) -> list[Report]:
    """Measures and prints what the arguments ask for.

    Raises:
        ValueError: an argument that cannot be, or no GPU for --device cuda.
        ParityError: a packed network is further from float64 than dense; no figure of it is shown.
    """
    options.check_pace(args)
    settings = settings_of(args)
    for name in args.model:
        _fits(name, args.scale, settings.size)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    reports = []
    for name in args.model:
        torch.manual_seed(settings.seed)
        reports.append(measure(f"{name} x{args.scale}", models.build(name, args.scale), settings))
        print(reports[-1].markdown(), flush=True)
    options.deliver(args, reports, plot)
    return reports


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the arguments ask for.

    Raises:
        ValueError: one of them cannot be.
    """
    options.at_least_one(args, "threads")
    if min(args.v or [1]) < 1:
        raise ValueError(f"--v is {min(args.v)}: use at least 1")
    for sparsity in args.sparsity or ():
        if not 0.0 < sparsity < 1.0:
            raise ValueError(f"--sparsity is {sparsity}: it must lie between 0 and 1")
    quick = {"sparsities": (0.95,), "rounds": 5, "seconds": 2.0} if args.quick else {}
    given = {"sparsities": args.sparsity, "rows": args.v, "seconds": args.seconds}
    quick |= {name: value for name, value in given.items() if value is not None}
    size = layers.size(args.size)
    return Settings(size=size, device=args.device, seed=args.seed, **quick)


def _fits(name: str, scale: int, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        multiple = models.build(name, scale).pad_multiple
    if any(side % multiple for side in size):
        raise ValueError(
            f"--size {size[0]}x{size[1]} does not suit {name}: give multiples of {multiple}"
        )


def measure(name: str, model: nn.Module, settings: Settings) -> Report:
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
    clock = (CudaClock if settings.device == "cuda" else CpuClock)(settings.flush_bytes)
    packed: list[Packed] = []
    unshared: dict[str, list[str]] = {}
    with calls.switches(), tempfile.TemporaryDirectory() as folder:
        cache = autotune.Cache(Path(folder) / "choices.json")
        for v, sparsity in itertools.product(settings.rows, settings.sparsities):
            pruned = copy.deepcopy(model)
            left = prune(pruned, sparsity, v)
            packed.append(_packed(name, pruned, x, sparsity, v, cache))
            for reason, names in left.items():
                what = f"{_names(names)}: {reason}"
                unshared.setdefault(what, []).append(packed[-1].name)
        # The zeros do not matter to dense products, but a GPU's clock rate may depend on them.
        dense = _dense(pruned, x)
        # Warm on a CPU, eager on a GPU: as a network is called, launches included.
        tasks = [row.task for row in (*dense, *packed)]
        interleave(tasks, clock, settings.rounds, settings.seconds, clock.modes[:1])
    shape = "x".join(map(str, x.shape))
    mode = clock.modes[0].name
    report = Report(name, shape, machine_line(settings.device), mode, dense, packed)
    report.notes = [*_notes(report, settings), *_exceptions(report, settings, unshared)]
    return report


def _packed(
    name: str, pruned: nn.Module, x: Tensor, sparsity: float, v: int, cache: autotune.Cache
) -> Packed:
    """The row of a pruned network, packed and found right."""
    calls.set_precision("fp32")
    packed = issp.pack(pruned, example=x, cache=cache)
    about = checkpoint.sparsity(pruned)
    row = Packed(
        *(v, sparsity, about["weights"], about["weights"] - about["zeros"], packed.report),
        task=products.task(_call(packed, x), "fp32", x.device.type, required=True),
    )
    check(f"{name}, {row.name}", pruned, packed, x)
    row.where = None if x.is_cuda else where(packed, x)
    return row


def prune(model: nn.Module, sparsity: float, v: int) -> dict[str, list[str]]:
    """Hard zeros in every convolution and linear layer, by magnitude, as `issp.attach` selects.

    What is kept of a layer is scaled to the norm it had: signals neither vanish nor become
    denormal, as little as in a trained network.

    Args:
        model: changed in place.
        sparsity: of each layer, in 0..1.
        v: rows that share a pattern: 1 is unstructured, above it is N:M along the input channels.

    Returns:
        For v > 1, reason -> the layers that cannot share a pattern; these are unstructured.
    """
    prunable = {n: m for n, m in model.named_modules() if isinstance(m, _KINDS)}
    keeps, left = {}, {}
    for name, module in prunable.items() if v > 1 else ():
        outputs, inputs = module.weight.shape[:2]
        numbers = pattern(inputs, sparsity)
        if outputs % v:
            left.setdefault(f"v={v} does not divide {outputs} outputs", []).append(name)
        elif numbers is None:
            left.setdefault(f"no N:M of {inputs} input channels prunes so much", []).append(name)
        else:
            keeps[name] = Keep(*numbers, v=v)
    norms = [m.weight.detach().norm() for m in prunable.values()]
    issp.attach(model, sparsity=sparsity, overrides=keeps).finalize()
    with torch.no_grad():
        for module, norm in zip(prunable.values(), norms, strict=True):
            module.weight *= norm / module.weight.norm()
    return left


@torch.no_grad()
def check(what: str, dense: nn.Module, packed: nn.Module, x: Tensor) -> None:
    """Compares a packed network with float64, on at most 48x48 low-resolution pixels.

    The error (root mean square) may be twice that of the dense network with the same weights, plus
    one rounding of the result.

    Raises:
        ParityError: it is larger; names both errors.
    """
    x = x[..., :_CHECKED, :_CHECKED].contiguous()
    ours, theirs = packed(x), dense(x)
    if ours.shape != theirs.shape:
        shapes = [tuple(y.shape) for y in (ours, theirs)]
        raise ParityError(f"{what}: the output has shape {shapes[0]}, not {shapes[1]}")
    exact = copy.deepcopy(dense).double()(x.double())
    mine, peer = (_rms(y.double() - exact) for y in (ours, theirs))
    allowed = 2 * peer + torch.finfo(x.dtype).eps * _rms(exact)
    if not mine <= allowed:
        raise ParityError(
            f"{what}: the output is off by {mine:.3g} from float64, dense by {peer:.3g}; allowed "
            f"are {allowed:.3g}: nothing was timed"
        )


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@torch.no_grad()
def where(packed: nn.Module, x: Tensor) -> Where:
    """Where the time of a packed network on a CPU goes, over a few passes.

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
    for _ in range(_PASSES):
        packed(x)
    total = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    sparse, dense = spent[True] / total, spent[False] / total
    return Where(sparse, dense, max(0.0, 1 - sparse - dense))


def _dense(model: nn.Module, x: Tensor) -> list[Dense]:
    """The dense network in every precision and layout that this machine offers."""
    rows = []
    for variant in calls.dense_variants(_ANY, x.device.type):
        if variant.precision not in PRECISIONS:
            continue
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        place = {"dtype": DTYPES[variant.precision], "memory_format": layout}
        call = _call(copy.deepcopy(model).to(**place), x.to(**place))
        required = variant.precision == "fp32"
        task = products.task(call, variant.precision, x.device.type, required, variant.search)
        rows.append(Dense(variant.name, variant.precision, task))
    return rows


def _call(model: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> None:
        model(x)

    return call


def _names(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _notes(report: Report, settings: Settings) -> list[str]:
    """What has to be known to read the table."""
    notes = [
        f"Medians of {settings.rounds} rounds, all rows in turn in one run ({report.mode}). Speed: "
        "time of the fastest dense fp32 layout over that of packed; spread: quartile distance over "
        "median.",
        f"Random weights (seed {settings.seed}), pruned by magnitude in every convolution and "
        "linear layer; v above 1: N:M along the input channels, never more pruned than asked.",
        "Checked before: the output against float64, at most twice the error of dense.",
        "The path of each layer was measured anew in this run, see `issp.pack`.",
    ]
    if max(settings.size) > _CHECKED:
        notes[2] += f" On the first {_CHECKED}x{_CHECKED} pixels."
    if settings.device == "cpu":
        notes.append(
            f"Shares of the packed network's time are from {_PASSES} passes of their own. Dense "
            "layers: those that packing left dense; the rest: all but convolutions and linear "
            "layers."
        )
    return notes


def _exceptions(
    report: Report, settings: Settings, unshared: dict[str, list[str]]
) -> Iterator[str]:
    """What is not as a reader would expect."""
    for what, rows in unshared.items():
        yield f"{', '.join(rows)}: v = 1 and unstructured in {what}."
    for row in report.packed:
        if row.layers.whole is None or row.layers.whole.name == "dense":
            yield f"{row.name}: `issp.pack` left it dense. {row.layers.summary()}"
    for precision in report.others():
        slower = [row.name for row in report.packed if (report.speed(row, precision) or 1) < 1]
        if slower:
            yield f"Dense {precision} is faster than packed fp32 at {', '.join(slower)}."
    if "bf16" not in report.others():
        yield "This machine has no fast bfloat16: no such column."
    counts = [n for row in report.rows() if (n := len(row.task.samples.get(report.mode, ())))]
    if min(counts) < settings.rounds:
        yield f"Slow rows ran less often than {settings.rounds} times, at least {min(counts)}."
    for row in report.rows():
        if row.task.error:
            yield f"{row.name} could not be timed, {row.task.error}."
