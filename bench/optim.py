"""Update and pruning in one pass over the weights against torch's optimizers followed by either.

Every row trains its own copy of the network, parameters that are not pruned included, from one
steady state; forward and backward are left out, the gradients are noise. First the fused op is
compared with the reference bit for bit, and issp.optim with torch within 2 units in the last place;
if either differs, nothing is printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import optim_parity
from bench.harness import options
from bench.harness.bandwidth import Probe
from bench.harness.machine import machine_line
from bench.harness.report import Table, exceptions, measured, plot
from bench.harness.training import FAMILIES, Family, Gradients, Trainee, settled
from issp.ops import backends
from issp.sr import models
from issp.utils.timing import CpuClock, CudaClock, Task, interleave

EXAMPLE = "example: issp bench optim --model edsr-l --optimizer adam --threads 2 --quick"
_MODELS = ("swinir-light", "edsr-baseline", "edsr-l", "cat-r")


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        sparsity, shrink: of the pruning.
        device: "cpu" or "cuda".
        rounds: calls of each row in each mode.
        seconds: limit per row and mode; slow rows get fewer calls, at least one.
        settle: optimizer steps before the first timed one.
        flush_bytes, probe_bytes: see `bench.step.Settings`.
    """

    sparsity: float = 0.95
    shrink: float = 0.95
    device: str = "cpu"
    rounds: int = 20
    seconds: float = 4.0
    settle: int = 100
    flush_bytes: int | None = None
    probe_bytes: int | None = None


@dataclass(frozen=True)
class Variant:
    """One row: how a copy of the network is stepped.

    Attributes:
        name: with {} for the optimizer's name.
        kind: of the optimizer, see `Family.build`.
        stage: "update" alone, "pruning", or "frozen".
        call: from a trainee and the masks, what is timed; None: its `optimizer.step`, the pruner
            attached where there is one.
        raw: it calls the op itself: an error in it is an error, not a note.
    """

    name: str
    kind: str
    stage: str
    call: Callable[[Trainee, list[Tensor]], Callable[[], object]] | None = None
    raw: bool = False


_NEVER = Task(lambda: None, lambda: None)
BASE = "torch {} fused"
VARIANTS = (
    Variant(BASE, "fused", "update"),
    Variant("torch {} foreach", "foreach", "update"),
    Variant("issp {}, no pruner", "issp", "update"),
    Variant("torch {} fused, then issp step", "fused", "pruning"),
    Variant("issp {}, pruner attached", "issp", "pruning"),
    Variant("issp op alone", "fused", "pruning", lambda t, _: t.op(True), raw=True),
    Variant("issp op alone, cold start", "fused", "pruning", lambda t, _: t.op(False), raw=True),
    Variant(
        "torch {} fused, then foreach masks", "fused", "frozen", lambda t, m: t.masked_apart(m)
    ),
    Variant("torch {} fused, then issp masks", "fused", "frozen"),
    Variant("issp {}, frozen pruner", "issp", "frozen"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `issp bench optim`."""
    parser.add_argument(
        "--model",
        nargs="+",
        choices=models.names(),
        help=f"default {' '.join(_MODELS)} (quick: the first two)",
    )
    parser.add_argument(
        "--optimizer", nargs="+", choices=FAMILIES, help="default: all (quick: adam)"
    )
    parser.add_argument("--settle", type=int, help="untimed steps first, default 100 (quick: 60)")
    options.add_arguments(parser, "limit per row and mode, default 4 (quick: 0.5)")


def run(args: argparse.Namespace) -> list[Table]:
    """Measures and prints what the arguments ask for.

    Raises:
        ValueError: an argument out of range, or no GPU for --device cuda.
        ParityError: a fused optimizer differs from the reference or from torch.
    """
    options.apply(args)
    options.at_least_one(args, "settle")
    pace = {"rounds": 5, "seconds": 0.5, "settle": 60} if args.quick else {}
    given = {"settle": args.settle, "seconds": args.seconds}
    pace |= {name: value for name, value in given.items() if value is not None}
    settings = Settings(args.sparsity, args.shrink, args.device, **pace)
    names = args.optimizer or (["adam"] if args.quick else list(FAMILIES))
    optim_parity.check(names, settings.device, settings.sparsity, settings.shrink)
    tables = []
    for model in args.model or _MODELS[: 2 if args.quick else None]:
        torch.manual_seed(0)
        network = models.build(model, args.scale).to(settings.device)
        for name in names:
            table = measure(f"{model} x{args.scale}", network, FAMILIES[name], settings)
            tables.append(table)
            print(table.markdown(), flush=True)
    options.deliver(args, tables, plot)
    return tables


def measure(
    title: str,
    network: nn.Module,
    family: Family,
    settings: Settings,
    variants: Sequence[Variant] = VARIANTS,
) -> Table:
    """Times the variants on copies of a network. Call `optim_parity.check` first.

    Args:
        title: of the network.
        network: is left as it is.
        family: of the optimizer.
        settings: see `Settings`.
        variants: the first is what the ratios refer to.
    """
    clock = (CudaClock if settings.device == "cuda" else CpuClock)(settings.flush_bytes)
    start, gradients = settled(network, family, settings.sparsity, settings.shrink, settings.settle)
    masks = [mask.float() for mask in start.pruner.masks().values()]
    machine = machine_line(settings.device)
    slow = backends.active(settings.device) == "reference"
    slow |= family.op.__name__ in backends.by_reference(settings.device)
    missing = {v: "no kernel" for v in variants if v.raw and slow}
    trainees = {
        v: make_trainee(v, start, gradients, settings) for v in variants if v not in missing
    }
    tasks = {v: make_task(v, trainee, gradients, masks) for v, trainee in trainees.items()}
    probe = Probe(settings.device, settings.probe_bytes)
    interleave([*tasks.values(), *probe.tasks], clock, settings.rounds, settings.seconds)
    numel = sum(p.numel() for p in start.parameters())
    pruned = sum(p.numel() for p in start.prunable())
    named = {variant: variant.name.format(family.name) for variant in variants}
    base = named[variants[0]]
    table = Table(
        title=f"{title}, {family.name}: {len(start.parameters())} tensors, {numel} weights, "
        f"{pruned} of them in {len(masks)} pruned tensors, float32, sparsity {settings.sparsity}, "
        f"shrink {settings.shrink}",
        machine=machine,
        unit=clock.unit,
        basis=clock.basis,
        base=base,
        ratio_name=f"over {base}",
        numel=numel,
        roof=probe.roof(clock.basis),
    )
    for variant in variants:
        traffic = family.traffic(numel, 0 if variant.stage == "update" else pruned)
        task, why = tasks.get(variant, _NEVER), missing.get(variant)
        table.lines.append(measured(named[variant], task, clock, traffic, missing=why))
    errors = {named[variant]: task.error for variant, task in tasks.items() if task.error}
    table.notes = _notes(family, named, clock, settings)
    table.notes += [
        f"{named[variant]}: {', '.join(map(str, trainee.optimizer.report))}."
        for variant, trainee in trainees.items()
        if variant.kind == "issp" and trainee.pruner
    ]
    table.notes += exceptions(table.lines, errors, settings.rounds)
    return table


def make_trainee(
    variant: Variant, start: Trainee, gradients: Gradients, settings: Settings
) -> Trainee:
    """A copy that goes on from `start` as the variant says."""
    pruned = variant.call is None and variant.stage != "update"
    trainee = Trainee.of(
        start.model, start.family, variant.kind, pruned, settings.sparsity, settings.shrink
    )
    trainee.take(start)
    trainee.use(gradients)
    if pruned and variant.stage == "frozen":
        trainee.pruner.freeze()
    return trainee


def make_task(
    variant: Variant, trainee: Trainee, gradients: Gradients, masks: list[Tensor]
) -> Task:
    """What is timed; masks: one float32 tensor per pruned weight, for the variants that need it."""
    call = trainee.optimizer.step if variant.call is None else variant.call(trainee, masks)

    def prepare() -> None:
        call()  # the copies take turns, and "warm" means that the last step touched this one
        gradients.renew()

    return Task(call, prepare, required=variant.raw)


def _notes(family: Family, named: dict[Variant, str], clock, settings: Settings) -> list[str]:
    stages = {
        stage: ", ".join(name for variant, name in named.items() if variant.stage == stage)
        for stage in ("update", "pruning", "frozen")
    }
    moved = family.traffic(1)
    return [
        "Medians, all rows in turn in one run, each on its own copy of the network and its "
        f"moments. GB/s, roofline share, spread (quartile distance over median) and best (shortest "
        f"call): column {clock.basis}.",
        f"The update alone: {stages['update']}. Update, selection, shrinkage, masks and flips: "
        f"{stages['pruning']}. Update with fixed masks, weights and moments masked: "
        f"{stages['frozen']}.",
        f"Bytes counted: {moved:g} per weight (read w and g, read and write "
        f"{'both moments' if family.adaptive else 'the momentum'}, write w), and the mask's bit "
        "where a mask is used. Two passes are credited with one: that is what the work needs.",
        f"Cold: {clock.flush_bytes / 1e6:.0f} MB were read before each call. {settings.settle} "
        "steps came before the first timed one; new gradients before each call.",
    ]
