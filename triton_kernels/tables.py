"""The whole model in one launch: device tables of pointers and sizes, and tiles of a tensor.

A launch has one program per tile; `tiles` says whose tile it is, `rows` where that tensor lies.
The tables are cached by the tensors' addresses: a repeated call uploads nothing, so that it can be
captured in a CUDA graph once it has run before.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LINE = 16  # words: a tensor's mask and its scratch region start on 64-byte lines
SCRATCH_HEADER = 64  # words; word 0 counts the searches that the bracket missed

# 2048 weights by 8 warps: 8 weights per thread fit 64 registers without spills, so that four
# programs share an SM and keep 32 KB of loads in flight, and a 60 x 60 layer has two tiles. With
# 4096 the compiler wants 90 to 125 registers, most of them for what is rare, and two programs fit.
TILE = 2048

# Seen to lay out and to allocate registers differently: 3.6 and 3.9.
RECENT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)

INTEGER = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float64: torch.int64,
}


class Tables(NamedTuple):
    """What a launch over many tensors reads."""

    rows: Tensor  # int64 [T, 8]: address, elements, first tile, tiles, mask word, region, capacity
    tiles: Tensor  # int32 [tiles]: the tensor of every tile, largest tensors first
    aligned: bool  # every address is a multiple of 16 bytes


_cache: OrderedDict[tuple, Tables] = OrderedDict()
_captured: dict[tuple, Tables] = {}  # a graph reads these tables as long as the process lives
_CACHED = 64


def mask_words(numel: int) -> int:
    """Words of one tensor's packed mask, padding included."""
    return -(-numel // (32 * LINE)) * LINE


def region_words(numel: int) -> int:
    """Words of scratch that belong to one tensor: counters first, then its candidates."""
    return (numel // 10 // LINE + 2) * LINE


def starts(lengths: Sequence[int], first: int = 0) -> list[int]:
    """First word of every tensor in a buffer with these lengths, after a header."""
    found = []
    for length in lengths:
        found.append(first)
        first += length
    return found


def spans(tensors: Sequence[Tensor], tile: int) -> int:
    """Consecutive tiles per program: 8 where that leaves 512 programs (four per SM), else 1.

    A program's first load waits for its row of the tables, its last act is an atomic: some 2 us
    without traffic, which more tiles share. A small model needs every SM more than that.
    """
    return 8 if sum(x.numel() for x in tensors) >= 512 * 8 * tile else 1


def tables(tensors: Sequence[Tensor], tile: int, keep: Sequence[int] | None = None) -> Tables:
    """The tables of these tensors, from the cache when they lie where they lay before.

    Args:
        tensors: all tensors of the call; masks and scratch are laid out over all of them.
        tile: elements per program, a multiple of 512 (a line of mask words).
        keep: which tensors get tiles (all by default).
    """
    device = tensors[0].device
    numels = [x.numel() for x in tensors]
    keep = range(len(tensors)) if keep is None else keep
    name = (tile, device, *keep, *(x.data_ptr() for x in tensors), *numels)
    found = _captured.get(name) or _cache.get(name)
    if found is None:
        found = _build(tensors, numels, tile, sorted(keep, key=lambda t: -numels[t]))
        _cache[name] = found
        if len(_cache) > _CACHED:
            _cache.popitem(last=False)
    elif name in _cache:
        _cache.move_to_end(name)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[name] = found
    return found


def _build(tensors: Sequence[Tensor], numels: list[int], tile: int, order: list[int]) -> Tables:
    # Largest first: what the last tile of a tensor adds at the end is short for the tensors that
    # finish the launch.
    device = tensors[0].device
    counts = [-(-n // tile) for n in numels]
    first = dict(zip(order, starts([counts[t] for t in order]), strict=True))
    masks = starts([mask_words(n) for n in numels])
    regions = starts([region_words(n) for n in numels], SCRATCH_HEADER)
    rows = [
        [
            x.data_ptr(),
            n,
            first.get(t, 0),
            counts[t],
            masks[t],
            regions[t],
            region_words(n) - LINE,
            0,
        ]
        for t, (x, n) in enumerate(zip(tensors, numels, strict=True))
    ]
    tiles = torch.repeat_interleave(
        torch.tensor(order, dtype=torch.int32), torch.tensor([counts[t] for t in order])
    )
    aligned = all(tensors[t].data_ptr() % 16 == 0 for t in order)
    return Tables(torch.tensor(rows, dtype=torch.int64).to(device), tiles.to(device), aligned)


def launch(dtype: str) -> dict:
    """Launch options of the kernels with tiles of 2048.

    64 registers (72 where an older compiler would spill), but for float64, whose weights take two
    each. No contraction: a product and a comparison of it must see the same, rounded, value.
    """
    registers = None if dtype == "float64" else (64 if RECENT else 72)
    return {"num_warps": 8, "maxnreg": registers, "enable_fp_fusion": False}


def name_of(dtype: torch.dtype) -> str:
    """DTYPE of semantics.py: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def halves(shrink: float) -> tuple[int, int]:
    """The float64 bits of the shrink factor as two int32; `factor` in semantics.py joins them."""
    return struct.unpack("<ii", struct.pack("<d", shrink))[::-1]


@triton.jit
def overflowed(found_inf):
    """True when the gradient scaler met an infinity: nothing may be modified."""
    if found_inf is None:
        return False
    else:
        return tl.load(found_inf) != 0


@triton.jit
def locate(rows, tiles, program):
    """The program's tensor, and of that tensor: address, elements, tile index, tiles."""
    t = tl.load(tiles + program)
    row = rows + t.to(tl.int64) * 8
    return t, tl.load(row), tl.load(row + 1), program - tl.load(row + 2), tl.load(row + 3)


@triton.jit
def mask_start(rows, t):
    """First word of tensor t in the packed masks."""
    return tl.multiple_of(tl.load(rows + t.to(tl.int64) * 8 + 4), 16)


@triton.jit
def region(rows, t, scratch):
    """Tensor t's words of the scratch buffer, and how many candidates they hold."""
    row = rows + t.to(tl.int64) * 8
    return scratch + tl.multiple_of(tl.load(row + 5), 16), tl.load(row + 6)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor's bits as integers; a known alignment makes the loads 16 bytes wide."""
    if DTYPE == "float64":
        found = address.to(tl.pointer_type(tl.int64))
    elif DTYPE == "float32":
        found = address.to(tl.pointer_type(tl.int32))
    else:
        found = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def load_tile(source, local, size, TILE: tl.constexpr):
    """The bits at source + local; past `size` all ones: the largest key, so never among the k.

    A full tile is loaded without a mask, whose unknown end would make the loads 4 bytes wide.
    """
    if size >= TILE:
        bits = tl.load(source + local)
    else:
        bits = tl.load(source + local, mask=local < size, other=-1)
    return bits


@triton.jit
def store_tile(target, local, size, bits, TILE: tl.constexpr):
    """The inverse of load_tile."""
    if size >= TILE:
        tl.store(target + local, bits)
    else:
        tl.store(target + local, bits, mask=local < size)


@triton.jit
def left(n, start, TILE: tl.constexpr):
    """How many elements the tile at `start` has, as int32."""
    return tl.minimum(n - start, TILE).to(tl.int32)
