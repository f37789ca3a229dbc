"""The padding of a convolution in numbers, where torch also takes "valid" and "same"."""

from __future__ import annotations

from torch import nn


def numeric_padding(layer: nn.Module) -> tuple[int, int]:
    """Height and width.

    Raises:
        ValueError: "same" of a kernel that pads one side more than the other.
    """
    assert isinstance(layer, nn.Conv2d)
    if not isinstance(layer.padding, str):
        height, width = layer.padding
        return (height, width)
    if layer.padding == "valid":
        return (0, 0)
    height, width = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    if height % 2 or width % 2:
        raise ValueError(
            f'{type(layer).__name__}: padding "same" of the kernel {layer.kernel_size} is '
            "not the same on both sides: leave the layer dense"
        )
    return (height // 2, width // 2)
