"""The pruner's hooks on its optimizers, and the watch for optimizers that lack them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Hooks:
    """Post-step hooks; copies and pickles come without, as those of torch's optimizers do."""

    def __init__(self) -> None:
        self._handles: list = []
        self._watch = None
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
    ) -> None:
        """Hooks the optimizers and watches all others.

        Args:
            optimizers: each calls `fire` with its number and AMP's overflow flag after its steps.
            fire: a bound method.
            trains: bound method; whether an optimizer has a weight to prune.
        """

        def hook(index: int) -> Callable:
            # GradScaler hands fused optimizers their overflow flag as an attribute.
            return lambda opt, *_: fire(index, getattr(opt, "found_inf", None))

        self._handles = [opt.register_step_post_hook(hook(i)) for i, opt in enumerate(optimizers)]
        self.removed = False
        strangers, known = weakref.WeakSet(), weakref.WeakSet(optimizers)
        # Weak: torch's list of global hooks must not keep a model alive.
        ask = weakref.WeakMethod(trains)

        def look(opt: Optimizer, *_) -> None:
            if opt in known or opt in strangers:
                return
            strangers.add(opt)
            question = ask()
            if question is not None and question(opt):
                warnings.warn(
                    "an optimizer without the pruner's hook trains weights to prune: if it "
                    "replaces the one given to attach, call pruner.reattach(optimizer)",
                    stacklevel=4,
                )

        self._watch = register_optimizer_step_post_hook(look)
        weakref.finalize(trains.__self__, self._watch.remove)

    def detach(self) -> None:
        """Removes all hooks."""
        for handle in (*self._handles, self._watch):
            if handle is not None:
                handle.remove()
        self._handles, self._watch, self.removed = [], None, True

    def present(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether every optimizer still has its hook."""
        return len(self._handles) == len(optimizers) and all(
            handle.id in opt._optimizer_step_post_hooks
            for opt, handle in zip(optimizers, self._handles, strict=True)
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
