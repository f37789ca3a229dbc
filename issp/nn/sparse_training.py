"""Conv2d and Linear that train the kept weights alone: torch's layers, computed sparse.

`to_sparse_` makes a layer one in place and `to_dense_` makes it torch's own again. Its parameter
`weight` stays the same object under the same name; in between it holds the values that a fixed mask
keeps, so that gradients, and what an optimizer stores for each weight, are as small. The layer
saves the dense weight with its zeros, and loads one: files are the same with and without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from issp.nn.leaf import Leaf
from issp.nn.padding import numeric_padding
from issp.nn.recording import is_recorded_for_torch
from issp.ops import sparse
from issp.ops.formats import PackedWeight, Transposed, positions_of, transposed_once


class KeptPositions:
    """Where the kept values of a weight stand in it.

    Args:
        mask: bool in the weight's shape, True = kept.
        v: consecutive output rows that share their positions, see `issp.ops.SparseRows`.

    Attributes:
        shape: of the dense weight.
        col_indices, crow_indices: see `issp.ops.SparseRows`.
        channels_last: the memory format of the dense weight, as that of the mask.

    Raises:
        ValueError: v does not divide the rows, or they do not share their positions.
    """

    def __init__(self, mask: Tensor, v: int = 1) -> None:
        if mask.shape[0] % v:
            raise ValueError(f"v = {v} does not divide the {mask.shape[0]} rows of the mask")
        blocks = mask.reshape(mask.shape[0] // v, v, -1)
        if not bool((blocks == blocks[:, :1]).all()):
            raise ValueError(f"v = {v}: the rows of a block do not share their positions")
        self.shape, self.v = tuple(mask.shape), v
        self._transposed: Transposed | None = None
        self.channels_last = mask.dim() == 4 and not mask.is_contiguous()
        _, columns, self.crow_indices = positions_of(blocks[:, 0])
        self.col_indices = columns.int()

    def transposed(self, weight: PackedWeight) -> list[Tensor]:
        """Lists of the transposed weight, made when backward first needs them."""
        self._transposed = transposed_once(weight, self.v, self._transposed)
        return self._transposed.lists

    def copy(self) -> KeptPositions:
        """Another object, which can move to another device by itself."""
        return copy.copy(self)

    def _flat_indices(self) -> Tensor:
        """int64 [E, v]: the place of each value in the dense weight, flattened."""
        device, length = self.col_indices.device, torch.Size(self.shape[1:]).numel()
        blocks = torch.arange(self.crow_indices.shape[0] - 1, device=device)
        block = torch.repeat_interleave(blocks, self.crow_indices.diff().long())
        rows = block[:, None] * self.v + torch.arange(self.v, device=device)
        return rows * length + self.col_indices[:, None]

    @torch.no_grad()
    def gather(self, dense: Tensor) -> Tensor:
        """The kept values [E, v] of a tensor in the weight's shape."""
        return dense.detach().reshape(-1)[self._flat_indices().to(dense.device)]

    @torch.no_grad()
    def expand(self, values: Tensor) -> Tensor:
        """The tensor in the weight's shape, zero where nothing is kept."""
        dense = values.new_zeros(torch.Size(self.shape).numel())
        dense[self._flat_indices().to(values.device)] = values.detach()
        dense = dense.view(self.shape)
        return dense.to(memory_format=torch.channels_last) if self.channels_last else dense

    def to_(self, device: torch.device) -> None:
        """Moves the positions."""
        self.col_indices = self.col_indices.to(device)
        self.crow_indices = self.crow_indices.to(device)


class KeptValues:
    """Values and their positions as a packed weight, see `issp.ops.formats.PackedWeight`.

    Args:
        values: [E, v].
        positions: of them.
    """

    def __init__(self, values: Tensor, positions: KeptPositions) -> None:
        self.values, self._positions = values, positions
        self.col_indices, self.crow_indices = positions.col_indices, positions.crow_indices
        self.shape = positions.shape

    @property
    def transposed(self) -> list[Tensor]:
        """See `KeptPositions.transposed`."""
        return self._positions.transposed(self)


class SparseTrainingLayer(Leaf):
    """What both layers share."""

    weight: Any
    positions: KeptPositions
    _dense_forward: Callable[[Tensor, Tensor], Tensor]
    _sparse_forward: Callable[[Tensor, KeptValues], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        if is_recorded_for_torch():
            return self._dense_forward(input, self.positions.expand(self.weight))
        return self._sparse_forward(input, KeptValues(self.weight, self.positions))

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        super()._apply(*args, **kwargs)
        self.positions.to_(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.positions.expand(self.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}weight"
        dense = state_dict.get(name)
        if isinstance(dense, Tensor):
            reason = self._mismatch(dense)
            if reason:
                *_, error_msgs = args
                error_msgs.append(f"{name} {reason}")
                return
            state_dict[name] = self.positions.gather(dense)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _mismatch(self, dense: Tensor) -> str:
        """Why a dense weight cannot be loaded, or ""."""
        if dense.shape != self.positions.shape:
            return f"is {tuple(dense.shape)}: the layer's weight is {self.positions.shape}"
        if dense.count_nonzero() != self.positions.gather(dense).count_nonzero():
            return (
                "has weights where the fixed mask has none: call pruner.finalize() before loading "
                "weights of another mask"
            )
        return ""

    def reset_parameters(self) -> None:
        """Refused: torch's would draw the values as if they were a dense weight."""
        raise RuntimeError(
            "a layer that trains sparse is not initialised anew: call pruner.finalize() before"
        )

    def extra_repr(self) -> str:
        kept, numel = self.weight.numel(), torch.Size(self.positions.shape).numel()
        return f"{super().extra_repr()}, kept={kept} of {numel}"


class SparseTrainingConv2d(SparseTrainingLayer, nn.Conv2d):
    """nn.Conv2d whose kept weights alone are stored and trained."""

    def _dense_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)

    def _sparse_forward(self, x: Tensor, weight: KeptValues) -> Tensor:
        if isinstance(x, Tensor) and x.dim() == 3:
            return self._sparse_forward(x[None], weight)[0]
        return sparse.conv2d(
            x,
            weight,
            self.bias,
            None,
            "none",
            stride=self.stride,
            padding=numeric_padding(self),
            dilation=self.dilation,
        )


class SparseTrainingLinear(SparseTrainingLayer, nn.Linear):
    """nn.Linear whose kept weights alone are stored and trained."""

    def _dense_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def _sparse_forward(self, x: Tensor, weight: KeptValues) -> Tensor:
        return sparse.matmul(x, weight, self.bias, None, "none")


@torch.no_grad()
def to_sparse_(layer: nn.Conv2d | nn.Linear, positions: KeptPositions) -> None:
    """Makes a layer of torch's train its kept values alone, in place; its gradient follows.

    Args:
        layer: exactly nn.Conv2d or nn.Linear, which a sparse layer can replace
            (`issp.nn.convert.dense_reason`).
        positions: of the values; all other weights must be zero.
    """
    kind = SparseTrainingConv2d if isinstance(layer, nn.Conv2d) else SparseTrainingLinear
    layer.positions = positions  # type: ignore[assignment]
    layer.__class__ = kind
    replace_data_(layer.get_parameter("weight"), positions.gather)


@torch.no_grad()
def to_dense_(layer: nn.Module) -> None:
    """Makes a layer torch's own again, in place; pruned weights and their gradients are zero."""
    assert isinstance(layer, SparseTrainingLayer)
    positions = layer.positions
    layer.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear  # type: ignore[assignment]
    del layer.positions
    replace_data_(layer.get_parameter("weight"), positions.expand)


def replace_data_(weight: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    """Gives a parameter the changed data, of any shape, and its gradient likewise.

    Backward's node of the parameter remembers its shape and lives as long as a loss of the user's;
    torch makes a new one where the dtype changes, so the data pass through another one.
    """
    grad, weight.grad = weight.grad, None
    data = change(weight.data)
    other = torch.float64 if data.dtype == torch.float32 else torch.float32
    weight.data = torch.empty(0, dtype=other, device=data.device)
    weight.data = data
    if grad is not None:
        weight.grad = change(grad)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer in its dense shape, whether it trains sparse or not."""
    if isinstance(layer, SparseTrainingLayer):
        return layer.positions.expand(layer.weight)
    return layer.get_parameter("weight")


def dense_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of `dense_weight`."""
    if isinstance(layer, SparseTrainingLayer):
        return layer.positions.shape
    return tuple(layer.get_parameter("weight").shape)
