"""The whole model in one launch: device tables of pointers and sizes, and tiles of a tensor.

A launch has one program per `tiles_per_program` tiles; `tiles` maps a program to its tensor, `rows`
a tensor to its address and layout.

Layouts depend on the tensors' sizes alone. They are uploaded when these sizes are seen first, and
kept. Addresses change more often, a gradient's in every step where no allocator gives it the same
memory again: they are the arguments of a kernel that writes them into a copy of the layout. Nothing
waits for the GPU then, and a CUDA graph may be captured with gradients that nobody has seen before.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .target import registers

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
    aligned: bool = True  # every address is a multiple of 16 bytes

    @property
    def grid(self) -> tuple[int]:
        """The launch's grid."""
        return (self.tiles.numel(),)


_cache: OrderedDict[tuple, tuple] = OrderedDict()
_captured: dict[int, tuple] = {}  # a graph reads these tables as long as the process lives
_CACHE_SIZE = 64
_lock = threading.RLock()  # of both: threads may call ops at the same time

ADDRESSES = 64  # that one launch writes
ADDRESSES_AT_ONCE: tl.constexpr = tl.constexpr(ADDRESSES)


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
    """The tables of these tensors.

    Args:
        tensors: all tensors of the call; masks and scratch are laid out over all of them.
        tile: elements per tile, a multiple of 512 (a line of mask words).
        tiles_per_program: consecutive tiles per program (None: by the size of the model).
        keep: which tensors get programs (all by default).

    Raises:
        RuntimeError: see `get_or_build`.
    """
    numels, device = tuple(map(Tensor.numel, tensors)), tensors[0].device
    key = (device, numels, tile, tiles_per_program, None if keep is None else tuple(keep))

    def build() -> Tables:
        count = tiles_per_program or _tiles_per_program(numels, tile)
        return _build(numels, [-(-n // (tile * count)) for n in numels], count, keep, device)

    return _located(key, get_or_build(key, device, build), tensors, keep)


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

    Raises:
        RuntimeError: see `get_or_build`.
    """
    numels, device = tuple(map(Tensor.numel, tensors)), tensors[0].device
    key = (device, numels, groups, tuple(patterns), tuple(keep))

    def build() -> tuple[Tables, Tensor]:
        programs = [-(-pattern[5] // groups) for pattern in patterns]
        numbers = torch.tensor(patterns, dtype=torch.int64, device="cpu").to(device)
        return _build(numels, programs, 1, keep, device), numbers

    table, numbers = get_or_build(key, device, build)
    return _located(key, table, tensors, keep), numbers


def _located(
    key: tuple, layout: Tables, tensors: Sequence[Tensor], keep: Sequence[int] | None
) -> Tables:
    """The layout with the addresses of these tensors."""
    pointers = tuple(map(Tensor.data_ptr, tensors))
    rows = addressed(key, layout.rows, pointers)
    aligned = all(pointers[t] % 16 == 0 for t in (range(len(pointers)) if keep is None else keep))
    return layout._replace(rows=rows, aligned=aligned)


def uploaded(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """A table of one row per tensor, and as many int32 counters at 0, both cached by the values.

    Raises:
        RuntimeError: see `get_or_build`.
    """

    def build() -> tuple[Tensor, Tensor]:
        table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(device)
        return table, torch.zeros(len(rows), dtype=torch.int32, device="cpu").to(device)

    return get_or_build((device, *rows), device, build)


def get_or_build(key: tuple, device: torch.device, build: Callable[[], tuple]) -> tuple:
    """What `build` uploads, from the cache if that has been built for this key before.

    Raises:
        RuntimeError: a CUDA graph is being captured, and it has not.
    """
    with _lock:
        entry = _known(key, device)
        if entry is None:
            if is_capturing(device):
                raise RuntimeError(
                    "call the op once with these tensors before capturing a CUDA graph"
                )
            entry = build()
            _remember(key, entry)
        return entry


def addressed(key: tuple, table: Tensor, addresses: Sequence[int]) -> Tensor:
    """A copy of a table with these addresses in its first column, from the cache if it is there.

    Args:
        key: that `table` was built for.
        table: int64 [T, columns].
        addresses: T of them.
    """

    def write() -> Tensor:
        copy = table.clone()
        for start in range(0, len(addresses), ADDRESSES):
            some = addresses[start : start + ADDRESSES]
            some = (*some, *some[-1:] * (ADDRESSES - len(some)))
            write_addresses[(1,)](copy, start, *copy.shape, some)
        return copy

    device = table.device
    key = ("addressed", key, tuple(addresses))
    with _lock, torch.cuda.device_of(table):
        copy, stream = _known(key, device) or (None, None)
        if is_capturing(device):
            # What the graph writes belongs to it: outside of it there may be nothing yet.
            return write() if copy is None else copy
        here = current_stream(device)
        if copy is None or stream != here:  # another stream may still be writing it
            copy = write()
            _remember(key, (copy, here))
        return copy


def current_stream(device: torch.device) -> int:
    """The stream that launches go to."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _known(key: tuple, device: torch.device) -> tuple | None:
    """The entry of a key; one that a graph will read is kept for good."""
    entry = _cache.get(key)
    if entry is not None:
        _cache.move_to_end(key)
        if is_capturing(device):
            _captured[id(entry)] = entry
    return entry


def _remember(key: tuple, entry: tuple) -> None:
    _cache[key] = entry
    _cache.move_to_end(key)
    if len(_cache) > _CACHE_SIZE:
        _cache.popitem(last=False)


def _tiles_per_program(numels: Sequence[int], tile: int) -> int:
    # A program's first load waits for its row of the tables, and it ends with an atomic: some 2 us
    # without traffic per program, however many tiles it has. A small model gains more from using
    # every SM: eight tiles only where they leave 512 programs, about four per SM.
    return 8 if sum(numels) >= 512 * 8 * tile else 1


def _build(
    numels: Sequence[int],
    programs: Sequence[int],
    tiles_per_program: int,
    keep: Sequence[int] | None,
    device: torch.device,
) -> Tables:
    # Largest first: what the last program of a tensor adds at the end (the selection) is short for
    # the tensors that finish the launch.
    order = sorted(range(len(numels)) if keep is None else keep, key=lambda t: -numels[t])
    first = dict(zip(order, starts([programs[t] for t in order]), strict=True))
    masks = starts([mask_words(n) for n in numels])
    regions = starts([region_words(n) for n in numels], SCRATCH_HEADER)
    rows = [
        [0, n, first.get(t, 0), programs[t], masks[t], regions[t], region_words(n) - LINE, 0]
        for t, n in enumerate(numels)
    ]
    tiles = torch.repeat_interleave(
        torch.tensor(order, dtype=torch.int32, device="cpu"),
        torch.tensor([programs[t] for t in order], dtype=torch.int64, device="cpu"),
    )
    uploaded_rows = torch.tensor(rows, dtype=torch.int64, device="cpu").to(device)
    return Tables(uploaded_rows, tiles.to(device), tiles_per_program)


def launch(dtype: str, aligned: bool = True) -> dict:
    """Launch options of the kernels with tiles of 2048.

    64 registers (72 where an older compiler would spill), but for float64, whose weights take two
    each, and for unaligned tensors, whose layout holds eight mask words in a thread. No
    contraction: a product and a comparison of it must see the same, rounded, value.
    """
    most = (64 if RECENT else 72) if aligned and dtype != "float64" else None
    return {"num_warps": 8, **registers(most), "enable_fp_fusion": False}


def name_of(dtype: torch.dtype) -> str:
    """DTYPE of semantics.py: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def split_f64(shrink: float) -> tuple[int, int]:
    """The float64 bits of the shrink factor as two int32; `factor` in semantics.py joins them."""
    return struct.unpack("<ii", struct.pack("<d", shrink))[::-1]


@triton.jit(do_not_specialize=["start", "count", "columns", "addresses"])
def write_addresses(table, start, count, columns, addresses):
    """table[start + i, 0] = addresses[i], up to the end of the table."""
    for i in tl.static_range(ADDRESSES_AT_ONCE):
        if start + i < count:
            tl.store(table + (start + i) * columns, addresses[i])


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
