"""The pruner's hooks on its optimizers, and a watch for optimizers that lack them."""

from __future__ import annotations

import functools
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from issp.pruning.buckets import WeightBucket
from issp.pruning.prune_step import PruneStep, PruningOptimizer, prunes_within_step

_TORCH = os.path.dirname(torch.__file__) + os.sep
_watchers: weakref.WeakSet[Hooks] = weakref.WeakSet()
_global_handles: list[RemovableHandle] = []


class Hooks:
    """Post-step hooks; copies and pickles come without, as those of torch's optimizers do.

    Attributes:
        removed: whether `detach` has removed the hooks.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._attached_to: dict[int, PruningOptimizer] = {}
        self._firing = False
        self._is_trained_by: Callable[[Optimizer], bool] | None = None
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.removed = False

    def __reduce__(self) -> tuple[type[Hooks], tuple[()]]:
        return Hooks, ()

    def attach(
        self,
        optimizers: Sequence[Optimizer],
        *,
        begin_step: Callable[[int, Tensor | None], PruneStep],
        finish_step: Callable[[int, Tensor | None, Sequence[WeightBucket] | None], None],
        is_trained_by: Callable[[Optimizer], bool],
    ) -> None:
        """Hooks the optimizers and watches all others.

        Args:
            optimizers: those that train the pruned weights.
            begin_step: called at the start of a step by optimizers that prune within it, with the
                number of the optimizer and AMP's overflow flag.
            finish_step: called after each step of each optimizer, with the same and the buckets
                that are left; None where the step has done nothing of the pruner's work.
            is_trained_by: whether an optimizer has a weight to prune.
        """
        handles: list[RemovableHandle] = []

        def hook(index: int) -> Callable[..., None]:
            def fire(optimizer: Optimizer, *_: Any) -> None:
                if handles is not self._handles:
                    return
                self._firing = True
                try:
                    attached = self._attached_to.get(index)
                    remaining = None if attached is None else attached.take_remaining()
                    # GradScaler sets the overflow flag of fused optimizers as an attribute.
                    finish_step(index, getattr(optimizer, "found_inf", None), remaining)
                finally:
                    self._firing = False

            return fire

        handles += [opt.register_step_post_hook(hook(i)) for i, opt in enumerate(optimizers)]
        self._handles, self._is_trained_by, self.removed = handles, is_trained_by, False
        self._seen = weakref.WeakSet(optimizers)
        self._attached_to = {
            index: opt
            for index, opt in enumerate(optimizers)
            if prunes_within_step(opt) and opt.attach_pruner(functools.partial(begin_step, index))
        }
        # One hook for the process, never removed: the garbage collector could remove it while torch
        # iterates over its table of hooks.
        if not _global_handles:
            _global_handles.append(register_optimizer_step_post_hook(_after_any_step))
        _watchers.add(self)

    def detach(self) -> None:
        """Removes all hooks; called from within a step, it leaves them behind without effect."""
        if not self._firing:
            # Not from within: torch iterates over its table of hooks at that moment.
            for handle in self._handles:
                handle.remove()
        for optimizer in self._attached_to.values():
            optimizer.detach_pruner()
        self._handles, self._attached_to, self._is_trained_by, self.removed = [], {}, None, True

    def check_unhooked(self, optimizer: Optimizer) -> None:
        """Warns once when an optimizer without the hook trains weights to prune."""
        if self._is_trained_by is None or optimizer in self._seen:
            return
        self._seen.add(optimizer)
        if self._is_trained_by(optimizer):
            warnings.warn(
                "an optimizer without the pruner's hook trains weights to prune: if it replaces "
                "the one given to attach, call pruner.reattach(optimizer)",
                stacklevel=_stacklevel_outside_torch(),
            )

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


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    for hooks in list(_watchers):
        hooks.check_unhooked(optimizer)


def _stacklevel_outside_torch() -> int:
    """The `stacklevel` with which the caller's warning points at the user's line.

    Torch's wrappers of `step` (hooks, schedulers, GradScaler) differ in depth.
    """
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_TORCH) or frame.f_globals.get("__name__") == __name__
    ):
        level, frame = level + 1, frame.f_back
    return level


def as_list(opt: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """One, several or no optimizer as a list, without wrappers.

    Raises:
        TypeError: something that is no torch optimizer.
    """
    several = [] if opt is None else list(opt) if isinstance(opt, list | tuple) else [opt]
    return [_without_wrappers(one) for one in several]


def _without_wrappers(optimizer: Any) -> Optimizer:
    # Wrappers (accelerate's among them) are optimizers by type but never run hooks themselves.
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"opt must be a torch optimizer, not {type(optimizer).__name__}")
    return optimizer
