"""The rules of the sparse ops as Triton functions: lists of entries, sums, the epilogue.

issp/ops/schemas/sparse.py describes the format. Every op is a tl.dot of gathered tiles, its sums in
float32 (float64 for float64), over chunks of ascending entries. PRECISION is tl.dot's: 16-bit types
are multiplied by tensor cores, float32 by them only where torch allows TF32 ("tf32") and by fused
multiply-adds otherwise ("ieee"), float64 by the tensor cores' float64 instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .semantics import narrow
from .target import INTERPRETED, registers, rounded_to_tf32

TENSOR_CORE_ROWS = 16  # of v: a block fills the rows of one tensor core instruction
CHUNK = 16  # entries per step, the least K of 16-bit types: blocks with few entries waste least
PROGRAMS = 528  # four for each SM of the largest GPUs; below it tiles are made smaller
# Entries of a run of float32. A tl.dot of fused multiply-adds continues the chain of its total, and
# a chain of 2304 has several times the error of a dense matmul: runs are summed and added up. In
# other types roundings of inputs or results hide it, or there are digits to spare.
RUN = 128
ONE_RUN: tl.constexpr = tl.constexpr(65536)  # no runs
GRAD_RUN: tl.constexpr = tl.constexpr(256)  # pixels of a run of a gradient, of all types
GRAD_CHUNK = 32  # entries of a gradient's tile; one computation per pixel serves all of them
SUM_TILE = 1024


def prefers_tensor_cores(x_dtype: torch.dtype, v: int) -> bool:
    """Whether tensor cores serve sparse ops of this dtype with blocks of v rows, and fill up.

    float32 takes them where torch's own matmul may: where
    `torch.backends.cuda.matmul.fp32_precision` is "tf32" (or its older name allow_tf32 is True).
    """
    if x_dtype == torch.float32 and precision(x_dtype) != "tf32":
        return False
    return v >= TENSOR_CORE_ROWS and x_dtype != torch.float64


def precision(x_dtype: torch.dtype) -> str:
    """PRECISION of a call under torch's present settings."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if x_dtype == torch.float32 and allowed else "ieee"


def tile_sizes(
    x_dtype: torch.dtype,
    precision: str,
    v: int,
    images: int,
    pixels: int,
    blocks: int,
    epilogue: bool,
) -> dict:
    """ROWS, PIXELS, CHUNK and RUN of an op's tile, and its launch options.

    Two pixels per thread use one computation per entry. With tiles of 8192 sums three programs fit
    on an SM (168 registers), with tiles of 4096 four (128), both without spills. With an
    epilogue (gelu, or a residual, which has another layout) or with runs (which have separate
    sums), tiles of 4096 take 168 registers.
    """
    # Of float64, sums and operands take two registers each.
    rows, words = min(triton.next_power_of_2(v), 64), 4 if x_dtype == torch.float64 else 1
    runs = x_dtype == torch.float32 and precision == "ieee"
    columns = min(256, (4096 if epilogue or runs else 8192) // (rows * words))
    while columns > 64 and images * triton.cdiv(pixels, columns) * blocks < PROGRAMS:
        columns //= 2
    max_sums = 2048 if runs else 4096  # sums of a program that has 128 registers
    most_registers = 168 if epilogue or rows * columns * words > max_sums else 128
    run = RUN if runs else ONE_RUN.value
    return {"ROWS": rows, "PIXELS": columns, "CHUNK": CHUNK, "RUN": run, **launch(most_registers)}


def grad_sizes(x_dtype: torch.dtype, v: int) -> dict:
    """ROWS and PIXELS of a gradient's tile, and its launch options."""
    rows = min(triton.next_power_of_2(v), 32)
    pixels = 128 if rows <= 16 and x_dtype != torch.float64 else 64
    return {"ROWS": rows, "PIXELS": pixels, "CHUNK": GRAD_CHUNK, **launch(224)}


def launch(most_registers: int) -> dict:
    """Launch options."""
    # One stage: copies that run ahead would take two more instructions per gathered element.
    return {"num_warps": 4, "num_stages": 1, **registers(most_registers)}


def split_tiles(entries: int, v: int, dense: int, blocks: int, tiles: int) -> tuple[int, int, int]:
    """How a gradient of values is divided: programs per block, splits, tiles per split.

    From shapes alone, so that its bits depend on nothing else. Program p of a block takes its
    chunks p, p + programs, ...; the splits' partial sums take no more memory than the dense weight.

    Args:
        entries: of the weight, each with v values.
        dense: elements of the dense weight.
        blocks: tiles of rows of all blocks.
        tiles: tiles of pixels.
    """
    programs = max(1, triton.cdiv(triton.cdiv(entries, blocks), GRAD_CHUNK))
    max_splits = max(1, min(tiles, dense // max(1, entries * v)))
    tiles_per_split = triton.cdiv(tiles, min(max_splits, triton.cdiv(PROGRAMS, blocks * programs)))
    return programs, max(1, triton.cdiv(tiles, tiles_per_split or 1)), tiles_per_split


def partial_sums(x: Tensor, splits: int, entries: int, v: int) -> Tensor:
    """A buffer [splits, entries, v]: a single split writes the result itself."""
    accumulates = splits > 1 and x.dtype != torch.float64
    return x.new_empty((splits, entries, v), dtype=torch.float32 if accumulates else x.dtype)


def summed(partial: Tensor, x: Tensor) -> Tensor:
    """[splits, entries, v] added up in order, in x's type."""
    if partial.shape[0] == 1:
        return partial[0]
    out = x.new_empty(partial.shape[1:])
    programs = triton.cdiv(out.numel(), SUM_TILE)
    sum_splits[(programs,)](partial, out, out.numel(), partial.shape[0], TILE=SUM_TILE)
    return out


def index_of(*counts: int) -> tl.dtype:
    """Type of offsets below these counts."""
    return tl.int64 if max(counts) >= 2**31 else tl.int32


@triton.jit
def block_entries(starts, block, entries):
    """A block's first entry and the one behind its last: bounded, whatever the lists hold."""
    begin = tl.maximum(tl.load(starts + block), 0)
    return begin, tl.minimum(tl.load(starts + block + 1), entries)


@triton.jit
def positions(columns, entry, end, length):
    """Positions of entries, and which entries exist and lie inside the weight."""
    column = tl.load(columns + entry, mask=entry < end, other=-1)
    inside = (column >= 0) & (column < length)
    return tl.where(inside, column, 0), inside


@triton.jit
def weights(values, entry, end, row, V: tl.constexpr, INDEX: tl.constexpr):
    """Weights of entries and rows, which broadcast; zero behind the last of either."""
    offset = entry.to(INDEX) * V + row
    return tl.load(values + offset, mask=(entry < end) & (row < V), other=0.0)


@triton.jit
def wide(value):
    """In the type of the sums: float64 for float64, else float32."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def zeros(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums at the beginning."""
    if x.dtype.element_ty == tl.float64:
        return tl.zeros([ROWS, COLUMNS], tl.float64)
    else:
        return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def run_of(total, RUN: tl.constexpr):
    """Where a run's sums begin: at zero, or without runs where the total is."""
    if RUN < ONE_RUN:
        return tl.zeros_like(total)
    else:
        return total


@triton.jit
def added(total, run, RUN: tl.constexpr):
    """The total after a run."""
    if RUN < ONE_RUN:
        return total + run
    else:
        return run


@triton.jit
def multiplied(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b."""
    if PRECISION == "tf32":
        a, b = rounded_to_tf32(a), rounded_to_tf32(b)
    if INTERPRETED:
        # It would multiply the bits of bfloat16; the wide type holds products of 16-bit numbers.
        a, b = wide(a), wide(b)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def activated(total, bias, row, exists, ACTIVATION: tl.constexpr):
    """The activation of total + bias: none, relu (NaN stays), gelu (by erf).

    row: of the bias, shaped to broadcast against the sums; exists: likewise, which rows there are.
    """
    if bias is not None:
        total += wide(tl.load(bias + row, mask=exists, other=0.0))
    if ACTIVATION == "relu":
        total = tl.where(total < 0, 0.0, total)
    elif ACTIVATION == "gelu":
        total = total * 0.5 * (1.0 + tl.erf(total * 0.7071067811865476))
    return total


@triton.jit
def store(total, y, residual, offset, inside):
    """Stores total + residual, rounded once."""
    if residual is not None:
        tl.debug_barrier()  # else the load moves in front of gelu, and registers run out
        total += wide(tl.load(residual + offset, mask=inside, other=0.0))
    tl.store(y + offset, narrowed(total, y.dtype.element_ty), mask=inside)


@triton.jit
def narrowed(total, DTYPE: tl.constexpr):
    """Rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # It would cut the bits off.
        bits = narrow(total, "bfloat16") | tl.where(total == total, 0, 0x40).to(tl.int16)
        return bits.to(tl.bfloat16, bitcast=True)
    else:
        return total.to(DTYPE)


@triton.jit(do_not_specialize=["count", "splits"])
def sum_splits(partial, target, count, splits, TILE: tl.constexpr):
    """target[i] = the sum of partial[s, i] over s in ascending order."""
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < count
    total = tl.load(partial + offset, mask=inside, other=0.0)
    for _ in range(1, splits):
        offset += count
        total += tl.load(partial + offset, mask=inside, other=0.0)
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(target + offset, narrowed(total, target.dtype.element_ty), mask=inside)
