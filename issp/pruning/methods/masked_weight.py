"""Modules that compute with a masked weight, while their parameter keeps its dense values.

Within a call `module.weight` is the masked tensor. The parameter stays where it is, so that names,
optimizers and checkpoints know nothing of the mask. Pruned weights have a zero gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from issp.nn.selection import Layer
from issp.ops import reference


@torch.no_grad()
def magnitude_ranks(weight: Tensor, of: int) -> Tensor:
    """The place of each magnitude within its group of consecutive input channels.

    Args:
        weight: [O, I, ...] float, I a multiple of `of`.
        of: size of a group, up to 256.

    Returns:
        uint8 in the weight's shape and memory order: 0 for the largest magnitude. Ties: the highest
        index first, so that the n first are those that `Keep(n, of)` keeps.
    """
    keys = reference.key(weight.detach().contiguous()).unflatten(1, (-1, of)).flip(2)
    order = keys.sort(dim=2, descending=True, stable=True).indices
    place = torch.arange(of, dtype=torch.uint8, device=weight.device)
    place = place.view(1, 1, of, *[1] * (weight.dim() - 2)).expand_as(order)
    ranks = torch.empty_like(order, dtype=torch.uint8).scatter_(2, order, place)
    return _ordered_like(weight, ranks.flip(2).flatten(1, 2))


def _ordered_like(weight: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=values.dtype, requires_grad=False).copy_(values)


class MaskedWeight:
    """The mask of one weight, in the calls of the modules that have it.

    Unit j of a weight are those of rank j in their groups; the mask keeps some of the units.

    Args:
        layer: has the weight.
        modules: that share it.
        of: size of a group of input channels.

    Attributes:
        ranks: see `magnitude_ranks`.
        kept: bool in the weight's shape: the mask.
        priorities: float32 [of - 1] leaf, of the units from 1 on; each backward pass adds to their
            gradient that of the mask. None: the mask has no gradient.
        outputs: for each module, of its first call with a gradient: outputs per output channel, and
            the size of the batch (or of windows of it); None where there was no call.
    """

    def __init__(self, layer: Layer, modules: Sequence[nn.Module], of: int) -> None:
        self.layer, self.of = layer, of
        self.modules = list(modules)
        self.ranks = magnitude_ranks(layer.weight, of)
        self.kept = torch.ones_like(layer.weight, dtype=torch.bool)
        self.priorities: Tensor | None = None
        self.outputs: list[tuple[int, int] | None] = [None] * len(self.modules)
        self._handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": []}  # copies of the modules have hooks without effect

    def attach(self) -> None:
        """Begins to mask; in a copy, the copied modules."""
        if not self._handles:
            for index, module in enumerate(self.modules):
                enter, leave = _Enter(self, index), _Leave(self, index)
                self._handles.append(module.register_forward_pre_hook(enter))
                self._handles.append(module.register_forward_hook(leave, always_call=True))

    def detach(self) -> None:
        """Ends it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def rank(self) -> None:
        """Ranks the dense weights anew; the mask follows with the next `keep`."""
        self.ranks = magnitude_ranks(self.layer.weight, self.of)

    @torch.no_grad()
    def keep(self, units: Tensor) -> None:
        """Sets the mask: bool [of] on the CPU, which units are kept."""
        weight = self.layer.weight
        self.ranks = _ordered_like(weight, self.ranks.to(weight.device))
        self.kept = _ordered_like(weight, units.to(weight.device)[self.ranks.long()])

    def masked(self, weight: Tensor) -> Tensor:
        """The weight (the parameter, or its replica on another device) times the mask."""
        kept, ranks = self.kept.to(weight.device), self.ranks.to(weight.device)
        if self.priorities is None:
            return weight * kept
        return _Masked.apply(weight, self.priorities.to(weight.device), kept, ranks, self.of)


class _Masked(torch.autograd.Function):
    """weight * mask, with the gradient of the mask for the priorities of its units.

    Args of `apply`: see `MaskedWeight`. The units are straight-through in their priorities: the
    mask is the sum of all units j times b_j, and db_j / dp_j = 1, whether the unit is kept or not.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, priorities: Tensor, kept: Tensor, ranks: Tensor, of: int
    ) -> Tensor:
        ctx.save_for_backward(weight, kept, ranks)
        ctx.of = of
        return weight * kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, ranks = ctx.saved_tensors
        of_weight = of_priorities = None
        if ctx.needs_input_grad[0]:
            of_weight = grad * kept
        if ctx.needs_input_grad[1]:
            groups = (-1, ctx.of)
            products = (grad.float() * weight.float()).unflatten(1, groups)
            # Sorted by rank: a sum of a fixed order, which adding into 32 bins would not be.
            units = torch.empty_like(products)
            units.scatter_(2, ranks.long().unflatten(1, groups), products)
            others = [d for d in range(units.dim()) if d != 2]
            of_priorities = units.sum(others)[1:]
        return of_weight, of_priorities, None, None, None


class _Hook:
    """A hook of one module; copies and pickles of the module have it without effect."""

    def __init__(self, masked: MaskedWeight | None = None, index: int = 0) -> None:
        self._masked, self._index = masked, index

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return type(self), ()


class _Enter(_Hook):
    """Puts the masked weight in front of the parameter, which attribute look-up finds later."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._masked is not None:
            weights: Any = _of_replica(module) or module._parameters
            module.__dict__["weight"] = self._masked.masked(weights["weight"])


class _Leave(_Hook):
    """Takes it away, also when the call has failed."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._masked is None:
            return
        module.__dict__.pop("weight", None)
        module.__dict__.update(_of_replica(module))
        outputs = self._masked.outputs
        if outputs[self._index] is None and isinstance(output, Tensor) and output.requires_grad:
            shape = self._masked.layer.weight.shape
            batch = output.shape[0] if output.dim() >= len(shape) else 1
            outputs[self._index] = output.numel() // shape[0], batch


def _of_replica(module: nn.Module) -> dict[str, Any]:
    """The weight of a replica of DataParallel, an attribute there; otherwise nothing."""
    tensors = module.__dict__.get("_former_parameters", {})
    return {"weight": tensors["weight"]} if "weight" in tensors else {}
