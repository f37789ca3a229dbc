"""How large images are cut into tiles: the size that memory allows, and what neighbours share."""

from __future__ import annotations

import math
import os
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Overlap of tiles where the receptive field does not decide it.
OVERLAP = 32
# Sides that are aimed at. On a CPU a larger tile shares less of itself with its neighbours, but its
# tensors leave the cache: packed edsr-tiny x2 takes 1.08 us per kept pixel in tiles of 256, 0.90 in
# tiles of 384, 1.00 in tiles of 512. Small tiles do not fill a GPU. A network without a receptive
# radius depends on the whole tile.
_SIDE, _SIDE_UNBOUNDED, _SIDE_CUDA = 384, 512, 1024
# A tile of ten radii computes 1.6 times the pixels that it keeps, one of four 4 times: exact seams
# are worth no more than that.
_RADII, _LEAST_RADII = 10, 4
_LEAST_SIDE = 64  # of a tile that memory has to hold
_MEMORY = 768 * 2**20  # bytes that a tile may take even if less than four times as much is free
# What functions allocate inside: reordered inputs and results, scores of attention.
_UNSEEN = 2
_PROBE = 16  # side of the input with which a convolutional network's memory is counted
_LEAST_WINDOWS = 3  # per side; on fewer the masks of shifted windows weigh more than on a tile


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
        tile: side of the tiles in input pixels; None: images are processed at once.
        overlap: pixels that neighbouring tiles share; each keeps its half.
        exact: the overlap covers the receptive field, so there are no seams.
    """

    tile: int | None = None
    overlap: int = 0
    exact: bool = True

    def cuts(self, height: int, width: int) -> bool:
        """Whether an image of this size is processed in more than one tile."""
        return self.tile is not None and max(height, width) > self.tile


class TileSpan(NamedTuple):
    """A tile along one axis, in pixels: start..end is read, first..last of it is kept."""

    start: int
    end: int
    first: int
    last: int


def tile_spans(
    length: int, tile: int, overlap: int, multiple: int = 1, align: int = 1
) -> list[TileSpan]:
    """Tiles along one axis, all of one size, whose kept parts follow one another without gap.

    Args:
        length: of the axis, a multiple of `multiple`.
        tile: the largest size of a tile, a multiple of `multiple`.
        overlap: what neighbours share at least, a multiple of `multiple`.
        multiple: of which starts and sizes are multiples.
        align: of which the size is a multiple too if `tile` allows it.
    """
    if length <= tile:
        return [TileSpan(0, length, 0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    size = _round_up(math.ceil((length - overlap) / count), multiple) + overlap
    aligned = _round_up(size, math.lcm(multiple, align))
    size = aligned if aligned <= tile else size
    count = math.ceil((length - overlap) / (size - overlap))
    starts = [min(i * (size - overlap), length - size) for i in range(count)]
    cuts = [0, *(start + overlap // 2 for start in starts[1:]), length]
    return [TileSpan(s, s + size, cuts[i], cuts[i + 1]) for i, s in enumerate(starts)]


def fixed_tiling(model: nn.Module, tile: int | None, overlap: int | None = None) -> Tiling:
    """The tiling of a given tile size.

    Args:
        model: the network.
        tile: see `Tiling`, a multiple of `model.pad_multiple`.
        overlap: a multiple of it too; None: the receptive field, or less if that were more than
            half of the tile.

    Raises:
        ValueError: a size that does not fit.
    """
    if tile is None:
        if overlap is not None:
            raise ValueError(f"tile_overlap {overlap} needs a tile size: pass tile too")
        return Tiling()
    network = getattr(model, "module", model)
    multiple, radius = getattr(network, "pad_multiple", 1), _radius(network)
    if tile < 1 or tile % multiple:
        least = "at least 1" if multiple == 1 else f"a positive multiple of {multiple}"
        raise ValueError(f"tile must be {least}, got {tile}")
    if overlap is None:
        covering = tile if radius is None else _round_up(2 * radius, multiple)
        overlap = covering if 2 * covering <= tile else min(OVERLAP, tile // 2)
        overlap = overlap // multiple * multiple
    if not 0 <= overlap < tile or overlap % multiple:
        raise ValueError(
            f"tile_overlap must be a multiple of {multiple} below the tile size {tile}, "
            f"got {overlap}"
        )
    return Tiling(tile, overlap, radius is not None and overlap >= 2 * radius)


def fitting_tiling(model: nn.Module, channels: int, memory: int | None = None) -> Tiling:
    """The tiling that this network, device and machine suit: exact if memory allows it.

    Args:
        model: the network, on the device that will compute.
        channels: of its input.
        memory: bytes that a tile may take, at least `least_bytes`; None: by what is free.
    """
    network = getattr(model, "module", model)
    multiple, radius = getattr(network, "pad_multiple", 1), _radius(network)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    memory = _free_memory(device) if memory is None else memory
    if radius is not None:
        aim = max(_SIDE_CUDA if device.type == "cuda" else _SIDE, _RADII * radius)
        side = _largest_side(network, channels, _round_up(aim, multiple), memory)
        if side >= _LEAST_RADII * radius:
            return Tiling(side, _round_up(2 * radius, multiple))
    aim = _SIDE_CUDA if device.type == "cuda" else _SIDE_UNBOUNDED
    return fixed_tiling(model, _largest_side(network, channels, _round_up(aim, multiple), memory))


def least_bytes(model: nn.Module, channels: int) -> int:
    """Bytes that the smallest tile takes which `fitting_tiling` should be given memory for."""
    network = getattr(model, "module", model)
    side = _round_up(_LEAST_SIDE, getattr(network, "pad_multiple", 1))
    return _tile_bytes(network, channels, side)


def exact_bytes(model: nn.Module, channels: int) -> int | None:
    """Bytes of the smallest tile for which `fitting_tiling` makes seams exact; None: of no tile."""
    network = getattr(model, "module", model)
    radius = _radius(network)
    if radius is None:
        return None
    side = _round_up(_LEAST_RADII * radius, getattr(network, "pad_multiple", 1))
    return _tile_bytes(network, channels, side)


def _radius(network: nn.Module) -> int | None:
    return getattr(network, "receptive_radius", None)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _free_memory(device: torch.device) -> int:
    """Bytes that a tile may take: a quarter of what is free, but not too few."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # this system does not tell
        free = 0
    return max(_MEMORY, free // 4)


def _largest_side(network: nn.Module, channels: int, aim: int, memory: int) -> int:
    """The largest side up to `aim` of a tile that takes at most `memory` bytes."""
    multiple, side = getattr(network, "pad_multiple", 1), aim
    while side > multiple:
        needed = _tile_bytes(network, channels, side)
        if needed <= memory:
            break
        side = int(0.97 * side * math.sqrt(memory / needed)) // multiple * multiple
    return max(side, multiple)


def _tile_bytes(network: nn.Module, channels: int, side: int) -> int:
    """Bytes that a tile of this side takes beside the weights."""
    if _radius(network) is None:
        return _UNSEEN * peak_bytes(network, (1, channels, side, side))
    # Convolutions and windows alone: memory grows with the number of pixels.
    multiple = getattr(network, "pad_multiple", 1)
    probe = _round_up(_PROBE, multiple) if multiple == 1 else _LEAST_WINDOWS * multiple
    weight = next(network.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    each = peak_bytes(network, (1, channels, probe, probe), device) / probe**2
    return math.ceil(_UNSEEN * each * side**2)


@torch.no_grad()
def peak_bytes(
    network: nn.Module, shape: tuple[int, ...], device: torch.device | str = "meta"
) -> int:
    """Bytes of the tensors that live at once while a network computes; its weights do not count.

    Args:
        network: any module.
        shape: of its input.
        device: that of the network; or "meta", where nothing is computed, but which takes a second
            to load when it is used first.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    state = {name: tensor.to(device) for name, tensor in tensors}
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    with _LiveBytes() as live:
        x = torch.zeros(shape, dtype=dtype, device=device)
        torch.func.functional_call(network, state, (x,))
    return live.peak


class _LiveBytes(TorchFunctionMode):
    """Counts the bytes of all storages that functions make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
