"""Runs a function in several processes that gloo joins; a failure or a hang ends all of them.

The processes are forked from a server that has imported torch, so they start within milliseconds.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch built with gloo"
)
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["torch._inductor", "torch.distributed.checkpoint", "issp.pruning.attach", "issp.optim"]
    + ["issp.sr.train", "tests.distributed.ranks"]
)


class RankError(AssertionError):
    """A rank raised, ended early or hung; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 60.0,
    launched: bool = False,
) -> list[Any]:
    """Runs `function(*args)` in `world` processes of one gloo process group.

    Args:
        function: at the top level of a module; `torch.distributed` says its rank and their number.
        world: number of processes.
        *args: what pickle takes.
        timeout: seconds until all are ended, their tracebacks shown.
        launched: no process group is there, but the environment that torchrun gives its processes;
            a process that SIGKILL ends returns None.

    Returns:
        What each rank returned (tensors and plain values), in the order of the ranks.

    Raises:
        RankError: a rank raised (the first one is shown), ended, or was not done in time.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Its host is none of the ranks, as with torchrun.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {"MASTER_PORT": str(store.port)} if launched else None
        # Not daemons, which may have no processes of their own.
        ranks = [
            _processes.Process(
                target=_run, args=(folder, rank, world, timeout, environment, function, args)
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, folder, timeout, -signal.SIGKILL if launched else 0)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        results = [folder / f"{rank}.result" for rank in range(world)]
        return [torch.load(x, weights_only=False) if x.exists() else None for x in results]


def _wait(ranks: list[Any], folder: Path, timeout: float, expected: int) -> None:
    """Returns once all ranks have ended with status 0 or the expected one."""
    deadline = time.monotonic() + timeout
    while running := {rank: p for rank, p in enumerate(ranks) if p.exitcode is None}:
        left = deadline - time.monotonic()
        if left <= 0:
            stacks = _stacks(running, folder)
            raise RankError(f"ranks {sorted(running)} hang after {timeout:g} s:\n{stacks}")
        connection.wait([p.sentinel for p in running.values()], left)
        if any(process.exitcode not in (None, 0, expected) for process in ranks):
            time.sleep(0.5)  # the one that failed first may be the next to end
            raise RankError(_reason(ranks, folder))


def _reason(ranks: list[Any], folder: Path) -> str:
    """The error that came first: the others have lost their peer only."""
    for rank, process in enumerate(ranks):
        if process.exitcode and not (folder / f"{rank}.error").exists():
            return f"rank {rank} ended with status {process.exitcode}"
    first = min(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    return f"rank {first.stem} failed:\n{first.read_text()}"


def _stacks(running: dict[int, Any], folder: Path) -> str:
    """Where the ranks are; those that are still starting say nothing."""
    begun = [rank for rank in running if (folder / f"{rank}.stacks").exists()]
    for rank in begun:
        os.kill(running[rank].pid, signal.SIGUSR2)
    time.sleep(1.0)
    return "\n".join((folder / f"{rank}.stacks").read_text() for rank in begun)


def _run(
    folder: Path,
    rank: int,
    world: int,
    timeout: float,
    environment: dict[str, str] | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """One rank: its result, its error and, at SIGUSR2, its stack go to the folder."""
    with open(folder / f"{rank}.stacks", "w") as stacks:
        faulthandler.register(signal.SIGUSR2, file=stacks)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            if environment is not None:
                os.environ |= _torchrun(rank, world) | environment
                torch.save(function(*args), folder / f"{rank}.result")
                os._exit(0)  # whatever groups an error has left
            # Longer than the run: a lost rank shows as the error of its own.
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(folder / "store"), world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=2 * timeout),
            )
            torch.save(function(*args), folder / f"{rank}.result")
            dist.barrier()  # or a rank that is done early would take the connection away
            dist.destroy_process_group()
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            os._exit(1)
        faulthandler.unregister(signal.SIGUSR2)


def _torchrun(rank: int, world: int) -> dict[str, str]:
    """What torchrun sets; the store is its own, not that of rank 0."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {
        **{name: str(value) for name, value in numbers.items()},
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
