"""The whole model in one launch: device tables of pointers and sizes, and tiles of a tensor.

A launch has one program per `tiles_per_program` tiles; `tiles` maps a program to its tensor, `rows`
a tensor to its address and layout.
The tables are cached by the tensors' addresses: a repeated call uploads nothing, so that it can be
captured in a CUDA graph once it has run before.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LINE = 16  # words: a tensor's mask and its scratch region start on 64-byte lines
SCRATCH_HEADER = 64  # words; word 0 counts the searches that the bracket missed

# 2048 weights by 8 warps: 8 weights per thread fit 64 registers without spills, so that four
# programs fit on an SM and keep 32 KB of loads in flight, and a 60 x 60 layer has two tiles. With
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

    rows: Tensor  # int64 [T, 8]: address, elements, first program, programs, mask, region, capacity
    tiles: Tensor  # int32 [programs]: the tensor of every program, largest tensors first
    tiles_per_program: int  # consecutive tiles per program
    aligned: bool  # every address is a multiple of 16 bytes

    @property
    def grid(self) -> tuple[int]:
        """The launch's grid."""
        return (self.tiles.numel(),)


_cache: OrderedDict[tuple, tuple] = OrderedDict()
_captured: dict[tuple, tuple] = {}  # a graph reads these tables as long as the process lives
_CACHE_SIZE = 64


def mask_words(numel: int) -> int:
    """Words of one tensor's packed mask, padding included."""
    return -(-numel // (32 * LINE)) * LINE


def region_words(numel: int) -> int:
    """Words of scratch that belong to one tensor: counters first, then its candidates."""
    return (numel // 10 // LINE + 2) * LINE


def starts(lengths: Sequence[int], first: int = 0) -> list[int]:
    """First word of every tensor in a buffer with these lengths, after a header."""
    offsets = []
    for length in lengths:
        offsets.append(first)
        first += length
    return offsets


def tables(
    tensors: Sequence[Tensor],
    tile: int,
    tiles_per_program: int | None = None,
    keep: Sequence[int] | None = None,
) -> Tables:
    """The tables of these tensors, from the cache when their addresses are the same.

    Args:
        tensors: all tensors of the call; masks and scratch are laid out over all of them.
        tile: elements per tile, a multiple of 512 (a line of mask words).
        tiles_per_program: consecutive tiles per program (None: by the size of the model).
        keep: which tensors get programs (all by default).

    Raises:
        RuntimeError: a CUDA graph is being captured and the tables have to be uploaded first.
    """
    pointers, numels = tuple(map(Tensor.data_ptr, tensors)), tuple(map(Tensor.numel, tensors))
    key = (pointers, numels, tile, tiles_per_program, None if keep is None else tuple(keep))
    device = tensors[0].device

    def build() -> Tables:
        count = tiles_per_program or _tiles_per_program(numels, tile)
        table = _build(pointers, numels, [-(-n // (tile * count)) for n in numels], count, keep)
        return table._replace(rows=table.rows.to(device), tiles=table.tiles.to(device))

    return get_or_build(key, device, build)


def group_tables(
    tensors: Sequence[Tensor],
    patterns: Sequence[tuple[int, ...]],
    keep: Sequence[int],
    groups: int,
) -> tuple[Tables, Tensor]:
    """The tables of tensors in groups of weights, and a table of one row of numbers per tensor.

    Args:
        tensors: as in `tables`.
        patterns: 8 numbers for every tensor, of which the sixth counts its groups.
        keep: which tensors get programs.
        groups: groups per program.
    """
    pointers, numels = tuple(map(Tensor.data_ptr, tensors)), tuple(map(Tensor.numel, tensors))
    device = tensors[0].device

    def build() -> tuple[Tables, Tensor]:
        programs = [-(-pattern[5] // groups) for pattern in patterns]
        table = _build(pointers, numels, programs, 1, keep)
        table = table._replace(rows=table.rows.to(device), tiles=table.tiles.to(device))
        return table, torch.tensor(patterns, dtype=torch.int64, device="cpu").to(device)

    return get_or_build((pointers, numels, groups, tuple(patterns), tuple(keep)), device, build)


def uploaded(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """A table of one row per tensor, and as many int32 counters at 0, both cached by the values.

    Raises:
        RuntimeError: a CUDA graph is being captured and the table has to be uploaded first.
    """

    def build() -> tuple[Tensor, Tensor]:
        table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(device)
        return table, torch.zeros(len(rows), dtype=torch.int32, device=device)

    return get_or_build(tuple(rows), device, build)


def get_or_build(key: tuple, device: torch.device, build: Callable[[], tuple]) -> tuple:
    """What `build` returns, from the cache if that has been built for this key before.

    Raises:
        RuntimeError: a CUDA graph is being captured, and it has not.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    entry = _captured.get(key) or _cache.get(key)
    if entry is None and capturing:
        raise RuntimeError("call the op once with these tensors before capturing a CUDA graph")
    if entry is None:
        entry = build()
        _cache[key] = entry
        if len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    elif key in _cache:
        _cache.move_to_end(key)
    if capturing:
        _captured[key] = entry
    return entry


def _tiles_per_program(numels: Sequence[int], tile: int) -> int:
    # A program's first load waits for its row of the tables, and it ends with an atomic: some 2 us
    # without traffic per program, however many tiles it has. A small model gains more from using
    # every SM: eight tiles only where they leave 512 programs, about four per SM.
    return 8 if sum(numels) >= 512 * 8 * tile else 1


def _build(
    pointers: Sequence[int],
    numels: Sequence[int],
    programs: Sequence[int],
    tiles_per_program: int,
    keep: Sequence[int] | None,
) -> Tables:
    # Largest first: what the last program of a tensor adds at the end (the selection) is short for
    # the tensors that finish the launch.
    order = sorted(range(len(numels)) if keep is None else keep, key=lambda t: -numels[t])
    first = dict(zip(order, starts([programs[t] for t in order]), strict=True))
    masks = starts([mask_words(n) for n in numels])
    regions = starts([region_words(n) for n in numels], SCRATCH_HEADER)
    rows = [
        [p, n, first.get(t, 0), programs[t], masks[t], regions[t], region_words(n) - LINE, 0]
        for t, (p, n) in enumerate(zip(pointers, numels, strict=True))
    ]
    tiles = torch.repeat_interleave(
        torch.tensor(order, dtype=torch.int32, device="cpu"),
        torch.tensor([programs[t] for t in order], dtype=torch.int64, device="cpu"),
    )
    aligned = all(pointers[t] % 16 == 0 for t in order)
    return Tables(
        torch.tensor(rows, dtype=torch.int64, device="cpu"), tiles, tiles_per_program, aligned
    )


def launch(dtype: str, aligned: bool = True) -> dict:
    """Launch options of the kernels with tiles of 2048.

    64 registers (72 where an older compiler would spill), but for float64, whose weights take two
    each, and for unaligned tensors, whose layout holds eight mask words in a thread. No
    contraction: a product and a comparison of it must see the same, rounded, value.
    """
    registers = (64 if RECENT else 72) if aligned and dtype != "float64" else None
    return {"num_warps": 8, "maxnreg": registers, "enable_fp_fusion": False}


def name_of(dtype: torch.dtype) -> str:
    """DTYPE of semantics.py: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def split_f64(shrink: float) -> tuple[int, int]:
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
    """The program's tensor, and of that tensor: address, elements, program's index, programs."""
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
        result = address.to(tl.pointer_type(tl.int64))
    elif DTYPE == "float32":
        result = address.to(tl.pointer_type(tl.int32))
    else:
        result = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        result = tl.multiple_of(result, 16)
    return result


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
def elements_in_tile(n, start, TILE: tl.constexpr):
    """How many elements the tile at `start` has, as int32."""
    return tl.minimum(n - start, TILE).to(tl.int32)
