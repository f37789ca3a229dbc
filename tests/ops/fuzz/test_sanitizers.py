"""csrc/cpu with AddressSanitizer and UndefinedBehaviorSanitizer: parity cases and random calls.

A copy of the package with a sanitized library runs in child processes; the sanitizer's own library
must be the first that the interpreter loads.
"""

from __future__ import annotations

import fcntl
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.fuzz.harness import fuzz

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[3]
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"]
FLAGS += ["-fno-omit-frame-pointer"]
LINKED = ["pyproject.toml", "tests", "triton_kernels", "csrc"]


def preloaded() -> str | None:
    """What the interpreter loads first: libasan, and libstdc++, whose exceptions it intercepts.

    None where the compiler has no libasan.
    """
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    files = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [*setup["cxx"](), f"-print-file-name={name}"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None
        files.append(said.strip())
    return " ".join(files) if all(os.path.isabs(path) for path in files) else None


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A folder from which a sanitized issp is imported, and the variables that it needs."""
    first = preloaded()
    if first is None:
        pytest.skip("the C++ compiler has no AddressSanitizer (libasan)")
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "sanitized"
    with open(base / "sanitized.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of pytest's processes builds, minutes long
        if not (folder / "done").exists():
            _build(folder)
            (folder / "done").touch()
    options = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=8192"
    environment = {
        "LD_PRELOAD": first,
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "ISSP_BACKEND": "cpp",
        "ISSP_FUZZ_UNLIMITED": "1",  # the sanitizer reserves more addresses than there is memory
        "PYTHONPATH": str(folder),
    }
    return folder, environment


def _build(folder: Path) -> None:
    skipped = shutil.ignore_patterns("*.so", "__py*")
    shutil.copytree(ROOT / "issp", folder / "issp", ignore=skipped)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    _library()().build(folder / "issp" / "_C.abi3.so", folder / "build")


def _library():
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")

    class Sanitized(setup["CpuLibrary"]):
        """The CPU library with checks; an undefined symbol is the sanitizers'."""

        def compile_command(self):
            return [*super().compile_command(), *FLAGS]

        def link_command(self):
            return [*setup["cxx"](), "-shared", *FLAGS]

    return Sanitized


def test_parity(sanitized):
    """Cases of every op; AVX2 has the most code of its own."""
    folder, environment = sanitized
    files = ["ops/test_parity.py", "ops/test_update_parity.py", "ops/test_nm_step.py"]
    files += ["ops/test_auxiliary.py", "ops/test_auxiliary_sums.py", "ops/sparse/test_parity.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not full", "-k", "cpp-avx2 and not large and not million"]
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in files)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(("name", "seed"), [("cpp-avx2", 6), ("raw", 7)])
def test_random_calls(sanitized, name, seed):
    folder, environment = sanitized
    findings = fuzz(name, seed, 800, folder=folder, environment=environment)
    assert not findings.problems, "\n\n".join(findings.problems[:3])
    assert sum(findings.outcomes.values()) == 800


def test_the_sanitizer_is_on(sanitized):
    """The library was built with it: its symbols are in the file."""
    folder, _ = sanitized
    built = (folder / "issp" / "_C.abi3.so").read_bytes()
    assert b"__asan_report_load8" in built and b"__ubsan_handle_add_overflow_abort" in built
