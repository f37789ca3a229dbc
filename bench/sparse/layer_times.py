"""The times of one layer: speed over dense, share of the roofline, break-even.

Ratios are speeds: 4 means four times faster than what stands behind "over".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.harness.bandwidth import Bandwidth
from bench.harness.timing import Task
from bench.sparse.layers import Layer


@dataclass
class Entry:
    """One timed call.

    Attributes:
        name: what computes: "dense fp32", "N:M v=4", "torch CSR".
        pass_: "forward" or "step".
        precision: of the op, for the roofline.
        flops: of the useful work, two per weight that is not zero and application.
        nbytes: what must be read and written: activations, gradients and stored weights.
        task: its times.
        dense: it computes the dense op.
        sparsity: asked for, None for dense.
        actual: the share that is pruned; less than asked where no pattern divides the channels.
        label: pattern and actual sparsity.
    """

    name: str
    pass_: str
    precision: str
    flops: float
    nbytes: float
    task: Task
    dense: bool = False
    sparsity: float | None = None
    actual: float | None = None
    label: str = ""


@dataclass
class LayerTimes:
    """The measurements of one layer with one number of threads.

    Attributes:
        layer: what was timed.
        threads: of the CPU.
        machine: see `bench.harness.machine`.
        modes: names of the timed modes; the first is what all ratios refer to.
        bandwidth: of memory, from the same rounds.
        peaks: precision -> operations per second of a large matrix product, its shortest call.
        entries: in the order of printing.
        notes: sentences under the table.
    """

    layer: Layer
    threads: int
    machine: str
    modes: Sequence[str]
    bandwidth: Bandwidth
    peaks: dict[str, float]
    entries: list[Entry]
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The layer, where it occurs, threads."""
        models = f" ({', '.join(self.layer.models)})" if self.layer.models else ""
        return f"{self.layer.name}{models}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def basis(self) -> str:
        """The mode that ratios and rates refer to."""
        return self.modes[0]

    def pass_names(self) -> list[str]:
        """Those that were timed."""
        return list(dict.fromkeys(entry.pass_ for entry in self.entries))

    def seconds(self, entry: Entry, mode: str | None = None) -> float | None:
        """Median of a mode; by default of the first that was timed. None where it could not be."""
        modes = self.modes if mode is None else [mode]
        return next((s for m in modes if (s := entry.task.median(m)) is not None), None)

    def dense(self, pass_: str) -> list[Entry]:
        """The dense ops of one pass that could be timed."""
        dense = [e for e in self.entries if e.dense and e.pass_ == pass_]
        return [e for e in dense if self.seconds(e) is not None]

    def best(self, pass_: str, precision: str | None = None) -> Entry | None:
        """The fastest dense op, of one precision or of all."""
        dense = [e for e in self.dense(pass_) if precision in (None, e.precision)]
        return min(dense, key=self.seconds, default=None)

    def over(self, entry: Entry, other: Entry | None) -> float | None:
        """How many times faster an entry is than another."""
        seconds = self.seconds(entry)
        return None if seconds is None or other is None else self.seconds(other) / seconds

    def rate(self, entry: Entry) -> float | None:
        """Useful operations per second."""
        seconds = self.seconds(entry)
        return None if seconds is None else entry.flops / seconds

    def share(self, entry: Entry) -> float | None:
        """Share of the roofline: the time that arithmetic or memory alone would take, over ours."""
        seconds = self.seconds(entry)
        if seconds is None:
            return None
        arithmetic = entry.flops / self.peaks[entry.precision]
        return max(arithmetic, entry.nbytes / self.bandwidth.peak) / seconds

    def curve(self, name: str, pass_: str, precision: str | None) -> list[tuple[float, float]]:
        """Sparsity and speed over the best dense op, ascending.

        Args:
            name: of the entries.
            pass_: theirs.
            precision: of the dense op; None: whichever is fastest.
        """
        base = self.best(pass_, precision)
        entries = [e for e in self.entries if (e.name, e.pass_) == (name, pass_) and not e.dense]
        points = [(e.actual, self.over(e, base)) for e in entries if e.actual is not None]
        return sorted((s, ratio) for s, ratio in points if ratio is not None)

    def forms(self, pass_: str) -> list[str]:
        """Names of the sparse entries of one pass, in the order of printing."""
        sparse = [e for e in self.entries if not e.dense and e.actual is not None]
        return list(dict.fromkeys(e.name for e in sparse if e.pass_ == pass_))

    def asked(self) -> list[float]:
        """The sparsities that were asked for."""
        return sorted({e.sparsity for e in self.entries if e.sparsity is not None})


def break_even(curve: Sequence[tuple[float, float]]) -> str | None:
    """The sparsity from which on a form is faster than dense, as text.

    Args:
        curve: sparsity and speed over dense, ascending.

    Returns:
        "87 %", interpolated between the last point that is slower than dense and the next (the
        logarithms of speed and of what is kept); "below 50 %" or "above 99 %" where the first and
        last points lie on one side; None without points.
    """
    if not curve:
        return None
    slower = [i for i, (_, ratio) in enumerate(curve) if ratio < 1]
    if not slower:
        return f"below {100 * curve[0][0]:.4g} %"
    if slower[-1] == len(curve) - 1:
        return f"above {100 * curve[-1][0]:.4g} %"
    (s, low), (t, high) = curve[slower[-1] : slower[-1] + 2]
    if t == s:
        return f"{100 * t:.3g} %"
    # A form that stores nothing at all has no logarithm: half a weight in ten million instead.
    a, b = (math.log(max(1 - x, 5e-8)) for x in (s, t))
    fraction = math.log(1 / low) / math.log(high / low)
    return f"{100 * (1 - math.exp(a + fraction * (b - a))):.3g} %"
