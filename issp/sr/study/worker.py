"""A process that trains and scores one run of a study after the other.

Every line of its input is a job, every line of its output an event, as JSON. When its input ends,
the study has gone: the run that is in progress saves its state and the process ends.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from issp.sr import checkpoint, config, evaluate, logging
from issp.sr.interrupt import Interrupted
from issp.sr.run_folder import RunFolder
from issp.sr.study import scoring
from issp.sr.study.plan import BASELINE
from issp.sr.train import train
from issp.utils import denormals, process
from issp.utils.errors import UserError, explain_out_of_memory, one_line

_SECONDS = 0.5  # between two events of one training


class _Events:
    """Writes events to what was standard output; whatever else is printed goes to stderr."""

    def __init__(self) -> None:
        self._file: TextIO = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)

    def send(self, event: str, **values: Any) -> None:
        """Writes one event; a study that has gone reads none."""
        try:
            self._file.write(f"{json.dumps({'event': event, **values})}\n")
        except BrokenPipeError:
            os.kill(os.getpid(), signal.SIGTERM)


class _RunProgress(logging.Progress):
    """Sends the iteration that a training has reached, and keeps its text log."""

    def __init__(self, events: _Events):
        super().__init__(quiet=True)
        self._events, self._sent = events, 0.0

    def advance(self, iteration: int) -> None:
        super().advance(iteration)
        now = time.monotonic()
        if now - self._sent > _SECONDS or iteration == self.total:
            self._sent = now
            self._events.send("trained", iteration=iteration)


def main(threads: int) -> None:
    """Works until the input ends.

    Args:
        threads: of the processor that compute.
    """
    process.keep_freed_memory()
    torch.set_num_threads(threads)
    denormals.flush_denormals()  # before the first parallel operation, also when only scoring
    events = _Events()
    warnings.showwarning = lambda message, *_, **__: events.send("warned", text=str(message))
    for job in _jobs():
        try:
            with explain_out_of_memory("use smaller batches or fewer --workers"):
                _run(job, events)
        except Interrupted:
            events.send("stopped")
            return
        except (UserError, ValueError, OSError) as error:  # others are bugs and end the process
            events.send("failed", text=one_line(error))
        else:
            events.send("finished")


def _jobs() -> Iterator[dict[str, Any]]:
    """The lines of standard input; at its end the process gets SIGTERM, which saves a training."""
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            jobs.put(json.loads(line))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield jobs.get()


def _run(job: dict[str, Any], events: _Events) -> None:
    settings, identity = config.parse(job["config"]), job["identity"]
    test = {name: config.EvalData(**entry) for name, entry in job["test"].items()}
    folder = RunFolder(settings.folder)
    if identity["method"] == BASELINE:
        scoring.score(evaluate.bicubic(settings.scale), folder.path, identity, test)
        return
    model = folder.path / scoring.MODEL
    if not _is_trained(model, settings.train.total_iter):
        resume = folder.latest_state() is not None
        if not resume and folder.path.exists():
            shutil.rmtree(folder.path)  # it was interrupted before it had a state
        train(settings, resume=resume, progress=_RunProgress(events))
    events.send("trained", iteration=settings.train.total_iter)
    network = checkpoint.load(model).to(job["device"])
    identity["zeros"] = checkpoint.sparsity(network)["ratio"]
    # The folder of a study may be moved.
    identity["model"] = str(Path(folder.path.parent.name, folder.path.name, scoring.MODEL))
    scoring.score(evaluate.of_model(network), folder.path, identity, test)


def _is_trained(model: Path, total: int) -> bool:
    try:
        return checkpoint.read_tensors(model)[1].get("iteration") == total
    except (FileNotFoundError, ValueError):  # a damaged one is written again
        return False
