"""Counts the machine instructions of the CUDA kernels per 32 weights, without a GPU.

A kernel that moves every byte once may still be slow because it issues too many instructions. Each
source is compiled with setup.py's flags and disassembled; what is counted is the code that handles
every weight: a kernel's main loop, or what a block executes once where it has no loop over weights.

fewest, most: warp instructions per 32 weights of the shortest and of the longest path that loads
and stores all weights of an iteration and makes none of the calls in RARE; what stands in inner
loops counts once. The classes are those of `most`.
Weights of an iteration: counted from the loads on the path (LDG.E.128 loads 4 float32 weights per
thread, 128 per warp); or a constant of csrc/cuda, where loads of 4 bytes stand among others.

budget: what an H200 issues while its memory moves the bytes of 32 weights,
    32 * bytes per weight / 4.3 TB/s * 132 SMs * 4 warp instructions per clock * 1.755 GHz.
The step moves 8.125 bytes per weight (read, written, its bit of mask read): 56 instructions. Adam
with the step moves 28.25 (gradient and moments too, mask read and written): 195. A kernel above
its budget cannot reach that bandwidth.

Occupancy is the share of an SM's warps that registers, threads and shared memory leave room for.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from bench.harness import cuda_compiler, options, progress, sass
from bench.harness.machine import revision
from bench.harness.table import Column, Row, Table, percent
from issp.utils.environment import cpu_name
from issp.utils.files import atomic_write, user_path

EXAMPLE = "example: python -m bench sass --kernel adam --arch 90a --out sass.md"
ARCHITECTURES = ("80", "90a", "100")

# Of an H200: bytes/s of a copy, read and written; warp instructions per second.
_BANDWIDTH, _ISSUED = 4.3e12, 132 * 4 * 1.755e9
_STEP_BYTES, _ADAM_BYTES, _SGD_BYTES = 8.125, 28.25, 20.25


@dataclass(frozen=True)
class Sm:
    """What one multiprocessor has for its blocks; each block reserves 1 KB of shared memory."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


SMS = {
    "80": Sm(64, 32, 164 * 1024),
    "90a": Sm(64, 32, 228 * 1024),
    "100": Sm(64, 32, 228 * 1024),
    "120": Sm(48, 24, 100 * 1024),
}

# Calls that a step in the steady state does not make, or makes once per tensor.
RARE = ("leave_to_search(", "verify(", "list_candidate(", "update_span(", "search_alone(")


@dataclass(frozen=True)
class Sweep:
    """A loop that handles every weight once.

    Attributes:
        call: in the source, which became the loop; "": the main loop of the kernel.
        weights: of a thread in an iteration, or the constant of csrc that says so; 0: loads tell.
        arrays: that are loaded for a weight, where loads tell.
        times: how often it handles every weight.
        inner: whether its inner loops count, once each.
    """

    call: str = ""
    weights: int | str = 0
    arrays: int = 1
    times: int = 1
    inner: bool = True


@dataclass(frozen=True)
class Counted:
    """A kernel whose instructions are counted.

    Attributes:
        name: of the row.
        source: in csrc/cuda, without its suffix.
        kernel: how its name begins, as the log of the compiler has it.
        shared_bytes: of dynamic shared memory per block.
        bytes: that any implementation moves per weight; None: no budget.
        sweeps: their counts are added up.
    """

    name: str
    source: str
    kernel: str
    shared_bytes: int
    bytes: float | None
    sweeps: tuple[Sweep, ...] = (Sweep(),)


@dataclass(frozen=True)
class Count:
    """Warp instructions per 32 weights.

    Attributes:
        weights: of a warp in an iteration; of the last sweep.
        fewest: on the shortest paths.
        most: on the longest.
        classes: of the longest, by class.
    """

    weights: float
    fewest: float
    most: float
    classes: dict[str, float]


def budget(bytes_per_weight: float) -> float:
    """Warp instructions that an H200 issues while it moves the bytes of 32 weights."""
    return 32 * bytes_per_weight / _BANDWIDTH * _ISSUED


def blocks_per_sm(sm: Sm, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks run on an SM at a time."""
    warps = -(-threads // 32)
    registers_of_warp = -(-registers * 32 // 256) * 256  # they are given in units of 256
    shared = -(-(shared_bytes + 1024) // 128) * 128
    return min(
        *(sm.blocks, sm.warps // warps, sm.shared_bytes // shared),
        sm.registers // registers_of_warp // warps,
    )


def disassembler() -> str:
    """nvdisasm, from the PATH or from Triton's wheel.

    Raises:
        FileNotFoundError: it is in neither.
    """
    spec = find_spec("triton")
    folders = (
        [str(Path(spec.origin).parent / "backends/nvidia/bin")] if spec and spec.origin else []
    )
    found = shutil.which("nvdisasm") or next(
        filter(None, (shutil.which("nvdisasm", path=folder) for folder in folders)), None
    )
    if not found:
        raise FileNotFoundError(
            "nvdisasm is neither on the PATH nor in Triton's package: install the CUDA toolkit, or "
            "pip install triton"
        )
    return found


def disassembled(cubin: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Of every kernel in a file, by its symbol: the code with the source's lines, the threads."""

    def said(*words: str) -> str:
        command = [disassembler(), *words, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    threads, symbol = {}, ""
    lines = iter(said().splitlines())
    for line in lines:
        if match := re.search(r"\.section\s+\.nv\.info\.([^,\s]+)", line):
            symbol = match[1]
        elif "EIATTR_MAX_THREADS" in line:
            word = next(x for x in lines if ".word" in x)
            threads[symbol] = int(word.split()[-1], 16)
    return sass.sections(said("-c", "-gi")), threads


@cache
def sources() -> dict[str, list[str]]:
    """The lines of csrc's files by their names."""
    files = (x for x in (cuda_compiler.ROOT / "csrc").rglob("*") if x.is_file())
    return {file.name: file.read_text(encoding="utf-8").splitlines() for file in files}


def constant(name: str) -> int:
    """A constant of csrc that is a plain number; the largest, for the emulator has smaller ones.

    Raises:
        LookupError: there is none.
    """
    pattern = re.compile(rf"^constexpr uint32_t\b.*\b{name} = (\d+)[,;]", re.MULTILINE)
    found = [int(x) for lines in sources().values() for x in pattern.findall("\n".join(lines))]
    if not found:
        raise LookupError(f"csrc has no constant {name}")
    return max(found)


def count(code: sass.Code, sweeps: Sequence[Sweep]) -> Count:
    """Counts a kernel's instructions."""
    total, fewest, most, weights = Counter[str](), 0.0, 0.0, 0.0
    for sweep in sweeps:
        loop = code.loop_of(sweep.call) if sweep.call else code.main_loop()
        iteration = code.iteration(loop, 4, sweep.arrays, sweep.inner)
        given = constant(sweep.weights) if isinstance(sweep.weights, str) else sweep.weights
        weights = given or iteration.weights
        fewest += sweep.times * iteration.fewest / weights
        most += sweep.times * len(iteration.instructions) / weights
        for kind, number in iteration.by_class.items():
            total[kind] += sweep.times * number / weights
    return Count(32 * weights, fewest, most, dict(total))


COLUMNS = (
    Column("kernel", "kernel"),
    Column("arch", "sm"),
    Column("weights", "weights of a warp's iteration"),
    Column("fewest", "fewest"),
    Column("most", "most"),
    *(Column(kind, kind) for kind in sass.CLASSES),
    Column("budget", "budget"),
    Column("registers", "registers"),
    Column("spilled", "spilled", format=lambda x: f"{x:.0f} B"),
    Column("threads", "threads"),
    Column("shared", "shared", format=lambda x: f"{x:.0f} B"),
    Column("blocks", "blocks per SM"),
    Column("occupancy", "occupancy", format=percent),
)


def rows_of(architecture: str, source: str, chosen: Sequence[Counted]) -> list[Row]:
    """The rows of the kernels of a source."""
    path = cuda_compiler.ROOT / "csrc" / "cuda" / f"{source}.cu"
    log, cubin = cuda_compiler.machine_code(path, architecture)
    listing, threads = disassembled(cubin)
    compiled = cuda_compiler.kernels(log)
    rows = []
    for what in chosen:
        kernel = next((x for x in compiled if x.name.startswith(what.kernel)), None)
        if kernel is None:
            raise LookupError(f"{path.name} has no kernel {what.kernel}")
        found = count(sass.Code(listing[kernel.symbol], RARE, sources()), what.sweeps)
        sm, size = SMS[architecture], threads[kernel.symbol]
        blocks = blocks_per_sm(sm, size, kernel.registers, what.shared_bytes)
        cells = {
            "kernel": what.name,
            "arch": architecture,
            "weights": found.weights,
            "fewest": found.fewest,
            "most": found.most,
            **{kind: found.classes.get(kind, 0.0) for kind in sass.CLASSES},
            "budget": None if what.bytes is None else round(budget(what.bytes)),
            "registers": kernel.registers,
            "spilled": kernel.spilled,
            "threads": size,
            "shared": what.shared_bytes,
            "blocks": blocks,
            "occupancy": blocks * size / 32 / sm.warps,
        }
        rows.append(Row(cells))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--kernel", nargs="+", metavar="WORD", help="rows with one of these words")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=SMS)
    parser.add_argument("--out", type=user_path, help="also write the table to this .md file")


def select(words: Sequence[str] | None) -> list[Counted]:
    """The kernels whose names have one of the words; all without any.

    Raises:
        ValueError: there is none.
    """
    chosen = [x for x in KERNELS if not words or any(word in x.name for word in words)]
    if not chosen:
        names = ", ".join(x.name for x in KERNELS)
        raise ValueError(f"--kernel {' '.join(words or ())}: no row has that word: {names}")
    return chosen


def run(args: argparse.Namespace) -> None:
    """Prints the table.

    Raises:
        ValueError: no kernel is chosen, there is no nvcc, or a folder does not exist.
    """
    chosen = select(args.kernel)
    options.folders_exist(args.out)
    compiler = cuda_compiler.SETUP["nvcc"]()
    if compiler is None:
        raise ValueError("sass needs nvcc: install the CUDA toolkit, or name it in CUDA_HOME")
    disassembler()
    version = ".".join(map(str, cuda_compiler.SETUP["nvcc_version"](compiler)))
    machine = f"{cpu_name()}; nvcc {version}; issp {revision()}; no GPU: counted, not measured"
    table = Table("Machine instructions per 32 weights", machine, COLUMNS)
    sources_ = list(dict.fromkeys(x.source for x in chosen))
    units = [(arch, source) for source in sources_ for arch in args.arch]
    found = {
        (arch, source): rows_of(arch, source, [x for x in chosen if x.source == source])
        for arch, source in progress.counted(units, "source")
    }
    table.rows = [
        row
        for what in chosen
        for arch in args.arch
        for row in found[arch, what.source]
        if row["kernel"] == what.name
    ]
    table.notes = [
        "fewest, most: warp instructions per 32 weights on the shortest and longest common path; "
        "`python -m bench sass --help` says how they are counted.",
        "budget: what an H200 issues in the time that the memory needs for 32 weights.",
    ]
    print(table.markdown())
    if args.out:
        atomic_write(args.out, table.markdown().encode())


_STEP_SHARED = 8336  # kSharedBytes of select.cuh
_TILE_BYTES = _STEP_SHARED + 256 + 33 * 1024  # and what 16 warps found and 8192 scores


def _groups(best: str, m: int) -> tuple[Sweep, ...]:
    """A tile of N:M groups: loaded, a bound per group, marked by it, written."""
    unrolled = 2 if best == "kMostBest" else 4
    return (
        Sweep("load_weights<T, true>(from", "kLoads"),
        Sweep(f"K next = group.score_at(column); @ return bound_of<{best}>(group,", unrolled),
        Sweep("const K score = group.score_at(column);", 4),
        Sweep("each_group<K>(layout, tile, view.scores(), thread()", m, inner=False),
        Sweep("write(std::true_type(), own);", "kStores"),
    )


_GROUPS = (("2:4", "2", 4), ("2:32", "2", 32), ("3:32", "4", 32), ("8:16", "kMostBest", 16))
# The rows of a chunk in a loop, and what the chunk costs beside them: words of mask and log.
_UPDATES = (
    ("Adam and step", "adam_soft_shrink", "AdamRule", _ADAM_BYTES, 4),
    ("SGD and step", "sgd_soft_shrink", "SgdRule", _SGD_BYTES, 3),
)
KERNELS = (
    Counted(
        "step",
        "soft_shrink",
        "speculate_kernel<Float32, NoUpdate",
        _STEP_SHARED,
        _STEP_BYTES,
        (Sweep("shrink_chunk(tensor, own"),),
    ),
    *(
        Counted(
            f"N:M {name}, step",
            "soft_shrink",
            "group_kernel<Float32, NoUpdate, 1,",  # units of one weight
            _TILE_BYTES,
            _STEP_BYTES,
            _groups(best, m),
        )
        for name, best, m in _GROUPS
    ),
    *(
        Counted(
            name,
            source,
            f"speculate_kernel<Float32, Optimizer, {rule}",
            _STEP_SHARED,
            moved,
            (
                Sweep("update_vector<false>(entry", arrays=arrays),
                Sweep("= write_words(tensor", 16, inner=False),  # weights of a thread
            ),
        )
        for name, source, rule, moved, arrays in _UPDATES
    ),
)
