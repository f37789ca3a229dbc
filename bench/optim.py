"""Update and pruning in one pass over the weights, beside torch's optimizers and a second pass.

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
from bench.harness import options, step_table
from bench.harness.machine import machine_line
from bench.harness.settings import TimingSettings
from bench.harness.table import Table, timing_notes
from bench.harness.timing import Task, interleave
from bench.harness.training import (
    OPTIMIZERS,
    Gradients,
    OptimizerSpec,
    TrainingReplica,
    steady_replica,
)
from issp.ops import backends
from issp.sr import models

EXAMPLE = "example: python -m bench optim --model edsr-l --optimizer adam --threads 2 --quick"
_MODELS = ("swinir-light", "edsr-baseline", "edsr-l", "cat-r")


@dataclass(frozen=True, kw_only=True)
class Settings(TimingSettings):
    """What to measure.

    Attributes:
        sparsity, shrink: of the pruning.
        settle: optimizer steps before the first timed one.
    """

    rounds: int = 20
    seconds: float = 4.0
    sparsity: float = 0.95
    shrink: float = 0.95
    settle: int = 100


@dataclass(frozen=True)
class Variant:
    """One row: how a copy of the network is stepped.

    Attributes:
        name: with {} for the optimizer's name.
        kind: of the optimizer, see `OptimizerSpec.build`.
        stage: "update" alone, "pruning", or "frozen".
        call: from a replica and the masks, what is timed; None: its `optimizer.step`, the pruner
            attached where there is one.
        calls_op: it calls the op itself: an error in it is an error, not a note.
    """

    name: str
    kind: str
    stage: str
    call: Callable[[TrainingReplica, list[Tensor]], Callable[[], object]] | None = None
    calls_op: bool = False


_NOT_TIMED = Task(lambda: None, lambda: None)
BASE = "torch {} fused"
VARIANTS = (
    Variant(BASE, "fused", "update"),
    Variant("torch {} foreach", "foreach", "update"),
    Variant("issp {}, no pruner", "issp", "update"),
    Variant("torch {} fused, then issp step", "fused", "pruning"),
    Variant("issp {}, pruner attached", "issp", "pruning"),
    Variant("issp op alone", "fused", "pruning", lambda replica, _: replica.fused_call(True), True),
    Variant(
        *("issp op alone, cold start", "fused", "pruning"),
        *(lambda replica, _: replica.fused_call(False), True),
    ),
    Variant(
        *("torch {} fused, then foreach masks", "fused", "frozen"),
        lambda replica, masks: replica.step_then_mask(masks),
    ),
    Variant("torch {} fused, then issp masks", "fused", "frozen"),
    Variant("issp {}, frozen pruner", "issp", "frozen"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench optim`."""
    parser.add_argument(
        "--model",
        nargs="+",
        choices=models.names(),
        help=f"default {' '.join(_MODELS)} (quick: the first two)",
    )
    parser.add_argument(
        "--optimizer", nargs="+", choices=OPTIMIZERS, help="default: all (quick: adam)"
    )
    parser.add_argument("--settle", type=int, help="untimed steps first, default 100 (quick: 60)")
    options.add_arguments(parser, "limit per row and mode, default 4 (quick: 0.5)")


def run(args: argparse.Namespace) -> None:
    """Measures and prints what the arguments ask for.

    Raises:
        ValueError: an argument out of range, or no GPU for --device cuda.
        ParityError: a fused optimizer differs from the reference or from torch.
    """
    options.apply(args)
    options.at_least_one(args, "settle")
    quick = {"rounds": 5, "seconds": 0.5, "settle": 60}
    chosen = ("sparsity", "shrink", "device", "settle", "seconds")
    settings = Settings(**options.overrides(args, chosen, quick))
    names = args.optimizer or (["adam"] if args.quick else list(OPTIMIZERS))
    optim_parity.check(names, settings.device, settings.sparsity, settings.shrink)
    tables = []
    for model in args.model or _MODELS[: 2 if args.quick else None]:
        torch.manual_seed(0)
        network = models.build(model, args.scale).to(settings.device)
        for name in names:
            table = measure(f"{model} x{args.scale}", network, OPTIMIZERS[name], settings)
            tables.append(table)
            print(table.markdown(), flush=True)
    options.write_outputs(args, tables, lambda path: step_table.plot(tables, path))


def measure(
    title: str,
    network: nn.Module,
    spec: OptimizerSpec,
    settings: Settings,
    variants: Sequence[Variant] = VARIANTS,
) -> Table:
    """Times the variants on copies of a network. Call `optim_parity.check` first.

    Args:
        title: of the network.
        network: is left as it is.
        spec: of the optimizer.
        settings: see `Settings`.
        variants: the first is what the ratios refer to.
    """
    clock = settings.clock()
    start, gradients = steady_replica(
        network, spec, settings.sparsity, settings.shrink, settings.settle
    )
    masks = [mask.float() for mask in start.pruner.masks().values()]
    machine = machine_line(settings.device)
    slow = backends.active(settings.device) == "reference"
    slow |= spec.op.__name__ in backends.by_reference(settings.device)
    missing = {v: "no kernel" for v in variants if v.calls_op and slow}
    replicas = {
        v: make_replica(v, start, gradients, settings) for v in variants if v not in missing
    }
    tasks = {v: make_task(v, replica, gradients, masks) for v, replica in replicas.items()}
    probe = settings.probe()
    interleave([*tasks.values(), *probe.tasks], clock, settings.rounds, settings.seconds)
    numel = sum(p.numel() for p in start.parameters())
    pruned = sum(p.numel() for p in start.prunable())
    named = {variant: variant.name.format(spec.name) for variant in variants}
    base = named[variants[0]]
    entries = [
        step_table.Entry(
            name=named[variant],
            task=tasks.get(variant, _NOT_TIMED),
            traffic=spec.traffic(numel, 0 if variant.stage == "update" else pruned),
            missing=missing.get(variant),
        )
        for variant in variants
    ]
    table = step_table.make(
        title=f"{title}, {spec.name}: {len(start.parameters())} tensors, {numel} weights, "
        f"{pruned} of them in {len(masks)} pruned tensors, float32, sparsity {settings.sparsity}, "
        f"shrink {settings.shrink}",
        machine=machine,
        clock=clock,
        bandwidth=probe.result(clock.basis),
        numel=numel,
        entries=entries,
        base=base,
        ratio_name=f"over {base}",
    )
    table.notes = _notes(spec, named, clock, settings)
    table.notes += [
        f"{named[variant]}: {', '.join(map(str, replica.optimizer.report))}."
        for variant, replica in replicas.items()
        if variant.kind == "issp" and replica.pruner
    ]
    table.notes += timing_notes(
        [(named[variant], task) for variant, task in tasks.items()], settings.rounds
    )
    return table


def make_replica(
    variant: Variant, start: TrainingReplica, gradients: Gradients, settings: Settings
) -> TrainingReplica:
    """A copy that goes on from `start` as the variant says."""
    pruned = variant.call is None and variant.stage != "update"
    replica = TrainingReplica.copy_of(
        start.model, start.spec, variant.kind, pruned, settings.sparsity, settings.shrink
    )
    replica.copy_state_from(start)
    replica.set_gradients(gradients)
    if pruned and variant.stage == "frozen":
        replica.pruner.freeze()
    return replica


def make_task(
    variant: Variant, replica: TrainingReplica, gradients: Gradients, masks: list[Tensor]
) -> Task:
    """What is timed; masks: one float32 tensor per pruned weight, for the variants that need it."""
    call = replica.optimizer.step if variant.call is None else variant.call(replica, masks)

    def prepare() -> None:
        call()  # the copies take turns, and "warm" means that the last step touched this one
        gradients.renew()

    return Task(call, prepare, required=variant.calls_op)


def _notes(spec: OptimizerSpec, named: dict[Variant, str], clock, settings: Settings) -> list[str]:
    stages = {
        stage: ", ".join(name for variant, name in named.items() if variant.stage == stage)
        for stage in ("update", "pruning", "frozen")
    }
    moved = spec.traffic(1)
    return [
        "Medians, all rows in turn in one run, each on its own copy of the network and its "
        f"moments. GB/s, roofline share, spread (quartile distance over median) and best (shortest "
        f"call): column {clock.basis}.",
        f"The update alone: {stages['update']}. Update, selection, shrinkage, masks and flips: "
        f"{stages['pruning']}. Update with fixed masks, weights and moments masked: "
        f"{stages['frozen']}.",
        f"Bytes counted: {moved:g} per weight (read w and g, read and write "
        f"{'both moments' if spec.adaptive else 'the momentum'}, write w), and the mask's bit "
        "where a mask is used. Two passes are credited with one: that is what the work needs.",
        f"Cold: {clock.flush_bytes / 1e6:.0f} MB were read before each call. {settings.settle} "
        "steps came before the first timed one; new gradients before each call.",
    ]
