"""Builds issp/_C (CPU) and, where nvcc and its headers are found, issp/_CUDA.

Both use only LibTorch's stable ABI and no Python symbol, so one abi3 wheel serves every Python from
3.10 and every torch from 2.11. Without a C++ compiler the package installs without them and runs on
Triton or the reference; `issp info` says what is missing. ISSP_CUDA=0 leaves _CUDA out, ISSP_CUDA=1
makes its absence an error.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
ARCHITECTURES = {
    "80": "sm_80",
    "90a": "sm_90a",
    "100": "sm_100",
    "120": "sm_120",
}


def nvcc() -> str | None:
    """The CUDA compiler, or None where it is absent or unwanted."""
    wanted = os.environ.get("ISSP_CUDA", "")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if wanted == "1" and not found:
        raise SystemExit("ISSP_CUDA=1 but nvcc is not on the PATH: install the CUDA toolkit")
    return None if wanted == "0" else found


def ninja_rules(objects, library, command, flags, link) -> str:
    """A ninja file: every source to its object, all objects to one library."""
    lines = [
        f"rule compile\n  command = {command} -MD -MF $out.d {flags} -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = compile $in",
        f"rule link\n  command = {link}\n  description = link $out",
        *(f"build {target}: compile {source}" for source, target in objects.items()),
        f"build {library}: link {' '.join(objects.values())}",
        f"default {library}",
    ]
    return "\n".join(lines) + "\n"


class BuildNative(build_ext):
    """Compiles the extensions with ninja, in parallel, and only what changed."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".abi3.so"

    def build_extension(self, ext):
        try:
            self._build(ext)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if os.environ.get("ISSP_REQUIRE_NATIVE") == "1":
                raise
            self.warn(f"{ext.name} was not built ({error}); issp will run without it")
            self.extensions = [other for other in self.extensions if other is not ext]

    def _build(self, ext):
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 11):
            raise OSError(f"torch {torch.__version__} is older than 2.11")
        folder = Path(self.build_temp, ext.name).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        library.parent.mkdir(parents=True, exist_ok=True)
        objects = {
            str(ROOT / source): str(folder / (Path(source).name + ".o")) for source in ext.sources
        }
        includes = " ".join(f"-isystem {path}" for path in include_paths())
        libraries = " ".join(f"-L{path}" for path in library_paths())
        flags = f"-std=c++17 -O3 {TARGET} -I{ROOT / 'csrc'} {includes}"
        compile_, flags, extra = ext.toolchain(flags)
        link = f"{compile_} -shared $in -o $out {libraries} -ltorch_cpu -ltorch {extra}"
        rules = ninja_rules(objects, library, compile_, flags, link)
        (folder / "build.ninja").write_text(rules)
        subprocess.run([ninja(), "-C", str(folder)], check=True)


class CpuLibrary(Extension):
    """issp/_C: every .cpp of csrc/cpu."""

    def __init__(self):
        sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/**/*.cpp"))
        super().__init__("issp._C", sources, py_limited_api=True)

    def toolchain(self, flags):
        compiler = os.environ.get("CXX") or "g++"
        # fp-contract off: a * b + c stays two roundings, as on every other back end.
        # maybe-uninitialized is a false alarm in GCC 12's own AVX-512 header.
        warnings = "-Wall -Wextra -Wno-maybe-uninitialized"
        return compiler, f"{flags} -fPIC -fvisibility=hidden -ffp-contract=off {warnings}", ""


class CudaLibrary(Extension):
    """issp/_CUDA: every .cu of csrc/cuda, for the listed architectures and PTX of the last."""

    def __init__(self, compiler):
        sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
        super().__init__("issp._CUDA", sources, py_limited_api=True)
        self.compiler = compiler

    def toolchain(self, flags):
        wanted = os.environ.get("ISSP_CUDA_ARCHS", ";".join(ARCHITECTURES)).split(";")
        codes = [
            f"-gencode arch=compute_{a},code={ARCHITECTURES.get(a, 'sm_' + a)}" for a in wanted
        ]
        last = wanted[-1]
        codes.append(f"-gencode arch=compute_{last},code=compute_{last}")
        more = f"-DUSE_CUDA -Xcompiler -fPIC -fmad=false -t 2 {' '.join(codes)}"
        # The stream symbol lives in a CUDA torch: left undefined here, found when torch loads it.
        return self.compiler, f"{flags.replace('-isystem', '-I')} {more}", "-cudart static"


def ninja() -> str:
    """The ninja of the environment that builds."""
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if not found:
        raise OSError("ninja is not installed: pip install ninja")
    return found


extensions = [CpuLibrary()]
if nvcc() and list(ROOT.glob("csrc/cuda/*.cu")):
    extensions.append(CudaLibrary(nvcc()))

setup(
    packages=[*find_packages(include=["issp", "issp.*"]), "issp.triton_kernels"],
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
