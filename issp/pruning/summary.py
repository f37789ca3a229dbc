"""What the pruner reports: values by layer name, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from issp import ops
from issp.nn.selection import Layer
from issp.ops.keep import Keep
from issp.ops.validation import pruning as checks
from issp.pruning.buckets import Group


def by_name(layers: Sequence[Layer], found: Mapping, default: Callable[[Layer], object]) -> dict:
    """Values in the model's order, those of tied weights under each of their names.

    Args:
        layers: in the model's order.
        found: first name of a layer -> value.
        default: value of a layer that is not pruned yet.
    """
    return {
        name: found[layer.name] if layer.name in found else default(layer)
        for layer in layers
        for name in (layer.name, *layer.aliases)
    }


def column(groups: Sequence[Group], name: str) -> dict:
    """A tensor of the state (flips, thresholds) by layer name; waits once per group."""
    found = {}
    for group in groups:
        values = getattr(group.state, name).tolist()
        found |= {x.name: value for x, value in zip(group.layers, values, strict=True)}
    return found


def zeros(tensors: Sequence[Tensor]) -> list[int]:
    """Exact zeros of each tensor, of either sign; reads once and waits once per device."""
    places: dict[torch.device, list[int]] = {}
    for i, x in enumerate(tensors):
        places.setdefault(x.device, []).append(i)
    found = [0] * len(tensors)
    for indices in places.values():
        parts = [(i, in_memory_order(tensors[i])) for i in indices if tensors[i].numel()]
        counts = ops.count_zeros([x for _, x in parts]).tolist() if parts else []
        for (i, _), count in zip(parts, counts, strict=True):
            found[i] = count
    return found


def in_memory_order(x: Tensor) -> Tensor:
    """What `count_zeros` and `magnitude_statistics` take, with the same elements.

    A copy only of what has gaps in memory. Of dtypes that no op takes, just the zeros are kept.
    """
    if x.dtype not in checks.DTYPES:
        x = (x != 0).half()
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    return x.detach().permute(order).contiguous()


def summary(
    title: str, layers: Sequence[Layer], groups: Sequence[Group], notes: Mapping[str, str]
) -> Summary:
    """Counts what is in the masks and weights now, not what was asked for."""
    flips, thresholds = column(groups, "flips"), column(groups, "thresholds")
    selected = {}
    for group in groups:
        masks = zip(group.layers, group.masks(), strict=True)
        selected |= {layer.name: int((~mask).sum()) for layer, mask in masks}
    rows = []
    counts = zeros([layer.weight for layer in layers])
    for layer, count in zip(layers, counts, strict=True):
        row = Row(
            layer.name,
            tuple(layer.weight.shape),
            layer.target,
            selected.get(layer.name, 0),
            count,
            flips.get(layer.name, 0),
            thresholds.get(layer.name, float("nan")),
            notes.get(layer.name, ""),
        )
        rows += [row, *(replace(row, name=x, tied_to=layer.name) for x in layer.aliases)]
    return Summary(title, rows)


@dataclass(frozen=True)
class Row:
    """One line of the summary; counts in weights.

    Args:
        target: sparsity, or the N:M pattern.
        selected: weights that the current mask marks as unimportant.
        zeros: weights that are exactly 0; before the freeze soft shrinkage leaves few or none.
        note: why the layer is not pruned yet, "" when it is.
        tied_to: first name of the same weight, when this is another one.
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

    @property
    def numel(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Summary:
    """What the pruner did, one row per name; `print` it. Tied weights count once in the totals."""

    title: str
    rows: list[Row]

    def _total(self, column: str) -> int:
        return sum(getattr(row, column) for row in self.rows if row.tied_to is None)

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
        table = [("layer", "shape", "target", "selected", "zeros", "flips", "threshold", "")]
        for row in self.rows:
            target = row.target
            table.append(
                (
                    row.name or "(model)",
                    "x".join(map(str, row.shape)),
                    f"{target.n}:{target.of}" if isinstance(target, Keep) else f"{target:.4g}",
                    _share(row.selected, row.numel),
                    _share(row.zeros, row.numel),
                    str(row.flips),
                    f"{row.threshold:.4g}",
                    row.note if row.tied_to is None else f"tied to {row.tied_to}",
                )
            )
        total = (_share(self.selected, self.numel), _share(self.zeros, self.numel))
        flips = str(self._total("flips"))
        table.append(("total", str(self.numel), "", *total, flips, "", ""))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i in (0, 7) else c.rjust(w) for i, (c, w) in cells).rstrip()
            for cells in (list(enumerate(zip(line, widths, strict=True))) for line in table)
        ]
        return "\n".join([self.title, *lines])


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.2f}%)"
