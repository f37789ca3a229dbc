"""The pruner's hooks on its optimizers, and the watch for optimizers that lack them."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from issp.pruning.buckets import Turn

_watchers: weakref.WeakSet[Hooks] = weakref.WeakSet()


def _watch(hooks: Hooks) -> None:
    # One hook for the process, never removed: a removal by the garbage collector could come while
    # torch goes through its table of hooks.
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_look))
    _watchers.add(hooks)


def _look(opt: Optimizer, *_) -> None:
    for hooks in list(_watchers):
        hooks.look(opt)


_watching: list = []


class Hooks:
    """Post-step hooks; copies and pickles come without, as those of torch's optimizers do."""

    def __init__(self) -> None:
        self._handles: list = []
        self._followers: list = []
        self._firing = False
        self._trains: Callable[[Optimizer], bool] | None = None
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.removed = False  # on purpose, by `detach`

    def __getstate__(self) -> dict:
        return {"removed": False}

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def attach(
        self,
        optimizers: Sequence[Optimizer],
        fire: Callable[[int, Tensor | None], None],
        trains: Callable[[Optimizer], bool],
        prepare: Callable[[int, Tensor | None], Turn],
    ) -> None:
        """Hooks the optimizers and watches all others.

        Args:
            optimizers: each calls `fire` with its number and AMP's overflow flag after its steps.
            fire: a step of the pruner.
            trains: whether an optimizer has a weight to prune.
            prepare: called with the same before an update by optimizers that can do the pruner's
                work within their step; `fire` does what they leave.
        """
        handles: list = []

        def hook(index: int) -> Callable:
            def fired(opt: Optimizer, *_) -> None:
                if handles is not self._handles:
                    return
                self._firing = True
                try:
                    # GradScaler hands fused optimizers their overflow flag as an attribute.
                    fire(index, getattr(opt, "found_inf", None))
                finally:
                    self._firing = False

            return fired

        handles += [opt.register_step_post_hook(hook(i)) for i, opt in enumerate(optimizers)]
        self._handles, self._trains, self.removed = handles, trains, False
        self._seen = weakref.WeakSet(optimizers)
        self._followers = [
            opt
            for i, opt in enumerate(optimizers)
            if hasattr(opt, "follow_pruner") and opt.follow_pruner(functools.partial(prepare, i))
        ]
        _watch(self)

    def detach(self) -> None:
        """Removes all hooks; called from within a step, it leaves them behind without effect."""
        if not self._firing:
            # Not from within: torch is going through its table of hooks just then.
            for handle in self._handles:
                handle.remove()
        for opt in self._followers:
            opt.leave_pruner()
        self._handles, self._followers, self._trains, self.removed = [], [], None, True

    def look(self, opt: Optimizer) -> None:
        """Warns once when an optimizer without the hook trains weights to prune."""
        if self._trains is None or opt in self._seen:
            return
        self._seen.add(opt)
        if self._trains(opt):
            warnings.warn(
                "an optimizer without the pruner's hook trains weights to prune: if it replaces "
                "the one given to attach, call pruner.reattach(optimizer)",
                stacklevel=5,
            )

    def present(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether every optimizer still has its hook."""
        return len(self._handles) == len(optimizers) and all(
            handle.id in opt._optimizer_step_post_hooks
            for opt, handle in zip(optimizers, self._handles, strict=True)
        )

    def warn_if_missing(self, optimizers: Sequence[Optimizer]) -> None:
        """Warns when a hook is gone that nobody removed; to be called by what users' calls call."""
        if optimizers and not (self.present(optimizers) or self.removed):
            warnings.warn(
                "the optimizer does not have the pruner's hook (copying and pickling drop it): "
                "call pruner.reattach(optimizer)",
                stacklevel=4,
            )


def optimizers(opt: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """One, several or no optimizer as a list.

    Raises:
        TypeError: something that is no torch optimizer.
    """
    given = [] if opt is None else list(opt) if isinstance(opt, list | tuple) else [opt]
    found = []
    for one in given:
        # Wrappers (accelerate's among them) are optimizers by type but never run hooks themselves.
        while not hasattr(one, "_optimizer_step_post_hooks") and hasattr(one, "optimizer"):
            one = one.optimizer
        if not isinstance(one, Optimizer):
            raise TypeError(f"opt must be a torch optimizer, not {type(one).__name__}")
        found.append(one)
    return found
