"""A busy machine: the same calls alone, and beside processes that never sleep.

Each setting has its own process: how OpenMP threads wait is set before torch is loaded. All
processes prepare while the machine is idle (issp.pack measures then); afterwards they take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.harness import options
from bench.harness.errors import BenchmarkFailed
from bench.harness.machine import machine_line
from bench.harness.table import Column, Row, Table, median, ratio
from issp.utils.files import user_path

EXAMPLE = "python -m bench busy --beside 1 5 --rounds 5"
ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "2 threads, as libraries run": {},
    "as the issp command": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
CALLS = ("train, dense", "train, issp", "infer, dense", "infer, packed")
_BUSY_LOOP = "while True: pass"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--model", default="edsr-tiny", help="default edsr-tiny, x2")
    parser.add_argument("--beside", type=int, nargs="+", default=[1, 5], metavar="N")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, default=2.0, help="per process and round")
    parser.add_argument("--out", type=user_path, help="also write the table to this .md file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Prints one table: median times alone and beside busy processes, and their ratios."""
    if args.worker:
        return _serve(args.model)
    options.check_counts("--beside", args.beside)
    options.at_least_one(args, "rounds")
    options.folders_exist(args.out)
    table = _table(args, _measure(args))
    print(table.markdown())
    if args.out:
        args.out.write_text(table.markdown())


def _measure(args: argparse.Namespace) -> dict[tuple[str, int, str], list[float]]:
    """Seconds of the calls by setting, number of busy processes and call."""
    samples: dict[tuple[str, int, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(_worker(args.model, name)) for name in SETTINGS}
        for number in range(args.rounds):
            for beside in (0, *args.beside):
                print(f"round {number + 1} of {args.rounds}, beside {beside}", file=sys.stderr)
                with _busy_processes(beside):
                    for name in random.sample(list(workers), len(workers)):
                        for call, seconds in _ask(workers[name], args.seconds).items():
                            samples.setdefault((name, beside, call), []).extend(seconds)
    return samples


@contextlib.contextmanager
def _worker(model: str, setting: str) -> Iterator[subprocess.Popen]:
    waits = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in waits} | SETTINGS[setting]
    command = [sys.executable, "-m", "bench", "busy", "--worker", "--model", model]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _answer(process)
        yield process
    finally:
        process.kill()
        process.communicate()


def _ask(worker: subprocess.Popen, seconds: float) -> dict[str, list[float]]:
    worker.stdin.write(f"{seconds}\n")
    worker.stdin.flush()
    return _answer(worker)


def _answer(worker: subprocess.Popen) -> dict[str, list[float]]:
    line = worker.stdout.readline()
    if not line:
        command = "python -m bench busy --worker"
        raise BenchmarkFailed(f"a worker ended: run {command} to see its error")
    return json.loads(line)


@contextlib.contextmanager
def _busy_processes(count: int) -> Iterator[None]:
    command = [sys.executable, "-S", "-c", _BUSY_LOOP]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        time.sleep(0.5 if count else 0.0)  # until all of them run
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _serve(model: str) -> None:
    """The worker: prepares, then times the calls in turn for each number of seconds it reads."""
    calls = _calls(model)
    print("{}", flush=True)
    for line in sys.stdin:
        end = time.perf_counter() + float(line)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        while time.perf_counter() < end or not seconds[CALLS[-1]]:
            for name in random.sample(list(calls), len(calls)):
                begin = time.perf_counter()
                calls[name]()
                seconds[name].append(time.perf_counter() - begin)
        print(json.dumps(seconds), flush=True)


def _calls(model: str) -> dict[str, Callable[[], object]]:
    import torch

    import issp
    from issp.utils import denormals

    denormals.flush_denormals()
    x, target = torch.rand(8, 3, 32, 32), torch.rand(8, 3, 64, 64)

    def network_and_iteration(optimizer_class, prune):
        network = issp.models.build(model, scale=2)
        optimizer = optimizer_class(network.parameters(), lr=1e-4)
        pruner = issp.attach(network, optimizer, sparsity=0.9) if prune else None

        def iteration():
            optimizer.zero_grad()
            (network(x) - target).abs().mean().backward()
            optimizer.step()

        return network, pruner, iteration

    dense, _, dense_iteration = network_and_iteration(torch.optim.Adam, prune=False)
    _, _, iteration = network_and_iteration(issp.optim.Adam, prune=True)
    sparse, pruner, _ = network_and_iteration(issp.optim.Adam, prune=True)
    pruner.freeze()
    image = torch.rand(1, 3, 96, 96)
    packed = issp.pack(pruner.finalize().eval(), example=image)
    dense_copy = issp.models.build(model, scale=2).eval()
    infer = torch.inference_mode()
    inferences = (infer(lambda: dense_copy(image)), infer(lambda: packed(image)))
    actions = (dense_iteration, iteration, *inferences)
    for action in actions:
        action()
    return dict(zip(CALLS, actions, strict=True))


def _table(args: argparse.Namespace, samples: dict[tuple[str, int, str], list[float]]) -> Table:
    columns = [Column("threads", "threads"), Column("call", "call"), Column("idle", "idle", "ms")]
    for beside in args.beside:
        columns += [
            Column(f"{beside}", f"beside {beside}", "ms"),
            Column(f"x{beside}", "times idle"),
        ]
    title = f"{args.model} x2, alone and beside processes that never sleep"
    table = Table(title, machine_line("cpu"), columns)
    for setting in SETTINGS:
        for call in CALLS:
            idle = median(samples[setting, 0, call])
            cells = {"threads": setting, "call": call, "idle": idle}
            for beside in args.beside:
                busy = median(samples[setting, beside, call])
                cells |= {f"{beside}": busy, f"x{beside}": ratio(busy, idle)}
            table.rows.append(Row(cells))
    table.notes.append(
        f"Medians of {args.rounds} rounds of {args.seconds:g} s. Training: 8 crops of 32x32; "
        "inference: one image of 96x96, 90 % sparse, packed while the machine was idle."
    )
    return table
