"""Optimizer states of weights that are stored sparse: small in memory, dense in what is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from torch.utils.hooks import RemovableHandle

from issp.nn.selection import Layer
from issp.nn.sparse_training import KeptPositions, SparseTrainingLayer
from issp.pruning.prune_step import prunes_within_step

# They treat each weight by itself, so that leaving out pruned ones does not change the others.
_ELEMENTWISE = (*(Adadelta, Adagrad, Adam, Adamax, AdamW, ASGD, NAdam, RAdam, RMSprop, Rprop, SGD),)


def check_elementwise(optimizers: Sequence[Any], wrappers: Sequence[Any]) -> None:
    """Refuses optimizers that may treat a weight as a whole, or whose state is not known.

    Raises:
        ValueError: one of them, or none at all.
    """
    if not optimizers:
        raise ValueError(
            "freeze(accelerate=...) makes the optimizer's moments small: pass the optimizer to "
            "attach"
        )
    for optimizer in (*wrappers, *optimizers):
        known = type(optimizer) in _ELEMENTWISE or prunes_within_step(optimizer)
        if not known or optimizer in wrappers:
            names = ", ".join(kind.__name__ for kind in _ELEMENTWISE)
            raise ValueError(
                f"freeze(accelerate=...) does not know that {type(optimizer).__name__} treats "
                f"every weight by itself: use one of torch.optim ({names}) or of issp.optim, or "
                "freeze without accelerate"
            )


def change_states(
    optimizers: Sequence[Optimizer], layer: Layer, change: Callable[[Tensor], Tensor]
) -> None:
    """Replaces what the optimizers keep for each element of a layer's weight, in its shape now."""
    for optimizer in optimizers:
        # `state` is a defaultdict: asking with [] would create an entry.
        state = optimizer.state.get(layer.weight)
        if state:
            state.update(_changed(state, layer.weight.shape, change))


def _changed(
    state: Mapping[str, Any], shape: Sequence[int], change: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """The state of a weight, its tensors of that shape changed."""
    return {
        name: change(x) if isinstance(x, Tensor) and x.shape == shape else x
        for name, x in state.items()
    }


class DenseStateDicts:
    """Lets optimizers save and load dense moments for weights that are stored sparse.

    Args:
        layers: that train sparse.
        optimizers: of their weights.
    """

    def __init__(self, layers: Sequence[Layer], optimizers: Sequence[Optimizer]) -> None:
        self._layers = list(layers)
        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            self._handles += [
                optimizer.register_state_dict_post_hook(self._expand),
                optimizer.register_load_state_dict_pre_hook(self._gather),
            ]

    def remove(self) -> None:
        """Ends it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": []}  # copies of an optimizer have no hooks

    def _expand(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """What `state_dict` returns, with dense moments."""
        states = dict(saved["state"])
        for number, positions, values in self._numbered(optimizer):
            if number in states:
                states[number] = _changed(states[number], values.shape, positions.expand)
        return {**saved, "state": states}

    def _gather(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
        """What `load_state_dict` gets, with the kept moments of dense ones."""
        if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
            return None  # the optimizer says what is wrong
        numbers = [n for group in saved.get("param_groups", ()) for n in group.get("params", ())]
        states = dict(saved["state"])
        for index, positions, _ in self._numbered(optimizer):
            number = numbers[index] if index < len(numbers) else None
            if isinstance(states.get(number), dict):
                states[number] = _changed(states[number], positions.shape, positions.gather)
        return {**saved, "state": states}

    def _numbered(self, optimizer: Optimizer) -> Iterator[tuple[int, KeptPositions, Tensor]]:
        """Number in the optimizer, positions and values of each weight that it has."""
        modules = [layer.module for layer in self._layers]
        by_id = {id(x.weight): x for x in modules if isinstance(x, SparseTrainingLayer)}
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        for number, weight in enumerate(weights):
            if id(weight) in by_id:
                yield number, by_id[id(weight)].positions, weight
