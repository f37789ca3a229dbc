"""issp/_CUDA leads to libtorch_cuda and loads; which back end serves a GPU, and when none may.

The library is built for one architecture, under build/, where nvcc is; no GPU is needed. With
ISSP_CUDA_TORCH_PYTHON naming a Python that has a CUDA build of torch, it is also loaded there.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from issp import backends, cli
from issp.ops import validation
from issp.ops.info import info

ROOT = Path(__file__).resolve().parents[3]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
PYTHON = os.environ.get("ISSP_CUDA_TORCH_PYTHON") or (sys.executable if torch.version.cuda else "")
# Always loaded, or libraries that every CUDA driver's machine has as part of its C library.
SYSTEM = re.compile(r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux.*)\.so\.\d")


@pytest.fixture(scope="module")
def library():
    """issp/_CUDA for one architecture: objects are compiled again only when something changed."""
    if not (SETUP["nvcc"]() and shutil.which("readelf") and shutil.which("nm")):
        pytest.skip("nvcc or binutils are not installed")
    folder = ROOT / "build" / "cuda_library"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISSP_CUDA_ARCHS", "90a")
        SETUP["CudaLibrary"]().build(folder / "_CUDA.abi3.so", folder)
    return folder / "_CUDA.abi3.so"


def needed(path: Path) -> list[str]:
    """The libraries that the loader looks for."""
    said = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True, check=True)
    return re.findall(r"\(NEEDED\).*\[(.*)\]", said.stdout)


def symbols(path: Path, which: str) -> set[str]:
    """Names of the dynamic table without their versions; which is "undefined" or "defined"."""
    said = subprocess.run(
        ["nm", "-D", f"--{which}-only", path], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in said.stdout.splitlines()]
    # A weak one may stay undefined: the loader gives it the address 0.
    return {line[-1].split("@")[0] for line in lines if line[-2] not in "wv"}


def undefined(path: Path, stub: Path) -> set[str]:
    """What nothing that a library needs defines; libtorch_cuda defines what its stub does."""
    missing = symbols(path, "undefined")
    for name in needed(path):
        if SYSTEM.fullmatch(name):
            # As the loader finds it; the C compiler knows where.
            asked = ["gcc", f"-print-file-name={name}"]
            said = subprocess.run(asked, capture_output=True, text=True, check=True)
            found = Path(said.stdout.strip())
        else:
            found = stub if name == stub.name else SETUP["torch"]().folder / "lib" / name
        missing -= symbols(found, "defined")
    return missing


@pytest.mark.full
def test_the_library_leads_to_libtorch_cuda(library):
    names = needed(library)
    assert "libtorch_cuda.so" in names and "libtorch_cpu.so" in names, names
    # The runtime is linked in, and its symbols are not shared with torch's.
    assert not [name for name in names if name.startswith("libcudart")]
    exported = [x for x in symbols(library, "defined") if re.match(r"cuda[A-Z]|cu[A-Z]", x)]
    assert exported == []
    assert undefined(library, library.with_name("libtorch_cuda.so")) == set()


@pytest.mark.full
def test_a_library_that_does_not_lead_there_is_found_out(library, tmp_path):
    """The link as it once was: nothing names libtorch_cuda, so nobody defines its symbol."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    # The folder may hold objects of sources that are gone.
    objects = [library.parent / f"{source.name}.o" for source in sources]
    link = [SETUP["nvcc"](), "-shared", "-cudart=static", *objects, "-o", tmp_path / "_CUDA.so"]
    subprocess.run([*link, *SETUP["CudaLibrary"]().libraries_of_torch()], check=True)
    names = needed(tmp_path / "_CUDA.so")
    assert "libtorch_cpu.so" in names and "libtorch_cuda.so" not in names
    missing = undefined(tmp_path / "_CUDA.so", library.with_name("libtorch_cuda.so"))
    assert missing == {"aoti_torch_get_current_cuda_stream"}


@pytest.mark.full
def test_the_library_names_its_runtime_to_the_back_ends(library, monkeypatch):
    major = SETUP["nvcc_version"](SETUP["nvcc"]())[0]
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 11080, raising=False)
    assert f"nvcc {major}." in backends._driver_problem(library)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: major * 1000, raising=False)
    assert backends._driver_problem(library) is None


@pytest.mark.full
@pytest.mark.skipif(not PYTHON, reason="ISSP_CUDA_TORCH_PYTHON names no Python with CUDA's torch")
def test_the_library_loads_in_a_cuda_build_of_torch(library):
    done = subprocess.run(
        [PYTHON, "-m", "bench.load_cuda", str(library)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ops = len(validation.PRUNING_OPS) + len(validation.SPARSE_OPS)
    assert f"{ops} of {ops} ops registered for CUDA, {ops} of {ops} fakes ran" in done.stdout


@pytest.fixture
def chosen(monkeypatch):
    """chosen(forced, works): back ends of "cpu" and "cuda" when only those in `works` load."""

    def choose(forced: str | None, works: set[str], gpu=True, built=True) -> tuple[str, str]:
        problems: dict[str, str] = {}

        def attempt(name):
            if name not in works:
                problems[name] = f"{name} is broken"
            return name in works

        monkeypatch.setattr(backends, "_active", {})
        monkeypatch.setattr(backends, "_problems", problems)
        monkeypatch.setattr(backends, "_try", attempt)
        monkeypatch.setattr(backends, "_library", lambda name: Path("x.so") if built else None)
        monkeypatch.setattr(backends, "_share_with_triton", lambda: None)
        monkeypatch.setattr(backends, "cuda_versions", lambda: "versions")
        monkeypatch.setattr(backends.schemas.library, "impl", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        if forced is None:
            monkeypatch.delenv("ISSP_BACKEND", raising=False)
        else:
            monkeypatch.setenv("ISSP_BACKEND", forced)
        backends.register()
        return backends.active("cpu"), backends.active("cuda")

    monkeypatch.delenv("ISSP_STRICT", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield choose


ALL = {"cpp", "cuda", "triton"}


class TestChoice:
    def test_the_best_that_works(self, chosen):
        assert chosen(None, ALL) == ("cpp", "cuda")
        assert chosen(None, ALL, gpu=False) == ("cpp", "reference")

    def test_one_that_is_forced_leaves_the_other_device_as_it_is(self, chosen):
        assert chosen("cuda", ALL) == ("cpp", "cuda")
        assert chosen("triton", ALL) == ("cpp", "triton")
        assert chosen("cpp", ALL) == ("cpp", "cuda")
        assert chosen("reference", ALL) == ("reference", "reference")

    @pytest.mark.parametrize("forced", ["cuda", "triton"])
    def test_forcing_a_gpu_back_end_never_runs_another(self, chosen, forced):
        sentence = f"ISSP_BACKEND={forced} cannot run on cuda: {forced} is broken; unset it"
        with pytest.raises(RuntimeError, match=sentence):
            chosen(forced, ALL - {forced})
        with pytest.raises(RuntimeError, match=r"torch sees no CUDA device \(versions\)"):
            chosen(forced, ALL, gpu=False)

    def test_forcing_cpp_never_runs_the_reference(self, chosen):
        with pytest.raises(RuntimeError, match="ISSP_BACKEND=cpp cannot run on cpu: cpp is broken"):
            chosen("cpp", ALL - {"cpp"})

    def test_triton_in_place_of_a_library_that_was_built_is_one_warning(self, chosen):
        with pytest.warns(RuntimeWarning, match="cuda is broken; build issp anew") as seen:
            assert chosen(None, {"cpp", "triton"}) == ("cpp", "triton")
        assert len(seen) == 1

    def test_strict_refuses_triton_in_place_of_a_library_that_was_built(self, chosen, monkeypatch):
        monkeypatch.setenv("ISSP_STRICT", "1")
        sentence = "runs Triton on cuda, not its CUDA library: cuda is broken.*ISSP_BACKEND=triton"
        with pytest.raises(RuntimeError, match=sentence):
            chosen(None, {"cpp", "triton"})
        assert chosen("triton", {"cpp", "triton"}) == ("cpp", "triton")

    def test_triton_where_no_library_was_built_is_as_it_should_be(self, chosen, monkeypatch):
        monkeypatch.setenv("ISSP_STRICT", "1")
        assert chosen(None, {"cpp", "triton"}, built=False) == ("cpp", "triton")
        with pytest.raises(RuntimeError, match="slow reference on cuda: cuda is broken; triton"):
            chosen(None, {"cpp"}, built=False)


def test_a_library_that_does_not_load_is_told_with_the_loaders_words(monkeypatch, tmp_path):
    (tmp_path / "_CUDA.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops" / "backends.py"))
    problem = backends._load_library("cuda")
    assert problem.startswith(f"_CUDA.abi3.so does not load with torch {torch.__version__} (nvcc")
    assert "of an unknown version built" in problem and "file too short" in problem
    (tmp_path / "_CUDA.abi3.so").unlink()
    assert "issp/_CUDA was not built (ISSP_CUDA=1 builds it" in backends._load_library("cuda")


class TestVersions:
    """A library of CUDA 13.0's nvcc, beside drivers and torches of other versions."""

    @pytest.fixture
    def versions(self, monkeypatch, tmp_path):
        """versions(driver, torch): the library, where these are the versions of the others."""
        path = tmp_path / "_CUDA.abi3.so"
        path.write_bytes(b"...issp needs a driver for CUDART_VERSION 13000\0...")
        monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops" / "backends.py"))

        def of(driver, cuda):
            monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
            monkeypatch.setattr(torch.version, "cuda", cuda)
            return path

        return of

    @pytest.mark.parametrize("driver, works", [(12080, False), (13000, True), (14010, True)])
    def test_a_driver_older_than_the_runtime_is_told_before_loading(self, versions, driver, works):
        problem = backends._driver_problem(versions(driver, "12.8"))
        assert (problem is None) is works
        if problem:
            assert problem == (
                "nvcc 13.0 built _CUDA.abi3.so, the driver knows CUDA 12.8 at most, torch was "
                "built for CUDA 12.8: update the driver, or rebuild with CUDA_HOME naming a "
                "toolkit of CUDA 12"
            )

    def test_a_library_that_does_not_load_names_all_three(self, versions):
        versions(13020, "12.8")
        problem = backends._load_library("cuda")
        assert problem.startswith(f"_CUDA.abi3.so does not load with torch {torch.__version__} (")
        versions = "built _CUDA.abi3.so, the driver knows CUDA 13.2 at most, torch was built for"
        assert f"nvcc 13.0 {versions} CUDA 12.8): " in problem

    @pytest.mark.parametrize(
        "driver, cuda, words",
        [
            (
                0,
                None,
                "nvcc 13.0 built _CUDA.abi3.so, torch sees no driver, torch was built without",
            ),
            (12040, "12.4", "the driver knows CUDA 12.4 at most, torch was built for CUDA 12.4"),
        ],
    )
    def test_info_names_them_in_one_line(self, versions, capsys, driver, cuda, words):
        versions(driver, cuda)
        assert words in backends.cuda_versions()
        assert backends.cuda_versions() == info()["backends"]["cuda"]
        assert cli.main(["info"]) == 0
        assert f"cuda        {backends.cuda_versions()}\n" in capsys.readouterr().out

    def test_a_library_that_was_not_built(self, versions):
        versions(13000, "13.0").unlink()
        assert backends.cuda_versions().startswith("issp/_CUDA was not built, the driver knows")
