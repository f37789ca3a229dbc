"""Tables of scores as the paper's tables 1 to 3: methods grouped by scale against test sets."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from issp.sr.results import Result

PAPER = Path(__file__).with_name("paper_results.csv")

# Public names of the methods in the order of the tables, with those that the paper prints.
LABELS = {
    "bicubic": "Bicubic",
    "dense": "Dense",
    "scratch": "Scratch",
    "l1": "L1-norm",
    "assl": "ASSL",
    "srp": "SRP",
    "sls": "SLS",
    "iht": "IHT",
    "iss-r": "ISS-R",
    "iss-p": "ISS-P",
}
_REFERENCES = ("bicubic", "dense")  # shown beside the pruned networks, not ranked among them
_SETS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
_SAME_SET = {"bsd100": "B100", "bsds100": "B100"} | {name.lower(): name for name in _SETS}
_DIGITS = {"PSNR": 2, "SSIM": 4}
_PAPER_TABLES = {
    ("edsr-l", 0.95, "rgb"): 1,
    ("swinir-light", 0.95, "y"): 2,
    ("swinir-light", 0.99, "y"): 3,
}
_FAR = 0.005  # a measured share of zeros that differs more from the ratio is named


@dataclass(frozen=True)
class Value:
    """Mean of a score over seeds, in dB for "PSNR".

    Attributes:
        mean, spread: spread is the sample standard deviation, None for one value.
        count: number of values.
    """

    mean: float
    spread: float | None
    count: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> Value:
        """That of the scores of all seeds."""
        finite = len(scores) > 1 and max(scores) < float("inf")
        return cls(
            sum(scores) / len(scores), statistics.stdev(scores) if finite else None, len(scores)
        )

    def texts(self, metric: str) -> tuple[str, str | None]:
        """Mean and spread with the digits that tables give."""
        digits = _DIGITS[metric]
        spread = None if self.spread is None else f"{self.spread:.{digits}f}"
        return f"{self.mean:.{digits}f}", spread


@dataclass
class Row:
    """One method at one scale.

    Attributes:
        method: as it is printed.
        source: who says so; "" for what was measured with this package.
        is_ranked: whether it competes for the best value.
        seeds: number of known seeds.
        cells: by (set, "PSNR" or "SSIM").
        marks: "best" or "second", by the same.
    """

    method: str
    scale: int
    source: str
    is_ranked: bool
    seeds: int
    cells: dict[tuple[str, str], Value]
    marks: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The method, with its source if it is not ours."""
        return f"{self.method} ({self.source})" if self.source else self.method


@dataclass(frozen=True)
class TableKey:
    """What all rows of a table have in common: Y and RGB are never in one.

    Attributes:
        arch: "" where no network was scored.
        sparsity: the ratio that was asked for.
        channel: "y" or "rgb".
        crop_border: pixels; None: as many as the scale.
    """

    arch: str
    sparsity: float | None
    channel: str
    crop_border: int | None


@dataclass
class ScoreTable:
    """A table without its form.

    Attributes:
        key: what its rows have in common.
        columns: (set, "PSNR" or "SSIM") in their order.
        rows: grouped by scale, methods in the order of `LABELS`.
        notes: sentences that belong below it.
    """

    key: TableKey
    columns: list[tuple[str, str]]
    rows: list[Row]
    notes: list[str]

    @property
    def sets(self) -> list[str]:
        """The test sets."""
        return list(dict.fromkeys(name for name, _ in self.columns))

    @property
    def title(self) -> str:
        """What its rows have in common, in words."""
        key = self.key
        parts = [key.arch] if key.arch else []
        if key.sparsity is not None:
            parts.append(f"sparsity {key.sparsity:g}" if key.sparsity else "dense")
        parts.append("Y channel" if key.channel == "y" else "RGB")
        if key.crop_border is not None:
            parts.append(f"crop border {key.crop_border}")
        number = None
        if key.crop_border is None and key.sparsity is not None:
            number = _PAPER_TABLES.get((key.arch, key.sparsity, key.channel))
        return ", ".join(parts) + (f" (the paper's table {number})" if number else "")


def build(results: Iterable[Result]) -> list[ScoreTable]:
    """The tables of all results: one for each network, ratio, channel and crop border.

    "bicubic" and "dense" are in every table of their channel and scale, and of their network.

    Raises:
        ValueError: two results of one seed differ.
    """
    results = list(dict.fromkeys(results))
    return [_table(key, _members(results, key)) for key in _keys(results)]


def _keys(results: Sequence[Result]) -> list[TableKey]:
    """A key for each table; references have one of their own only if no other table shows them."""

    def key(r: Result) -> TableKey:
        return TableKey(r.arch, r.sparsity, r.channel, r.crop_border)

    keys = list(dict.fromkeys(key(r) for r in results if r.method not in _REFERENCES))
    for reference in ("dense", "bicubic"):  # in this order: a table of "dense" shows "bicubic"
        for r in results:
            if r.method == reference and not any(r in _members(results, known) for known in keys):
                keys.append(key(r))
    return sorted(keys, key=lambda k: (k.arch, k.sparsity or 0, k.channel, k.crop_border or -1))


def _members(results: Iterable[Result], key: TableKey) -> list[Result]:
    """The results that a table shows."""
    same = [r for r in results if (r.channel, r.crop_border) == (key.channel, key.crop_border)]
    network = [r for r in same if r.arch == key.arch]
    members = [r for r in network if r.method in _REFERENCES or r.sparsity == key.sparsity]
    scales = {r.scale for r in members}
    return members + [r for r in same if key.arch and not r.arch and r.scale in scales]


def _table(key: TableKey, results: Sequence[Result]) -> ScoreTable:
    """The table of results that belong together."""
    sets = sorted({_set_name(r.set) for r in results}, key=set_order)
    metrics = ["PSNR", "SSIM"] if any(r.ssim is not None for r in results) else ["PSNR"]
    columns = [(name, metric) for name in sets for metric in metrics]
    groups = defaultdict(list)
    for r in results:
        groups[r.scale, r.method, r.source].append(r)
    rows = [_row(groups[group]) for group in sorted(groups, key=_row_order)]
    _mark(rows, columns)
    return ScoreTable(key, columns, rows, _notes(results, rows))


def _row(results: Sequence[Result]) -> Row:
    first = results[0]
    by_seed: dict[tuple[str, int | None], Result] = {}
    for r in results:
        other = by_seed.setdefault((_set_name(r.set), r.seed), r)
        if (r.psnr, r.ssim) != (other.psnr, other.ssim):
            raise ValueError(
                f"{r.method} x{r.scale} on {r.set} ({r.channel}) has two scores, {other.psnr:.4f} "
                f"and {r.psnr:.4f}, of seed {'unknown' if r.seed is None else r.seed}: give the "
                "seeds (`issp test --seed`), or remove one"
            )
    scores = defaultdict(list)
    for (name, _), r in by_seed.items():
        scores[name, "PSNR"].append(r.psnr)
        if r.ssim is not None:
            scores[name, "SSIM"].append(r.ssim)
    return Row(
        method=_method(results),
        scale=first.scale,
        source=first.source,
        is_ranked=first.method not in _REFERENCES,
        seeds=len({seed for _, seed in by_seed if seed is not None}),
        cells={column: Value.of(values) for column, values in scores.items()},
    )


def _method(results: Sequence[Result]) -> str:
    """The printed name, with the measured share of zeros where that is not the ratio."""
    first = results[0]
    label = LABELS.get(first.method, first.method)
    shares = [r.zeros for r in results if r.zeros is not None]
    if not shares or first.sparsity is None:
        return label
    share = sum(shares) / len(shares)
    return f"{label}, {share:.3f} zero" if abs(share - first.sparsity) > _FAR else label


def _mark(rows: Sequence[Row], columns: Iterable[tuple[str, str]]) -> None:
    """Marks the best and the second of each column among rows of one scale and source.

    What is printed decides: equal digits share a mark. One value alone is not marked.
    """
    rivals = defaultdict(list)
    for row in rows:
        if row.is_ranked:
            rivals[row.scale, row.source].append(row)
    for group in rivals.values():
        for column in columns:
            shown = [
                (float(row.cells[column].texts(column[1])[0]), row)
                for row in group
                if column in row.cells
            ]
            if len(shown) < 2:
                continue
            levels = sorted({value for value, _ in shown}, reverse=True)
            for value, row in shown:
                if value in levels[:2]:
                    row.marks[column] = ("best", "second")[levels.index(value)]


def _notes(results: Sequence[Result], rows: Sequence[Row]) -> list[str]:
    """What the reader must know beside the numbers."""
    notes = []
    if any(row.seeds > 1 for row in rows):
        notes.append("Mean ± sample standard deviation over seeds.")
    for row in rows:
        for name in sorted({name for name, _ in row.cells}, key=set_order):
            count = row.cells[name, "PSNR"].count
            if count < row.seeds:
                notes.append(f"{row.label} x{row.scale}, {name}: {count} of {row.seeds} seeds.")
    own = [r for r in results if not r.source]
    for name in sorted({_set_name(r.set) for r in own}, key=set_order):
        members = [r for r in own if _set_name(r.set) == name]
        counts = sorted({r.images for r in members if r.images is not None})
        if len(counts) > 1:
            notes.append(f"{name}: rows are of {counts[0]} to {counts[-1]} images: not comparable.")
        if {"read", "made"} <= {r.lr for r in members}:
            notes.append(f"{name}: low-resolution images were read for some rows, made for others.")
    for r in results:
        if r.note:
            label = LABELS.get(r.method, r.method) + (f" ({r.source})" if r.source else "")
            notes.append(f"{label} x{r.scale}, {_set_name(r.set)}: {r.note}.")
    return notes


def _set_name(name: str) -> str:
    return _SAME_SET.get(name.lower(), name)


def set_order(name: str) -> tuple[int, str]:
    """Sorts test sets as the paper does; others by name, behind them."""
    return (_SETS.index(name) if name in _SETS else len(_SETS), name)


def _row_order(group: tuple[int, str, str]) -> tuple[int, int, str, str]:
    scale, method, source = group
    known = list(LABELS)
    position = known.index(method) if method in known else len(known)
    return scale, position, method, source
