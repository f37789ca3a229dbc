"""Layers that compute in the tile layout of matrix engines, and give it to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from issp.deploy.derived import DerivedLayer, derive
from issp.nn.padding import numeric_padding
from issp.ops.tiles import (
    TiledImage,
    TiledWeight,
    from_tiles,
    tiled_chain,
    tiled_conv2d,
    tiled_conv2d_by_taps,
    to_tiles,
)

# Tokens of an image without height and width are put in rows of as many pixels.
_ROW = 64
# Rows of a weight by taps: more of them take as long as the weight as it is.
_MAX_TAP_ROWS = 32
# Input channels of a layer that takes pictures, whose 8 bits bfloat16 does not hold.
_MAX_PICTURE_CHANNELS = 3


class TiledLayer(DerivedLayer):
    """A layer in bfloat16. Where a gradient may be wanted, torch computes it.

    Args of a call:
        input: torch's tensor, then the result is one too; or a `TiledImage`, then it is one.
        residual, activation, scale, shuffle, out: see `issp.ops.tiles.tiled_conv2d`.
    """

    def _make_form(self, weight: Tensor, bias: Tensor | None) -> tuple[TiledWeight, Tensor | None]:
        return TiledWeight.from_weight(weight, self.v), None if bias is None else bias.float()

    def _compute(self, t: TiledImage, *epilogue: Any) -> TiledImage:
        return tiled_conv2d(t, *self._derived(), *epilogue)


class TiledConv2d(TiledLayer, nn.Conv2d):
    """A convolution of stride 1 that keeps the size; see `TiledLayer`."""

    def forward(  # type: ignore[override]
        self,
        input: Tensor | TiledImage,
        residual: TiledImage | None = None,
        activation: str = "none",
        scale: float = 1.0,
        shuffle: int = 1,
        out: TiledImage | None = None,
    ) -> Tensor | TiledImage:
        if isinstance(input, TiledImage):
            return self._compute(input, residual, activation, scale, shuffle, out)
        if torch.is_grad_enabled() or input.dim() != 4:
            return super().forward(input)
        return from_tiles(self._compute(to_tiles(input)), input.dtype)


class PictureConv2d(TiledConv2d):
    """A convolution of few channels as exact as in float32, up to some 2^-16.

    x and the weight are sums of two bfloat16 numbers each, and three of the four products are
    computed: on a trained edsr-baseline x2 the rounding of pictures and of these weights cost
    0.03 dB, that of all other layers 0.002.
    """

    def _make_form(self, weight: Tensor, bias: Tensor | None) -> tuple[TiledWeight, Tensor | None]:
        high, low = _parts(weight)
        return super()._make_form(torch.cat([high, high, low], 1), bias)

    def forward(  # type: ignore[override]
        self, input: Tensor | TiledImage, *args: Any, **kwargs: Any
    ) -> Tensor | TiledImage:
        """As `TiledConv2d`; a `TiledImage` is one of `picture_to_tiles`."""
        if isinstance(input, TiledImage):
            return super().forward(input, *args, **kwargs)
        if torch.is_grad_enabled() or input.dim() != 4:
            return nn.Conv2d.forward(self, input)
        return from_tiles(self._compute(picture_to_tiles(input)), input.dtype)


class TapConv2d(TiledLayer, nn.Conv2d):
    """A convolution of stride 1 to few channels: its result is torch's tensor, rounded once.

    Args of a call:
        input: torch's tensor, or a `TiledImage`.
        dtype: of the result; default: that of the input, float32 for tiles.
    """

    def _make_form(self, weight: Tensor, bias: Tensor | None) -> tuple[TiledWeight, Tensor | None]:
        return TiledWeight.from_taps(weight, self.v), None if bias is None else bias.float()

    def forward(self, input: Tensor | TiledImage, dtype: torch.dtype = torch.float32) -> Tensor:
        if isinstance(input, TiledImage):
            return tiled_conv2d_by_taps(input, *self._derived(), self.kernel_size[0]).to(dtype)
        if torch.is_grad_enabled() or input.dim() != 4:
            return super().forward(input)
        return self.forward(to_tiles(input), input.dtype)


class TiledLinear(TiledLayer, nn.Linear):
    """A linear layer, of which the tokens are pixels; see `TiledLayer`."""

    def forward(  # type: ignore[override]
        self,
        input: Tensor | TiledImage,
        residual: TiledImage | None = None,
        activation: str = "none",
        scale: float = 1.0,
        out: TiledImage | None = None,
    ) -> Tensor | TiledImage:
        if isinstance(input, TiledImage):
            return self._compute(input, residual, activation, scale, 1, out)
        if torch.is_grad_enabled() or not input.numel():
            return super().forward(input)
        y = tokens_from_tiles(self._compute(tokens_to_tiles(input)), input, input.dtype)
        return y


def picture_to_tiles(x: Tensor) -> TiledImage:
    """The image [N, C, H, W] as the 3 C channels that `PictureConv2d` reads."""
    high, low = _parts(x)
    # The lower part of a weight may have another sign: infinity would become NaN.
    return to_tiles(torch.cat([high, low, torch.where(high.isfinite(), high, 0.0)], 1))


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in bfloat16, and what that lacks, both float32."""
    x = x.float()
    high = x.bfloat16().float()
    return high, torch.where(high.isfinite(), x - high, 0.0)


def compute_chain(
    images: Sequence[TiledImage],
    layers: Sequence[TiledLayer],
    plan: Sequence[int],
    scales: Sequence[float],
) -> TiledImage:
    """Layers that follow each other as one op; see `issp.ops.tiles.tiled_chain`."""
    return tiled_chain(images, [layer._derived() for layer in layers], plan, scales)


def tokens_to_tiles(x: Tensor) -> TiledImage:
    """Tokens [..., C] as the pixels of images: [N, H, W, C], or rows of pixels."""
    if x.dim() != 4:
        tokens = math.prod(x.shape[:-1])
        width = math.gcd(tokens, _ROW)
        x = x.reshape(1, tokens // width, width, x.shape[-1])
    return to_tiles(x.permute(0, 3, 1, 2))


def tokens_from_tiles(t: TiledImage, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The pixels of images as tokens, in the shape of `like` but for the last dimension."""
    pixels = from_tiles(t, dtype).permute(0, 2, 3, 1)
    return pixels.reshape(*like.shape[:-1], t.channels).contiguous()


def tiled_layer(module: nn.Module, v: int) -> TiledConv2d | TapConv2d | TiledLinear:
    """The same layer in the tile layout, with the same parameters.

    Args:
        module: one without `unsupported_reason`.
        v: rows of a unit, see `issp.ops.tiles.TiledWeight`; those of a layer by taps are its own.
    """
    if isinstance(module, nn.Linear):
        return derive(module, TiledLinear, v)
    weight = module.get_parameter("weight")
    rows = weight.shape[0] * weight.shape[2] * weight.shape[3]
    if weight.shape[2] == 3 and rows <= _MAX_TAP_ROWS:
        return derive(module, TapConv2d, 16 if rows <= 16 else 32)
    if weight.shape[1] <= _MAX_PICTURE_CHANNELS and weight.shape[1] < weight.shape[0]:
        return derive(module, PictureConv2d, v)
    return derive(module, TiledConv2d, v)


def unsupported_reason(module: nn.Module) -> str:
    """Why a layer cannot compute in the tile layout, or ""."""
    if type(module) is nn.Linear:
        return ""
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__name__}, which may compute something else"
    kernel = module.kernel_size
    kept = kernel in ((1, 1), (3, 3)) and numeric_padding(module) == (kernel[0] // 2,) * 2
    if not kept or module.stride != (1, 1) or module.dilation != (1, 1):
        return "the tile layout has convolutions of 3x3 and 1x1 that keep the size alone"
    if module.groups != 1 or module.padding_mode != "zeros":
        return "the tile layout has neither groups nor other padding than zeros"
    return ""
