"""Compiles the CUDA sources as setup.py does, without a GPU, and reads what ptxas reports.

Results are kept under build/cuda_compile until a source, a header, a flag or the compiler changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "cuda_compile"
SETUP: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
# They choose architectures and the number of processes, which the callers do here.
_VARIABLES = ("ISSP_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")


class CompilationFailed(RuntimeError):
    """nvcc refuses a source; what it said follows."""


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about a kernel.

    Attributes:
        name: such as "apply_kernel<Float32, 120>".
        symbol: the mangled name.
        target: such as "sm_90a".
        registers: per thread.
        spilled: bytes per thread.
        stack: bytes per thread.
    """

    name: str
    symbol: str
    target: str
    registers: int
    spilled: int
    stack: int


def command(architectures: Sequence[str] = ()) -> list[str]:
    """nvcc as setup.py calls it, and what makes it report registers and spills.

    Args:
        architectures: such as "90a"; none: those of a wheel.
    """
    before = {name: os.environ.pop(name, None) for name in _VARIABLES}
    try:
        if architectures:
            os.environ["ISSP_CUDA_ARCHS"] = ";".join(architectures)
        found = SETUP["CudaLibrary"]().compile_command()
    finally:
        os.environ.pop("ISSP_CUDA_ARCHS", None)
        os.environ.update({name: value for name, value in before.items() if value is not None})
    return [*found, "-Xptxas=-v", "-Xcompiler=-Wall"]


def report(source: Path) -> str:
    """What nvcc and ptxas say about a source, for all architectures of a wheel."""
    log, _ = _compiled(source, [*command(), "-c"], ".o", keep_output=False)
    return log


def machine_code(source: Path, architecture: str) -> tuple[str, Path]:
    """What ptxas says about a source, and the file of its machine code.

    Args:
        source: a .cu file.
        architecture: such as "90a".
    """
    # A cubin has the code of one architecture; PTX goes elsewhere.
    flags = [x for x in command([architecture]) if "code=compute_" not in x]
    return _compiled(source, [*flags, "-cubin"], f".sm_{architecture}.cubin", keep_output=True)


def _compiled(
    source: Path, words: list[str], suffix: str, *, keep_output: bool
) -> tuple[str, Path]:
    version = subprocess.run([words[0], "--version"], capture_output=True, text=True, check=True)
    about = (words, version.stdout, SETUP["torch"]().version)
    digest = hashlib.sha256(repr(about).encode())
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h")]
    for path in sorted([source, *headers]):
        digest.update(path.read_bytes())
    output = KEPT / f"{source.stem}-{digest.hexdigest()[:20]}{suffix}"
    log = output.with_name(f"{output.name}.log")
    if not log.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f"{os.getpid()}-{output.name}")
        done = subprocess.run(
            [*words, str(source), "-o", str(partial)], capture_output=True, text=True, check=False
        )
        said = done.stdout + done.stderr
        if done.returncode:
            raise CompilationFailed(f"{source.name} does not compile:\n{said[-6000:]}")
        if keep_output:
            os.replace(partial, output)
        else:
            partial.unlink()
        partial.write_text(said)
        os.replace(partial, log)
    return log.read_text(), output


def kernels(log: str) -> list[Kernel]:
    """Every kernel that was compiled; shared memory is all dynamic, so a log names none."""
    entry = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
    found, symbol, target, stack, spilled = [], "", "", 0, 0
    for line in log.splitlines():
        if match := entry.search(line):
            symbol, target = match.groups()
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            stack, spilled = map(int, match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            name, static = readable(symbol), re.search(r"(\d+) bytes smem", line)
            assert static is None, f"{name} has {static[1]} bytes of static shared memory"
            found.append(Kernel(name, symbol, target, int(match[1]), spilled, stack))
    return found


def readable(symbol: str) -> str:
    """The kernel and its template arguments, such as apply_kernel<Float32, 120>."""
    words: list[str] = []
    at, end = symbol.find("issp") + len("issp"), symbol.find("EEv") + 1 or len(symbol)
    while match := re.compile(r"\D*?(?:L[bi](\d+)E|(\d+))").match(symbol, at, end):
        at = match.end() + int(match[2] or 0)
        words.append(match[1] or symbol[match.end() : at])
    return f"{words[0]}<{', '.join(words[1:])}>" if words else symbol
