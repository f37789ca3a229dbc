"""Runs random raw calls in child processes, which a call may end or stop: the parent goes on.

python -m tests.ops.fuzz.harness BACK_END SEED COUNT [OP ...]
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.ops.fuzz import calls
from tests.ops.fuzz.child import call_of

ROOT = Path(__file__).resolve().parents[3]
CHILD = str(Path(__file__).with_name("child.py"))
PATIENCE = 120  # seconds for one call; before the first one torch is imported


@dataclass
class Findings:
    """What came of random calls.

    Attributes:
        problems: a text per call that ended or stopped its process, failed without a sentence,
            modified a tensor and raised, or differs from the reference.
        outcomes: (op, whether the call was refused) -> calls.
    """

    problems: list[str] = field(default_factory=list)
    outcomes: Counter = field(default_factory=Counter)


class _Child:
    """A process that reports line by line, read with a time limit."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        command = [sys.executable, CHILD, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(
            command, cwd=folder, text=True, env=_environment(folder, environment), **pipes
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.said: list[str] = []
        self._threads = [
            threading.Thread(target=read, daemon=True) for read in (self._read, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(line)
        self.lines.put(None)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.said += self.process.stderr

    def next(self) -> dict | str:
        """The next report, or how the process ended: "" if it finished."""
        try:
            line = self.lines.get(timeout=PATIENCE)
        except queue.Empty:
            self.process.kill()
            return f"hung for {PATIENCE} s"
        if line is not None:
            return json.loads(line)
        status = self.process.wait()
        for thread in self._threads:
            thread.join(timeout=10)
        return f"ended with status {status}: {''.join(self.said)[-4000:]}" if status else ""


def _environment(folder: Path, more: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}


def fuzz(
    back_end: str,
    seed: int,
    count: int,
    *ops: str,
    folder: Path = ROOT,
    environment: dict[str, str] | None = None,
) -> Findings:
    """Runs `count` random calls of a back end.

    Args:
        back_end: as `tests.ops.fuzz.child.table_of` takes it.
        seed: of all calls.
        ops: those that are called, in turn; none: all.
        folder: where the children import issp and tests from.
        environment: more variables for the children.
    """
    findings, done = Findings(), 0
    while done < count:
        numbers = map(str, (seed, done, count - done))
        child = _Child([back_end, *numbers, *ops], folder, environment or {})
        running: int | None = None
        while isinstance(report := child.next(), dict):
            running = report.get("begin")
            if running is None:
                done = report["end"] + 1
                _note(findings, report, seed, ops)
        if not report:
            return findings
        if running is None:
            raise RuntimeError(f"the process that fuzzes {report}")
        findings.problems.append(f"{report}\n{_told(seed, running, ops)}")
        done = running + 1
    return findings


def _note(findings: Findings, report: dict, seed: int, ops: tuple[str, ...]) -> None:
    findings.outcomes[report["op"], bool(report["refused"])] += 1
    if report["problem"]:
        text = f"{report['problem']} {report['refused']}"
        findings.problems.append(f"{text}\n{_told(seed, report['end'], ops)}")


def _told(seed: int, number: int, ops: tuple[str, ...]) -> str:
    op, arguments, _ = call_of(seed, number, ops or calls.OPS)
    return f"  call {number} of seed {seed}: {op}({', '.join(map(calls.describe, arguments))})"


if __name__ == "__main__":
    which, first_seed, calls_wanted, *only = sys.argv[1:]
    found = fuzz(which, int(first_seed), int(calls_wanted), *only)
    print("\n".join(found.problems))
    print(dict(found.outcomes))
    print(len(found.problems), "problems")
