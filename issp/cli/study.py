"""`issp study`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from issp.sr.study.plan import Study

HELP = "train a grid of methods, sparsities, scales, seeds and networks with equal budgets"
EXAMPLE = (
    "issp study configs/study_cpu.yml --dry-run\n"
    "  issp study configs/study_cpu.yml --workers 2 --threads 1\n"
    "  issp study configs/study_cpu.yml --report"
)

_OPTIONS = ("out", "workers", "threads")  # of which a continued study needs the same
_ENOUGH = 3.0  # seconds for each network and method, in a dry run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("study", metavar="STUDY.yml", help="the grid; see docs/usage.md, Studies")
    parser.add_argument(
        "--out", "-o", metavar="DIR", help="folder of the study (default: the file's `out`)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="runs at a time (default: 1)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of each worker (default: cores / workers)"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run", action="store_true", help="list the runs and estimate their time"
    )
    instead.add_argument(
        "--report", action="store_true", help="make the report anew, train nothing"
    )


def main(args: argparse.Namespace) -> int:
    """Trains and scores what is not finished, and writes the report.

    Returns:
        1 when a run failed.
    """
    from issp.sr.study import plan

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("a study trains in processes of its own: start it without torchrun")
    cores = os.cpu_count() or 1
    for option in ("workers", "threads"):
        value = getattr(args, option)
        if value is not None and not 1 <= value <= max(256, cores):
            raise ValueError(f"--{option} is {value}: it must be from 1 to {max(256, cores)}")
    threads = args.threads or max(1, cores // args.workers)
    study = plan.load(args.study, args.out)
    if args.dry_run:
        return _list(study, args.workers, threads)
    if args.report:
        return _report(study)
    return _run(study, args, threads)


def _run(study: Study, args: argparse.Namespace, threads: int) -> int:
    from issp.cli.common import item_progress
    from issp.sr.study import runner

    given = [f"--{name}={getattr(args, name)}" for name in _OPTIONS if getattr(args, name)]
    with item_progress("study") as progress:
        options = runner.Options(
            workers=args.workers,
            threads=threads,
            command=shlex.join(["issp", "study", args.study, *given]),
            say=_while_shown(lambda line: print(line, flush=True)),
            show=_while_shown(progress),
        )
        failed = runner.run(study, options)
    for name, text in failed.items():
        print(f"failed: {name}: {text}", file=sys.stderr)
    return max(int(bool(failed)), _report(study))


def _while_shown(show: Callable[..., None]) -> Callable[..., None]:
    """As `show`; when nobody reads the output any more, the study goes on without."""

    def shown(*args: Any) -> None:
        try:
            show(*args)
        except OSError:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # what is printed later, Python's flush included
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    return shown


def _report(study: Study) -> int:
    from issp.sr.study import plan, report
    from issp.sr.study.folder import StudyFolder

    folder = StudyFolder(study)
    folder.check()
    if not (study.out / plan.RUNS).is_dir():
        raise ValueError(f"the study in {study.out} has not begun: start without --report")
    print(f"see {report.write(folder)}")
    return 0


def _list(study: Study, workers: int, threads: int) -> int:
    """Prints a line for each run, and the time that all are likely to take on this machine."""
    import torch

    from issp.sr import builders
    from issp.sr.study.folder import StudyFolder
    from issp.sr.timing import seconds_per_iteration
    from issp.utils import denormals
    from issp.utils.text import duration, table

    torch.set_num_threads(threads)
    denormals.flush_denormals()
    folder = StudyFolder(study)
    folder.check()
    device = builders.device(study.runs[0].config.device)
    speed: dict[tuple[str, int, str], float] = {}
    rows, total = [], 0.0
    for run in study.runs:
        kind = run.network, run.scale, run.method
        iterations = run.config.train.total_iter
        if folder.is_finished(run):
            rows.append([run.name, f"{iterations}", "finished", ""])
            continue
        if kind not in speed:
            print(f"timing {' '.join(map(str, kind))} on {device} ...", file=sys.stderr, flush=True)
            speed[kind] = seconds_per_iteration(run.config, device, probe=100, enough=_ENOUGH)
        done = folder.iteration(run)
        seconds = speed[kind] * (iterations - done)
        total += seconds
        state = f"goes on from {done}" if done else "new"
        rows.append([run.name, f"{iterations}", state, duration(seconds)])
    print(table(["run", "iterations", "state", "estimate"], rows))
    whole = duration(total / workers)
    print(
        f"\n{len(rows)} runs in {study.out}, {workers} at a time: {whole}, by a few iterations on\n"
        "noise; reading images, validation and scoring come on top"
    )
    return 0
