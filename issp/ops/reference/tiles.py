"""The reference of convolution in the tile layout, bit for bit; see issp/ops/schemas/tiles.py.

Rounded float32 arithmetic is done in float64: a sum or product of two float32 numbers, rounded to
float64 and then to float32, is rounded right, and a multiply-add is with one correction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from issp.ops.schemas.tiles import TILED_ACTIVATIONS, chain_layers, tiled_shape

_SMALLEST = 2.0**-126  # normal number of float32 and bfloat16
_SCALE = 2.0**64


def to_tiles(x: Tensor) -> Tensor:
    """See `to_tiles` in issp/ops/schemas/tiles.py."""
    batch, channels, height, width = x.shape
    planes = (channels + 1) // 2
    data = x.new_zeros(tiled_shape(*x.shape), dtype=torch.bfloat16)
    paired = F.pad(_to_bfloat16(x.to(torch.float32)), (0, 0, 0, 0, 0, 2 * planes - channels))
    by_row = paired.view(batch, planes, 2, height, width).permute(0, 3, 1, 4, 2)
    data[:, 1 : height + 1, 1:, :width] = by_row
    return data


def from_tiles(data: Tensor, channels: int, width: int, dtype: torch.dtype) -> Tensor:
    """See `from_tiles` in issp/ops/schemas/tiles.py."""
    inner = data[:, 1:-1, 1:, :width].permute(0, 2, 4, 1, 3)
    return inner.flatten(1, 2)[:, :channels].to(dtype).contiguous()


def tiled_conv2d(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    tile_starts: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Sequence[int],
    activation: str,
    scale: float,
) -> Tensor:
    """See `tiled_conv2d` in issp/ops/schemas/tiles.py."""
    _, width, rows, kernel, shuffle = geometry
    y = _sums(x, values, positions, tile_starts, width, kernel)[:, :rows]
    zero = y.new_zeros(rows)
    y = _to_float32(y + _flush(zero if bias is None else bias.double())[:, None, None])
    y = _activate(y, activation)
    y = _to_float32(y * _flush(zero[:1].float().add(scale).double()))
    if residual is not None:
        y = _to_float32(y + _flush(from_tiles(residual, rows, width, torch.float64)))
    return to_tiles(F.pixel_shuffle(y.float(), shuffle))


def tiled_conv2d_out(*args: object) -> None:
    """See `tiled_conv2d_out` in issp/ops/schemas/tiles.py."""
    *arguments, out = args
    out.copy_(tiled_conv2d(*arguments))  # type: ignore[attr-defined, arg-type]


def tiled_conv2d_by_taps(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    tile_starts: Tensor,
    bias: Tensor | None,
    geometry: Sequence[int],
) -> Tensor:
    """See `tiled_conv2d_by_taps` in issp/ops/schemas/tiles.py."""
    _, width, rows, kernel = geometry
    taps, height = kernel * kernel, x.shape[1] - 2
    shares = _sums(x, values, positions, tile_starts, width, 1)[:, : rows * taps]
    shares = F.pad(shares, (kernel // 2,) * 4)
    y = shares.new_zeros(x.shape[0], rows, height, width)
    for tap in range(taps):
        ky, kx = tap // kernel, tap % kernel
        y = _to_float32(y + shares[:, tap::taps, ky : ky + height, kx : kx + width])
    added = y.new_zeros(rows) if bias is None else _flush(bias.double())
    return _to_float32(y + added[:, None, None]).float()


def tiled_chain(
    images: Sequence[Tensor],
    sizes: Sequence[int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    plan: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    """See `tiled_chain` in issp/ops/schemas/tiles.py."""
    slots = list(images)
    channels, widths = list(sizes[::2]), list(sizes[1::2])
    for i, layer in enumerate(chain_layers(plan)):
        values, positions, tile_starts = weights[3 * i : 3 * i + 3]
        y = tiled_conv2d(
            slots[layer.source],
            values,
            positions,
            tile_starts,
            biases[i] if biases[i].numel() else None,
            slots[layer.residual] if layer.residual >= 0 else None,
            [channels[layer.source], widths[layer.source], *layer[3:6]],
            TILED_ACTIVATIONS[layer.activation],
            scales[i],
        )
        if layer.target < len(slots):
            slots[layer.target].copy_(y)
            continue
        slots.append(y)
        channels.append(layer.rows // layer.shuffle**2)
        widths.append(widths[layer.source] * layer.shuffle)
    is_given = layer.target < len(images)
    return images[0].new_empty(0) if is_given else slots[layer.target]


def _sums(
    x: Tensor, values: Tensor, positions: Tensor, tile_starts: Tensor, width: int, kernel: int
) -> Tensor:
    """[N, rows of all blocks, H, W]."""
    weights = _flush(values.double()).flatten(1, 2)
    lines = _lines(_flush(x.double()), width, kernel)
    starts = tile_starts.tolist()
    blocks = [
        _block_sums(weights[begin:end], positions[begin:end], lines)
        for begin, end in zip(starts, starts[1:], strict=False)
    ]
    return torch.cat(blocks, 1)


def _lines(data: Tensor, width: int, kernel: int) -> Tensor:
    """What each position reads: float64 [N, planes, taps, 2, H, W]."""
    height = data.shape[1] - 2
    image = F.pad(data[:, :, :, :width].permute(0, 2, 4, 1, 3), (1, 1))
    edge = 1 - kernel // 2
    taps = [
        image[..., edge + ky : edge + ky + height, edge + kx : edge + kx + width]
        for ky in range(kernel)
        for kx in range(kernel)
    ]
    return torch.stack(taps, 2)


def _block_sums(weights: Tensor, positions: Tensor, lines: Tensor) -> Tensor:
    """[N, v, H, W]: the sums of one block; weights [K tiles, v, 32]."""
    batch, _, _, _, height, width = lines.shape
    total = lines.new_zeros(batch, weights.shape[1], height, width)
    for tile in range(len(weights)):
        both = lines.new_zeros(batch, weights.shape[1], 2, height, width)  # even and odd
        for entry, position in enumerate(positions[tile].tolist()):
            pair = lines[:, position // 16, position % 16][:, None]  # [N, 1, 2, H, W]
            both = _fma(weights[tile, :, 2 * entry : 2 * entry + 2, None, None], pair, both)
        total = _to_float32(total + _to_float32(both[:, :, 0] + both[:, :, 1]))
    return total


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded once to float32; a and b are bfloat16 numbers, so the product is exact."""
    product = a * b
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)  # what rounding to float64 lost (Knuth)
    # Round to odd: a last bit that says that something was lost keeps the next rounding right.
    inexact = (error != 0) & torch.isfinite(total) & ~torch.isnan(error)
    bits = total.view(torch.int64)
    towards_zero = (error > 0) != (total > 0)
    truncated = torch.where(inexact & towards_zero, bits - 1, bits)
    odd = torch.where(inexact, truncated | 1, bits)
    return _to_float32(odd.view(torch.float64))


def _to_float32(x: Tensor) -> Tensor:
    """Rounded to float32, in float64; what is denormal when rounded becomes zero of its sign."""
    tiny = (x * _SCALE).float().abs() < _SMALLEST * _SCALE
    return torch.where(tiny, torch.copysign(torch.zeros_like(x), x), x.float().double())


def _flush(x: Tensor) -> Tensor:
    """Zero of the same sign for denormals."""
    return torch.where(x.abs() < _SMALLEST, torch.copysign(torch.zeros_like(x), x), x)


def _to_bfloat16(x: Tensor) -> Tensor:
    return _flush(x.double()).float().to(torch.bfloat16)


def _activate(y: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.where(y < 0, 0.0, y)
    return _to_float32(F.gelu(y)) if activation == "gelu" else y
