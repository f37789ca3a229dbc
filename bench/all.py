"""All benchmarks, each in its own process: one that fails or hangs does not stop the others.

Leaves bench.md (tables as far as they got, and what failed), samples.json (every measured time) and
one picture per benchmark in the folder. What an earlier call left there of other benchmarks stays,
so that --only adds to it. Exit status 1 when a benchmark failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.harness.errors import BenchmarkFailed
from issp.utils.files import atomic_write, user_path

EXAMPLE = "example: python -m bench all --device cuda --folder bench/results/gpu-2026-11-22"
# `accuracy` is left out: it trains for half an hour and times nothing.
# Step, optim, train and network have no picture: a GPU machine gives back few files, and their
# bars show no more than their tables.
PLAN = {
    "must-show": ["conv", "--must-show"],
    "step": ["step"],
    "scaling": ["step", "--scaling"],
    "optim": ["optim"],
    "nm 2:4": ["step", "--pattern", "2:4"],
    "nm 2:32": ["step", "--pattern", "2:32"],
    "train": ["train"],
    "conv": ["conv"],
    "matmul": ["matmul"],
    "network": ["network"],
}
PICTURES = ("scaling", "conv", "matmul")
# On a GPU everything together has to end within minutes.
PACE = {
    "cpu": {},
    "cuda": {
        "step": ["--seconds", "1"],
        "scaling": ["--budget", "45"],
        "optim": ["--seconds", "0.5"],
        "nm 2:4": ["--seconds", "0.5"],
        "nm 2:32": ["--seconds", "0.5"],
        "train": ["--seconds", "8"],
        "must-show": ["--seconds", "0.5"],
        "conv": ["--size", "64", "--seconds", "0.2"],
        "matmul": ["--size", "64", "--seconds", "0.2"],
        "network": ["--model", "edsr-baseline", "--sparsity", "0.95", "--seconds", "2"],
    },
}
COMMAND = ("-m", "bench")
_MOST_ERRORS = 4000  # characters
LIMIT = {"cpu": 1800, "cuda": 110}
LIMITS = {"cpu": {"conv": 7200, "matmul": 3600}, "cuda": {"conv": 220, "matmul": 150}}


@dataclass
class Outcome:
    """How one benchmark ended; samples.json has it by its name."""

    name: str
    seconds: float
    problem: str  # "" when it passed
    errors: str
    tables: str
    samples: list

    def line(self) -> str:
        """For the terminal."""
        return f"{self.name}: {self.problem or 'passed'} ({self.seconds:.0f} s)"

    def markdown(self) -> str:
        """Its tables, and what went wrong."""
        failed = f"### {self.name}: {self.problem}\n\n" if self.problem else ""
        return self.tables + failed


def run_one(name: str, options: Sequence[str], picture: Path | None, limit: float) -> Outcome:
    """Runs one benchmark in a process of its own; also returns when it fails or hangs.

    Args:
        name: key of `PLAN`.
        options: of its command line.
        picture: where its plot goes.
        limit: seconds.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, err, samples = (Path(folder, x) for x in ("out.md", "err.txt", "samples.json"))
        command = [sys.executable, *COMMAND, *PLAN[name], *options]
        command += ["--samples", samples]
        command += ["--plot", picture] if picture else []
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            try:
                code = subprocess.run(command, stdout=stdout, stderr=stderr, timeout=limit)
                problem = "failed" if code.returncode else ""
            except subprocess.TimeoutExpired:
                problem = f"stopped after its {limit:.0f} s"
        timed = json.loads(samples.read_text()) if samples.exists() else []
        tables, errors = (path.read_text(errors="replace") for path in (out, err))
    if problem == "failed":
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        problem = f"failed: {lines[-1] if lines else 'no message'}"
    return Outcome(name, time.monotonic() - begin, problem, errors, tables, timed)


def earlier(folder: Path) -> dict[str, Outcome]:
    """What earlier calls have left in the folder, by benchmark.

    Raises:
        ValueError: samples.json is not what `run` writes.
    """
    path = folder / "samples.json"
    if not path.exists():
        return {}
    try:
        return {name: Outcome(**cells) for name, cells in json.loads(path.read_text()).items()}
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} was not written by this benchmark: move it away") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench all`."""
    parser.add_argument("--device", default="cpu", choices=PACE)
    parser.add_argument("--folder", type=user_path, required=True, help="must exist")
    parser.add_argument("--only", nargs="+", default=list(PLAN), choices=PLAN, metavar="NAME")
    parser.add_argument("--threads", help="CPU threads; default: torch's")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--limit", type=float, help="seconds for each; default on a GPU: minutes")


def run(args: argparse.Namespace) -> None:
    """Runs what the arguments ask for.

    Raises:
        ValueError: the folder does not exist.
        BenchmarkFailed: names those that failed, after all have run.
    """
    if not args.folder.is_dir():
        raise ValueError(f"the folder {args.folder} does not exist: create it")
    pictures = PICTURES if importlib.util.find_spec("matplotlib") else ()
    if not pictures:
        print("no pictures: matplotlib is not installed", flush=True)
    common = ["--device", args.device]
    common += ["--quick"] if args.quick else []
    common += ["--threads", args.threads] if args.threads else []
    outcomes = earlier(args.folder)
    for name in args.only:
        pace = [] if args.quick else PACE[args.device].get(name, [])
        picture = args.folder / f"{name}.png" if name in pictures else None
        limit = LIMITS.get(args.device, {}).get(name, LIMIT[args.device])
        limit = limit if args.limit is None else args.limit
        print(f"{name}: begins, at most {limit:.0f} s", file=sys.stderr, flush=True)
        outcomes[name] = outcome = run_one(name, [*common, *pace], picture, limit)
        print(outcome.line(), flush=True)
        if outcome.problem:
            print(outcome.errors[-_MOST_ERRORS:], flush=True)
        # After each: a machine that is taken away leaves what has been measured.
        ordered = [outcomes[x] for x in PLAN if x in outcomes]
        text = "\n".join(x.markdown() for x in ordered)
        atomic_write(args.folder / "bench.md", text.encode())
        record = json.dumps({x.name: asdict(x) for x in ordered}, indent=1)
        atomic_write(args.folder / "samples.json", record.encode())
    failed = [name for name in args.only if outcomes[name].problem]
    if failed:
        raise BenchmarkFailed(f"failed: {', '.join(failed)}")
