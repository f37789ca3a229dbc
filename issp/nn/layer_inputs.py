"""What the layers of a model are applied to in an example, and whether a sparse form could be."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from issp.nn.convert import dense_reason
from issp.ops.validation import DTYPES

DenseLayer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class LayerInput:
    """What a layer is applied to in the example."""

    shape: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    requires_grad: bool = False

    @classmethod
    def of(cls, x: Tensor) -> LayerInput:
        """That of a tensor."""
        channels_last = x.dim() == 4 and not x.is_contiguous()
        channels_last = channels_last and x.is_contiguous(memory_format=torch.channels_last)
        return cls(tuple(x.shape), channels_last, x.dtype, x.requires_grad)

    def random(self, device: torch.device) -> Tensor:
        """Random numbers of this shape, memory format and dtype."""
        x = torch.randn(self.shape, dtype=torch.float32, device=device).to(self.dtype)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        return x.requires_grad_(self.requires_grad)


def layer_inputs(model: nn.Module, args: tuple[Any, ...]) -> dict[nn.Module, list[LayerInput]]:
    """The distinct inputs of each Conv2d and Linear when the model is called with `args`."""
    inputs: dict[nn.Module, list[LayerInput]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = LayerInput.of(args[0] if args else kwargs["input"])
        seen = inputs.setdefault(module, [])
        if x not in seen:
            seen.append(x)

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                handle = module.register_forward_pre_hook(note, with_kwargs=True)
                hooks.enter_context(handle)
        model(*args)
    return inputs


def unsupported_reason(module: nn.Module, inputs: Sequence[LayerInput] | None = None) -> str:
    """Why a layer cannot have a sparse form at all, or "".

    Args:
        module: the layer.
        inputs: what it is applied to; None: that is not known.
    """
    reason = dense_reason(module)
    if reason:
        return reason
    weight = module.get_parameter("weight")
    dtype = weight.dtype
    if dtype not in DTYPES:
        return f"its weight is {dtype}"
    if inputs is None:
        return ""
    if not inputs:
        return "the example does not reach it"
    if any(0 in x.shape for x in inputs):
        return "its input is empty: pass an example that is not"
    device = weight.device.type
    if any(_computed(x.dtype, device) != _computed(dtype, device) for x in inputs):
        return f"its input is not {dtype} as its weight is"
    return ""


def _computed(dtype: torch.dtype, device: str) -> torch.dtype:
    """What torch.autocast makes of the dtype of a layer's input or weight."""
    if dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def shape_text(module: nn.Module, inputs: Sequence[LayerInput]) -> str:
    """The shape of a layer's weight and of what it is applied to."""
    weight = cast(Tensor, module.weight)  # a tensor that is computed, where it is parametrized
    return _size(weight.shape) + "".join(f" on {_size(x.shape)}" for x in inputs)


def measurement_key(
    module: DenseLayer,
    inputs: Sequence[LayerInput],
    shares: Mapping[str, float],
    passes: str = "forward",
) -> str:
    """All that the times of a layer depend on, as text: a key of `issp.nn.autotune`.

    Args:
        module: the dense layer.
        inputs: what it is applied to.
        shares: sparse form -> share of the weights that it stores.
        passes: what is timed.
    """
    parts = [f"{type(module).__name__} {_size(module.weight.shape)} {passes}"]
    if isinstance(module, nn.Conv2d):
        parts += [f"{name} {getattr(module, name)}" for name in ("stride", "padding", "dilation")]
    parts.append("bias" if module.bias is not None else "no bias")
    for x in inputs:
        no_gradient = passes != "forward" and not x.requires_grad
        notes = " channels_last" * x.channels_last + " without gradient" * no_gradient
        parts.append(f"x {_size(x.shape)} {x.dtype}{notes}")
    device = module.weight.device.type
    if torch.is_autocast_enabled(device):
        parts.append(f"autocast {torch.get_autocast_dtype(device)}")
    # Two digits: layers that differ in a handful of weights share a measurement.
    parts += [f"{name} keeps {share:.2g}" for name, share in shares.items()]
    return ", ".join(parts)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
