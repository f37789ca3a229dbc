"""Statistics of gradients of a training run: norm, variance, mean and standard deviation."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from issp import ops
from issp.pruning import summary
from issp.pruning.pruner import Pruner
from issp.sr import logging

COLUMNS = ("iteration", "layer", "norm", "variance", "mean", "std")


class GradientLog:
    """gradients.csv: a row for every layer in each recorded iteration.

    `norm` is the norm of the gradient; `variance`, `mean` and `std` are of its absolute values.

    Args:
        path, upto: see `issp.sr.logging.CsvLog`.
        weights: by layer name.

    Source: the authors' gradient record, see `issp.ops.magnitude_statistics`.
    """

    def __init__(self, path: Path, weights: dict[str, Tensor], upto: int = 0):
        self._csv, self._weights = logging.CsvLog(path, COLUMNS, upto), weights

    def add(self, iteration: int) -> None:
        """Records the gradients as the backward pass left them; waits for the GPU."""
        grads = {name: w.grad for name, w in self._weights.items() if w.grad is not None}
        if grads:
            tensors = [summary.in_memory_order(grad) for grad in grads.values()]
            statistics = ops.magnitude_statistics(tensors).tolist()
            cells = ((iteration, n, *v) for n, v in zip(grads, statistics, strict=True))
            self._csv.add(*(dict(zip(COLUMNS, row, strict=True)) for row in cells))


def weights_to_record(model: nn.Module, pruner: Pruner | None) -> dict[str, Tensor]:
    """Layer name -> weight of the layers to prune; without a pruner of all Conv2d and Linear."""
    if pruner is None:
        modules = model.named_modules()
        return {name: m.weight for name, m in modules if isinstance(m, nn.Conv2d | nn.Linear)}
    names = [row.name for row in pruner.summary().rows if row.tied_to is None]
    return {name: model.get_submodule(name).weight for name in names}
