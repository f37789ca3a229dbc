"""Every CUDA source compiles for every target, without register spills, against a CPU-only torch.

Needs nvcc, not a GPU. The compiler's report is kept under build/ until a source changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TARGETS = ("80", "90a", "100", "120")
REGISTERS_OF_AN_SM = 65536
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def _flags() -> list[str]:
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-Wall", "-t", "2"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
    flags += [f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS]
    flags += [f"-gencode=arch=compute_{TARGETS[-1]},code=compute_{TARGETS[-1]}"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    return flags + [f"-isystem={path}" for path in cpp_extension.include_paths()]


def _report(source: Path) -> str:
    """What nvcc and ptxas say about a source; compiled only when something has changed."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256(repr((_flags(), version.stdout, torch.__version__)).encode())
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h")]
    for path in sorted([source, *headers]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_compile"
    kept = folder / f"{source.stem}-{digest.hexdigest()[:20]}.log"
    if kept.exists():
        return kept.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    target = kept.with_suffix(f".{os.getpid()}.o")
    done = subprocess.run(
        [NVCC, *_flags(), "-c", str(source), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    target.unlink(missing_ok=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, f"{source.name} does not compile:\n{log[-6000:]}"
    partial = kept.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(log)
    os.replace(partial, kept)
    return log


def _kernels(log: str) -> list[tuple[str, str, int, int, int]]:
    """(kernel, target, registers, bytes spilled, bytes of stack) of every compiled kernel."""
    entry = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
    found, name, target, stack, spilled = [], "", "", 0, 0
    for line in log.splitlines():
        if match := entry.search(line):
            name, target = match.groups()
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            stack, spilled = map(int, match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            static = re.search(r"(\d+) bytes smem", line)  # shared memory is all dynamic
            assert static is None, (
                f"{_readable(name)} has {static[1]} bytes of static shared memory"
            )
            found.append((_readable(name), target, int(match[1]), spilled, stack))
    return found


def _readable(symbol: str) -> str:
    name = re.search(r"\d+([a-z_]+_kernel)", symbol)
    kind = re.search(r"\d+(B?Float\d+)", symbol)
    size = re.search(r"Li(\d+)E", symbol)
    parts = [x[1] for x in (kind, size) if x]
    return f"{name[1] if name else symbol}<{', '.join(parts)}>"


def test_the_parser_sees_a_spill():
    log = """
ptxas info    : Compiling entry function '_ZN4issp12apply_kernelINS_7Float32ELi120EE' for 'sm_80'
    56 bytes stack frame, 64 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers"""
    assert _kernels(log) == [("apply_kernel<Float32, 120>", "sm_80", 64, 64, 56)]


def _runs_twice(source: Path, kernel: str) -> bool:
    ours = source.stem == "soft_shrink" or kernel.startswith("resident_kernel")
    return ours and "Float64" not in kernel


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source):
    log = _report(source)
    assert "warning" not in log, log
    kernels = _kernels(log)
    assert {target for _, target, *_ in kernels} == {f"sm_{t}" for t in TARGETS}
    for name, target, registers, spilled, stack in sorted(kernels):
        print(f"{source.name} {target} {name}: {registers} registers")
        assert spilled == 0 and stack == 0, f"{name} on {target} spills {spilled} bytes"
        assert registers * 512 <= REGISTERS_OF_AN_SM, f"{name} on {target} cannot launch"
    # Two blocks per SM: what csrc/cuda/tile.cuh and resident.cuh promise.
    twice = [r for name, _, r, *_ in kernels if _runs_twice(source, name)]
    assert max(twice, default=0) * 512 * 2 <= REGISTERS_OF_AN_SM
