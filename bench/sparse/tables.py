"""Tables and pictures of the times of layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.harness.plots import Lines, plot_lines
from bench.harness.table import Column, Row, Table, percent
from bench.sparse.layer_times import LayerTimes, break_even

PASS_NAMES = {"forward": "forward", "step": "training step: forward, dX, dW"}
_MARKS = "os^Dv*"
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def times_table(times: LayerTimes, pass_: str) -> Table:
    """Every timed call of one pass, with its speed over every dense one."""
    dense, best = times.dense(pass_), times.best(pass_, "fp32")
    columns = [Column("what", "what"), Column("pattern", "sparsity")]
    columns += [Column(f"{mode} median", mode, "us") for mode in times.modes]
    columns += [Column("spread", "spread", format=percent), Column("rate", unit="GFLOP/s")]
    columns += [Column("share", "of roofline", format=percent)]
    columns += [Column("over best fp32", "over best fp32")]
    columns += [Column(f"over {e.name}", e.name.replace("dense", "over")) for e in dense]
    ours = {(e.name, e.sparsity): e for e in times.entries if e.pass_ == pass_ and not e.dense}
    if any(e.name.endswith(" fp16") for e in ours.values()):
        columns += [Column("over ours", "over issp fp32")]
    peaks = ", ".join(f"{name} {x / 1e9:.4g}" for name, x in times.peaks.items())
    table = Table(
        f"{times.title}, {PASS_NAMES[pass_]}",
        times.machine,
        columns,
        roofline=f"GFLOP/s of a large matrix product: {peaks}; memory: {times.bandwidth}",
        limits=times.bandwidth.limits() | {"flops": times.peaks},
    )
    for entry in (e for e in times.entries if e.pass_ == pass_):
        cells = {"what": entry.name, "pattern": entry.label or None, "sparsity": entry.sparsity}
        cells |= {f"{mode} median": times.seconds(entry, mode) for mode in times.modes}
        cells["spread"] = entry.task.spread(times.basis)
        cells |= {"rate": times.rate(entry), "share": times.share(entry)}
        cells["over best fp32"] = times.over(entry, best)
        cells |= {f"over {e.name}": times.over(entry, e) for e in dense}
        if entry.name.endswith(" fp16"):
            wide = ours.get((entry.name.removesuffix(" fp16"), entry.sparsity))
            cells["over ours"] = times.over(entry, wide)
        table.rows.append(Row(cells, entry.task.samples))
    if best:
        table.notes.append(f"Baseline: {best.name}.")
    return table


def layer_tables(times: LayerTimes) -> list[Table]:
    """The tables of one layer: one per pass, then speed and break-even with the notes."""
    title = f"{times.title}: speed over the best dense fp32 layout, and break-even"
    speeds = speed_table([times], title)
    speeds.notes = times.notes
    return [*(times_table(times, pass_) for pass_ in times.pass_names()), speeds]


def speed_table(all_times: Sequence[LayerTimes], title: str) -> Table:
    """Speed of every form over the best fp32 layout, and from which sparsity on it is faster."""
    asked = sorted({s for times in all_times for s in times.asked()})
    columns = [Column(key, key) for key in ("layer", "pass", "threads", "form")]
    columns += [Column(str(s), f"{100 * s:g} %") for s in asked]
    columns += [
        Column("over fp32 from", "over fp32 from"),
        Column("over any from", "over any from"),
    ]
    rows = [row for times in all_times for row in _speed_rows(times)]
    return Table(title, all_times[0].machine, columns, rows)


def _speed_rows(times: LayerTimes) -> list[Row]:
    rows = []
    for pass_ in times.pass_names():
        best = times.best(pass_, "fp32")
        for name in times.forms(pass_):
            cells: dict[str, Any] = {"layer": times.layer.name, "pass": pass_}
            cells |= {"threads": times.threads, "form": name}
            cells |= {
                str(e.sparsity): times.over(e, best)
                for e in times.entries
                if (e.name, e.pass_) == (name, pass_)
            }
            cells["over fp32 from"] = break_even(times.curve(name, pass_, "fp32"))
            cells["over any from"] = break_even(times.curve(name, pass_, None))
            rows.append(Row(cells))
    return rows


def plot(all_times: Sequence[LayerTimes], path: Path) -> None:
    """Speed over the best fp32 layout against sparsity: a row per layer, a column per pass.

    One colour per form, dashed for fewer threads; gray lines are the dense ops of other
    precisions, black is the baseline.
    """
    layers = list(dict.fromkeys(times.layer for times in all_times))
    pass_names = list(dict.fromkeys(p for times in all_times for p in times.pass_names()))
    names = list(dict.fromkeys(n for t in all_times for p in pass_names for n in t.forms(p)))
    max_threads = max(times.threads for times in all_times)
    rows = []
    for layer in layers:
        rows.append([])
        for pass_ in pass_names:
            matching = [t for t in all_times if t.layer == layer and pass_ in t.pass_names()]
            panel = Lines(f"{layer.name}: {pass_}", "sparsity", "speed over best dense fp32")
            levels: list[tuple[str, float]] = []
            for times in matching:
                style = "-" if times.threads == max_threads else "--"
                panel.series += _series(times, pass_, names, style)
                levels += _dense_levels(times, pass_)
            panel.series.append(("best dense fp32", None, 1, {"color": "black", "linewidth": 1}))
            panel.finish = partial(_finish, levels=levels)
            rows[-1].append(panel)
    plot_lines(rows, path, height=3.4)


def _series(times: LayerTimes, pass_: str, names: Sequence[str], style: str) -> list[tuple]:
    series = []
    for i, name in enumerate(names):
        curve = times.curve(name, pass_, "fp32")
        if curve:
            look = {"color": f"C{i}", "marker": _MARKS[i % len(_MARKS)], "markersize": 4}
            x, y = [1 - s for s, _ in curve], [speed for _, speed in curve]
            series.append((f"{name}, {_threads(times)}", x, y, {"linestyle": style, **look}))
    gray = {"color": "gray", "linestyle": style, "linewidth": 1}
    label = f"dense, other precisions, {_threads(times)}"
    return series + [(label, None, y, gray) for _, y in _dense_levels(times, pass_)]


def _dense_levels(times: LayerTimes, pass_: str) -> list[tuple[str, float]]:
    """Label and speed over fp32 of the fastest dense op of every other precision."""
    base, levels = times.best(pass_, "fp32"), []
    for precision in times.peaks:
        best = times.best(pass_, precision)
        if precision != "fp32" and best and base:
            label = f"{best.name.removeprefix('dense ')}, {_threads(times)}"
            levels.append((label, times.over(best, base)))
    return levels


def _threads(times: LayerTimes) -> str:
    return f"{times.threads} thread{'s' * (times.threads > 1)}"


def _finish(panel: Any, levels: Sequence[tuple[str, float]]) -> None:
    """Labels the levels and both axes; the share of kept weights falls to the right."""
    for label, y in levels:
        panel.annotate(
            label,
            (0.01, y),
            (0, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize="xx-small",
            color="gray",
        )
    first, last = panel.get_xlim()
    ticks = [s for s in (0.5, 0.75, 0.9, 0.95, 0.99) if first <= 1 - s <= last]
    panel.set_xticks([1 - s for s in ticks], [f"{100 * s:g} %" for s in ticks])
    low, high = panel.get_ylim()
    values = [v for v in _TICKS if low <= v <= high]
    panel.set_yticks(values, [f"{v:g}" for v in values])
    panel.minorticks_off()
    panel.invert_xaxis()
