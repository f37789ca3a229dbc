"""The tensors of one parameter group in the order of the op, found once and kept."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from issp.ops.schemas import SCRATCH_HEADER
from issp.pruning.buckets import Group, memory_order

GRADIENTS = (torch.float32, torch.bfloat16)
DEVICES = ("cpu", "cuda")


class Unsuited(Exception):
    """The op does not take these tensors; the message says why."""


def same(left: Iterable, right: Iterable) -> bool:
    """Whether two equally long sequences hold the very same objects."""
    return all(map(operator.is_, left, right))


class Plan:
    """One parameter group while its tensors stay the same: first the pruned weights, then the rest.

    Parameters without a gradient are left out, as torch leaves them. If a pruned weight is among
    them, none is shrunk by the op: it updates only, and the pruner's hook shrinks after it.

    Args:
        params: `params` of the parameter group.
        grads: their gradients, or None.
        pruned: the pruner's group for this parameter group, or None.

    Attributes:
        trained: the parameters with a gradient, in the group's order.
        weights: the same in the op's order; the first `count` are pruned.
        states: the optimizer's dict per weight, which the optimizer fills in.
        whole: whether the op does all of the pruner's work for `pruned`.

    Raises:
        Unsuited: the op does not take these weights or gradients.
    """

    def __init__(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], pruned: Group | None
    ) -> None:
        self.params, self.pruned = list(params), pruned
        self.missing = [grad is None for grad in grads]
        self._own = [] if pruned is None else pruned.parameters()
        place = {id(p): i for i, p in enumerate(params) if grads[i] is not None}
        self.whole = pruned is not None and all(id(p) in place for p in self._own)
        first = [place[id(p)] for p in self._own] if self.whole else []
        self.count = len(first)
        self._order = first + sorted(set(place.values()) - set(first))
        self.weights = [params[i] for i in self._order]
        self.trained = [p for p, out in zip(params, self.missing, strict=True) if not out]
        _check(self.trained)
        self._turns = [memory_order(w) for w in self.weights]
        if any(turn == [] for turn in self._turns):
            raise Unsuited("a weight is a view with gaps or overlaps in memory")
        self._plain = not any(self._turns)
        self._copied = not self._check_grads(grads)
        self.states: list[dict] = []

    def holds(self, params: Sequence[Tensor], missing: list[bool], pruned: Group | None) -> bool:
        """Whether this is still the plan for these parameters."""
        return (
            self.pruned is pruned
            and self.missing == missing
            and same(self.params, params)
            and (pruned is None or same(self._own, pruned.parameters()))
        )

    def grads(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients in the op's order and memory layout; from all of the group's."""
        ordered = [grads[i] for i in self._order]
        if self._copied:
            ordered = [_like(g, w) for g, w in zip(ordered, self.weights, strict=True)]
        return self.views(ordered)

    def views(self, tensors: list[Tensor]) -> list[Tensor]:
        """One tensor per weight as the op wants it: contiguous (channels_last is permuted)."""
        if self._plain:
            return tensors
        return [
            x if turn is None else x.permute(turn)
            for x, turn in zip(tensors, self._turns, strict=True)
        ]

    def folded(self) -> list[Tensor]:
        """The weights as the op wants them: as `views`, N:M weights as their pattern reads them."""
        views = self.views(self.weights)
        return (
            self.pruned.folded(views[: self.count]) + views[self.count :] if self.whole else views
        )

    def settle(self, state: dict, key: str, t: int) -> None:
        """Gives a moment the memory layout of its weight, where loading has brought another.

        Raises:
            Unsuited: it is of another shape, dtype or device.
        """
        moment, weight, turn = state[key], self.weights[t], self._turns[t]
        if not isinstance(moment, Tensor) or (moment.shape, moment.dtype, moment.device) != (
            weight.shape,
            weight.dtype,
            weight.device,
        ):
            raise Unsuited(f"the state's {key} is not like its weight")
        if not (moment if turn is None else moment.permute(turn)).is_contiguous():
            state[key] = _like(moment, weight)

    def _check_grads(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether all gradients lie in memory as their weights do."""
        for i in self._order:
            grad, weight = grads[i], self.params[i]
            if grad.layout != torch.strided or grad.dtype not in GRADIENTS:
                raise Unsuited(f"gradients of {grad.dtype}, {grad.layout}")
            if grad.device != weight.device:
                raise Unsuited("a gradient on another device than its weight")
        ordered = [grads[i] for i in self._order]
        return all(g.is_contiguous() for g in self.views(ordered))


def _check(weights: Sequence[Tensor]) -> None:
    for weight in weights:
        if type(weight) not in (Tensor, torch.nn.Parameter):
            raise Unsuited(f"weights of type {type(weight).__name__}")  # DTensor among them
        if weight.dtype != torch.float32:
            raise Unsuited(f"weights of {weight.dtype}")
        if weight.device != weights[0].device:
            raise Unsuited("weights on several devices")
        if weight.device.type not in DEVICES:
            raise Unsuited(f"weights on {weight.device.type}")
        if weight.numel() == 0:
            raise Unsuited("an empty weight")


def _like(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=x.dtype).copy_(x)


def no_state(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """k, thresholds, masks, flips and scratch of a call that prunes nothing."""
    integers = torch.empty(0, dtype=torch.int64, device=device)
    return (
        integers,
        torch.empty(0, device=device),
        torch.empty(0, dtype=torch.int32, device=device),
        integers.clone(),
        torch.zeros(SCRATCH_HEADER, dtype=torch.int32, device=device),
    )
