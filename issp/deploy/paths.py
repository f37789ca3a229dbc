"""Layers that torch computes itself on another path than nn.Conv2d and nn.Linear take."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from issp.nn.leaf import Leaf
from issp.nn.pixel_shuffle import PixelShuffle
from issp.ops import semi_structured


class WholeRowsPixelShuffle(PixelShuffle):
    """torch's PixelShuffle of a packed model, which `restore_` makes torch's own again."""


_Path = TypeVar("_Path", "ChannelsLastConv2d", "TwoFourLinear")


class ChannelsLastConv2d(Leaf, nn.Conv2d):
    """A convolution computed in channels_last, from any layout to contiguous tensors."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4:  # an image without a batch has no such layout
            return super().forward(input)
        x = input.contiguous(memory_format=torch.channels_last)
        return super().forward(x).contiguous()


def channels_last(module: nn.Conv2d) -> ChannelsLastConv2d:
    """The same layer with its weight in channels_last; shares the bias, not the weight."""
    weight = module.weight.detach().to(memory_format=torch.channels_last)
    return _copy_as(module, ChannelsLastConv2d, weight)


class TwoFourLinear(Leaf, nn.Linear):
    """A 2:4 linear layer by torch's semi-structured matmul, for inference.

    The parameter stays the dense weight with its zeros, and so does what is saved; the compressed
    one is made from it at the first call.
    """

    _compressed: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            raise RuntimeError(
                "torch's 2:4 matmul has no derivative: call the packed model under "
                "torch.no_grad(), or pack it with keep=Keep(2, of=4) for training"
            )
        compressed = self.__dict__.get("_compressed")
        if compressed is None:
            compressed = self._compressed = semi_structured.pack(self.weight)
        return semi_structured.linear(input, compressed, self.bias)

    def _apply(self, *args: Any, **kwargs: Any) -> TwoFourLinear:
        self._compressed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._compressed = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        # A compressed weight belongs to one kind of GPU: it is never saved.
        return {**self.__dict__, "_compressed": None}


def two_four(module: nn.Linear, x: Tensor) -> TwoFourLinear | None:
    """The same layer by torch's 2:4 matmul, where weight and input allow it; or None."""
    weight = module.weight.detach()
    with torch.no_grad():
        if semi_structured.unsupported_reason(x, weight.shape, weight.dtype):
            return None
    if (weight.reshape(-1, 4).ne(0).sum(1) > 2).any():
        return None
    return _copy_as(module, TwoFourLinear, weight)


def restore_(module: ChannelsLastConv2d | TwoFourLinear | WholeRowsPixelShuffle) -> None:
    """Makes a layer of this file torch's own again, in place."""
    if isinstance(module, WholeRowsPixelShuffle):
        module.__class__ = nn.PixelShuffle  # type: ignore[assignment]
        return
    module.__dict__.pop("_compressed", None)
    kind = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    module.__class__ = kind  # type: ignore[assignment]
    module.weight.data = module.weight.data.contiguous()


def _copy_as(module: nn.Conv2d | nn.Linear, kind: type[_Path], weight: Tensor) -> _Path:
    """A shallow copy of the layer, of another class and with another weight."""
    layer = kind.__new__(kind)
    layer.__dict__.update(module.__dict__)
    layer._parameters = dict(module._parameters)
    layer.weight = nn.Parameter(weight, module.weight.requires_grad)
    return layer
