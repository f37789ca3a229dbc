"""The wheel, the archive of sources, and what setup.py builds, leaves out and refuses."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
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
        ISSP_NATIVE="1",
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.full
def test_wheel_is_abi3_and_complete(wheel):
    assert "cp310-abi3" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "issp").rglob("*.py")}
    kernels = {f"issp/triton_kernels/{p.name}" for p in (ROOT / "triton_kernels").glob("*.py")}
    files = {n for n in names if not n.startswith("issp-")}
    data = {"issp/_C.abi3.so", "issp/py.typed", "issp/sr/paper_results.csv"}
    assert files == modules | kernels | data


@pytest.mark.full
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


def build(tmp_path, **environment):
    """`setup.py build_ext` into a folder; it stops before anything is compiled."""
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    return run(sys.executable, "setup.py", "build_ext", *folders, **environment)


def test_a_library_that_is_not_built_is_an_error_with_the_remedy(tmp_path):
    failed = build(tmp_path, CXX="no-such-compiler", ISSP_CUDA="0", ISSP_NATIVE="1")
    assert failed.returncode != 0
    (last,) = failed.stderr.splitlines()[-1:]
    assert last.startswith("issp: issp._C was not built") and "ISSP_NATIVE=0" in last
    assert "install a C++17 compiler" in last
    assert "Traceback" not in failed.stderr


def test_none_is_built_when_none_is_asked_for(tmp_path):
    done = build(tmp_path, CXX="no-such-compiler", ISSP_NATIVE="0", ISSP_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_cuda_that_is_asked_for_is_never_left_out(tmp_path):
    setup = read_setup()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_HOME", str(tmp_path))
        with pytest.raises(setup["BuildError"], match="there is no nvcc.*unset ISSP_CUDA"):
            setup["check_cuda"]()


def read_setup():
    return runpy.run_path(str(ROOT / "setup.py"))


def fake_nvcc(folder: Path, release: str) -> Path:
    """A CUDA_HOME whose nvcc only tells its version."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.88\n")
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "asked, cuda_of_torch, compiler, wanted",
    [
        (None, None, True, False),  # a CPU build of torch, nvcc lies around
        (None, "13.0", True, True),
        (None, "13.0", False, False),
        ("0", "13.0", True, False),
        ("1", None, True, True),
        ("1", None, False, True),  # and then an error
    ],
)
def test_when_cuda_is_built(monkeypatch, tmp_path, asked, cuda_of_torch, compiler, wanted):
    setup = read_setup()
    names = setup["wants_cuda"].__globals__
    home = fake_nvcc(tmp_path / "cuda", "13.0") if compiler else tmp_path
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setitem(names, "torch", lambda: setup["Torch"](tmp_path, "2.13.0", cuda_of_torch))
    if asked is None:
        monkeypatch.delenv("ISSP_CUDA", raising=False)
    else:
        monkeypatch.setenv("ISSP_CUDA", asked)
    assert setup["wants_cuda"]() is wanted


def test_a_toolkit_of_another_cuda_than_torchs_is_told_in_one_sentence(
    monkeypatch, tmp_path, capsys
):
    setup = read_setup()
    names = setup["check_cuda"].__globals__
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", "12.8")))
    monkeypatch.setitem(names, "torch", lambda: setup["Torch"](tmp_path, "2.13.0", "13.0"))
    setup["check_cuda"]()
    said = capsys.readouterr().err
    assert "nvcc is of CUDA 12.8, torch of CUDA 13.0" in said and said.count("\n") == 1
    monkeypatch.setitem(names, "torch", lambda: setup["Torch"](tmp_path, "2.13.0", "12.6"))
    setup["check_cuda"]()
    assert capsys.readouterr().err == ""


class TestTorchThatIsRead:
    """setup.py finds torch without importing it, also where pip hides it."""

    def test_it_is_the_torch_of_the_environment(self):
        import torch

        found = read_setup()["torch"]()
        assert found == (Path(torch.__file__).parent, torch.__version__, torch.version.cuda)

    def test_in_isolation_it_is_found_where_the_package_goes(self, tmp_path):
        # pip's isolated build: PYTHONPATH leads to a sitecustomize that hides site-packages.
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\nsys.path[:] = [x for x in sys.path if 'site-packages' not in x]\n"
        )
        hidden = run(sys.executable, "-c", "import torch", PYTHONPATH=str(tmp_path))
        assert hidden.returncode != 0
        code = (
            "import sys, types\n"
            "for name in ('setuptools', 'setuptools.command', 'setuptools.command.build_ext',\n"
            "             'setuptools.command.dist_info'):\n"
            "    sys.modules[name] = types.ModuleType(name)\n"
            "sys.modules['setuptools'].Extension = sys.modules['setuptools'].setup = object\n"
            "sys.modules['setuptools.command.build_ext'].build_ext = object\n"
            "sys.modules['setuptools.command.dist_info'].dist_info = object\n"
            "import runpy; print(runpy.run_path('setup.py')['torch']().folder)"
        )
        found = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path))
        assert found.stdout.strip() == str(read_setup()["torch"]().folder), found.stderr

    def test_none_is_one_sentence_that_names_the_remedy(self, monkeypatch):
        setup = read_setup()
        names = setup["numbers"].__globals__
        monkeypatch.setattr(names["importlib"].util, "find_spec", lambda name: None)
        monkeypatch.setattr(
            names["subprocess"], "run", lambda *_, **__: subprocess.CompletedProcess((), 0, "", "")
        )
        with pytest.raises(setup["BuildError"], match="install it first.*--no-build-isolation"):
            setup["torch"]()


def test_the_archive_of_sources_holds_what_is_compiled(tmp_path):
    tree = tmp_path / "tree"
    unwanted = shutil.ignore_patterns(
        *(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "results")
    )
    shutil.copytree(ROOT, tree, ignore=unwanted)
    (tree / "issp" / "_CUDA.abi3.so").write_bytes(b"stale")
    made = run(
        *(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path / "out"),
        cwd=tree,
        ISSP_CUDA="1",
        CUDA_HOME="/nowhere",  # an archive needs no compiler, whatever is asked for
    )
    assert made.returncode == 0, made.stderr
    (archive,) = (tmp_path / "out").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("csrc", "triton_kernels", "issp"):
        wanted = {
            str(path.relative_to(tree)) for path in (tree / folder).rglob("*") if path.is_file()
        }
        lacking = {x for x in wanted - inside if not x.endswith((".so", ".pyc"))}
        assert lacking == set()
    assert not [name for name in inside if name.endswith(".so")]
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"} <= inside


def one_source(tmp_path, monkeypatch, names):
    """A tree with a space in its path and two small sources, as setup.py's CPU library."""
    tree = tmp_path / "a path: with $pace"
    (tree / "csrc" / "cpu").mkdir(parents=True)
    (tree / "csrc" / "one.h").write_text("#pragma once\ninline int one() { return 1; }\n")
    for name in ("first", "second"):
        source = f'#include "one.h"\nint {name}() {{ return one(); }}\n'
        (tree / "csrc" / "cpu" / f"{name}.cpp").write_text(source)
    (tree / "torch" / "lib").mkdir(parents=True)
    monkeypatch.setitem(names, "ROOT", tree)
    monkeypatch.setitem(names, "torch", lambda: names["Torch"](tree / "torch", "2.13.0", None))
    return tree


def test_a_path_with_spaces_builds_and_what_did_not_change_stays(tmp_path, monkeypatch, capfd):
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler here")
    setup = read_setup()
    tree = one_source(tmp_path, monkeypatch, setup["CpuLibrary"].build.__globals__)
    made = [
        "g++",
        "-shared",
        "-fPIC",
        "-x",
        "c++",
        "/dev/null",
        "-o",
        tree / "torch/lib/libtorch_cpu.so",
    ]
    subprocess.run(made, check=True)
    library, folder = tree / "out" / "_C.so", tree / "temp dir"
    setup["CpuLibrary"]().build(library, folder)
    assert library.is_file()
    capfd.readouterr()
    setup["CpuLibrary"]().build(library, folder)
    assert "no work to do" in capfd.readouterr().out
    (tree / "csrc" / "one.h").write_text("#pragma once\ninline int one() { return 2; }\n")
    setup["CpuLibrary"]().build(library, folder)
    assert "[3/3] link" in capfd.readouterr().out


def test_a_symbol_that_nobody_defines_is_refused(tmp_path, monkeypatch):
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler here")
    setup = read_setup()
    tree = one_source(tmp_path, monkeypatch, setup["CpuLibrary"].build.__globals__)
    made = [
        "g++",
        "-shared",
        "-fPIC",
        "-x",
        "c++",
        "/dev/null",
        "-o",
        tree / "torch/lib/libtorch_cpu.so",
    ]
    subprocess.run(made, check=True)
    (tree / "csrc" / "cpu" / "third.cpp").write_text(
        "int absent(); int third() { return absent(); }\n"
    )
    with pytest.raises(subprocess.CalledProcessError):
        setup["CpuLibrary"]().build(tree / "_C.so", tree / "temp")


def test_max_jobs_reaches_ninja_and_nvcc(tmp_path, monkeypatch):
    setup = read_setup()
    names = setup["CpuLibrary"].build.__globals__
    one_source(tmp_path, monkeypatch, names)
    calls = []
    monkeypatch.setattr(names["subprocess"], "run", lambda call, **_: calls.append(call))
    monkeypatch.setitem(names, "ninja", lambda: "ninja")
    monkeypatch.delenv("MAX_JOBS", raising=False)
    setup["CpuLibrary"]().build(tmp_path / "_C.so", tmp_path / "temp")
    monkeypatch.setenv("MAX_JOBS", "1")
    setup["CpuLibrary"]().build(tmp_path / "_C.so", tmp_path / "temp")
    assert [call[3:] for call in calls] == [[], ["-j", "1"]]


def test_flags_of_the_environment_reach_compiler_and_linker(monkeypatch):
    setup = read_setup()
    monkeypatch.setenv("CPPFLAGS", "-DFIRST='a b'")
    monkeypatch.setenv("CXXFLAGS", "-O1 -ffast-math -std=c++14")
    monkeypatch.setenv("LDFLAGS", "-Wl,-z,now")
    command = setup["CpuLibrary"]().compile_command()
    assert {"-DFIRST=a b", "-O1", "-ffast-math"} <= set(command)
    # The last of a kind counts: the user's optimisation, our standard and our exact arithmetic.
    assert command.index("-O1") > command.index("-O3")
    assert command.index("-std=c++17") > command.index("-std=c++14")
    assert command.index("-fno-fast-math") > command.index("-ffast-math")
    link = setup["CpuLibrary"]().link_command()
    assert "-Wl,-z,now" in link and "-ffast-math" not in link


@pytest.mark.parametrize(
    "given, host",
    [("g++-12", ["-ccbin=g++-12"]), ("ccache g++ -m64", ["-ccbin=g++"]), (None, [])],
)
def test_nvcc_takes_the_cpp_compiler_that_is_named(monkeypatch, tmp_path, given, host):
    setup = read_setup()
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", "13.0")))
    if given is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", given)
    library = setup["CudaLibrary"]()
    for command in (library.compile_command(), library.link_command()):
        assert [flag for flag in command if flag.startswith("-ccbin")] == host


@pytest.mark.parametrize(
    "ours, of_torch, built, said",
    [
        ("", "8.0;9.0a+PTX", ["80", "90a"], ""),
        ("", "7.5 8.6 12.0+PTX", ["86", "120"], "left out, no sm_80 or newer: 75"),
        ("", "Ampere", None, "left out, no sm_80 or newer: Ampere"),
        ("90a", "8.0", ["90a"], ""),
        ("8.0, 9.0a", "", ["80", "90a"], ""),
    ],
)
def test_architectures_are_asked_for_as_of_any_torch_extension(
    monkeypatch, capsys, ours, of_torch, built, said
):
    setup = read_setup()
    monkeypatch.setenv("ISSP_CUDA_ARCHS", ours)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", of_torch)
    assert setup["architectures"]((13, 0)) == (built or list(setup["ARCHITECTURES"]))
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == bool(said)


@pytest.mark.parametrize("name", ["native", "75", "sm_80"])
def test_an_architecture_that_is_none_is_refused(monkeypatch, name):
    monkeypatch.setenv("ISSP_CUDA_ARCHS", f"80;{name}")
    setup = read_setup()
    with pytest.raises(setup["BuildError"], match=rf"ISSP_CUDA_ARCHS: '{name}' is none of sm_80"):
        setup["architectures"]((13, 0))


def test_an_nvcc_that_names_no_release_is_one_sentence(tmp_path, monkeypatch):
    home = fake_nvcc(tmp_path / "cuda", "13.0")
    (home / "bin" / "nvcc").write_text("#!/bin/sh\necho HIP version 6.2\n")
    monkeypatch.setenv("CUDA_HOME", str(home))
    setup = read_setup()
    with pytest.raises(setup["BuildError"], match=r"nvcc --version names no release"):
        setup["check_cuda"]()


@pytest.mark.parametrize("switch", ["ISSP_NATIVE", "ISSP_CUDA"])
def test_a_switch_of_the_build_is_0_or_1(tmp_path, switch):
    settings = {"ISSP_NATIVE": "1", "ISSP_CUDA": "0", "CXX": "no-such-compiler", switch: "off"}
    failed = build(tmp_path, **settings)
    assert failed.returncode != 0
    assert failed.stderr.strip() == f"{switch}=off: use 0 or 1, or unset it"


def test_old_setuptools_are_named_before_they_call_the_project_invalid(tmp_path):
    code = (
        "import setuptools, runpy, sys\n"
        "setuptools.__version__ = '65.5.1'\n"
        "sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    failed = run(sys.executable, "-c", code, ISSP_CUDA="0")
    said = 'issp: setuptools 65.5.1 is too old: pip install "setuptools>=77"'
    assert failed.returncode == 1 and failed.stderr.strip() == said


@pytest.mark.parametrize("free_threaded", [False, True])
def test_the_stable_abi_is_not_claimed_for_a_free_threaded_python(free_threaded):
    code = (
        "import sysconfig, setuptools, distutils.core\n"
        "real = sysconfig.get_config_var\n"
        f"flag = {int(free_threaded)}\n"
        "sysconfig.get_config_var = lambda x: flag if x == 'Py_GIL_DISABLED' else real(x)\n"
        "made = distutils.core.run_setup('setup.py', ['-q', 'bdist_wheel'], stop_after='config')\n"
        "command = made.get_command_obj('bdist_wheel')\n"
        "command.ensure_finalized()\n"
        "print(command.py_limited_api, made.ext_modules[0].py_limited_api)"
    )
    said = run(sys.executable, "-c", code, ISSP_CUDA="0", ISSP_NATIVE="1")
    assert said.stdout.split() == (["False", "False"] if free_threaded else ["cp310", "True"])
