"""What computes each layer of a model now, and the reason: the report of `issp.pack`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from issp.nn.autotune import Choice
from issp.utils.text import cell


@dataclass
class Line:
    """One Conv2d or Linear.

    Attributes:
        name: of the module.
        shape: of its weight and of what it is applied to.
        sparsity: share of its weights that are zero, in 0..1; None where it was not looked at.
        form: the sparse form that is fastest, chosen or not; "" where none was timed.
        sparse, dense: microseconds of that form, and of the fastest dense layout.
        choice: what computes it now: "dense", "dense channels_last", or the form.
        reason: of the choice.
        key: of the choice in the cache; "" where nothing was timed.
    """

    name: str
    shape: str
    sparsity: float | None
    form: str = ""
    sparse: float | None = None
    dense: float | None = None
    choice: str = "dense"
    reason: str = ""
    key: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether a sparse form computes it now."""
        return self.choice not in _DENSE

    def record(self, choice: Choice, sparse: Sequence[str]) -> None:
        """Records what was measured; `sparse` names the sparse candidates."""
        times = choice.microseconds
        self.dense = min(t for name, t in times.items() if name not in sparse)
        timed = [name for name in times if name in sparse]
        if timed:
            self.form = choice.name if choice.name in sparse else min(timed, key=times.__getitem__)
            self.sparse = times[self.form]
        self.choice, self.reason = choice.name, choice.reason
        for name, error in choice.errors.items():
            self.reason += f"; {name} could not be timed: {error}"

    def stay_dense(self) -> None:
        """Records that the model as a whole is slower with its sparse layers."""
        if self.choice != "dense":
            self.reason += ", but the whole model is slower with it"
            self.choice = "dense"


@dataclass
class LayerReport:
    """The lines of all layers; called without arguments, the report as text.

    Attributes:
        lines: one per layer, in the order of the model.
        machine: what the figures hold for.
        whole: of the whole model: with its sparse layers, and without; None: it has none.
    """

    lines: list[Line]
    machine: str
    whole: Choice | None = None

    def __call__(self) -> str:
        """A markdown table with a line per layer, and a sentence on the whole model."""
        head = ["layer", "shape", "sparsity", "form", "us sparse", "us dense", "choice", "why"]
        rows = [head, ["---", "---", *["---:"] * 4, "---", "---"], *map(_cells, self.lines)]
        text = ["| " + " | ".join(map(cell, cells)) + " |" for cells in rows]
        return "\n".join([*text, "", self.summary(), self.machine])

    def summary(self) -> str:
        """One sentence on the whole model."""
        sparse = [line for line in self.lines if line.is_sparse]
        count = f"{len(sparse)} of {len(self.lines)} layers are sparse"
        if not sparse and self.whole is None:
            return f"{count}: the model computes as before."
        if self.whole is None:
            return f"{count}."
        times = self.whole.microseconds
        dense = times["dense"]
        sparse_time = next(time for name, time in times.items() if name != "dense")
        text = f"{_time(sparse_time / 1e3)} ms, dense {_time(dense / 1e3)} ms"
        if self.whole.name != "dense":
            gain = f"{dense / sparse_time:.2f} times as fast"
            return f"{count}; the whole model takes {text}, {gain}."
        return (
            f"The model is dense throughout: with its sparse layers it would take {text}. Its "
            "layers are measured again the next time."
        )


_DENSE = ("dense", "dense channels_last")


def _cells(line: Line) -> list[str]:
    sparsity = "-" if line.sparsity is None else f"{100 * line.sparsity:.4g} %"
    times = [_time(line.sparse), _time(line.dense)]
    return [line.name, line.shape, sparsity, line.form or "-", *times, line.choice, line.reason]


def _time(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
