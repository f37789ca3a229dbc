"""The report of a study: report.md, psnr.png and results.csv, made from its folder alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from issp.sr import builders, config, logging, plots, table_formats, tables
from issp.sr.config import Config
from issp.sr.results import Result
from issp.sr.study.folder import StudyFolder
from issp.sr.study.plan import BASELINE, Run
from issp.utils.files import atomic_write
from issp.utils.text import duration, table

NAME, FIGURE = "report.md", "psnr.png"
_ORDER = "Mean PSNR of all test sets, Y channel, and its standard deviation over the seeds:"


def write(folder: StudyFolder) -> Path:
    """Writes the report of what is finished; the rest is named.

    Returns:
        Path of report.md.

    Raises:
        MissingPackageError: matplotlib is absent; all but the figure is written.
    """
    rows = folder.collect()
    path = folder.path / NAME
    atomic_write(path, _text(folder, rows).encode())
    if rows:
        plots.scores(rows, folder.path / FIGURE)
    return path


def _text(folder: StudyFolder, rows: Sequence[Result]) -> str:
    runs = folder.study.runs
    finished = [run for run in runs if folder.is_finished(run)]
    parts = [
        f"# {folder.path.resolve().name}",
        f"{len(finished)} of {len(runs)} runs are finished.",
    ]
    missing = [run.name for run in runs if run not in finished]
    if missing:
        parts.append(f"Not finished: {', '.join(missing)}.")
    parts += _circumstances(folder, finished)
    if rows:
        parts.append(f"![PSNR of every method]({FIGURE})")
        parts += ["## Scores", table_formats.markdown(tables.build(rows)).rstrip()]
        parts += ["## Order", _ORDER, "\n".join(_order(rows))]
        parts += ["## Runs", _facts(folder, finished)]
    return "\n\n".join(parts) + "\n"


def _circumstances(folder: StudyFolder, finished: Sequence[Run]) -> list[str]:
    """Budgets, machines and revisions, as the run folders record them."""
    if not finished:
        return []
    budgets, machines, revisions = (dict[str, list[str]]() for _ in range(3))
    for run in finished:
        path = folder.run(run).path
        recorded = config.parse(config.load_yaml(path / "config.yml"))
        budgets.setdefault(budget(recorded), []).append(run.name)
        facts = json.loads((path / "log" / "environment.json").read_text(encoding="utf-8"))
        machines.setdefault(_machine(facts), []).append(run.name)
        revisions.setdefault(facts["git"] or "unknown", []).append(run.name)
    described = {"Budget of every run": budgets, "Computed on": machines, "Revision": revisions}
    return [_listed(subject, texts) for subject, texts in described.items()]


def _listed(subject: str, facts: dict[str, list[str]]) -> str:
    """One sentence, or where the runs differ a list."""
    if len(facts) == 1:
        return f"{subject}: {next(iter(facts))}."
    lines = [f"* {text}: {', '.join(runs)}" for text, runs in facts.items()]
    return "\n".join([f"{subject}, which differs:", "", *lines])


def budget(settings: Config) -> str:
    """What must be equal for a comparison: iterations, batches, learning rates, images."""
    train, images, pruning = settings.train, settings.train_data, settings.freeze_iter
    size = images.gt_size // settings.scale
    rates = [builders.learning_rate(settings, i) for i in (1, pruning + 1, train.total_iter)]
    milestones = ", ".join(map(str, settings.milestones))
    halvings = f", times {train.scheduler.gamma:g} after {milestones}" if milestones else ""
    return (
        f"{pruning} pruning and {train.total_iter - pruning} fine-tuning iterations of "
        f"{images.batch_size_per_gpu} patches of {size} x {size} low-resolution pixels of "
        f"{images.dataroot_gt or images.type}, {train.optim_g.type} at {rates[0]:g} and from "
        f"{rates[1]:g} to {rates[2]:g} in fine-tuning ({train.scheduler.type}{halvings})"
    )


def _machine(facts: dict[str, Any]) -> str:
    cpu, gpu = facts["cpu"], facts["gpu"]
    device = f"{gpu['name']}, " if gpu else ""
    return (
        f"{device}{cpu['name']}, {cpu['threads']} of {cpu['cores']} threads, denormal numbers "
        f"{cpu['denormals']}, torch {facts['torch']}, issp {facts['issp']}"
    )


def _order(rows: Sequence[Result]) -> Iterator[str]:
    """The methods of every network, scale and sparsity by PSNR, the best first."""
    sets = {row.set for row in rows}
    of_seed: dict[tuple[Any, ...], dict[str, dict[int | None, list[float]]]] = {}
    for r in rows:
        if r.channel == "y" and r.method != BASELINE:
            methods = of_seed.setdefault((r.arch, r.scale, r.sparsity or 0), {})
            methods.setdefault(r.method, {}).setdefault(r.seed, []).append(r.psnr)
    for (arch, scale, sparsity), methods in of_seed.items():
        ranked = []
        for method, seeds in methods.items():
            means = [statistics.fmean(v) for v in seeds.values() if len(v) == len(sets)]
            if means:
                value = tables.Value.of(means)
                spread = "" if value.spread is None else f" ± {value.spread:.3f}"
                ranked.append((value.mean, f"{method} {value.mean:.3f}{spread}"))
        ordered = " > ".join(text for _, text in sorted(ranked, reverse=True))
        yield f"* {arch} x{scale}, {f'{100 * sparsity:g} %' if sparsity else 'dense'}: {ordered}"


def _facts(folder: StudyFolder, finished: Sequence[Run]) -> str:
    """A line for each run: its exact zeros and its time."""
    lines = []
    for run in finished:
        row = folder.results_of(run)[0]
        log = logging.read_csv(folder.run(run).path / "log" / "train.csv")
        spans = zip([0, *(r["iteration"] for r in log)], log, strict=False)
        seconds = sum(r["seconds"] * (r["iteration"] - before) for before, r in spans)
        losses = [r["loss"] for r in log[-1:]]
        lines.append(
            [
                run.name,
                f"{100 * (row.zeros or 0):.3f} %",
                duration(seconds),
                *map("{:.5f}".format, losses),
            ]
        )
    return table(["run", "zeros", "time", "last loss"], lines)
