"""Trains and scores the runs of a study in worker processes."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from issp.sr import builders, config
from issp.sr.interrupt import Interrupted, StopRequest
from issp.sr.logging.progress import fit
from issp.sr.logging.text import TextLog
from issp.sr.study.folder import StudyFolder
from issp.sr.study.plan import Run, Study

_SECONDS = 0.2  # between two looks at signals
_BESIDE = 26  # columns for a bar, the share and the time that is left


class StudyInterrupted(Interrupted):
    """A study was asked to stop: the states of its runs are saved.

    Args:
        finished, total: numbers of runs.
        command: what continues the study.
        status: exit status, 128 + signal number.
    """

    def __init__(self, finished: int, total: int, command: str, status: int):
        super().__init__(0, command, status)
        self.args = (f"stopped with {finished} of {total} runs finished; continue with: {command}",)


@dataclass(frozen=True)
class Options:
    """How the runs of a study are computed.

    Attributes:
        workers: processes at a time.
        threads: of the processor, for each of them.
        command: what the user calls to continue.
        say: shows a line of text.
        show: shows how much of the work is done: (done, total, text).
    """

    workers: int
    threads: int
    command: str
    say: Callable[[str], None]
    show: Callable[[float, float, str], None]


def check(study: Study) -> dict[str, float]:
    """Builds every network once and finds the images of every set.

    Returns:
        The relative cost of a run by its name.

    Raises:
        ConfigError: a network cannot be built.
        ValueError, OSError: images are missing.
    """
    costs: dict[str, float] = {}
    parameters: dict[tuple[str, int], int] = {}
    for run in study.runs:
        settings, kind = run.config, (run.network, run.scale)
        if kind not in parameters:
            model = builders.network(settings)
            parameters[kind] = sum(p.numel() for p in model.parameters())
            builders.pairs(settings.train_data, run.scale)
            for entry in (*settings.val_data, *study.test.values()):
                builders.pairs(entry, run.scale)
        crops, size = settings.train_data.batch_size_per_gpu, settings.train_data.gt_size
        pixels = crops * (size // run.scale) ** 2
        costs[run.name] = float(settings.train.total_iter * parameters[kind] * pixels)
    return costs


def run(study: Study, options: Options) -> dict[str, str]:
    """Trains and scores what is not finished yet, and writes results.csv.

    Returns:
        The sentences of the runs that failed, by name; the others are finished.

    Raises:
        StudyInterrupted: a signal came; every run that was in progress has saved its state.
        ConfigError, ValueError, OSError: as `check`, and as `StudyFolder.check`.
    """
    folder = StudyFolder(study)
    folder.check()
    costs = check(study)
    lock = folder.begin()
    try:
        work = _Work(study, folder, options, costs, lock)
        failed = work.all()
    finally:
        folder.collect()
        folder.end()
    return failed


@dataclass(eq=False)
class _Worker:
    """A process, and the run that it works on."""

    process: subprocess.Popen[str]
    index: int
    device: str
    run: Run | None = None

    def assign(self, run: Run, study: Study) -> None:
        """Gives it a run."""
        self.run = run
        settings = config.to_tree(run.config) | {"device": self.device}
        identity = {"method": run.method, "arch": run.network, "scale": run.scale}
        identity |= {"sparsity": run.sparsity, "seed": run.seed}
        test = {name: entry.model_dump(exclude_none=True) for name, entry in study.test.items()}
        job = {"config": settings, "identity": identity, "test": test, "device": self.device}
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # its end is reported as any other's
            self.process.stdin.write(f"{json.dumps(job)}\n")
            self.process.stdin.flush()


@dataclass
class _Work:
    """The runs that are to be done, and the processes that do them."""

    study: Study
    folder: StudyFolder
    options: Options
    costs: dict[str, float]
    lock: int | None
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.finished = {run.name for run in self.study.runs if self.folder.is_finished(run)}
        runs = (*self.study.baselines, *self.study.runs)
        todo = [run for run in runs if not self.folder.is_finished(run)]
        self.pending = collections.deque(todo)
        # Shares of the runs that are done; the work of this start begins where they are now.
        self.done = {run.name: self._share(run, self.folder.iteration(run)) for run in todo}
        self.before = dict(self.done)
        self.workers: list[_Worker] = []
        self.reports: queue.Queue[tuple[_Worker, dict[str, Any]]] = queue.Queue()
        self.log = TextLog()

    def all(self) -> dict[str, str]:
        """Does all runs; returns the sentences of those that failed."""
        self.log.open(self.folder.path / "study.log")
        total = len(self.study.runs)
        self._say(f"{self.folder.path}: {total} runs, {len(self.finished)} are finished")
        with StopRequest() as stop:
            try:
                for index in range(min(self.options.workers, len(self.pending))):
                    self._start(index)
                self._loop(stop)
            except KeyboardInterrupt:  # the second one: nothing more is saved
                for worker in self.workers:
                    worker.process.kill()
                raise
            finally:
                for worker in self.workers:
                    worker.process.terminate()
                    worker.process.wait()
        if stop.signal:
            stopped = StudyInterrupted(
                len(self.finished), total, self.options.command, 128 + stop.signal
            )
            self.log.add(str(stopped))
            raise stopped
        return self.failed

    def _loop(self, stop: StopRequest) -> None:
        stopping = False
        while any(worker.run for worker in self.workers):
            try:
                worker, event = self.reports.get(timeout=_SECONDS)
            except queue.Empty:
                pass
            else:
                self._handle(worker, stopping, **event)
            if stop.signal and not stopping:
                stopping = True
                self.pending.clear()
                self._say("stopping: the states of the runs are being saved")
                for worker in self.workers:
                    worker.process.terminate()
            self._show()

    def _handle(
        self, worker: _Worker, stopping: bool, event: str, iteration: int = 0, text: str = ""
    ) -> None:
        run = worker.run
        if run is None:
            return
        if event == "trained":
            self.done[run.name] = self._share(run, iteration)
            return
        if event == "warned":
            self._say(f"{run.name}: warning: {text}")
            return
        worker.run = None
        if event == "finished":
            self._finish(run)
        elif event == "failed":
            self._fail(run, text)
        elif event == "ended" and not stopping:
            status = worker.process.wait()
            self._fail(run, f"its process ended with status {status}")
            self.workers.remove(worker)
            self._start(worker.index)
            return
        if self.pending and event != "ended":
            worker.assign(self.pending.popleft(), self.study)

    def _finish(self, run: Run) -> None:
        if run in self.study.runs:
            self.finished.add(run.name)
        self.done[run.name] = 1.0
        self.folder.collect()
        rows = [row for row in self.folder.results_of(run) if row.channel == "y"]
        scores = ", ".join(f"{row.set} {row.psnr:.2f} dB" for row in rows)
        self._say(f"{run.name}: {scores} ({len(self.finished)} of {len(self.study.runs)} runs)")

    def _fail(self, run: Run, text: str) -> None:
        self.failed[run.name] = text
        self.done[run.name] = 1.0
        self._say(f"{run.name}: failed: {text}")

    def _start(self, index: int) -> None:
        """Starts a process, and gives it a run if one is left."""
        if not self.pending:
            return
        process = _spawn(self.options.threads, self.lock)
        worker = _Worker(process, index, self._device(index))
        self.workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        worker.assign(self.pending.popleft(), self.study)

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout
        for line in worker.process.stdout:
            self.reports.put((worker, json.loads(line)))
        self.reports.put((worker, {"event": "ended"}))

    def _device(self, index: int) -> str:
        """The device of a worker: GPUs in turn, unless the base names one."""
        name = self.study.runs[0].config.device
        chosen = builders.device(name)
        if chosen.type == "cpu" or chosen.index is not None:
            return str(chosen)
        return f"cuda:{index % torch.cuda.device_count()}"

    def _share(self, run: Run, iteration: int) -> float:
        return iteration / run.config.train.total_iter

    def _show(self) -> None:
        # A baseline costs next to nothing.
        costs = {name: self.costs.get(name, 0.0) for name in self.before}
        work = sum(cost * (1 - self.before[name]) for name, cost in costs.items())
        done = sum(cost * (self.done[name] - self.before[name]) for name, cost in costs.items())
        current = [worker.run for worker in self.workers if worker.run]
        parts = [f"{len(self.finished)} of {len(self.study.runs)} runs"]
        parts += [f"| {run.name} {100 * self.done[run.name]:.0f} %" for run in current]
        columns = shutil.get_terminal_size((120, 24)).columns - _BESIDE
        self.options.show(done, work, fit(parts, max(columns, len(parts[0]))))

    def _say(self, line: str) -> None:
        self.log.add(line)
        self.options.say(line)


def _spawn(threads: int, lock: int | None) -> subprocess.Popen[str]:
    """A worker in a process group of its own, so that Ctrl-C reaches the study alone.

    It inherits the lock of the study's folder: no other start begins before all have ended.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from issp.sr.study import worker; worker.main({threads})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        start_new_session=True,
        pass_fds=() if lock is None else (lock,),
    )
