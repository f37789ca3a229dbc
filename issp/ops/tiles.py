"""Public functions of the tile layout: bfloat16 convolution chains for CPUs with matrix engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from issp.ops import validation
from issp.ops.formats import SparseRows
from issp.ops.info import tile_kernels
from issp.ops.schemas.tiles import LANES
from issp.ops.validation import raise_python_error

_to_tiles = raise_python_error(validation.check_to_tiles, torch.ops.issp.to_tiles)
_from_tiles = raise_python_error(validation.check_from_tiles, torch.ops.issp.from_tiles)
_conv2d = raise_python_error(validation.check_tiled_conv2d, torch.ops.issp.tiled_conv2d)
_conv2d_out = raise_python_error(validation.check_tiled_conv2d_out, torch.ops.issp.tiled_conv2d_out)
_by_taps = raise_python_error(
    validation.check_tiled_conv2d_by_taps, torch.ops.issp.tiled_conv2d_by_taps
)
_chain = raise_python_error(validation.check_tiled_chain, torch.ops.issp.tiled_chain)


class TiledImage(NamedTuple):
    """Images in the tile layout; made by `to_tiles` and `tiled_conv2d`.

    Args:
        data: bfloat16 [N, H + 2, ceil(C / 2) + 1, pitch, 2], see issp/ops/schemas/tiles.py.
        channels, height, width: of the images.
    """

    data: Tensor
    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W), that of the images as `from_tiles` gives them."""
        return (self.data.shape[0], self.channels, self.height, self.width)


class TiledWeight:
    """A weight as `tiled_conv2d` reads it: v output rows share positions of channel pairs.

    Made once, from a weight whose zeros come in units of v consecutive rows x 2 consecutive
    channels at one tap: every unit in which one weight is not zero is stored. Masks of other units
    work and cost the units that they touch. The values are rounded to bfloat16.

    Args:
        values: bfloat16 [T, v / 16, 16, 32].
        positions: int32 [T, 16].
        tile_starts: int32 [ceil(O / v) + 1].
        shape: (O, I) or (O, I, k, k) with k = 1 or 3, that of the dense weight.

    Raises:
        TypeError, ValueError: tensors that do not make a weight of this shape.
    """

    def __init__(
        self, values: Tensor, positions: Tensor, tile_starts: Tensor, shape: Sequence[int]
    ) -> None:
        self.values, self.positions, self.tile_starts = values, positions, tile_starts
        self.shape = tuple(int(size) for size in shape)
        validation.check_plan(values, positions, tile_starts, _four(self.shape))

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight: Tensor | SparseRows, v: int = 16) -> TiledWeight:
        """From a dense or packed weight; one without zeros is stored whole.

        Args:
            weight: [O, I] or [O, I, k, k], k = 1 or 3, of any floating dtype; O and I need not be
                multiples of v and 2.
            v: rows of a unit, 16 or 32.

        Raises:
            TypeError, ValueError: a weight of another kind, or another v.
        """
        dense = weight.to_dense() if isinstance(weight, SparseRows) else weight
        validation.check_tensor(dense, "weight")
        if v not in (16, 32):
            raise ValueError(f"v is {v}: the tile layout has units of 16 or 32 rows")
        rows, channels, kernel, _ = validation.check_tiled_shape(_four(dense.shape))
        taps, blocks, planes = kernel * kernel, -(-rows // v), -(-channels // 2)
        whole = torch.zeros(blocks * v, 2 * planes, taps, dtype=torch.float32, device=dense.device)
        whole[:rows, :channels] = dense.detach().reshape(rows, channels, taps)
        units = whole.view(blocks, v, planes, 2, taps).permute(0, 2, 4, 1, 3)
        units = units.reshape(blocks, planes * taps, v, 2).to(torch.bfloat16)
        kept = units.ne(0).flatten(2).any(2)
        tiles = (kept.sum(1) + LANES - 1) // LANES
        starts = torch.cat([tiles.new_zeros(1), tiles.cumsum(0)])
        block, unit = kept.nonzero(as_tuple=True)
        slot = starts[block] * LANES + (kept.cumsum(1) - 1)[block, unit]
        total = int(starts[-1])
        positions = torch.full((total * LANES,), taps // 2, dtype=torch.int32, device=dense.device)
        positions[slot] = (16 * (unit // taps + 1) + unit % taps).to(torch.int32)
        values = units.new_zeros(total * LANES, v, 2)
        values[slot] = units[block, unit]
        tiled = values.view(total, LANES, v // 16, 16, 2).permute(0, 2, 3, 1, 4).flatten(3)
        return cls(
            tiled.contiguous(),
            positions.view(total, LANES),
            starts.to(torch.int32),
            tuple(dense.shape),
        )

    @classmethod
    def from_taps(cls, weight: Tensor | SparseRows, v: int = 16) -> TiledWeight:
        """Of shape (O * k * k, I), each tap a row of its own, for `tiled_conv2d_by_taps`.

        Args:
            weight: [O, I, k, k], k = 1 or 3.
            v: as in `from_weight`.
        """
        dense = weight.to_dense() if isinstance(weight, SparseRows) else weight
        validation.check_tensor(dense, "weight")
        _, channels, _, _ = validation.check_tiled_shape(_four(dense.shape))
        return cls.from_weight(dense.movedim(1, -1).reshape(-1, channels), v)

    @property
    def v(self) -> int:
        """Rows of a unit."""
        return 16 * self.values.shape[1]

    @property
    def kernel(self) -> int:
        """1 or 3."""
        return _four(self.shape)[2]

    @property
    def density(self) -> float:
        """Stored values per weight of the dense weight; entries that fill K tiles up count."""
        return self.values.numel() / torch.Size(self.shape).numel()

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The bfloat16 weight of `shape`."""
        rows, channels, kernel, _ = _four(self.shape)
        taps, v, planes = kernel * kernel, self.v, -(-channels // 2)
        total, blocks = self.values.shape[0], len(self.tile_starts) - 1
        entries = self.values.view(total, v // 16, 16, LANES, 2).permute(0, 3, 1, 2, 4)
        entries = entries.reshape(total * LANES, v, 2)
        block = torch.repeat_interleave(self.tile_starts.diff().long()).repeat_interleave(LANES)
        position = self.positions.flatten().long()
        # Plane 0 takes the entries that only fill up.
        units = self.values.new_zeros(blocks, planes + 1, taps, v, 2)
        units[block, position // 16, position % 16] = entries
        whole = units[:, 1:].permute(0, 3, 1, 4, 2).reshape(blocks * v, 2 * planes, taps)
        return whole[:rows, :channels].reshape(self.shape)

    def __repr__(self) -> str:
        return f"TiledWeight(shape={self.shape}, v={self.v}, density={self.density:.4f})"


def tiles_supported() -> bool:
    """Whether this CPU computes in the tile layout on a matrix engine (AMX bfloat16)."""
    return tile_kernels() == "amx"


def to_tiles(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> TiledImage:
    """Images in the tile layout; rounded to bfloat16, denormals to zero.

    Args:
        x: [N, C, H, W] float32, float16 or bfloat16, contiguous or channels_last (other strides are
            read as they are, slower). Tokens [N, L, C] are the image x.mT[:, :, None], of one row.
        dtype: of the tiles: torch.bfloat16.

    Raises:
        TypeError, ValueError: what cannot be converted, or requires a gradient.
    """
    if dtype != torch.bfloat16:
        raise TypeError(f"dtype is {dtype}: the tile layout is bfloat16")
    _refuse_gradient(x)
    return TiledImage(_to_tiles(x), *x.shape[1:])


def from_tiles(t: TiledImage, dtype: torch.dtype = torch.float32) -> Tensor:
    """The images [N, C, H, W], contiguous.

    Args:
        t: of `to_tiles` or `tiled_conv2d`.
        dtype: float32, float16 or bfloat16.

    Raises:
        TypeError, ValueError: t is no tiled image, or another dtype.
    """
    return _from_tiles(t.data, t.channels, t.width, dtype)


def tiled_conv2d(
    t: TiledImage,
    w: TiledWeight,
    bias: Tensor | None = None,
    residual: TiledImage | None = None,
    activation: str = "none",
    scale: float = 1.0,
    shuffle: int = 1,
    out: TiledImage | None = None,
) -> TiledImage:
    """PixelShuffle(activation(convolution of t + bias) * scale + residual), stride 1, same size.

    For inference. Sums are float32, the result is rounded to bfloat16 once; the exact arithmetic
    stands in issp/ops/schemas/tiles.py. The bits do not depend on the number of threads.

    Args:
        t: [N, I, H, W].
        w: of shape (O, I), (O, I, 1, 1), or (O, I, 3, 3) with padding 1.
        bias: float32 [O] or none.
        residual: [N, O, H, W] or none; with shuffle = 1 only.
        activation: "none", "relu" or "gelu" (by erf).
        scale: factor of the activated sum.
        shuffle: upscaling factor of torch.nn.PixelShuffle; its square divides O.
        out: where to write: an image of the result's shape that these functions made (its zeros
            are kept, not written), which spares the allocation. It may be `residual`, not `t`.

    Returns:
        [N, O / shuffle^2, H * shuffle, W * shuffle]; `out` where it is given.

    Raises:
        TypeError, ValueError: what does not fit, named.
    """
    rows, channels, kernel, _ = _four(w.shape)
    _check_channels(t, w, channels)
    args = (
        *(t.data, w.values, w.positions, w.tile_starts, bias),
        None if residual is None else residual.data,
        [channels, t.width, rows, kernel, shuffle],
        *(activation, scale),
    )
    validation.check_shuffle(rows, shuffle)
    shape = (rows // (shuffle * shuffle), t.height * shuffle, t.width * shuffle)
    if residual is not None:
        _check_same_shape(residual, (t.data.shape[0], *shape), "residual")
    if out is None:
        return TiledImage(_conv2d(*args), *shape)
    _check_same_shape(out, (t.data.shape[0], *shape), "out")
    _conv2d_out(*args, out.data)
    return out


def tiled_conv2d_by_taps(
    t: TiledImage, w: TiledWeight, bias: Tensor | None = None, kernel: int = 3
) -> Tensor:
    """A convolution of stride 1 to few channels, as a plain float32 image that is not rounded.

    Every pixel is read once for all taps, whose sums are then shifted and added, in an order of
    their own: see issp/ops/schemas/tiles.py. For three channels it takes a third of the time.

    Args:
        t: [N, I, H, W].
        w: by `TiledWeight.from_taps`, of shape (O * kernel * kernel, I).
        bias: float32 [O] or none.
        kernel: 1, or 3 with padding 1.

    Returns:
        [N, O, H, W] float32, contiguous.

    Raises:
        TypeError, ValueError: what does not fit, named.
    """
    rows, channels, across, _ = _four(w.shape)
    if kernel not in (1, 3) or across != 1 or rows % (kernel * kernel):
        raise ValueError(
            f"the weight of shape {w.shape} has no rows for the taps of a kernel of {kernel} x "
            f"{kernel}: make it by TiledWeight.from_taps"
        )
    _check_channels(t, w, channels)
    geometry = [channels, t.width, rows // (kernel * kernel), kernel]
    return _by_taps(t.data, w.values, w.positions, w.tile_starts, bias, geometry)


def tiled_chain(
    images: Sequence[TiledImage],
    weights: Sequence[tuple[TiledWeight, Tensor | None]],
    plan: Sequence[int],
    scales: Sequence[float],
) -> TiledImage:
    """Many calls of `tiled_conv2d` as one: a call of a small layer costs more than its products.

    Args:
        images: those that layers of the chain read or write; the first slots.
        weights: weight and bias of each layer.
        plan: seven numbers for each layer, see issp/ops/schemas/tiles.py.
        scales: of each layer.

    Returns:
        What the last layer writes; other images that are not given are gone.

    Raises:
        TypeError, ValueError: what does not fit, named.
    """
    sizes = [size for t in images for size in (t.channels, t.width)]
    tensors: list[Tensor] = []
    biases: list[Tensor] = []
    none = torch.empty(0, dtype=torch.float32, device=images[0].data.device)
    for w, bias in weights:
        tensors += (w.values, w.positions, w.tile_starts)
        biases.append(none if bias is None else bias)
    data = _chain([t.data for t in images], sizes, tensors, biases, plan, scales)
    _, _, target, rows, _, shuffle, _ = plan[-7:]
    if target < len(images):
        return images[target]
    slot, factor = target, 1  # how much larger it is than the image that it comes from
    for i in range(len(plan) - 7, -1, -7):
        if plan[i + 2] == slot:
            slot, factor = plan[i], factor * plan[i + 5]
    source = images[slot]
    return TiledImage(data, rows // shuffle**2, source.height * factor, source.width * factor)


def _check_channels(t: TiledImage, w: TiledWeight, channels: int) -> None:
    if t.channels != channels:
        raise ValueError(
            f"the image of shape {t.shape} has {t.channels} channels, but the weight of shape "
            f"{w.shape} needs {channels}"
        )


def _check_same_shape(image: TiledImage, shape: tuple[int, ...], name: str) -> None:
    if image.shape != shape:
        raise ValueError(f"{name} is of shape {image.shape}: it must be {shape}")


def _refuse_gradient(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "x requires a gradient, and the tile layout has none: call it under torch.no_grad(), "
            "or use issp.ops.sparse_conv2d"
        )


def _four(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(O, I, k, k) of (O, I) as well."""
    if len(shape) == 2:
        return (int(shape[0]), int(shape[1]), 1, 1)
    if len(shape) != 4:
        raise ValueError(f"the weight is {tuple(shape)}: it must be [O, I] or [O, I, k, k]")
    return (int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3]))
