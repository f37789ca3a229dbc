"""Every CUDA source compiles for every target, without register spills, against a CPU-only torch.

Needs nvcc, not a GPU. The flags are those of setup.py: registers and spills are of the program that
is installed. The compiler's report is kept under build/ until a source changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
SOURCES = [ROOT / source for source in SETUP["CudaLibrary"]().sources]
TARGETS = SETUP["ARCHITECTURES"]
REGISTERS_OF_AN_SM = 65536
NVCC = SETUP["nvcc"]()

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def _command() -> list[str]:
    """nvcc as setup.py calls it, and what makes it report registers and spills."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ISSP_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
            patch.delenv(name, raising=False)
        return [*SETUP["CudaLibrary"]().compile_command(), "-Xptxas=-v", "-Xcompiler=-Wall"]


def _report(source: Path) -> str:
    """What nvcc and ptxas say about a source; compiled only when something has changed."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256(repr((_command(), version.stdout, torch.__version__)).encode())
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
        [*_command(), "-c", str(source), "-o", str(target)],
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


@needs_nvcc
def test_the_flags_are_those_that_the_results_and_the_wheel_rest_on():
    command = _command()
    for flag in ("-fmad=false", "-lineinfo", "-Xfatbin=-compress-all", "-O3"):
        assert flag in command
    assert "-Xcompiler=-fPIC,-fvisibility=hidden" in command
    assert "-gencode=arch=compute_80,code=compute_80" in command  # PTX for every newer GPU
    assert not [flag for flag in command if "fast" in flag or "ftz" in flag]


def test_an_nvcc_that_is_too_old_is_told_in_one_sentence(monkeypatch, capsys):
    monkeypatch.delenv("ISSP_CUDA_ARCHS", raising=False)
    assert SETUP["architectures"]((12, 8)) == list(TARGETS)
    assert SETUP["architectures"]((12, 6)) == ["80", "90a"]
    said = capsys.readouterr().err
    assert "nvcc 12.6 cannot build sm_100, sm_120 (12.8 can)" in said and said.count("\n") == 1
    monkeypatch.setenv("ISSP_CUDA_ARCHS", "90a;100")
    with pytest.raises(SETUP["BuildError"], match=r"nvcc 12.6 cannot build sm_100 \(12.8 can\)"):
        SETUP["architectures"]((12, 6))
    assert SETUP["architectures"]((13, 0)) == ["90a", "100"]


def _runs_twice(source: Path, kernel: str) -> bool:
    ours = source.stem == "soft_shrink" or kernel.startswith("resident_kernel")
    return ours and "Float64" not in kernel


@pytest.mark.full
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
