"""Packed sparse weights: `SparseRows`, unstructured, and `NMTensor`, N:M.

The format is torch's BSR with blocks of (v, 1); see issp/ops/schemas/sparse.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from issp.ops import reference, validation
from issp.ops.keep import Keep
from issp.ops.schemas import library

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self needs Python 3.11


def _checked_transpose(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    validation.check_transpose(*args)
    return reference.transpose(*args)


library.impl("_sparse_transpose", _checked_transpose, "CompositeExplicitAutograd")


def transpose(
    col_indices: Tensor, crow_indices: Tensor, v: int, shape: Sequence[int]
) -> list[Tensor]:
    """`transposed` of issp/ops/schemas/sparse.py, for a weight of `shape`."""
    inputs, taps = shape[1], torch.Size(shape[2:]).numel()
    return list(torch.ops.issp._sparse_transpose(col_indices, crow_indices, v, inputs, taps))


class Transposed(NamedTuple):
    """The lists of a transposed weight, and the tensors and versions that they were made of."""

    lists: list[Tensor]
    positions: tuple[Tensor, Tensor]
    versions: tuple[int, int]


def transposed_once(p: PackedWeight, v: int, kept: Transposed | None) -> Transposed:
    """`kept`, or made anew where the positions of `p` are other tensors or were written to."""
    positions = (p.col_indices, p.crow_indices)
    versions = (_version(positions[0]), _version(positions[1]))
    if (
        kept is not None
        and kept.positions[0] is positions[0]
        and kept.positions[1] is positions[1]
        and kept.versions == versions
    ):
        return kept
    return Transposed(transpose(*positions, v, p.shape), positions, versions)


def _version(t: Tensor) -> int:
    try:
        return t._version
    except RuntimeError:  # a tensor of inference_mode has none
        return 0


class PackedWeight(Protocol):
    """What the sparse ops read of a weight: a `SparseRows`, or a sparse layer with a fixed mask."""

    @property
    def values(self) -> Tensor: ...

    @property
    def col_indices(self) -> Tensor: ...

    @property
    def crow_indices(self) -> Tensor: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def transposed(self) -> list[Tensor]: ...


class SparseRows:
    """A weight of which only chosen positions are stored; blocks of v rows share theirs.

    This is torch's BSR format with blocks of (v, 1) over the weight as a matrix [O, I * kh * kw];
    see `to_bsr` and `from_bsr`.

    Args:
        values: [E, v] float32, float16, bfloat16 or float64: one weight for each row of the block.
        col_indices: int32 [E]: positions in a row of the dense weight, ascending in a block row.
        crow_indices: int32 [O / v + 1]: block row b owns the entries crow_indices[b] ..
            crow_indices[b + 1].
        shape: (O, I) or (O, I, kh, kw), that of the dense weight.

    Raises:
        TypeError, ValueError: tensors that do not make a weight of this shape.
    """

    def __init__(
        self, values: Tensor, col_indices: Tensor, crow_indices: Tensor, shape: Sequence[int]
    ) -> None:
        self.values, self.col_indices, self.crow_indices = values, col_indices, crow_indices
        self.shape = tuple(int(size) for size in shape)
        self._transposed: Transposed | None = None
        self._check()

    def _check(self) -> None:
        _check_two_or_four(self.shape, "shape")
        rows = validation.check_weight(
            self.values, self.values, self.col_indices, self.crow_indices
        )
        if rows != self.shape[0]:
            raise ValueError(
                f"crow_indices and values describe {rows} rows, but the shape {self.shape} has "
                f"{self.shape[0]}: pass the shape of the dense weight"
            )
        validation.check_positions(self.col_indices, self.crow_indices, self._row_length())

    def _row_length(self) -> int:
        return torch.Size(self.shape[1:]).numel()

    @classmethod
    def from_dense(cls, weight: Tensor, v: int = 1) -> SparseRows:
        """Stores what is not zero; for v > 1 every position at which one of the v rows is not.

        Args:
            weight: [O, I] or [O, I, kh, kw]. The values are a copy, without its graph.
            v: consecutive rows that share their positions; it must divide O.

        Raises:
            TypeError, ValueError: a weight of another kind, or v that does not divide its rows.
        """
        kept = _blocks(weight, v).ne(0).any(1)
        return cls(*pack_entries(weight, kept), weight.shape)

    @classmethod
    def from_unchecked(
        cls, values: Tensor, col_indices: Tensor, crow_indices: Tensor, shape: tuple[int, ...]
    ) -> SparseRows:
        """As the constructor, without its checks, which have to read the positions."""
        rows = object.__new__(cls)
        rows.values, rows.col_indices, rows.crow_indices = values, col_indices, crow_indices
        rows.shape = shape
        rows._transposed = None
        return rows

    @classmethod
    def from_bsr(cls, bsr: Tensor, shape: Sequence[int] | None = None) -> SparseRows:
        """From torch's BSR tensor with blocks of (v, 1); shares its values where they allow it.

        Args:
            bsr: [O, L], layout torch.sparse_bsr. Its graph does not follow.
            shape: of the weight, with O rows of L elements; default: that of `bsr`.

        Raises:
            TypeError, ValueError: a tensor of another kind, or one that does not make a weight.
        """
        validation.check_tensor(bsr, "bsr")
        if bsr.layout != torch.sparse_bsr:
            raise TypeError(f"bsr has the layout {bsr.layout}: it must be torch.sparse_bsr")
        values = bsr.values().detach()
        if values.dim() != 3 or values.shape[2] != 1:
            raise ValueError(f"bsr has blocks {tuple(values.shape[1:])}: they must be (v, 1)")
        shape = tuple(bsr.shape) if shape is None else tuple(shape)
        if bsr.shape != (shape[0], torch.Size(shape[1:]).numel()):
            raise ValueError(f"bsr is {tuple(bsr.shape)}: that is no weight of shape {shape}")
        columns, starts = (x.to(torch.int32) for x in (bsr.col_indices(), bsr.crow_indices()))
        return SparseRows(values[..., 0].contiguous(), columns, starts, shape)

    def to_bsr(self) -> Tensor:
        """torch's BSR tensor [O, I * kh * kw] with blocks of (v, 1); shares the values."""
        return torch.sparse_bsr_tensor(
            self.crow_indices,
            self.col_indices,
            self.values.detach()[..., None],
            (self.shape[0], self._row_length()),
            device=self.values.device,
            check_invariants=True,
        )

    @property
    def v(self) -> int:
        """Consecutive rows that share their positions."""
        return self.values.shape[1]

    @property
    def sparsity(self) -> float:
        """Share of the dense weight's positions that are not stored."""
        return 1.0 - self.values.numel() / torch.Size(self.shape).numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def transposed(self) -> list[Tensor]:
        """`transposed` of issp/ops/schemas/sparse.py, made when first asked for."""
        self._transposed = transposed_once(self, self.v, self._transposed)
        return self._transposed.lists

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The weight of `shape`, +0 where nothing is stored; without a graph."""
        weight = reference.to_dense(
            self.values.detach(), self.col_indices, self.crow_indices, self._row_length()
        )
        return weight.view(self.shape)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `Tensor.to`: on another device, in another dtype. The positions stay int32."""
        values = self.values.to(*args, **kwargs)
        if values is self.values:
            return self
        moved = object.__new__(type(self))
        moved.__dict__.update(self.__dict__)
        moved.values = values
        moved.col_indices = self.col_indices.to(values.device)
        moved.crow_indices = self.crow_indices.to(values.device)
        moved._transposed = None
        return moved

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._description()}, sparsity={self.sparsity:.4f}, "
            f"{self.dtype}, {self.device})"
        )

    def _description(self) -> str:
        return f"shape={self.shape}, v={self.v}"


class NMTensor(SparseRows):
    """A weight that keeps exactly n of every m consecutive input channels, at each kernel position.

    Args:
        values: [E, v] with v = keep.v.
        col_indices: int32 [E], see `SparseRows`.
        crow_indices: int32 [O / v + 1].
        shape: (O, I) or (O, I, kh, kw); keep.of divides I and keep.v divides O.
        keep: the pattern, of layout "channels". Of c channels that are kept together each has its
            entry.

    Raises:
        TypeError, ValueError: tensors that do not make a weight of this shape and pattern.
    """

    def __init__(
        self,
        values: Tensor,
        col_indices: Tensor,
        crow_indices: Tensor,
        shape: Sequence[int],
        keep: Keep,
    ) -> None:
        self.keep = keep
        super().__init__(values, col_indices, crow_indices, shape)

    def _check(self) -> None:
        super()._check()
        check_pattern(self.shape, self.keep)
        if self.v != self.keep.v:
            raise ValueError(f"values have v = {self.v} but the pattern is {self.keep}")
        if validation.can_read(self.col_indices):
            _check_groups(self.col_indices, self.crow_indices, self.shape, self.keep)

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Keep) -> NMTensor:  # type: ignore[override]
        """Stores n positions of every group; where fewer are not zero, the first zeros as well.

        With c > 1 they are n / c units of c channels.

        Args:
            weight: [O, I] or [O, I, kh, kw] with at most n positions per group that are not zero
                in one of its v rows or in another channel of their unit. The values are a copy,
                without its graph.
            keep: the pattern, of layout "channels".

        Raises:
            TypeError, ValueError: the pattern does not divide the weight, is "flat", or a group
                has more than n positions.
        """
        blocks = _blocks(weight, keep.v if isinstance(keep, Keep) else 1)
        check_pattern(weight.shape, keep)
        channels = blocks.ne(0).any(1).view(len(blocks), -1, keep.c, _taps(weight.shape))
        units = channels.any(2).view(len(blocks), -1, keep.of // keep.c, channels.shape[3])
        counts, n = units.sum(2, keepdim=True), keep.n // keep.c
        overfull = (counts > n).flatten(2).any(2)
        if overfull.any():
            block, group = overfull.nonzero()[0].tolist()
            raise ValueError(
                f"{int(overfull.sum())} groups hold more than {keep.n} weights per {keep.of} (the "
                f"first: row {block * keep.v}, channels {group * keep.of}..."
                f"{group * keep.of + keep.of - 1}): prune first, issp.ops.nm_prune(weight, {keep})"
            )
        first = ~units & ((~units).cumsum(2) <= n - counts)
        kept = (units | first).view(len(blocks), -1, 1, channels.shape[3]).expand_as(channels)
        kept = kept.reshape(len(blocks), -1)
        return cls(*pack_entries(weight, kept), weight.shape, keep)

    @classmethod
    def from_bsr(  # type: ignore[override]
        cls, bsr: Tensor, keep: Keep, shape: Sequence[int] | None = None
    ) -> NMTensor:
        """As `SparseRows.from_bsr`, of a weight that has the pattern."""
        rows = SparseRows.from_bsr(bsr, shape)
        return cls(rows.values, rows.col_indices, rows.crow_indices, rows.shape, keep)

    @property
    def indices(self) -> Tensor:
        """int32 [O / v, entries of a block row]: `col_indices`, one line per block row."""
        return self.col_indices.view(self.shape[0] // self.v, -1)

    def _description(self) -> str:
        c = f", c={self.keep.c}" if self.keep.c > 1 else ""
        return f"shape={self.shape}, keep={self.keep.n}:{self.keep.of}, v={self.keep.v}{c}"


def check_pattern(shape: Sequence[int], keep: Keep, name: str = "the weight") -> None:
    """Refuses a pattern that a packed weight of this shape cannot have.

    Raises:
        TypeError: keep is no `Keep`.
        ValueError: layout "flat", or a shape that the pattern does not divide.
    """
    if not isinstance(keep, Keep):
        raise TypeError(f"keep must be an issp.Keep, not {type(keep).__name__}")
    if keep.layout != "channels":
        raise ValueError(
            f'{keep} groups weights in memory order, across rows: weights of layout "flat" are '
            "unstructured, use issp.ops.sparse_pack (SparseRows)"
        )
    keep.check_divides(shape, name)


def check_rows_per_block(rows: int, v: int, name: str = "the weight") -> None:
    """Refuses v where it does not divide the rows of a weight."""
    if v < 1 or rows % v:
        raise ValueError(f"v = {v} does not divide the {rows} rows of {name}: choose another v")


def _check_groups(
    col_indices: Tensor, crow_indices: Tensor, shape: Sequence[int], keep: Keep
) -> None:
    """Refuses positions unless every group of every block row owns exactly n entries, in units."""
    taps, groups = _taps(shape), shape[1] // keep.of
    block = torch.repeat_interleave(crow_indices.diff().long())
    channel, tap = col_indices.long() // taps, col_indices.long() % taps
    group = (block * groups + channel // keep.of) * taps + tap
    counts = torch.bincount(group, minlength=(shape[0] // keep.v) * groups * taps)
    unit = (block * (shape[1] // keep.c) + channel // keep.c) * taps + tap
    channels = torch.bincount(unit)
    if (counts != keep.n).any() or ((channels != 0) & (channels != keep.c)).any():
        together = f", {keep.c} together," if keep.c > 1 else ""
        raise ValueError(
            f"the positions do not keep {keep.n} of every {keep.of} channels{together} in a weight "
            f"of shape {tuple(shape)}: pack it with issp.ops.nm_pack, or use SparseRows"
        )


def _check_two_or_four(shape: Sequence[int], name: str) -> None:
    if len(shape) not in (2, 4):
        raise ValueError(f"{name} is {tuple(shape)}: it must be [O, I] or [O, I, kh, kw]")
    if min(shape) < 1:
        raise ValueError(f"{name} is {tuple(shape)}: every size must be at least 1")


def _taps(shape: Sequence[int]) -> int:
    return torch.Size(shape[2:]).numel()


def _blocks(weight: Tensor, v: int) -> Tensor:
    """The weight as [O / v, v, length of a row]."""
    validation.check_tensor(weight, "the weight")
    _check_two_or_four(weight.shape, "the weight's shape")
    check_rows_per_block(weight.shape[0], v)
    return weight.detach().reshape(weight.shape[0] // v, v, -1)


def pack_entries(
    weight: Tensor, kept: Tensor, entries: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """values, col_indices and crow_indices of chosen positions of a dense weight.

    Args:
        weight: [O, I] or [O, I, kh, kw].
        kept: bool [O / v, length of a row].
        entries: how many are kept, where that is known: then no device is waited for, and
            torch.compile knows every size.
    """
    block, column, crow_indices = positions_of(kept, entries)
    values = _blocks(weight, weight.shape[0] // kept.shape[0])[block, :, column]
    return values.contiguous(), column.int(), crow_indices


def positions_of(kept: Tensor, entries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The block row and the column of each entry, int64 [E], and crow_indices.

    Args:
        kept, entries: see `pack_entries`.
    """
    if entries is None:
        block, column = kept.nonzero(as_tuple=True)
    else:
        block, column = torch.nonzero_static(kept, size=entries).t().contiguous()
    rows = torch.arange(kept.shape[0] + 1, device=kept.device)
    return block, column, torch.searchsorted(block, rows, out_int32=True)
