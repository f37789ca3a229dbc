"""The pruner's hooks on its optimizers, and a watch for optimizers that lack them."""

from __future__ import annotations

import functools
import gc
import operator
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from issp.pruning.buckets import WeightBucket
from issp.pruning.prune_step import PruneStep, PruningOptimizer, prunes_within_step
from issp.pruning.untraced import untraced
from issp.pruning.wrappers import (
    changes_weights_afterwards,
    has_own_state,
    holds,
    running_steps,
    runs_hooks,
)

_TORCH = os.path.dirname(torch.__file__) + os.sep
_watchers: list[weakref.ref[Hooks]] = []  # every step goes through it: a WeakSet is slower
_global_handles: list[RemovableHandle] = []
# Number of the optimizer, AMP's overflow flag, and the buckets that are left: see `Work`.
_Step = tuple[int, Tensor | None, Sequence[WeightBucket] | None]


@dataclass(frozen=True)
class Work:
    """What a pruner does in the steps of its optimizers.

    Args:
        begin_step: called at the start of a step by optimizers that prune within it, with the
            number of the optimizer, AMP's overflow flag, why the step must not prune (or ""), and
            whether it is to be exact, see `BeginStep`.
        penalize: called once before each step of each optimizer, when the gradients are ready, with
            the number and AMP's scale of the gradients (or None); None: nothing is to be done then.
        finish_step: called once after each step of each optimizer, with the number, the flag and
            the buckets that are left; None where the step has done nothing of the pruner's work.
        weights: the weights to prune.
        describe: says which pruner it is.
        wrappers: optimizers around those hooked that keep weights or moments of their own; grows
            by those that are seen at work.
    """

    begin_step: Callable[[int, Tensor | None, str, bool], PruneStep]
    penalize: Callable[[int, Tensor | None], None] | None
    finish_step: Callable[[int, Tensor | None, Sequence[WeightBucket] | None], None]
    weights: Callable[[], Iterable[Tensor]]
    describe: Callable[[], str]
    wrappers: list[Any]

    def is_trained_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer has one of the weights."""
        return bool(self.trained_by([optimizer]))

    def trained_by(self, optimizers: Iterable[Optimizer]) -> set[int]:
        """Those of the weights, by id, that some of the optimizers have."""
        weights = set(map(id, self.weights()))
        groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
        return weights & {id(parameter) for params in groups for parameter in params}

    def pruned_after(self, optimizers: Sequence[Optimizer]) -> set[int]:
        """The weights, by id, that are pruned after steps of the optimizers, or by hand if none."""
        return self.trained_by(optimizers) if optimizers else set(map(id, self.weights()))


class Hooks:
    """Post-step hooks; copies and pickles come without, as those of torch's optimizers do.

    Attributes:
        removed: whether `detach` has removed the hooks.
        fired: whether the hooks that are attached now have done a step's work.
    """

    def __init__(self) -> None:
        self.fired = False
        self._handles: list[RemovableHandle] = []
        self._pre_handles: list[RemovableHandle] = []
        self._hooked: list[Optimizer] = []
        self._attached_to: dict[int, PruningOptimizer] = {}
        # Number of an optimizer that has stepped -> the wrapper whose step is still running, and
        # AMP's overflow flag.
        self._pending: dict[int, tuple[Optimizer, Tensor | None]] = {}
        self._firing = False
        self._work: Work | None = None
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.removed = False

    def __reduce__(self) -> tuple[type[Hooks], tuple[()]]:
        return Hooks, ()

    def attach(self, optimizers: Sequence[Optimizer], work: Work) -> None:
        """Hooks the optimizers, those that train the pruned weights, and watches all others.

        Without any, the weights are pruned by hand: no other pruner can be attached to them.

        Raises:
            ValueError: an optimizer runs no hooks, or prunes some of the weights already; nothing
                has been changed.
        """
        self.check(optimizers, work)
        handles: list[RemovableHandle] = []

        def hook(index: int) -> Callable[..., None]:
            def fire(optimizer: Optimizer, *_: Any) -> None:
                if handles is self._handles:
                    self._after_step(index, optimizer)

            return untraced(fire)

        handles += [opt.register_step_post_hook(hook(i)) for i, opt in enumerate(optimizers)]
        if work.penalize is not None:
            self._pre_handles = [
                opt.register_step_pre_hook(
                    untraced(functools.partial(self._before_step, handles, i))
                )
                for i, opt in enumerate(optimizers)
            ]
        self._handles, self._hooked, self._work = handles, list(optimizers), work
        self._pending, self.removed, self.fired = {}, False, False
        self._seen = weakref.WeakSet(optimizers)
        self._attached_to = {
            index: opt
            for index, opt in enumerate(optimizers)
            if prunes_within_step(opt) and opt.attach_pruner(functools.partial(self._begin, index))
        }
        # One hook for the process, never removed: the garbage collector could remove it while torch
        # iterates over its table of hooks.
        if not _global_handles:
            _global_handles.append(register_optimizer_step_post_hook(untraced(_after_any_step)))
        if self not in _living():
            _watchers.append(weakref.ref(self, _watchers.remove))

    def check(self, optimizers: Sequence[Optimizer], work: Work) -> None:
        """What `attach` raises, without attaching; hooks of this pruner are in nobody's way."""
        for optimizer in optimizers:
            if not runs_hooks(optimizer):
                raise ValueError(
                    f"opt: {type(optimizer).__name__} runs no hooks after its step: attach it with "
                    "hook=False and call pruner.step() after each of its steps"
                )
            for name in self._other_pruners(optimizer, work):
                raise ValueError(
                    f"the optimizer prunes these weights already, for {name}: call finalize() or "
                    "detach() of that pruner first, or build a new optimizer"
                )
        self._check_elsewhere(optimizers, work)

    def _check_elsewhere(self, optimizers: Sequence[Optimizer], work: Work) -> None:
        """Refuses weights that another pruner shrinks, by hand or after other optimizers' steps."""
        weights = work.pruned_after(optimizers)
        if not any(hooks.shrinks(weights) for hooks in self._others()):
            return
        gc.collect()  # a pruner that nobody has any more stays in a cycle with its hooks
        for name in [name for hooks in self._others() if (name := hooks.shrinks(weights))]:
            raise ValueError(
                f"another pruner has these weights already, {name}: call its reattach(opt) if this "
                "optimizer replaces the one that it knows, else its finalize() or detach()"
            )

    def _others(self) -> list[Hooks]:
        return [hooks for hooks in _living() if hooks is not self]

    def _other_pruners(self, optimizer: Optimizer, work: Work) -> list[str]:
        """The other pruners that prune some of the weights in the optimizer's steps."""
        weights = set(map(id, work.weights()))
        return [name for hooks in self._others() if (name := hooks.prunes(optimizer, weights))]

    def _begin(self, index: int, found_inf: Tensor | None, exact: bool = False) -> PruneStep:
        assert self._work is not None
        running = running_steps()
        if running is None:
            deferred = "no step: it creates the state"
        else:
            wrapper = self._outermost(running)
            deferred = f"shrunk after the step of {type(wrapper).__name__}" if wrapper else ""
        return self._work.begin_step(index, found_inf, deferred, exact)

    def _before_step(
        self,
        handles: list[RemovableHandle],
        index: int,
        optimizer: Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a step of optimizer `index`; a closure is followed by the penalty each time."""
        running = running_steps()
        if handles is not self._handles or running is None or self._work is None:
            return None
        if any(one is optimizer for one in running[1:]):
            return None  # called by `super().step()`: the outer step has been through this
        penalize = self._work.penalize
        assert penalize is not None
        # GradScaler sets the scale of fused optimizers, whose gradients are still scaled.
        scale = getattr(optimizer, "grad_scale", None)
        closure = kwargs["closure"] if "closure" in kwargs else (args[1:2] or (None,))[0]
        if closure is None:
            penalize(index, scale)
            return None

        def penalized() -> Any:
            with torch.enable_grad():
                loss = closure()
            penalize(index, scale)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": penalized}
        return (args[0], penalized, *args[2:]), kwargs

    def _outermost(self, running: Sequence[Optimizer]) -> Optimizer | None:
        """The outermost wrapper of the running step that may change the weights afterwards."""
        if len(running) < 2:
            return None
        assert self._work is not None
        for one in reversed(running[1:]):
            if (
                one is not running[0]
                and changes_weights_afterwards(one)
                and self._work.is_trained_by(one)
            ):
                return one
        return None

    def _after_step(self, index: int, optimizer: Optimizer) -> None:
        """After the step of optimizer `index`, which a subclass or a wrapper may have called."""
        running = running_steps()
        if running is not None and any(one is optimizer for one in running[1:]):
            return  # called by `super().step()`: the hook fires once more
        attached = self._attached_to.get(index)
        remaining = None if attached is None else attached.take_remaining()
        if running is None:
            return
        if not running:
            self._check_compiled()
        # GradScaler sets the overflow flag of fused optimizers as an attribute.
        found_inf = getattr(optimizer, "found_inf", None)
        wrapper = self._outermost(running)
        if wrapper is None:
            self._finish([(index, found_inf, remaining), *self._take_waiting(optimizer)])
            return
        self._pending[index] = (wrapper, found_inf)
        assert self._work is not None
        for one in running[1:]:
            if self._work.is_trained_by(one) and has_own_state(
                one, [*self._hooked, *self._work.wrappers]
            ):
                self._work.wrappers.append(one)

    def _check_compiled(self) -> None:
        """Refuses wrappers in a compiled step, where nothing tells whose step is running."""
        for one in [] if self._work is None else self._work.wrappers:
            raise ValueError(
                f"torch.compile(opt.step) hides when the step of {type(one).__name__} around the "
                "pruned optimizer ends: compile the model, and let the optimizer step as it is"
            )

    def after_other_step(self, optimizer: Optimizer) -> None:
        """After the step of any optimizer: does what waits for it, or warns that hooks lack."""
        if not self._hooked or any(one is optimizer for one in self._hooked):
            return
        if all(one is not optimizer for one, _ in self._pending.values()):
            self._check_unhooked(optimizer)
        elif sum(one is optimizer for one in running_steps() or ()) == 1:
            self._finish(self._take_waiting(optimizer))

    def _take_waiting(self, optimizer: Optimizer) -> list[_Step]:
        """The steps whose work waits for the end of this optimizer's."""
        if not self._pending:
            return []
        waiting = {i: flag for i, (one, flag) in self._pending.items() if one is optimizer}
        self._pending = {i: x for i, x in self._pending.items() if i not in waiting}
        return [(index, flag, None) for index, flag in waiting.items()]

    def _finish(self, steps: list[_Step]) -> None:
        self._firing = self.fired = True
        try:
            for index, found_inf, remaining in sorted(steps, key=operator.itemgetter(0)):
                if self._work is not None:  # a callback may have detached the pruner
                    self._work.finish_step(index, found_inf, remaining)
        finally:
            self._firing = False

    def detach(self) -> None:
        """Removes all hooks; called from within a step, it leaves them behind without effect."""
        if not self._firing:
            # Not from within: torch iterates over its table of hooks at that moment.
            for handle in (*self._handles, *self._pre_handles):
                handle.remove()
        for optimizer in self._attached_to.values():
            optimizer.detach_pruner()
        self._handles, self._pre_handles = [], []
        self._hooked, self._attached_to, self._pending = [], {}, {}
        self._work, self.removed, self.fired = None, True, False

    def _check_unhooked(self, optimizer: Optimizer) -> None:
        """Warns once when an optimizer without the hook trains weights to prune."""
        assert self._work is not None
        if optimizer in self._seen:
            return
        if holds(optimizer, self._hooked):
            self._seen.add(optimizer)
            return
        running = running_steps() or ()
        if any(one is hooked for one in running for hooked in self._hooked):
            return  # the hooked optimizer does a part of its work by this one
        self._seen.add(optimizer)
        if self._work.is_trained_by(optimizer) and not self._other_pruners(optimizer, self._work):
            warnings.warn(
                "an optimizer without the pruner's hook trains weights to prune: if it replaces "
                "the one given to attach, call pruner.reattach(optimizer)",
                stacklevel=_stacklevel_outside_torch(),
            )

    def prunes(self, optimizer: Optimizer, weights: set[int]) -> str:
        """Which pruner prunes some of the weights (by id) in the optimizer's steps, or ""."""
        if self._work is None or not any(one is optimizer for one in self._hooked):
            return ""
        own = set(map(id, self._work.weights()))
        return self._work.describe() if own & weights else ""

    def shrinks(self, weights: set[int]) -> str:
        """Which pruner prunes some of the weights (by id) in any way, or ""."""
        if self._work is None or not self._work.pruned_after(self._hooked) & weights:
            return ""
        return self._work.describe()

    def present(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether every optimizer still has its hook."""
        return len(self._handles) == len(optimizers) and all(
            handle.id in opt._optimizer_step_post_hooks
            for opt, handle in zip(optimizers, self._handles, strict=True)
        )

    def warn_if_missing(self, optimizers: Sequence[Optimizer]) -> None:
        """Warns of a hook that is gone without `detach`; users' calls call it."""
        if optimizers and not (self.present(optimizers) or self.removed):
            warnings.warn(
                "the optimizer does not have the pruner's hook (copying and pickling drop it): "
                "call pruner.reattach(optimizer)",
                stacklevel=3,
            )


def _living() -> list[Hooks]:
    return [hooks for ref in list(_watchers) if (hooks := ref()) is not None]


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    for hooks in _living():
        hooks.after_other_step(optimizer)


def _stacklevel_outside_torch() -> int:
    """The `stacklevel` with which the caller's warning points at the user's line.

    Torch's wrappers of `step` (hooks, schedulers, GradScaler) differ in depth.
    """
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_TORCH)
        or frame.f_globals.get("__name__", "").startswith(__package__)
    ):
        level, frame = level + 1, frame.f_back
    return level
