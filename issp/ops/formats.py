"""Sparse weights as products read them: `SparseRows`, unstructured, and `NMTensor`, N:M.

The format stands in schemas_products.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from issp.ops.keep import Keep
from issp.ops.reference import sparse as reference_products
from issp.ops.schemas import library
from issp.ops.validation import pruning as checks
from issp.ops.validation import sparse as checks_products

# Opaque to torch.compile, which could not know the sizes in between. See reference_products.py.
library.define(
    "_sparse_transpose(Tensor columns, Tensor starts, int v, int inputs, int taps) "
    "-> (Tensor, Tensor, Tensor)"
)
library.impl(
    "_sparse_transpose",
    lambda *args: tuple(reference_products.transpose(*args)),
    "CompositeExplicitAutograd",
)


@torch.library.register_fake("issp::_sparse_transpose", lib=library)
def _(columns: Tensor, starts: Tensor, v: int, inputs: int, taps: int):
    entries = columns.shape[0] * v
    return columns.new_empty(entries), columns.new_empty(inputs + 1), columns.new_empty(entries)


def transpose(columns: Tensor, starts: Tensor, v: int, shape: tuple[int, ...]) -> list[Tensor]:
    """`transposed` of schemas_products.py, for a weight of `shape`."""
    inputs, taps = shape[1], torch.Size(shape[2:]).numel()
    return list(torch.ops.issp._sparse_transpose(columns, starts, v, inputs, taps))


class SparseRows:
    """A weight of which only chosen positions are stored; blocks of v rows share theirs.

    Args:
        values: [E, v] float32, float16, bfloat16 or float64: one weight for each row of the block.
        columns: int32 [E]: positions in a row of the dense weight, ascending within a block.
        starts: int32 [O / v + 1]: block b owns the entries starts[b] .. starts[b + 1].
        shape: (O, I) or (O, I, kh, kw), that of the dense weight.

    Raises:
        TypeError, ValueError: tensors that do not make a weight of this shape.
    """

    def __init__(
        self, values: Tensor, columns: Tensor, starts: Tensor, shape: tuple[int, ...]
    ) -> None:
        self.values, self.columns, self.starts = values, columns, starts
        self.shape = tuple(int(size) for size in shape)
        self._transposed: list[Tensor] | None = None
        self._check()

    def _check(self) -> None:
        _two_or_four(self.shape, "shape")
        rows = checks_products.weight(self.values, self.values, self.columns, self.starts)
        if rows != self.shape[0]:
            raise ValueError(
                f"starts and values describe {rows} rows, but the shape {self.shape} has "
                f"{self.shape[0]}: pass the shape of the dense weight"
            )
        checks_products.positions(self.columns, self.starts, torch.Size(self.shape[1:]).numel())

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
        return cls(*taken(weight, kept), weight.shape)

    @classmethod
    def trusted(
        cls, values: Tensor, columns: Tensor, starts: Tensor, shape: tuple[int, ...]
    ) -> SparseRows:
        """As the constructor, without its checks, which have to read the positions."""
        rows = object.__new__(cls)
        rows.values, rows.columns, rows.starts, rows.shape = values, columns, starts, shape
        rows._transposed = None
        return rows

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
        """Columns, starts and order of the transposed weight, made when first asked for."""
        if self._transposed is None:
            self._transposed = transpose(self.columns, self.starts, self.v, self.shape)
        return self._transposed

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The weight of `shape`, +0 where nothing is stored; without a graph."""
        length = torch.Size(self.shape[1:]).numel()
        return reference_products.dense(
            self.values.detach(), self.columns, self.starts, length
        ).view(self.shape)

    def to(self, *args, **kwargs) -> SparseRows:
        """As `Tensor.to`: on another device, in another dtype. The positions stay int32."""
        values = self.values.to(*args, **kwargs)
        if values is self.values:
            return self
        moved = object.__new__(type(self))
        moved.__dict__.update(self.__dict__)
        moved.values = values
        moved.columns, moved.starts = (x.to(values.device) for x in (self.columns, self.starts))
        if self._transposed is not None:
            moved._transposed = [x.to(values.device) for x in self._transposed]
        return moved

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._about()}, sparsity={self.sparsity:.4f}, "
            f"{self.dtype}, {self.device})"
        )

    def _about(self) -> str:
        return f"shape={self.shape}, v={self.v}"


class NMTensor(SparseRows):
    """A weight that keeps exactly n of every m consecutive input channels, at each kernel position.

    Args:
        values: [E, v] with v = keep.v.
        columns: int32 [E], see `SparseRows`.
        starts: int32 [O / v + 1].
        shape: (O, I) or (O, I, kh, kw); keep.of divides I and keep.v divides O.
        keep: the pattern, of layout "channels".

    Raises:
        TypeError, ValueError: tensors that do not make a weight of this shape and pattern.
    """

    def __init__(
        self,
        values: Tensor,
        columns: Tensor,
        starts: Tensor,
        shape: tuple[int, ...],
        keep: Keep,
    ) -> None:
        self.keep = keep
        super().__init__(values, columns, starts, shape)

    def _check(self) -> None:
        super()._check()
        check_pattern(self.shape, self.keep)
        if self.v != self.keep.v:
            raise ValueError(f"values have v = {self.v} but the pattern is {self.keep}")
        if self.columns.device.type == "cpu":
            check_groups(self.columns, self.starts, self.shape, self.keep)

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Keep) -> NMTensor:
        """Stores n positions of every group; where fewer are not zero, the first zeros as well.

        Args:
            weight: [O, I] or [O, I, kh, kw] with at most n positions per group that are not zero
                in one of its v rows. The values are a copy, without its graph.
            keep: the pattern, of layout "channels".

        Raises:
            TypeError, ValueError: the pattern does not divide the weight, is "flat", or a group
                has more than n positions.
        """
        blocks = _blocks(weight, keep.v if isinstance(keep, Keep) else 1)
        check_pattern(weight.shape, keep)
        grouped = blocks.ne(0).any(1).view(len(blocks), -1, keep.of, _taps(weight.shape))
        counts = grouped.sum(2, keepdim=True)
        crowded = (counts > keep.n).flatten(2).any(2)
        if crowded.any():
            block, group = crowded.nonzero()[0].tolist()
            raise ValueError(
                f"{int(crowded.sum())} groups hold more than {keep.n} weights per {keep.of} (the "
                f"first: row {block * keep.v}, channels {group * keep.of}..."
                f"{group * keep.of + keep.of - 1}): prune first, issp.ops.nm_prune(weight, {keep})"
            )
        zeros = ~grouped
        first = zeros & (zeros.cumsum(2) <= keep.n - counts)
        kept = (grouped | first).view(len(blocks), -1)
        return cls(*taken(weight, kept), weight.shape, keep)

    @property
    def indices(self) -> Tensor:
        """int32 [O / v, entries of a block]: `columns`, one line per block."""
        return self.columns.view(self.shape[0] // self.v, -1)

    def _about(self) -> str:
        keep = self.keep
        return f"shape={self.shape}, keep={keep.n}:{keep.of}, v={keep.v}"


def check_pattern(shape: tuple[int, ...], keep: Keep, name: str = "the weight") -> None:
    """Whether products can have this pattern in a weight of this shape.

    Raises:
        TypeError: keep is no `Keep`.
        ValueError: layout "flat", or a shape that the pattern does not divide.
    """
    if not isinstance(keep, Keep):
        raise TypeError(f"keep must be an issp.Keep, not {type(keep).__name__}")
    if keep.layout != "channels":
        raise ValueError(
            f'{keep} groups weights in memory order, across rows: products of layout "flat" are '
            "unstructured, use issp.ops.sparse_pack (SparseRows)"
        )
    weight = torch.empty(shape, device="meta")
    checks.pattern(weight, name, keep.n, keep.of, keep.v, keep.layout)


def check_groups(columns: Tensor, starts: Tensor, shape: tuple[int, ...], keep: Keep) -> None:
    """Whether every group of every block owns exactly n entries; reads the positions.

    Raises:
        ValueError: it does not.
    """
    taps, groups = _taps(shape), shape[1] // keep.of
    block = torch.repeat_interleave(starts.diff().long())
    channel, tap = columns.long() // taps, columns.long() % taps
    place = (block * groups + channel // keep.of) * taps + tap
    counts = torch.bincount(place, minlength=(shape[0] // keep.v) * groups * taps)
    if (counts != keep.n).any():
        raise ValueError(
            f"the positions do not keep {keep.n} of every {keep.of} channels in a weight of shape "
            f"{tuple(shape)}: pack it with issp.ops.nm_pack, or use SparseRows"
        )


def _two_or_four(shape: tuple[int, ...], name: str) -> None:
    if len(shape) not in (2, 4):
        raise ValueError(f"{name} is {tuple(shape)}: it must be [O, I] or [O, I, kh, kw]")
    if min(shape) < 1:
        raise ValueError(f"{name} is {tuple(shape)}: every size must be at least 1")


def _taps(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[2:]).numel()


def _blocks(weight: Tensor, v: int) -> Tensor:
    """The weight as [O / v, v, length of a row]."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"the weight must be a tensor, not {type(weight).__name__}")
    if weight.dtype not in checks.DTYPES:
        raise TypeError(
            f"the weight has dtype {weight.dtype}: use float32, float16, bfloat16, float64"
        )
    _two_or_four(weight.shape, "the weight's shape")
    if v < 1 or weight.shape[0] % v:
        raise ValueError(
            f"v = {v} does not divide the {weight.shape[0]} rows of the weight: choose another v"
        )
    return weight.detach().reshape(weight.shape[0] // v, v, -1)


def taken(
    weight: Tensor, kept: Tensor, entries: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """values, columns and starts of chosen positions of a dense weight.

    Args:
        weight: [O, I] or [O, I, kh, kw].
        kept: bool [O / v, length of a row].
        entries: how many are kept, where that is known: then no device is waited for, and
            torch.compile knows every size.
    """
    if entries is None:
        block, column = kept.nonzero(as_tuple=True)
    else:
        block, column = torch.nonzero_static(kept, size=entries).t().contiguous()
    begins = torch.arange(kept.shape[0] + 1, device=kept.device)
    starts = torch.searchsorted(block, begins, out_int32=True)
    values = _blocks(weight, weight.shape[0] // kept.shape[0])[block, :, column]
    return values.contiguous(), column.int(), starts
