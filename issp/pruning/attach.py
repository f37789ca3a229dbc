"""`attach`: checks what a user asks for, selects the layers, and builds the pruner."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from issp.nn.selection import select, unpruned_weights
from issp.ops.keep import Keep, Unit
from issp.pruning import methods
from issp.pruning.arguments import check_kinds
from issp.pruning.ema import EMAWeights
from issp.pruning.pruner import Pruner
from issp.pruning.schedules import Schedule, final_sparsity
from issp.pruning.wrappers import see_through


def attach(
    model: nn.Module,
    opt: Optimizer | Sequence[Optimizer] | None = None,
    sparsity: float | None = None,
    shrink: float | None = None,
    *,
    method: str | methods.Method = "iss-p",
    types: type | Sequence[type] = (nn.Conv2d, nn.Linear),
    exclude: str | Iterable[str] = (),
    pattern: Keep | None = None,
    unit: Unit | Sequence[int] | None = None,
    overrides: Mapping[str, float | Keep] | None = None,
    schedule: Schedule | None = None,
    freeze_at: int | None = None,
    ema: nn.Module | Mapping[str, Tensor] | None = None,
    from_zeros: bool = False,
    hook: bool = True,
) -> Pruner:
    """Prunes `model` while it trains: after every `opt.step()` the smallest weights are shrunk.

    A layer is pruned from the moment its weight is trained: it requires gradients and the optimizer
    has it (`add_param_group` may bring it later). Parameter names of the model do not change.

    Args:
        model: as it is trained, wrappers included: the names of layers are those inside of them
            (DistributedDataParallel, torch.compile, Fabric, averaged models, in any order).
        opt: its optimizer, or a list: then a weight is shrunk after its own optimizer's step, and
            the first one counts the steps. Wrappers (Lookahead, SAM, accelerate, Fabric) are seen
            through. None: call `pruner.step()` yourself.
        sparsity: share of each layer's weights to prune, 0..1; without it 0.95 (SLS: 0.9375), or
            where the schedule ends. Counts follow `issp.num_pruned`.
        shrink: factor alpha of ISS-P in 0..1, without it 0.95; other methods have none.
        method: a name, or one of the classes of `issp.methods` with its options: "iss-p", "iht",
            "iss-r", "iss-r-stale", "l1", "scratch", "srp", "assl", "sls", "dense". "l1" and
            "scratch" fix the masks at once, so load pretrained weights before. See docs/method.md,
            section 2.4.
        types: module classes whose `weight` is pruned.
        exclude: name patterns: globs, or "re:" and a regular expression, for whole module names. A
            container stands for everything inside it.
        pattern: the N:M pattern of all layers, instead of a sparsity. A layer that it does not
            divide is an error, or with `Keep(..., tail="dense")` stays dense and says so in the
            summary.
        unit: prunes units of v output rows x c input channels at one kernel position, (v, c) or
            `issp.Unit`: of a layer's units those of the smallest L1 norm. A sparsity counts units,
            a `Keep` has its own. A layer that it does not divide is an error, or with
            `Unit(v, c, tail="dense")` stays dense and says so in the summary.
        overrides: name patterns -> sparsity in 0..1 or `issp.Keep`; the last match wins. A schedule
            scales these ratios too; an N:M pattern holds as soon as the schedule is above 0.
        schedule: `issp.Cubic`, `issp.Linear`, `issp.Constant`, in optimizer steps.
        freeze_at: optimizer step after which the masks are fixed, as `Pruner.freeze` does.
        ema: moving average of the model (a module with the same names, torch's AveragedModel, or a
            dict from parameter name to tensor) that gets the masks as well when they are fixed.
        from_zeros: the model is sparse already: its zeros become the masks, fixed from the start,
            and `sparsity` has no meaning.
        hook: False leaves the optimizer alone; call `pruner.step()` after each of its steps.

    Raises:
        ValueError: a name pattern that matches nothing, no layer to prune, an impossible ratio or
            schedule, a pattern or unit that does not divide a layer, an optimizer without any of
            the weights, or with another pruner of them, or one that cannot be followed.
        TypeError: an argument of a wrong kind.

    Source: docs/method.md, section 1 (the paper's figure 1).
    """
    types = types if isinstance(types, type) else _as_tuple(types)
    exclude = _as_tuple(exclude)
    overrides = {} if overrides is None else overrides
    check_kinds(
        model=model,
        sparsity=sparsity,
        shrink=shrink,
        types=types,
        exclude=exclude,
        pattern=pattern,
        unit=unit,
        overrides=overrides,
        schedule=schedule,
        freeze_at=freeze_at,
    )
    chosen = _method(method, shrink)
    if pattern is not None and sparsity is not None:
        raise ValueError(f"sparsity is {sparsity} beside pattern {pattern}: give one of them")
    if not chosen.prunes:
        if any(x is not None for x in (sparsity, pattern, unit, schedule)) or overrides:
            raise ValueError(
                f"{chosen.name} prunes nothing: drop sparsity, pattern, unit, overrides and "
                "schedule"
            )
        sparsity = 0.0
    default = chosen.default_sparsity if sparsity is None and schedule is None else sparsity
    sparsity = final_sparsity(default, schedule, freeze_at, from_zeros)
    target = sparsity if pattern is None else pattern
    units = _unit(unit, pattern, chosen, from_zeros)
    _check_method(chosen, target, overrides, schedule)
    if chosen.skips_undivided:
        target, overrides = _skipping(target), {n: _skipping(x) for n, x in overrides.items()}
    layers = select(model, types, exclude, overrides, target, units)
    if units is not None and not any(layer.unit for layer in layers):
        raise ValueError("unit has no effect: every layer has a Keep or the sparsity 0, drop it")
    methods.check_shards(chosen, layers)
    if not from_zeros:
        chosen.prepare(model, layers)
    unpruned = unpruned_weights(model, exclude, layers)
    pruner = Pruner(
        model,
        *see_through(opt),
        layers,
        unpruned=unpruned,
        method=chosen,
        schedule=schedule,
        freeze_at=freeze_at,
        ema=None if ema is None else EMAWeights(ema, layers),
        hook=hook,
    )
    try:
        pruner.start(from_zeros)
    except ValueError:
        pruner.detach()
        raise
    return pruner


def _unit(
    unit: Unit | Sequence[int] | None,
    pattern: Keep | None,
    method: methods.Method,
    from_zeros: bool,
) -> Unit | None:
    """The unit that the arguments name; refuses one that would have no effect."""
    if unit is None:
        return None
    if pattern is not None:
        raise ValueError(f"unit is {unit} beside pattern {pattern}: give v and c to the Keep")
    if from_zeros:
        raise ValueError("from_zeros takes its masks from the weights' zeros: drop unit")
    if not method.takes_units:
        raise ValueError(f"{method.name} prunes single weights: drop unit, or use iss-p or iht")
    if isinstance(unit, Unit):
        return unit
    v, c = unit
    return Unit(v, c)


def _method(method: str | methods.Method, shrink: float | None) -> methods.Method:
    """The method, with `shrink` if that is an option of it."""
    if shrink is None:
        return methods.create(method)
    chosen = methods.create(method)
    if isinstance(method, str) and "shrink" in chosen.options():
        return methods.create(method, shrink=shrink)
    if isinstance(method, str):
        warnings.warn(f'method "{method}" does not use shrink: drop it', stacklevel=3)
        return chosen
    raise ValueError(f"shrink is {shrink}: pass it to {type(method).__name__}() if it has one")


def _check_method(
    method: methods.Method,
    target: float | Keep,
    overrides: Mapping[str, float | Keep],
    schedule: Schedule | None,
) -> None:
    """Refuses settings that have no meaning for a method."""
    if schedule is not None and not method.ranks:
        raise ValueError(f"schedule has no meaning for {method.name}, which fixes its index sets")
    if schedule is not None and method.fixes_masks:
        raise ValueError(f"schedule has no meaning for {method.name}: it prunes once, at attach")
    if not method.takes_patterns and any(
        isinstance(x, Keep) for x in (target, *overrides.values())
    ):
        raise ValueError(f"an N:M pattern has no meaning for {method.name}: pass a sparsity")


def _skipping(target: float | Keep) -> float | Keep:
    return dataclasses.replace(target, tail="dense") if isinstance(target, Keep) else target


def _as_tuple(value: Any) -> Any:
    """Several values as a tuple, one in a tuple of its own; what is neither stays."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Iterable) else value
