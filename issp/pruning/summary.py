"""Values by layer name, and the summary of a pruner: its rows, its totals, its table."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from issp import ops
from issp.nn import sharding
from issp.nn.selection import Layer
from issp.ops.keep import Keep, Unit
from issp.ops.validation import pruning as checks
from issp.pruning.buckets import WeightBucket, WeightBuckets
from issp.pruning.memory_order import by_stride

T = TypeVar("T")

_HEADER = ("layer", "shape", "target", "selected", "zeros", "flips", "threshold", "")


def by_name(
    buckets: WeightBuckets,
    read: Callable[[WeightBucket], Iterable[T]],
    default: Callable[[Layer], T],
) -> dict[str, T]:
    """Values in the model's order, those of tied weights under each of their names.

    Args:
        buckets: whose layers are meant.
        read: the values of a bucket's layers, in their order.
        default: value of a layer that is not pruned yet.
    """
    values = buckets.column(read)
    return {
        name: values[layer.name] if layer.name in values else default(layer)
        for layer in buckets.layers
        for name in (layer.name, *layer.aliases)
    }


def zeros(tensors: Sequence[Tensor]) -> list[int]:
    """Exact zeros of each tensor, of either sign; reads once and waits once per device.

    Those of sharded tensors are summed over all ranks, which must call it with the same ones.
    """
    sharded, tensors = tensors, list(map(sharding.local, tensors))
    by_device: dict[torch.device, list[int]] = {}
    for i, x in enumerate(tensors):
        if x.numel():
            by_device.setdefault(x.device, []).append(i)
    result = [0] * len(tensors)
    for indices in by_device.values():
        counts = ops.count_zeros([in_memory_order(tensors[i]) for i in indices]).tolist()
        for i, count in zip(indices, counts, strict=True):
            result[i] = count
    return sharding.sum_over_shards(sharded, result)


def in_memory_order(x: Tensor) -> Tensor:
    """The tensor's elements, contiguous, as `count_zeros` and `magnitude_statistics` take them.

    Only a tensor with gaps in memory is copied. Of a dtype that no op takes, just the zeros are
    kept.
    """
    if x.dtype not in checks.DTYPES:
        x = (x != 0).half()
    return x.detach().permute(by_stride(x)).contiguous()


def summary(
    title: str,
    buckets: WeightBuckets,
    unpruned: Mapping[str, str],
    remarks: Mapping[str, str] | None = None,
) -> Summary:
    """Counts what is in the masks and weights now, not what was asked for.

    Args:
        title: first line.
        buckets: of the layers.
        unpruned: see `Summary`.
        remarks: by layer, what the method says of it.
    """
    flips = buckets.column(lambda bucket: bucket.flips())
    thresholds = buckets.column(lambda bucket: bucket.thresholds())
    selected = buckets.column(lambda bucket: bucket.num_pruned())
    rows, notes = [], {**(remarks or {}), **buckets.notes()}
    stored = [layer.weight for layer in buckets.layers]
    for layer, weight, count in zip(buckets.layers, stored, zeros(stored), strict=True):
        row = Row(
            name=layer.name,
            shape=layer.shape,
            target=layer.target,
            unit=layer.unit,
            selected=selected.get(layer.name, 0),
            zeros=count + torch.Size(layer.shape).numel() - weight.numel(),
            flips=flips.get(layer.name, 0),
            threshold=thresholds.get(layer.name, float("nan")),
            note=notes.get(layer.name, ""),
        )
        rows += [row, *(replace(row, name=x, tied_to=layer.name) for x in layer.aliases)]
    return Summary(title, rows, unpruned)


@dataclass(frozen=True)
class Row:
    """One line of the summary; counts in weights.

    Args:
        target: sparsity, or the N:M pattern.
        selected: weights that the current mask marks as unimportant.
        zeros: weights that are exactly 0; before the freeze soft shrinkage leaves few or none.
        note: why the layer is not pruned yet; when it is, what the method says of it, or "".
        tied_to: first name of the same weight, when this is another one.
        unit: what the sparsity is counted in, if not in single weights.
    """

    name: str
    shape: tuple[int, ...]
    target: float | Keep
    selected: int
    zeros: int
    flips: int
    threshold: float
    note: str = ""
    tied_to: str | None = None
    unit: Unit | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Summary:
    """The state of all layers, one row per name; `print` it. Tied weights count once in totals.

    Args:
        title: method, step and stage.
        rows: one per name of a layer.
        unpruned: parameter that looks prunable and is no layer -> why; not in the totals.
    """

    title: str
    rows: list[Row]
    unpruned: Mapping[str, str] = field(default_factory=dict)

    def _total(self, column: str) -> int:
        return sum(int(getattr(row, column)) for row in self.rows if row.tied_to is None)

    @property
    def numel(self) -> int:
        """Weights in all pruned layers."""
        return self._total("numel")

    @property
    def selected(self) -> int:
        """Weights that the masks mark as unimportant."""
        return self._total("selected")

    @property
    def zeros(self) -> int:
        """Weights that are exactly 0."""
        return self._total("zeros")

    @property
    def sparsity(self) -> float:
        """Share of exact zeros."""
        return self.zeros / self.numel

    def __str__(self) -> str:
        table = _aligned([_HEADER, *map(_cells, self.rows), self._totals()])
        return "\n".join([self.title, *table, *self._notes()])

    def _repr_html_(self) -> str:
        """The same as a table, which notebooks show."""
        lines = [*map(_cells, self.rows), self._totals()]
        body = "".join(f"<tr>{_html('td', cells)}</tr>" for cells in lines)
        notes = "".join(f"<br>{html.escape(note)}" for note in self._notes())
        return (
            f"<table><caption>{html.escape(self.title)}</caption>"
            f"<thead><tr>{_html('th', _HEADER)}</tr></thead><tbody>{body}</tbody></table>{notes}"
        )

    def _notes(self) -> list[str]:
        return [f"not pruned: {name}: {reason}" for name, reason in self.unpruned.items()]

    def _totals(self) -> tuple[str, ...]:
        shares = (_share(self.selected, self.numel), _share(self.zeros, self.numel))
        return ("total", str(self.numel), "", *shares, str(self._total("flips")), "", "")


def target_text(target: float | Keep, unit: Unit | None = None) -> str:
    """A layer's target as in the table: a share, one of units ("0.9 16x2"), or N:M."""
    if isinstance(target, Keep):
        return f"{target.n}:{target.of}"
    return f"{target:.4g}" + (f" {unit.name}" if unit else "")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name or "(model)",
        "x".join(map(str, row.shape)),
        target_text(row.target, row.unit),
        _share(row.selected, row.numel),
        _share(row.zeros, row.numel),
        str(row.flips),
        f"{row.threshold:.4g}",
        row.note if row.tied_to is None else f"tied to {row.tied_to}",
    )


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equally wide columns: names and notes to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    to_left = (0, len(widths) - 1)
    return [
        "  ".join(
            cell.ljust(width) if i in to_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def _html(tag: str, cells: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)


def _share(part: int, total: int) -> str:
    return f"{part} ({100 * part / total:.2f}%)"
