"""Records of every layer over a training: statistics of its gradient, and how its mask changes."""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from issp import ops
from issp.nn.selection import Layer, match_names, select
from issp.nn.sharding import is_sharded
from issp.pruning.buckets import WeightBucket
from issp.pruning.memory_order import memory_order, pointers
from issp.pruning.prune_step import prunes_within_step
from issp.pruning.pruner import Pruner
from issp.pruning.summary import in_memory_order
from issp.utils.csv_log import CsvLog
from issp.utils.files import user_path

GRADIENT_COLUMNS = ("iteration", "stage", "layer", "norm", "variance", "mean", "std")
MASK_COLUMNS = ("iteration", "layer", "flips", "swaps", "threshold", "zeros")
_BLOCK = 100  # recorded iterations that stay on the device; 100 layers take some 6 KB in each


class Recorder:
    """Writes gradients.csv and masks.csv while a model trains: a row per layer and iteration.

    gradients.csv: norm of the gradient as the step found it; variance, mean and deviation of its
    absolute values. masks.csv: mask bits that the step's selection changed (flips; swaps are half
    of them), magnitude of the last selected weight (threshold), weights that are exactly 0 (zeros).

    Values stay on the device and are read in blocks: no step waits for a GPU. `close()`, or the end
    of a `with` block, writes the last one. A layer has rows once it is active and has a gradient;
    a step that AMP skips has none. Of a layer that trains its kept weights alone, those are the
    gradient. With several optimizers the masks are those of each one's
    latest step. With several ranks, record on one.

    Args:
        source: the pruner; or a model without one, whose gradients each `step()` records.
        path: folder of the files.
        layers: name patterns (globs, or "re:" and a regular expression; a container stands for all
            in it) and numbers of layers in the model's order; None: all.
        every: interval in iterations.
        record: "gradients", "masks" or both; None: all that the source has.
        index_base: number of the first layer, 0 or 1.
        upto: rows of later iterations in earlier files are removed. None: the steps that the pruner
            has taken, so that a resumed run goes on where it is; load the pruner's state before.
        hook: False leaves the pruner alone; call `step()` after each optimizer step.

    Raises:
        ValueError: a name or number that no layer has, or an argument out of range.

    Source: docs/method.md, sections 1.6 (figures 1 and 2 of the supplement) and 2.7.
    """

    def __init__(
        self,
        source: Pruner | nn.Module,
        path: str | os.PathLike,
        layers: str | int | Iterable[str | int] | None = None,
        every: int = 1,
        *,
        record: str | Sequence[str] | None = None,
        index_base: int = 1,
        upto: int | None = None,
        hook: bool = True,
    ) -> None:
        pruner = source if isinstance(source, Pruner) else None
        names = _files_of(record, pruner)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every}: it must be a whole number of iterations from 1 on")
        self._layers = choose_layers(source, layers, index_base)
        for layer in self._layers:
            if is_sharded(layer.weight):
                raise ValueError(
                    f"{layer.name} is sharded, and a record is of whole layers: record a run "
                    "under DistributedDataParallel, which has the same masks"
                )
        self._pruner, self._every = pruner, every
        if upto is None:
            upto = 0 if pruner is None else pruner.step_count
        self._steps = upto  # counted here where there is no pruner
        self._blocks: dict[str, _Block] = {}
        for name in names:
            columns, _, row = _FILES[name]
            log = CsvLog(user_path(path) / f"{name}.csv", columns, upto)
            self._blocks[name] = _Block(log, row)
        self._buckets: list[WeightBucket] = []  # those that the parts were made from
        self._parts: list[_Part] = []
        if pruner is None:
            self._parts = [_Part(None, self._layers, list(range(len(self._layers))))]
        self._unhook: Callable[[], None] | None = None
        if pruner is not None and hook:
            self._unhook = pruner.on_step(lambda _: self.step())

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.no_grad()
    def step(self) -> None:
        """Records the latest optimizer step, if it is due; the hook calls it.

        Raises:
            OSError: see `flush`.
        """
        if self._pruner is None:
            self._steps += 1
            iteration, stage = self._steps, "dense"
        else:
            iteration = self._pruner.newest_step
            stage = self._pruner.stage_of(iteration)
        if iteration == 0 or iteration % self._every:
            return
        self._refresh()
        for name, block in self._blocks.items():
            compute = _FILES[name][1]
            # If AMP has skipped the step, the next one has its number and takes its place.
            block.samples[iteration] = stage, [x for part in self._parts for x in compute(part)]
        if any(len(block.samples) >= _BLOCK for block in self._blocks.values()):
            self.flush()

    def flush(self) -> None:
        """Writes what is recorded so far; waits for the device.

        Raises:
            OSError: a file cannot be written; its rows are kept for the next call.
        """
        steps = self._steps if self._pruner is None else self._pruner.step_count
        for block in self._blocks.values():
            block.flush(self._layers, steps)

    def close(self) -> None:
        """Writes the last rows and ends the recording; errors as `flush`."""
        self.flush()
        if self._unhook is not None:
            self._unhook()
            self._unhook = None

    def _refresh(self) -> None:
        """Follows buckets that were formed anew: layers have joined, or weights have moved."""
        if self._pruner is None:
            return
        buckets = self._pruner.buckets.all()
        same = len(buckets) == len(self._buckets) and all(map(operator.is_, buckets, self._buckets))
        if same:
            return
        numbers = {layer.name: number for number, layer in enumerate(self._layers)}
        self._buckets, self._parts = buckets, []
        for bucket in buckets:
            chosen = [numbers[x.name] for x in bucket.layers if x.name in numbers]
            if chosen:
                layers = [self._layers[i] for i in chosen]
                self._parts.append(_Part(bucket, layers, chosen, self._pruner.buckets.optimizers))


def choose_layers(
    source: Pruner | nn.Module, wanted: str | int | Iterable[str | int] | None, index_base: int
) -> list[Layer]:
    """The layers that are meant, in the model's order.

    Args:
        source, index_base: see `Recorder`.
        wanted: its `layers`.

    Raises:
        ValueError: a name or number that no layer has, no layer at all, or another base.
        TypeError: neither a name nor a number.
    """
    if isinstance(source, Pruner):
        layers = source.buckets.prunable
    else:
        layers = select(source, (nn.Conv2d, nn.Linear), (), {}, 0.0)
    if index_base not in (0, 1):
        raise ValueError(f"index_base is {index_base}: the first layer has number 0 or 1")
    if wanted is None:
        return layers
    numbers = {name: i for i, x in enumerate(layers) for name in (x.name, *x.aliases)}
    names = {name[:end] for name in numbers for end in _ends_of_parts(name)}
    chosen: set[int] = set()
    for one in [wanted] if isinstance(wanted, str | int) else wanted:
        if isinstance(one, str):
            found = match_names(one, names, "layers")
            chosen |= {numbers[name] for name in found & numbers.keys()}
        elif isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"layers: {one!r} is neither a name pattern nor a number")
        elif not 0 <= one - index_base < len(layers):
            last = index_base + len(layers) - 1
            raise ValueError(
                f"layers: there is no layer {one}: they are numbered from {index_base} to {last}"
            )
        else:
            chosen.add(one - index_base)
    if not chosen:
        raise ValueError("layers is empty: leave it out to record all")
    return [layers[i] for i in sorted(chosen)]


def _ends_of_parts(name: str) -> list[int]:
    """Where the names of the modules around a module, and its own, end in its name."""
    return [*(i for i, x in enumerate(name) if x == "."), len(name)]


def _files_of(record: str | Sequence[str] | None, pruner: Pruner | None) -> list[str]:
    """The names of the files to write."""
    if record is None:
        return list(_FILES) if pruner is not None else ["gradients"]
    names = [record] if isinstance(record, str) else list(dict.fromkeys(record))
    for name in names:
        if name not in _FILES:
            raise ValueError(f"record: {name!r} is none of {', '.join(_FILES)}")
        if name == "masks" and pruner is None:
            raise ValueError("record: a model without a pruner has no masks; pass the pruner")
    if not names:
        raise ValueError(f"record is empty: name {' or '.join(_FILES)}")
    return names


@dataclass
class _Samples:
    """What one call has computed of some layers.

    Args:
        layers: their numbers among the recorded ones.
        columns: values on the device, [layers] each.
    """

    layers: list[int]
    columns: tuple[Tensor, ...]


class _Part:
    """Recorded layers whose values are computed together: those of a bucket, or of a model.

    Args:
        bucket: that has them; None: there is no pruner.
        layers: in the bucket's order.
        numbers: of these layers among the recorded ones.
        optimizers: those that the number in the bucket refers to.
    """

    def __init__(
        self,
        bucket: WeightBucket | None,
        layers: Sequence[Layer],
        numbers: list[int],
        optimizers: Sequence[Optimizer] = (),
    ) -> None:
        self._bucket, self._layers, self._numbers = bucket, layers, numbers
        self._orders = [memory_order(layer.weight) for layer in layers]
        self._pointers: list[int] = []  # of the weights that the views are of
        self._views: list[Tensor] = []
        self._places = list(range(len(layers)))
        self._index: Tensor | None = None  # the places, on the device; None: the whole bucket
        self._optimizer: Optimizer | None = None
        if bucket is None:
            return
        if bucket.optimizer < len(optimizers):
            self._optimizer = optimizers[bucket.optimizer]
        if len(layers) < len(bucket.layers):
            places = {layer.name: i for i, layer in enumerate(bucket.layers)}
            self._places = [places[layer.name] for layer in layers]
            device = bucket.state.k.device
            self._index = torch.tensor(self._places, dtype=torch.int64, device=device)

    def gradients(self) -> list[_Samples]:
        """Norm, variance, mean, deviation of the gradients that there are."""
        numbers, views = [], []
        for number, weight, order in zip(self._numbers, self._weights(), self._orders, strict=True):
            grad = weight.grad
            if grad is not None:
                numbers.append(number)
                views.append(_contiguous(grad, order))
        kinds, scale, samples = [(x.device, x.dtype) for x in views], self._grad_scale(), []
        for kind in dict.fromkeys(kinds):
            chosen = [i for i, own in enumerate(kinds) if own == kind]
            values = ops.magnitude_statistics([views[i] for i in chosen])
            if scale is not None:
                divisor = scale.to(kind[0], torch.float64)
                values /= divisor
                values[:, 1] /= divisor  # a variance is of the square
            samples.append(_Samples([numbers[i] for i in chosen], values.unbind(1)))
        return samples

    def masks(self) -> list[_Samples]:
        """Flips, threshold, zeros."""
        if self._bucket is None:
            return []
        weights = self._weights()
        present = pointers(weights)
        if present != self._pointers:
            views = [_contiguous(x.detach(), y) for x, y in zip(weights, self._orders, strict=True)]
            self._views, self._pointers = views, present
        zeros, state = ops.count_zeros(self._views) + self._not_stored(), self._bucket.state
        return [
            _Samples(self._numbers, (self._pick(state.flips), self._pick(state.thresholds), zeros))
        ]

    def _not_stored(self) -> Tensor | int:
        """Zeros of each layer that a layer which trains sparse does not store."""
        counts = [
            torch.Size(layer.shape).numel() - weight.numel()
            for layer, weight in zip(self._layers, self._weights(), strict=True)
        ]
        device = self._weights()[0].device
        return torch.tensor(counts, dtype=torch.int64, device=device) if any(counts) else 0

    def _pick(self, values: Tensor) -> Tensor:
        """A copy of the layers' values among those of the bucket."""
        return values.clone() if self._index is None else values[self._index]

    def _weights(self) -> list[Tensor]:
        if self._bucket is None:
            return [layer.weight for layer in self._layers]
        weights = self._bucket.current_weights()
        return [weights[place] for place in self._places]

    def _grad_scale(self) -> Tensor | None:
        """GradScaler's scale, where the step has left it in the gradients."""
        if self._bucket is None or not prunes_within_step(self._optimizer):
            return None
        return self._optimizer.grad_scale_of(self._bucket.param_group)


def _contiguous(x: Tensor, order: list[int] | None) -> Tensor:
    """A weight or its gradient as the ops take it; copied only where memory has another order."""
    if x.is_sparse:
        x = x.to_dense()
    view = x.permute(order) if order else x
    return view if view.is_contiguous() else in_memory_order(x)


class _Block:
    """The iterations of one file that are not written yet.

    Args:
        log: the file.
        row: makes the cells of iteration, stage, layer, and a value of each column.

    Attributes:
        samples: iteration -> its stage, and what was computed.
    """

    def __init__(self, log: CsvLog, row: Callable[..., tuple[Any, ...]]) -> None:
        self._log, self._row = log, row
        self.samples: dict[int, tuple[str, list[_Samples]]] = {}

    def flush(self, layers: Sequence[Layer], steps: int) -> None:
        """Writes the iterations up to `steps`; AMP has skipped a later one."""
        values = iter(_read([x for _, y in self.samples.values() for z in y for x in z.columns]))
        names = [layer.name or "(model)" for layer in layers]
        rows: list[tuple[Any, ...]] = []
        for iteration, (stage, samples) in self.samples.items():
            by_layer: dict[int, tuple[Any, ...]] = {}
            for sample in samples:
                columns = [next(values) for _ in sample.columns]
                by_layer.update(zip(sample.layers, zip(*columns, strict=True), strict=True))
            if iteration <= steps:
                rows += [
                    self._row(iteration, stage, names[i], *by_layer[i]) for i in sorted(by_layer)
                ]
        if rows:
            self._log.add_cells(rows)
        self.samples.clear()


def _read(columns: Sequence[Tensor]) -> list[list[float]]:
    """The values of many small tensors; waits once for each device and dtype."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, column in enumerate(columns):
        by_kind.setdefault((column.device, column.dtype), []).append(i)
    values: list[list[float]] = [[] for _ in columns]
    for indices in by_kind.values():
        flat = iter(torch.cat([columns[i] for i in indices]).tolist())
        for i in indices:
            values[i] = list(itertools.islice(flat, len(columns[i])))
    return values


def _gradient_row(iteration: int, stage: str, layer: str, *values: float) -> tuple[Any, ...]:
    return (iteration, stage, layer, *values)


def _mask_row(
    iteration: int, _: str, layer: str, flips: int, threshold: float, zeros: int
) -> tuple[Any, ...]:
    swaps = flips // 2 if flips % 2 == 0 else flips / 2  # odd where the number selected changes
    return iteration, layer, flips, swaps, None if math.isnan(threshold) else threshold, zeros


_Compute = Callable[[_Part], list[_Samples]]
_Row = Callable[..., tuple[Any, ...]]
# Name of a file -> its columns, what computes the values, and what makes a row of them.
_FILES: dict[str, tuple[tuple[str, ...], _Compute, _Row]] = {
    "gradients": (GRADIENT_COLUMNS, _Part.gradients, _gradient_row),
    "masks": (MASK_COLUMNS, _Part.masks, _mask_row),
}
