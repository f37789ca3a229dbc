"""Argument checks of the ops of the tile layout, see `issp.ops.validation.pruning`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from issp.ops.schemas.tiles import (
    LANES,
    TILED_ACTIVATIONS,
    ChainLayer,
    chain_layers,
    result_shape,
    tiled_shape,
)
from issp.ops.validation.pruning import check_in_memory, check_is_tensor, check_strided
from issp.ops.validation.sparse import can_read, check_activation

# As in csrc/cpu/tiles/checks.h: sizes in bytes fit 64 bits, and those within a row 31.
_MAX_SIZE = 2**24
_MAX_ROW_BYTES = 2**29
_MAX_SHUFFLE = 16
_IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_to_tiles(x: Tensor) -> None:
    """The checks of `to_tiles`."""
    check_strided(x, "x")
    _check_image_dtype(x.dtype, "x has dtype")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], not of shape {tuple(x.shape)}")
    _check_sizes(x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    if x.is_neg() or x._is_zerotensor():
        raise ValueError("x is a view that torch computes when it is read: pass a copy of it")


def check_from_tiles(data: Tensor, channels: int, width: int, dtype: torch.dtype) -> None:
    """The checks of `from_tiles`."""
    check_tiled(data, "data", channels, width)
    _check_image_dtype(dtype, "dtype is")


def check_tiled_conv2d(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    tile_starts: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Sequence[int],
    activation: str,
    scale: float,
) -> None:
    """The checks of `tiled_conv2d`."""
    if len(geometry) != 5:
        raise ValueError(
            f"geometry has {len(geometry)} numbers: channels, width, rows, kernel and shuffle"
        )
    channels, width, rows, kernel, shuffle = geometry
    check_tiled(x, "x", channels, width)
    check_plan(values, positions, tile_starts, (rows, channels, kernel, kernel))
    check_shuffle(rows, shuffle)
    if bias is not None:
        check_bias(bias, rows)
    for name, tensor in {"values": values, "positions": positions, "bias": bias}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")
    shape = result_shape(x, geometry)
    _check_sizes(shape[0], rows // shuffle**2, shape[1] - 2, width * shuffle)
    if residual is not None:
        check_residual(shuffle)
        _check_data(residual, "residual", shape)
    check_activation(activation)


def check_tiled_conv2d_out(*args: object) -> None:
    """The checks of `tiled_conv2d_out`."""
    *arguments, out = args
    check_tiled_conv2d(*arguments)  # type: ignore[arg-type]
    x, values, positions, tile_starts, bias, residual, geometry, *_ = arguments
    _check_data(out, "out", result_shape(x, geometry))  # type: ignore[arg-type]
    others = [x, values, positions, tile_starts, bias]
    if isinstance(residual, Tensor) and not _same_memory(residual, out):
        others.append(residual)
    for other in others:
        if isinstance(other, Tensor) and _overlap(other, out):
            raise ValueError(
                "out overlaps another argument in memory: only the residual may be out itself"
            )


def check_tiled_conv2d_by_taps(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    tile_starts: Tensor,
    bias: Tensor | None,
    geometry: Sequence[int],
) -> None:
    """The checks of `tiled_conv2d_by_taps`."""
    if len(geometry) != 4:
        raise ValueError(f"geometry has {len(geometry)} numbers: channels, width, rows and kernel")
    channels, width, rows, kernel = geometry
    check_tiled_shape((rows, channels, kernel, kernel))
    by_taps = [channels, width, rows * kernel * kernel, 1, 1]
    check_tiled_conv2d(x, values, positions, tile_starts, None, None, by_taps, "none", 1.0)
    if bias is not None:
        check_bias(bias, rows)
        if bias.device != x.device:
            raise ValueError(f"bias is on {bias.device} but x is on {x.device}")


def check_tiled_chain(
    images: Sequence[Tensor],
    sizes: Sequence[int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    plan: Sequence[int],
    scales: Sequence[float],
) -> None:
    """The checks of `tiled_chain`."""
    layers = len(scales)
    if not images or not layers or len(sizes) != 2 * len(images):
        raise ValueError(
            f"{layers} layers, {len(images)} images and {len(sizes)} sizes: a chain has a layer "
            "and an image at least, and each image two sizes"
        )
    if (len(weights), len(biases), len(plan)) != (3 * layers, layers, 7 * layers):
        raise ValueError(
            f"{len(weights)} tensors of weights, {len(biases)} biases, a plan of {len(plan)} "
            f"numbers and {layers} scales: each layer has 3, 1, 7 and 1"
        )
    shapes: list[tuple[int, ...]] = []
    for i, image in enumerate(images):
        check_tiled(image, f"images[{i}]", sizes[2 * i], sizes[2 * i + 1])
        shapes.append((image.shape[0], sizes[2 * i], image.shape[1] - 2, sizes[2 * i + 1]))
    for i, layer in enumerate(chain_layers(plan)):
        plan_of_weight = (weights[3 * i], weights[3 * i + 1], weights[3 * i + 2])
        _check_chain_layer(f"layer {i}", layer, shapes, plan_of_weight, biases[i])
    _check_given(images, plan, [*weights, *biases])


def _check_chain_layer(
    name: str,
    layer: ChainLayer,
    shapes: list[tuple[int, ...]],
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor,
) -> None:
    source, residual, target, rows, kernel, shuffle, activation = layer
    read = [source] if residual == -1 else [source, residual]
    if not all(0 <= slot < len(shapes) for slot in read) or not 0 <= target <= len(shapes):
        raise ValueError(f"{name} reads {read} and writes {target} of {len(shapes)} images")
    batch, channels, height, width = shapes[source]
    check_plan(*weight, (rows, channels, kernel, kernel))
    check_shuffle(rows, shuffle)
    if bias.numel():
        check_bias(bias, rows)
    if not 0 <= activation < len(TILED_ACTIVATIONS):
        raise ValueError(
            f"activation of {name} is {activation}: 0, 1 and 2 are {TILED_ACTIVATIONS}"
        )
    shape = (batch, rows // shuffle**2, height * shuffle, width * shuffle)
    _check_sizes(*shape)
    if residual != -1:
        check_residual(shuffle)
    if target == len(shapes):
        shapes.append(shape)
    if target == source or any(shapes[slot] != shape for slot in (target, *read[1:])):
        raise ValueError(
            f"{name} gives {shape}: its residual and its target must be images of this shape, and "
            "the target another image than its source"
        )


def _check_given(images: Sequence[Tensor], plan: Sequence[int], others: Sequence[Tensor]) -> None:
    for target in {layer.target for layer in chain_layers(plan)}:
        if target < len(images):
            read = [*images[:target], *images[target + 1 :], *others]
            if any(_overlap(other, images[target]) for other in read):
                raise ValueError(
                    f"images[{target}] is written, and overlaps another argument in memory"
                )


def check_shuffle(rows: int, shuffle: int) -> None:
    """Refuses a factor of PixelShuffle that does not fit the rows of a weight."""
    if not 1 <= shuffle <= _MAX_SHUFFLE or rows % shuffle**2:
        raise ValueError(
            f"shuffle is {shuffle}: it must be 1 to {_MAX_SHUFFLE}, and its square divide the "
            f"{rows} output channels"
        )


def check_residual(shuffle: int) -> None:
    """Refuses a residual behind a PixelShuffle."""
    if shuffle != 1:
        raise ValueError(f"residual with shuffle = {shuffle}: add it in a layer without shuffle")


def check_bias(bias: Tensor, rows: int) -> None:
    """Refuses a bias that is not float32 [O]."""
    check_is_tensor(bias, "bias")
    if bias.dtype != torch.float32:
        raise TypeError(f"bias has dtype {bias.dtype}: pass bias.float(), sums are float32")
    if tuple(bias.shape) != (rows,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: it must be {(rows,)}")
    check_in_memory(bias, "bias")


def check_tiled_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Returns the shape [O, I, k, k] of a weight; refuses one that the tile layout has not."""
    rows, channels, kernel, across = shape
    if kernel not in (1, 3) or across != kernel:
        raise ValueError(
            f"a kernel of {kernel} x {across} has no tile layout: 1 x 1 and 3 x 3 have (stride 1)"
        )
    if not (1 <= rows <= _MAX_SIZE and 1 <= channels <= _MAX_SIZE):
        raise ValueError(
            f"the weight has {rows} rows and {channels} channels: 1 to {_MAX_SIZE} are supported"
        )
    return rows, channels, kernel, across


def check_plan(
    values: Tensor, positions: Tensor, tile_starts: Tensor, shape: Sequence[int]
) -> None:
    """Refuses tensors that do not make a weight [O, I, k, k] of the tile layout."""
    rows, channels, kernel, _ = check_tiled_shape(shape)
    for name, tensor, dtype in (
        ("values", values, torch.bfloat16),
        ("positions", positions, torch.int32),
        ("tile_starts", tile_starts, torch.int32),
    ):
        check_is_tensor(tensor, name)
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}: it must be {dtype}")
        check_in_memory(tensor, name)
    if values.dim() != 4 or values.shape[1] not in (1, 2) or values.shape[2:] != (16, 2 * LANES):
        raise ValueError(
            f"values must be [K tiles, v / 16, 16, 32] with v = 16 or 32, not of shape "
            f"{tuple(values.shape)}: make them by TiledWeight.from_weight"
        )
    v = 16 * values.shape[1]
    if positions.shape != (values.shape[0], LANES):
        raise ValueError(
            f"positions has shape {tuple(positions.shape)}: it must be "
            f"{(values.shape[0], LANES)}, 16 for every K tile of values"
        )
    if tuple(tile_starts.shape) != (-(-rows // v) + 1,):
        raise ValueError(
            f"tile_starts has shape {tuple(tile_starts.shape)}: {rows} rows in blocks of {v} "
            f"need {-(-rows // v) + 1} numbers"
        )
    if can_read(positions):
        _check_numbers(positions, tile_starts, channels, kernel * kernel)


def _check_numbers(positions: Tensor, tile_starts: Tensor, channels: int, taps: int) -> None:
    tiles = positions.shape[0]
    ascending = bool((tile_starts.diff() >= 0).all())
    if int(tile_starts[0]) != 0 or int(tile_starts[-1]) != tiles or not ascending:
        raise ValueError(f"tile_starts must ascend from 0 to the {tiles} K tiles of values")
    plane, tap = positions >> 4, positions & 15
    planes = (channels + 1) // 2
    wrong = (plane < 0) | (plane > planes) | (tap >= taps) | ((plane == 0) & (tap != taps // 2))
    if bool(wrong.any()):
        raise ValueError(
            f"positions do not lie in a weight of {channels} channels and {taps} taps: do the "
            "weight and x have the same number of channels?"
        )


def check_tiled(data: Tensor, name: str, channels: int, width: int) -> None:
    """Refuses what is not the data of a tiled image of these channels and this width."""
    check_is_tensor(data, name)
    if data.dim() != 5 or data.shape[1] < 2:
        raise ValueError(
            f"{name} must be [N, H + 2, planes + 1, pitch, 2], not of shape {tuple(data.shape)}: "
            "make it by issp.ops.to_tiles"
        )
    batch, height = data.shape[0], data.shape[1] - 2
    _check_sizes(batch, channels, height, width)
    _check_data(data, name, tiled_shape(batch, channels, height, width))


def _check_data(data: Tensor, name: str, shape: tuple[int, ...]) -> None:
    check_is_tensor(data, name)
    if data.dtype != torch.bfloat16:
        raise TypeError(f"{name} has dtype {data.dtype}: tiled images are bfloat16")
    if tuple(data.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(data.shape)}: it must be {shape}")
    check_in_memory(data, name)


def _check_image_dtype(dtype: torch.dtype, what: str) -> None:
    if dtype not in _IMAGE_DTYPES:
        raise TypeError(f"{what} {dtype}: use float32, float16 or bfloat16")


def _check_sizes(batch: int, channels: int, height: int, width: int) -> None:
    sizes = (batch, channels, height, width)
    if min(sizes) < 0 or max(sizes) > _MAX_SIZE or channels < 1:
        raise ValueError(
            f"an image of {sizes} has no tile layout: it needs a channel, and sizes up to "
            f"{_MAX_SIZE}"
        )
    shape = tiled_shape(*sizes)
    row_bytes = shape[2] * shape[3] * 4
    if row_bytes > _MAX_ROW_BYTES or shape[1] > (2**62 - 1) // _MAX_ROW_BYTES // max(1, batch):
        raise ValueError(
            f"an image of {sizes} is too large for the tile layout: divide it into tiles"
        )


def _same_memory(a: Tensor, b: object) -> bool:
    return isinstance(b, Tensor) and a.data_ptr() == b.data_ptr()


def _overlap(a: Tensor, b: object) -> bool:
    if not isinstance(b, Tensor) or not can_read(a) or not can_read(b):
        return False
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes
