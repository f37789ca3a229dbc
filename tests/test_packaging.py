"""The wheel, the source tree without a compiler, and what pyproject.toml says of both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USE = (
    "import torch, issp; w = [torch.randn(100)]; s = issp.ops.ShrinkState(w, [90]);"
    "issp.ops.soft_shrink_(w, s); assert s.masks()[0].sum() == 10;"
    "print(issp.backends.active('cpu'), issp.__file__)"
)


def run(*command, cwd=ROOT, **environment):
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_every_package_folder_is_listed():
    text = (ROOT / "pyproject.toml").read_text()
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for path in (ROOT / "issp").rglob("__init__.py")
    }
    for name in folders | {"issp.triton_kernels"}:
        assert f'"{name}"' in text, f"{name} would be missing from the wheel"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, the CPU library only; objects already compiled are reused."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler here: nothing native to put into a wheel")
    out = tmp_path_factory.mktemp("dist")
    built = run(
        *(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            out,
            ".",
        ),
        ISSP_CUDA="0",
        ISSP_REQUIRE_NATIVE="1",
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_is_abi3_and_complete(wheel):
    assert "cp310-abi3" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("issp/_C.abi3.so", "issp/schemas.py", "issp/triton_kernels/soft_shrink.py"):
        assert wanted in names
    assert not [n for n in names if n.startswith(("tests", "bench/", "triton_kernels"))]


def test_wheel_works_without_compiler_or_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    result = run(
        *(sys.executable, "-c", USE), cwd=tmp_path, PYTHONPATH=str(site), PATH="", ISSP_STRICT="1"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["cpp", str(site / "issp" / "__init__.py")]


def test_source_tree_without_native_library_runs_on_the_reference(tmp_path):
    shutil.copytree(
        ROOT / "issp", tmp_path / "issp", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    result = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("reference")
    assert result.stderr.count("RuntimeWarning: issp runs its slow reference on cpu") == 1


def test_build_without_a_compiler_goes_on_and_says_so(tmp_path):
    arguments = ("setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path)
    environment = {"CXX": "no-such-compiler", "ISSP_CUDA": "0"}
    relaxed = run(sys.executable, *arguments, ISSP_REQUIRE_NATIVE="0", **environment)
    assert relaxed.returncode == 0, relaxed.stderr
    assert "issp._C was not built" in relaxed.stdout + relaxed.stderr
    strict = run(sys.executable, *arguments, ISSP_REQUIRE_NATIVE="1", **environment)
    assert strict.returncode != 0
