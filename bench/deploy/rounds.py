"""Processes that compute one way each, in turns while the others are stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.deploy import worker
from bench.deploy.torch_ways import DENSE, OURS
from bench.harness.errors import BenchmarkFailed, ParityError
from bench.harness.progress import counted

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("onnxruntime", "openvino", "deepsparse")
SPARSE_PEERS = ("deepsparse",)
# Largest error (root mean square, over that of the result) of ways in float32 and in 16 bits.
BITS_32, BITS_16 = 1e-3, 0.05
_OPSET = 17  # that DeepSparse 1.8 with onnx 1.14 reads


@dataclass
class Way:
    """One way to compute one network.

    Attributes:
        name: of `all_ways`.
        sparsity: of the weights; None: zeros do not matter to it.
        folder: of the network.
        seconds: of each call.
        missing: why there are none.
        peak, file_bytes: memory of the process, and size of the file.
        error: see `BITS_32`.
        version, report: of the library; what packing says.
    """

    name: str
    sparsity: float | None
    folder: Path
    seconds: list[float] = field(default_factory=list)
    missing: str | None = None
    peak: int | None = None
    file_bytes: int | None = None
    error: float | None = None
    version: str = ""
    report: str = ""

    def spread(self) -> float | None:
        """Distance of the quartiles, as a share of the median; None below four samples."""
        if len(self.seconds) < 4:
            return None
        low, middle, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / middle


def all_ways() -> list[str]:
    """Ours, torch's, and those of other runtimes."""
    return [*OURS, *DENSE, *worker.RUNTIMES]


def export(model: nn.Module, x: Tensor, path: Path) -> None:
    """Writes a network as ONNX of a fixed size."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter(
            "ignore"
        )  # that this exporter is the older one, which needs no onnxscript
        torch.onnx.export(model, (x,), str(path), opset_version=_OPSET, dynamo=False)


class Process:
    """The process of a way, stopped unless it is asked.

    Args:
        way: what it computes; gets what the process tells.
        threads: that compute.
        python: the interpreter.
    """

    def __init__(self, way: Way, threads: int, python: str | Path) -> None:
        self.way = way
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if Path(python) == Path(sys.executable):
            paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        else:
            environment.pop("PYTHONPATH", None)
        self._log = open(way.folder / f"{way.name}.log", "w+")  # noqa: SIM115
        command = [str(python), worker.__file__, way.name, str(way.folder), str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
        facts = self._answer()
        way.missing = facts.get("missing")
        self.first: float | None = facts.get("first")
        way.version, way.file_bytes = facts.get("version", ""), facts.get("file")
        way.report = facts.get("report", "")
        self._signal(signal.SIGSTOP)

    def time(self, calls: int) -> None:
        """One round."""
        self._signal(signal.SIGCONT)
        self._ask(str(calls))
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        self.way.seconds += answer["seconds"]
        self.way.peak = answer["peak"]

    def close(self) -> None:
        """Ends the process; it writes its result first."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._ask("")
        self._process.wait()

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _ask(self, line: str) -> None:
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        last = self._log.read().strip()
        if self.way.name in OURS:
            raise BenchmarkFailed(f"the process of {self.way.name} ended:\n{last}")
        return {"missing": (last.splitlines() or ["the process ended"])[-1][:300]}


def measure(
    ways: Sequence[Way],
    threads: int,
    pythons: dict[str, Any],
    rounds: int,
    seconds: float,
) -> None:
    """Times all ways in turn, and compares their results.

    Args:
        ways: get their numbers.
        threads: that compute in each.
        pythons: runtime -> interpreter, None: this one.
        rounds: turns of each way.
        seconds: that a way may take in all rounds; it has at least one call in a round.

    Raises:
        ParityError: a result of ours is wrong.
        BenchmarkFailed: a process of ours ended.
    """
    with _processes(ways, threads, pythons) as processes:
        running = [process for process in processes if process.first is not None]
        order = random.Random(0)
        for _ in counted(range(rounds), "round"):
            order.shuffle(running)
            for process in running:
                process.time(max(1, int(seconds / rounds / process.first)))
    for way in ways:
        _compare(way)


@contextlib.contextmanager
def _processes(
    ways: Sequence[Way], threads: int, pythons: dict[str, Any]
) -> Iterator[list[Process]]:
    processes: list[Process] = []
    try:
        for way in counted(ways, "starting way"):
            python = pythons.get(way.name.split()[0]) or sys.executable
            processes.append(Process(way, threads, python))
        yield processes
        for process in processes:
            process.close()
    finally:
        for process in processes:
            process.kill()


def _compare(way: Way) -> None:
    result = way.folder / f"{way.name}.npy"
    if way.missing or not result.exists():
        return
    expected, actual = np.load(way.folder / "expected.npy"), np.load(result)
    if actual.shape != expected.shape:
        raise ParityError(f"{way.name}: the result has shape {actual.shape}, not {expected.shape}")
    way.error = float(_rms(actual - expected) / _rms(expected))
    allowed = BITS_16 if "16" in way.name else BITS_32
    if way.name in OURS and not way.error <= allowed:
        raise ParityError(
            f"{way.name}: the result is off by {way.error:.2g} from torch fp32; allowed are "
            f"{allowed:g}: no figure is printed"
        )


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
