"""Every CUDA source compiles for every target, without register spills, against a CPU-only torch.

Needs nvcc, not a GPU. The flags are those of setup.py: registers and spills are of the program that
is installed. The compiler's report is kept under build/ until a source changes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.harness import cuda_compiler
from bench.harness.cuda_compiler import Kernel, kernels

SETUP = cuda_compiler.SETUP
SOURCES = [cuda_compiler.ROOT / source for source in SETUP["CudaLibrary"]().sources]
TARGETS = SETUP["ARCHITECTURES"]
REGISTERS_OF_AN_SM = 65536
NVCC = SETUP["nvcc"]()

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def test_the_parser_sees_a_spill():
    log = """
ptxas info    : Compiling entry function '_ZN4issp12apply_kernelINS_7Float32ELi120EE' for 'sm_80'
    56 bytes stack frame, 64 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers"""
    symbol = "_ZN4issp12apply_kernelINS_7Float32ELi120EE"
    assert kernels(log) == [Kernel("apply_kernel<Float32, 120>", symbol, "sm_80", 64, 64, 56)]


@needs_nvcc
def test_the_flags_are_those_that_the_results_and_the_wheel_rest_on():
    command = cuda_compiler.command()
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


def _threads_of_an_sm(source: Path, kernel: str) -> int:
    """Threads whose registers an SM must have: of the blocks that launch bounds promise."""
    if kernel.startswith("speculate_kernel"):
        plain = 2 if "Float64" in kernel else 4 if "<Float32" in kernel else 3
        return 256 * (plain if source.stem == "soft_shrink" else 3)
    if kernel.startswith("settle_kernel"):
        return 256 * 4
    return 512 * (2 if source.stem == "soft_shrink" and "Float64" not in kernel else 1)


@pytest.mark.full
@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source):
    log = cuda_compiler.report(source)
    assert "warning" not in log, log
    compiled = kernels(log)
    assert {kernel.target for kernel in compiled} == {f"sm_{t}" for t in TARGETS}
    for kernel in sorted(compiled, key=lambda x: (x.name, x.target)):
        name = f"{kernel.name} on {kernel.target}"
        print(f"{source.name} {name}: {kernel.registers} registers")
        assert kernel.spilled == 0 and kernel.stack == 0, f"{name} spills {kernel.spilled} bytes"
        needed = kernel.registers * _threads_of_an_sm(source, kernel.name)
        assert needed <= REGISTERS_OF_AN_SM, f"{name} leaves no room for its blocks"
