"""The tensors of one parameter group in the order of the op, looked up once and kept."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from issp.ops.validation.pruning import check_no_overlap, numbered
from issp.optim.arguments import PruneState, no_state
from issp.pruning.buckets import WeightBucket
from issp.pruning.memory_order import ContiguousViews, memory_order, permuted, same_objects

GRAD_DTYPES = (torch.float32, torch.bfloat16)
DEVICES = ("cpu", "cuda")


_kind = operator.attrgetter("shape", "dtype", "device", "layout")


class UnsupportedByFusedOp(Exception):
    """The op does not take these tensors; the message says why."""


class FusedStepPlan:
    """One parameter group while its tensors stay the same: first the pruned weights, then the rest.

    Parameters without a gradient are left out, as torch leaves them. If a pruned weight is among
    them, the op shrinks no weight: it updates only, and the pruner's hook shrinks after it.

    Args:
        params: `params` of the parameter group.
        bucket: the pruned weights of this parameter group, or None.

    Attributes:
        bucket: as in Args.
        trained: the parameters with a gradient, in the order of the parameter group.
        weights: the same in the order of the op; the first `num_pruned` are pruned.
        num_pruned: how many weights the op prunes.
        prunes_all: whether the op does all of the pruner's work for `bucket`.
        prune_state: the bucket's masks and counts, and the N:M patterns of the pruned weights, as
            keywords of `PruneArgs`; empty where nothing is pruned.
        states: the optimizer's dict of each weight; empty without state.
        state_tensors: name -> that entry of all `states`, in the order of the weights.
        known_states: (its dict, the entries in the order of the names) of each weight.
        has_empty_states: whether an entry is still None.

    Raises:
        UnsupportedByFusedOp: the op does not take these weights or gradients.
    """

    def __init__(self, params: Sequence[Tensor], bucket: WeightBucket | None) -> None:
        self.bucket = bucket
        self.bind_states([], ())
        by_id = {id(p): p for p in params if p.grad is not None}
        self.trained = list(by_id.values())
        _check_weights(self.trained)
        in_bucket = {} if bucket is None else {id(w): w for w in bucket.weights}
        self.prunes_all = bucket is not None and in_bucket.keys() <= by_id.keys()
        pruned = in_bucket if self.prunes_all else {}
        self.num_pruned = len(pruned)
        self.weights = [*pruned.values(), *(p for p in self.trained if id(p) not in pruned)]
        self._orders = [memory_order(w) for w in self.weights]
        if any(order == [] for order in self._orders):
            raise UnsupportedByFusedOp("a weight is a view with gaps or overlaps in memory")
        self._all_contiguous = not any(self._orders)
        _check_grads(self.weights)
        self._copies_grads: bool | None = None  # the first gradients decide
        self._views = ContiguousViews(self._orders, bucket.flattened if pruned and bucket else ())
        self.prune_state = self._prune_state()
        # What the plan depends on; see `is_current`.
        self._params = list(params)
        self._untrained = [p for p in params if p.grad is None]
        self._bucket_version = 0 if bucket is None else bucket.version

    def _prune_state(self) -> dict[str, Any]:
        if self.bucket is None or not self.prunes_all:
            device = self.weights[0].device if self.weights else torch.device("cpu")
            return {**no_state(device)._asdict(), "patterns": []}
        s = self.bucket.state
        tensors = PruneState(s.k, s.thresholds, masks=s.packed, flips=s.flips, scratch=s.scratch)
        return {**tensors._asdict(), "patterns": s.patterns}

    def is_current(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], bucket: WeightBucket | None
    ) -> bool:
        """Whether nothing has changed that the plan was made from, the optimizer's state aside.

        That is: the bucket with the memory of its weights, the parameters, and which of them have
        gradients. Dtype, layout and memory order of gradients and of weights that are not pruned
        are left to the op: it refuses what does not fit, and the plan is made anew.
        """
        return (
            self.bucket is bucket
            and (bucket is None or self._bucket_version == bucket.version)
            and len(self._params) == len(params)
            and same_objects(self._params, params)
            and len(grads) == len(self.weights)
            and all(p.grad is None for p in self._untrained)
        )

    def grads(self) -> list[Tensor]:
        """The gradients as they are now, in the order of the op, without those that are None."""
        return [grad for w in self.weights if (grad := w.grad) is not None]

    def grad_views(self, grads: list[Tensor]) -> list[Tensor]:
        """The gradients as the op takes them; those in another memory order are copied.

        If the first ones need no copy, the op is left to refuse later ones that do.
        """
        views = self.contiguous_views(grads)
        if self._copies_grads is None:
            self._copies_grads = not all(map(Tensor.is_contiguous, views))
        if not self._copies_grads:
            return views
        return self.contiguous_views(
            [
                grad if view.is_contiguous() else _in_layout_of(weight, grad)
                for grad, view, weight in zip(grads, views, self.weights, strict=True)
            ]
        )

    def check_grads_apart(self, grads: list[Tensor]) -> None:
        """Raises UnsupportedByFusedOp if a gradient lies in the memory of a weight."""
        _check_no_overlap(self.weights, grads)

    def contiguous_views(self, tensors: list[Tensor]) -> list[Tensor]:
        """One tensor per weight as the op takes it: contiguous (channels_last is permuted)."""
        if self._all_contiguous:
            return tensors
        return [
            x if order is None else x.permute(order)
            for x, order in zip(tensors, self._orders, strict=True)
        ]

    def weight_views(self) -> list[Tensor]:
        """The weights as the op takes them: contiguous, N:M weights as their pattern reads them."""
        return self._views.of(self.weights)

    def state_views(self, name: str) -> list[Tensor]:
        """An entry of all states as the op takes it."""
        return self._state_views[name].of(self.state_tensors[name])

    def bind_states(self, states: list[dict[str, Any]], names: Sequence[str]) -> None:
        """Takes the optimizer's dicts, one per weight, and the entries that the op takes."""
        self.states = states
        self.state_tensors: dict[str, list[Any]] = {
            name: [state.get(name) for state in states] for name in names
        }
        self._state_views = {name: ContiguousViews(self._orders) for name in names}
        columns = list(self.state_tensors.values())
        self.known_states: list[tuple[Any, ...]] = list(zip(states, *columns, strict=True))
        self.has_empty_states = any(entry is None for column in columns for entry in column)

    def match_layout_(self, state: dict[str, Any], name: str, t: int) -> None:
        """Gives moment `name` of weight `t` the weight's memory layout; a loaded one may differ.

        Raises:
            UnsupportedByFusedOp: it is of another dtype, device or layout.
            ValueError: it is of another shape: torch's fused kernels would not notice.
        """
        moment, weight, order = state[name], self.weights[t], self._orders[t]
        if isinstance(moment, Tensor) and moment.shape != weight.shape:
            raise ValueError(
                f"{name} in the optimizer's state has shape {tuple(moment.shape)} but its weight "
                f"{tuple(weight.shape)}: remove it from optimizer.state or build a new optimizer"
            )
        if not isinstance(moment, Tensor) or _kind(moment) != _kind(weight):
            raise UnsupportedByFusedOp(f"the state's {name} is not like its weight")
        if not permuted(moment, order).is_contiguous():
            state[name] = _in_layout_of(weight, moment)


def _check_weights(weights: Sequence[Tensor]) -> None:
    for weight in weights:
        if type(weight) not in (Tensor, torch.nn.Parameter):
            # DTensor is one of them.
            raise UnsupportedByFusedOp(f"weights of type {type(weight).__name__}")
        if weight.dtype != torch.float32:
            raise UnsupportedByFusedOp(f"weights of {weight.dtype}")
        if weight.device != weights[0].device:
            raise UnsupportedByFusedOp("weights on several devices")
        if weight.device.type not in DEVICES:
            raise UnsupportedByFusedOp(f"weights on {weight.device.type}")
        if weight.numel() == 0:
            raise UnsupportedByFusedOp("an empty weight")
    _check_no_overlap(weights, [])


def _check_no_overlap(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    try:
        check_no_overlap(numbered(weights, "weights"), numbered(grads, "gradients"))
    except ValueError as error:
        raise UnsupportedByFusedOp(str(error)) from None


def _check_grads(weights: Sequence[Tensor]) -> None:
    for weight in weights:
        grad = weight.grad
        assert grad is not None
        if grad.layout != torch.strided or grad.dtype not in GRAD_DTYPES:
            raise UnsupportedByFusedOp(f"gradients of {grad.dtype}, {grad.layout}")


def _in_layout_of(weight: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=x.dtype).copy_(x)
