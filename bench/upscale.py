"""`issp upscale` on a photograph: seconds and memory of the whole command, beside other ways.

Each run is a process of its own, of this checkout or of the one that --before names, in turn, in
another order each round. Results are compared first: they may differ by one level of 255.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import issp
from bench.harness import options
from bench.harness.errors import BenchmarkFailed, ParityError
from bench.harness.machine import machine_line
from bench.harness.table import Column, Row, Table, median, ratio
from bench.network import prune
from issp import data
from issp.utils.files import user_path

EXAMPLE = """examples:
  python -m bench upscale --rounds 3
  git worktree add ../before REVISION && (cd ../before && python setup.py build_ext --inplace)
  python -m bench upscale --before ../before"""
ROOT = Path(__file__).resolve().parents[1]
_BASELINE = ["--tile", "256"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--model", default="edsr-tiny", help="x2; default edsr-tiny, the demo's")
    parser.add_argument("--sparsity", type=float, default=0.9, help="default 0.9, the demo's")
    parser.add_argument("--size", default="2000x3000", help="height x width, default 2000x3000")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--before", type=user_path, help="checkout whose --tile 256 is a row too")
    parser.add_argument("--out", type=user_path, help="also write the table to this .md file")


def run(args: argparse.Namespace) -> None:
    """Prints one table: seconds, processor seconds and peak memory of every way.

    Raises:
        ValueError: an argument that cannot be.
        ParityError: results differ by more than one level.
    """
    options.at_least_one(args, "rounds")
    options.at_least_one(args, "threads")
    options.check_sparsities([args.sparsity])
    options.folders_exist(args.out)
    height, width = map(int, args.size.split("x"))
    ways: dict[str, tuple[Path, list[str]]] = {
        "as it is": (ROOT, []),
        "--dense": (ROOT, ["--dense"]),
        "--dense --tile 256": (ROOT, ["--dense", *_BASELINE]),
    }
    if args.before:
        ways["before: --tile 256"] = (args.before.resolve(), _BASELINE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data.write_image(folder / "photo.png", photograph(height, width))
        torch.manual_seed(0)
        model = issp.models.build(args.model, 2)
        prune(model, args.sparsity, 1)
        issp.save(model, folder / "model.safetensors")
        rows = _measure(args, folder, ways)
    table = Table(
        f"upscale, {args.model} x2, {100 * args.sparsity:g} % zeros, {width} x {height} pixels",
        machine_line("cpu"),
        [
            Column("way"),
            Column("wall", "seconds"),
            Column("cpu", "processor seconds"),
            Column("peak", "peak memory, MB"),
            Column("ratio", "times as fast as the last row"),
        ],
        rows,
        [f"median of {args.rounds} runs of the whole command, reading and writing included"],
    )
    print(table.markdown())
    if args.out:
        args.out.write_text(table.markdown())


def photograph(height: int, width: int) -> np.ndarray:
    """An image of this size: sample photographs side by side."""
    tiles = [image[:256, :256] for image in data.sample_photographs("test").values()]
    row = np.concatenate([tiles[i % len(tiles)] for i in range(-(-width // 256))], axis=1)
    rows = [np.roll(row, 256 * i, axis=1) for i in range(-(-height // 256))]
    return np.concatenate(rows)[:height, :width].copy()


def _measure(
    args: argparse.Namespace, folder: Path, ways: dict[str, tuple[Path, list[str]]]
) -> list[Row]:
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):  # the first round compares, and fills the caches
        for name in random.sample(list(ways), len(ways)):
            print(f"round {number} of {args.rounds}: {name}", file=sys.stderr)
            sample = _command(args, folder, *ways[name], result=f"{list(ways).index(name)}.png")
            samples[name] += [sample] if number else []
        if not number:
            _compare(folder, list(ways))
    rows = []
    medians = {
        name: [median(column) for column in zip(*samples[name], strict=True)] for name in ways
    }
    for name, (wall, cpu, peak) in medians.items():
        cells = {"way": name, "wall": wall, "cpu": cpu, "peak": peak}
        cells["ratio"] = ratio(list(medians.values())[-1][0], wall)
        rows.append(Row(cells, {"wall": [sample[0] for sample in samples[name]]}))
    return rows


def _command(
    args: argparse.Namespace, folder: Path, checkout: Path, words: list[str], result: str
) -> tuple[float, float, float]:
    """Wall and processor seconds, and peak memory in MB, of one run."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "ISSP_CACHE": str(folder / "cache")}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    target = folder / result
    command = [sys.executable, "-m", "issp", "upscale", str(folder / "photo.png"), *words]
    command += ["--model", str(folder / "model.safetensors"), "--device", "cpu"]
    command += ["-o", str(target.with_suffix(""))]  # a folder: earlier revisions know no files
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begin
    if process.returncode:
        raise BenchmarkFailed(f"{' '.join(command)} ended with status {process.returncode}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def _compare(folder: Path, names: list[str]) -> None:
    results = [data.read_image(folder / str(i) / "photo_x2.png") for i in range(len(names))]
    for name, result in zip(names[1:], results[1:], strict=True):
        apart = np.abs(result.astype(np.int16) - results[0])
        # Tiles of earlier revisions overlap by less than the receptive field.
        allowed = 1 if not name.startswith("before") else 255
        share = float((apart > 1).mean())
        if apart.max() > allowed or share > 1e-3:
            raise ParityError(f"{name}: {100 * share:.3g} % of the samples differ by 2 or more")
