"""The op schemas: convolution of bfloat16 images that stay in the tile layout of matrix engines.

Tile layout of an image with C channels: bfloat16 [N, H + 2, P + 1, pitch, 2], P = ceil(C / 2)
    data[n, y + 1, p + 1, x, i] is channel 2p + i at (y, x). Zeros: the rows 0 and H + 1, plane 0,
    the pixels from W on (at least 16), and the second channel of the last plane where C is odd.
    pitch: `pitch_of`. For inference on CPUs with AMX; elsewhere the same bits, slowly.
Weight [O, I, k, k], k = 1 or 3, as blocks of v = 16 or 32 output rows that share their positions
    tile_starts   int32 [ceil(O / v) + 1], ascending from 0 to T: the K tiles of each block.
    positions     int32 [T, 16]: 16 * (p + 1) + ky * k + kx, a pair of channels at one tap. Entries
                  that only fill up a K tile read plane 0 at the middle tap (k * k // 2).
    values        bfloat16 [T, v / 16, 16, 32]: of 16 rows, the pairs of the K tile's 16 entries.
Arithmetic: float32, rounded to nearest even; denormal operands and results count as zero of the
    same sign. For each K tile, in order,
        even = fma(weight, pixel, even) over the first channels of the 16 entries, in order, from 0
        odd  = the same over their second channels
        sum  = sum + (even + odd)
    then y = activation(sum + bias) * scale + residual, each operation rounded once, and y rounded
    to bfloat16. relu keeps NaN and -0. The bits are the same on every back end and for any number
    of threads; only gelu (by erf) may differ by rounding, between the reference and the others.
    Pixels outside of the image are zeros, whatever lies in memory behind them.
geometry: channels of x, width of x, O, k, shuffle. torch.nn.PixelShuffle(shuffle) comes last; a
    residual is refused with it.
By taps, for few output channels: the weight [k * k * O, I], row o * k * k + ky * k + kx, gives the
    sums of every tap at every pixel, as above. Then y[o] at (y, x) is the sum, from 0 and in the
    order of the taps, of theirs at (y + ky - k // 2, x + kx - k // 2), zero outside of the image;
    plus the bias, each addition rounded once, float32 [N, O, H, W]. geometry: channels of x, width
    of x, O, k.
Chain: layers one after the other. images and sizes (channels and width of each) are given: slots 0,
    1, ... Each layer reads and writes slots; a target that is the next free slot is a new image,
    another one an image of the result's shape that nobody needs any more, which may be the
    residual. plan, for each layer: source, residual or -1, target, O, k, shuffle, activation (0:
    none, 1: relu, 2: gelu). weights: values, positions and tile_starts of each; biases: float32
    [O] or [0]. Gives the last target's data, where it is new, or an empty tensor; the memory of
    other new images is free when no layer needs them any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from issp.ops.schemas.pruning import library, one_device

TILED_ACTIVATIONS = ("none", "relu", "gelu")  # by number in the plan of a chain
LANES = 16  # pixels of a tile, and entries of a K tile

# x [N, C, H, W] float32, float16 or bfloat16, of any strides -> data.
library.define("to_tiles(Tensor x) -> Tensor")
# data -> [N, C, H, W], contiguous.
library.define("from_tiles(Tensor data, SymInt channels, SymInt width, ScalarType dtype) -> Tensor")
_CONV = (
    "Tensor x, Tensor values, Tensor positions, Tensor tile_starts, Tensor? bias, "
    "Tensor? residual, SymInt[] geometry, str activation, float scale"
)
# bias: float32 [O]. residual: the data of an image like the result.
library.define(f"tiled_conv2d({_CONV}) -> Tensor")
# The same into the data of an image like the result, whose zeros are kept. `out` may be the
# residual, and overlaps nothing else.
library.define(f"tiled_conv2d_out({_CONV}, Tensor(a!) out) -> ()")
library.define(
    "tiled_conv2d_by_taps(Tensor x, Tensor values, Tensor positions, Tensor tile_starts, "
    "Tensor? bias, SymInt[] geometry) -> Tensor"
)
library.define(
    "tiled_chain(Tensor(a!)[] images, SymInt[] sizes, Tensor[] weights, Tensor[] biases, "
    "int[] plan, float[] scales) -> Tensor"
)
# The kernels in use on the CPU: amx, avx512 or scalar; `want` selects them, for tests.
library.define('_tile_capability(str want="") -> str')


def pitch_of(width: int) -> int:
    """Pixels between the planes of a tiled image: whole lines, one of zeros at least."""
    lines = (width + LANES - 1) // LANES + 1
    # One more where 8 divides it, which would map the planes to few sets of a cache: without a
    # comparison, so that the width may be a symbol.
    return LANES * (lines + (8 - lines % 8) // 8)


def tiled_shape(batch: int, channels: int, height: int, width: int) -> tuple[int, ...]:
    """The shape of an image's data in the tile layout."""
    return (batch, height + 2, (channels + 1) // 2 + 1, pitch_of(width), 2)


class ChainLayer(NamedTuple):
    """A layer of a chain: what the plan says, in its order."""

    source: int
    residual: int
    target: int
    rows: int
    kernel: int
    shuffle: int
    activation: int


def chain_layers(plan: Sequence[int]) -> list[ChainLayer]:
    """The layers of a plan."""
    size = len(ChainLayer._fields)
    return [ChainLayer(*plan[i : i + size]) for i in range(0, len(plan), size)]


def result_shape(x: Tensor, geometry: Sequence[int]) -> tuple[int, ...]:
    """The shape of the data of a convolution's result."""
    _, width, rows, _, shuffle = geometry
    height = x.shape[1] - 2
    return tiled_shape(x.shape[0], rows // shuffle**2, height * shuffle, width * shuffle)


@torch.library.register_fake("issp::to_tiles", lib=library)
def _(x: Tensor) -> Tensor:
    return x.new_empty(tiled_shape(*x.shape), dtype=torch.bfloat16)


@torch.library.register_fake("issp::from_tiles", lib=library)
def _(data: Tensor, channels: int, width: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty((data.shape[0], channels, data.shape[1] - 2, width), dtype=dtype)


@torch.library.register_fake("issp::tiled_conv2d", lib=library)
def _(x: Tensor, *args: Any) -> Tensor:
    one_device(x, *args[:5])
    return x.new_empty(result_shape(x, args[5]))


@torch.library.register_fake("issp::tiled_conv2d_out", lib=library)
def _(x: Tensor, *args: Any) -> None:
    one_device(x, *args[:5], args[8])


@torch.library.register_fake("issp::tiled_conv2d_by_taps", lib=library)
def _(x: Tensor, *args: Any) -> Tensor:
    one_device(x, *args[:4])
    _, width, rows, _ = args[4]
    return x.new_empty((x.shape[0], rows, x.shape[1] - 2, width), dtype=torch.float32)


@torch.library.register_fake("issp::tiled_chain", lib=library)
def _(images: Sequence[Tensor], sizes: Sequence[int], *args: Any) -> Tensor:
    weights, biases, plan, _ = args
    one_device(images[0], *images[1:], *weights, *biases)
    shapes = [tuple(image.shape) for image in images]
    widths = list(sizes[1::2])
    for layer in chain_layers(plan):
        if layer.target == len(shapes):
            batch, height = shapes[layer.source][0], shapes[layer.source][1] - 2
            width = widths[layer.source] * layer.shuffle
            channels = layer.rows // layer.shuffle**2
            shapes.append(tiled_shape(batch, channels, height * layer.shuffle, width))
            widths.append(width)
    is_given = layer.target < len(images)
    return images[0].new_empty((0,) if is_given else shapes[layer.target])
