"""Builds issp/_C (CPU) and, for a CUDA build of torch where nvcc is, issp/_CUDA.

Both use only LibTorch's stable ABI and no Python symbol, so one abi3 wheel serves every Python from
3.10 and every torch from 2.11. The build reads torch's headers and never imports it: they are those
of the environment that is installed into, also when pip builds in isolation, so that pip does not
download another torch. A library that cannot be built is an error that names the remedy.

    ISSP_NATIVE=0     builds neither: issp runs on Triton or on its slow reference
    ISSP_CUDA         1: _CUDA or an error, 0: never (default: a CUDA build of torch, and nvcc)
    ISSP_CUDA_ARCHS   instead of all architectures, such as "80;90a"; or TORCH_CUDA_ARCH_LIST
    MAX_JOBS          compilers at a time
    CXX, CUDA_HOME    the compilers: CXX or g++ (of nvcc too), and CUDA_HOME/bin/nvcc or nvcc
    CPPFLAGS, CXXFLAGS, LDFLAGS    more flags for the C++ compiler and the linker
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
OLDEST_SETUPTOOLS = 77  # knows the licence expression of pyproject.toml
ARCHITECTURES = ("80", "90a", "100", "120")
# A free-threaded Python has no stable ABI before 3.15.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
WITHOUT = "ISSP_NATIVE=0 installs without native libraries (Triton or the slow reference run then)"


class BuildError(Exception):
    """What stopped a native library, and the remedy."""


class Torch(NamedTuple):
    """A torch that lies in a folder, not imported."""

    folder: Path
    version: str
    cuda: str | None  # CUDA it was built for, such as "13.0"


@functools.cache
def torch() -> Torch:
    """torch of this interpreter, or else of the environment that pip's isolation hides."""
    look = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if not origin:
        # pip isolates a build by environment variables alone; -E makes Python ignore them.
        hidden = subprocess.run(
            [sys.executable, "-E", "-c", look], capture_output=True, text=True, check=False
        )
        origin = hidden.stdout.strip()
    if not origin:
        raise BuildError(
            "torch is not in the environment: install it first, then run `pip install .` (a front "
            "end that builds in an environment of its own, as uv does, needs --no-build-isolation, "
            f"and setuptools and ninja installed); {WITHOUT}"
        )
    about = runpy.run_path(str(Path(origin).with_name("version.py")))
    found = Torch(Path(origin).parent, about["__version__"], about["cuda"])
    if numbers(found.version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f"torch {found.version} is too old: install torch >= {oldest}")
    return found


def numbers(version: str) -> tuple[int, int]:
    """(13, 0) of "13.0.88"."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def nvcc() -> str | None:
    """The CUDA compiler, or None where there is none."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version(compiler: str) -> tuple[int, int]:
    """(13, 0) of an nvcc."""
    said = subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, text=True, check=True)
    release = re.search(r"release (\d+\.\d+)", said.stdout)
    if not release:
        raise BuildError(f"{compiler} --version names no release: is it nvcc of a CUDA toolkit?")
    return numbers(release[1])


def asked_architectures() -> list[str]:
    """Those of ISSP_CUDA_ARCHS, or those of TORCH_CUDA_ARCH_LIST that can be built."""
    asked = architecture_names("ISSP_CUDA_ARCHS")
    wrong = [x for x in asked if not is_architecture(x)]
    if wrong:
        raise BuildError(f'ISSP_CUDA_ARCHS: {wrong[0]!r} is none of sm_80 or newer, as in "80;90a"')
    if asked:
        return asked
    # Of all packages of the environment: "7.5 8.0 9.0+PTX" in NVIDIA's images, or "Ampere".
    listed = architecture_names("TORCH_CUDA_ARCH_LIST")
    known = [x for x in listed if is_architecture(x)]
    if known != listed:
        others = ", ".join(x for x in listed if x not in known)
        print(f"issp: TORCH_CUDA_ARCH_LIST: left out, no sm_80 or newer: {others}", file=sys.stderr)
    return known


def architecture_names(variable: str) -> list[str]:
    """["80", "90a"] of "80;90a" and of "8.0 9.0a+PTX"."""
    given = re.split(r"[;,\s]+", os.environ.get(variable, ""))
    return [x.removesuffix("+PTX").replace(".", "") for x in given if x]


def is_architecture(name: str) -> bool:
    """Whether kernels can be built for it: sm_80 or newer."""
    number = re.fullmatch(r"(\d{2,3})[af]?", name)
    return number is not None and int(number[1]) >= 80


def architectures(version: tuple[int, int]) -> list[str]:
    """The architectures that are asked for, or all that this version of nvcc knows."""
    asked = asked_architectures()
    wanted = asked or list(ARCHITECTURES)
    new = [x for x in wanted if int(re.match(r"\d+", x)[0]) >= 100] if version < (12, 8) else []
    if new:
        known = [x for x in wanted if x not in new]
        here = f"nvcc {version[0]}.{version[1]} cannot build sm_{', sm_'.join(new)} (12.8 can)"
        if asked or not known:
            raise BuildError(f"{here}: install a newer CUDA toolkit or leave them out")
        print(f"issp: {here}: such a GPU compiles the PTX of sm_80 when it loads", file=sys.stderr)
        return known
    return wanted


class Library(Extension):
    """A native library: its sources, and the commands that compile and link them."""

    def __init__(self, name: str, pattern: str):
        sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
        super().__init__(name, sources, py_limited_api=not FREE_THREADED)

    def common_flags(self) -> list[str]:
        """For both compilers: optimised, and of torch nothing but the stable ABI of 2.11."""
        target = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}{0:012x}"
        return ["-std=c++17", target, f"-I{ROOT / 'csrc'}"]

    def compile_command(self) -> list[str]:
        """The compiler and its flags."""
        raise NotImplementedError

    def link_command(self) -> list[str]:
        """What links objects, to be followed by their names, the output's and `libraries`."""
        raise NotImplementedError

    def libraries_of_torch(self) -> list[str]:
        """What stands behind the objects: every symbol must be defined by one of these."""
        return [f"-L{torch().folder / 'lib'}", "-ltorch_cpu"]

    def more_rules(self, folder: Path) -> tuple[list[str], list[Path]]:
        """Lines of ninja and the libraries they make, linked with the objects."""
        return [], []

    def build(self, library: Path, folder: Path) -> None:
        """Compiles with ninja into a folder, in parallel and only what changed, and links."""
        compile_, link = self.compile_command(), self.link_command()
        folder, library = folder.absolute(), library.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        objects = {ROOT / source: folder / (Path(source).name + ".o") for source in self.sources}
        more, made = self.more_rules(folder)
        linked = " ".join(map(escaped, [*objects.values(), *made]))
        rules = [
            f"rule compile\n  command = {words(compile_)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = compile $in",
            f"rule link\n  command = {words(link)} $in -o $out {words(self.libraries_of_torch())}",
            "  description = link $out",
            *more,
            *(
                f"build {escaped(out)}: compile {escaped(source)}"
                for source, out in objects.items()
            ),
            f"build {escaped(library)}: link {linked}\ndefault {escaped(library)}",
        ]
        (folder / "build.ninja").write_text("\n".join(rules) + "\n", encoding="utf-8")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([ninja(), "-C", str(folder), *jobs], check=True)


class CpuLibrary(Library):
    """issp/_C: every .cpp of csrc/cpu."""

    remedy = f"install a C++17 compiler (g++ 11 or newer), or name one in CXX; {WITHOUT}"

    def __init__(self):
        super().__init__("issp._C", "csrc/cpu/**/*.cpp")

    def compile_command(self) -> list[str]:
        """g++ with the flags that every source has."""
        return [
            *cxx(),
            "-O3",
            *flags("CPPFLAGS", "CXXFLAGS"),
            *self.common_flags(),
            f"-isystem{torch().folder / 'include'}",
            *("-fPIC", "-fvisibility=hidden"),
            f"-ffile-prefix-map={ROOT}=.",  # the same library from any folder, without its path
            # The same bits as on every other back end: a * b + c stays two roundings, and no flag
            # of the user's drops NaN or reorders a sum.
            *("-ffp-contract=off", "-fno-fast-math"),
            # The last is a false alarm in GCC 12's own AVX-512 header.
            *("-Wall", "-Wextra", "-Wno-maybe-uninitialized"),
        ]

    def link_command(self) -> list[str]:
        """g++; the linker refuses a symbol that nobody defines."""
        return [*cxx(), *flags("LDFLAGS"), "-shared", "-Wl,-z,defs"]


class CudaLibrary(Library):
    """issp/_CUDA: every .cu of csrc/cuda, for each architecture, and PTX of the first."""

    remedy = "ISSP_CUDA=0 leaves the CUDA library out (GPUs run on Triton then)"

    def __init__(self):
        super().__init__("issp._CUDA", "csrc/cuda/*.cu")

    def compiler(self) -> list[str]:
        """nvcc, with the C++ compiler that CXX names: of "ccache g++ -m64" that is g++."""
        given = [x for x in shlex.split(os.environ.get("CXX", "")) if not x.startswith("-")]
        return [nvcc(), *(f"-ccbin={x}" for x in given[-1:])]

    def codes(self) -> list[str]:
        """-gencode options; PTX of the oldest, which every newer GPU can compile."""
        wanted = architectures(nvcc_version(nvcc()))
        codes = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in wanted]
        # PTX of 90a and its like runs on that architecture alone.
        portable = sorted((x for x in wanted if x.isdigit()), key=int)
        return codes + [f"-gencode=arch=compute_{x},code=compute_{x}" for x in portable[:1]]

    def compile_command(self) -> list[str]:
        """nvcc with the flags that every source has."""
        return [
            *self.compiler(),
            "-O3",
            *self.common_flags(),
            *(f"-isystem={torch().folder / 'include'}", "-DUSE_CUDA"),
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-fmad=false",  # a * b + c stays two roundings, as on every other back end
            *("-lineinfo", "-Xfatbin=-compress-all"),
            *("-t", "1" if os.environ.get("MAX_JOBS") == "1" else "2"),
            *self.codes(),
        ]

    def link_command(self) -> list[str]:
        """nvcc; the runtime is linked statically, torch's own may be of another CUDA."""
        return [*self.compiler(), "-shared", "-cudart=static", "-Xlinker=-z,defs"]

    def more_rules(self, folder: Path) -> tuple[list[str], list[Path]]:
        """A libtorch_cuda.so to link with: csrc/cuda/torch_cuda_stub.cpp says why."""
        stub = folder / "libtorch_cuda.so"
        link = [*cxx(), "-shared", "-fPIC", f"-Wl,-soname,{stub.name}"]
        source = escaped(ROOT / "csrc" / "cuda" / "torch_cuda_stub.cpp")
        rule = f"rule stub\n  command = {words(link)} $in -o $out\n  description = link $out"
        return [rule, f"build {escaped(stub)}: stub {source}"], [stub]


def cxx() -> list[str]:
    """The C++ compiler; CXX may be two words, such as "ccache g++"."""
    return shlex.split(os.environ.get("CXX") or "g++")


def flags(*names: str) -> list[str]:
    """Flags of the user's, from variables of the environment."""
    return [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]


def words(command: list[str]) -> str:
    """A command for ninja: quoted for the shell, dollars for ninja."""
    return shlex.join(command).replace("$", "$$")


def escaped(path: Path) -> str:
    """A path in a build line of ninja."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja() -> str:
    """The ninja of the environment that builds."""
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if not found:
        raise BuildError(f"ninja is not installed: pip install ninja; {WITHOUT}")
    return found


def wants_native() -> bool:
    """Unless ISSP_NATIVE=0."""
    return zero_or_one("ISSP_NATIVE") != "0"


def zero_or_one(name: str) -> str | None:
    """A variable of the environment that is a switch; None where it is unset or empty."""
    value = os.environ.get(name)
    if value not in (None, "", "0", "1"):
        raise SystemExit(f"{name}={value}: use 0 or 1, or unset it")
    return value or None


def wants_cuda() -> bool:
    """As ISSP_CUDA says, or else where it can be used and built."""
    asked = zero_or_one("ISSP_CUDA")
    if asked:
        return asked == "1"
    try:
        return nvcc() is not None and torch().cuda is not None
    except BuildError:
        return False  # no torch: said when something is built


def check_cuda() -> None:
    """Refuses what cannot give a library; says what may give one that this torch does not load."""
    if nvcc() is None:
        raise BuildError(
            "there is no nvcc on the PATH or in CUDA_HOME: install the CUDA toolkit, or unset "
            "ISSP_CUDA to install without the CUDA library"
        )
    mine, of_torch = nvcc_version(nvcc()), torch().cuda
    if of_torch and numbers(of_torch)[0] != mine[0]:
        print(
            f"issp: nvcc is of CUDA {mine[0]}.{mine[1]}, torch of CUDA {of_torch}: issp/_CUDA will "
            f"need a driver for CUDA {mine[0]}; CUDA_HOME names another toolkit",
            file=sys.stderr,
        )


class BuildNative(build_ext):
    """Builds the libraries, or fails with one sentence behind the compiler's own words."""

    def get_ext_filename(self, fullname):
        """Without a Python version: the libraries use no symbol of Python."""
        return fullname.replace(".", os.sep) + ".abi3.so"

    def build_extension(self, ext):
        """One library."""
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            if isinstance(ext, CudaLibrary):
                check_cuda()
            ext.build(library, Path(self.build_temp, ext.name))
        except BuildError as error:
            raise SystemExit(f"issp: {ext.name} was not built: {error}") from None
        except (OSError, subprocess.CalledProcessError):
            raise SystemExit(
                f"issp: {ext.name} was not built, the reason stands above: {ext.remedy}"
            ) from None


class Metadata(dist_info):
    """Fails before pip downloads what the package depends on, rather than after."""

    def run(self):
        """A torch that cannot be built with is found here."""
        try:
            if wants_native():
                torch()
        except BuildError as error:
            raise SystemExit(f"issp: {error}") from None
        super().run()


def packages() -> list[str]:
    """issp and every package below it; bench and tests are not installed."""
    folders = [path.parent.relative_to(ROOT) for path in ROOT.glob("issp/**/__init__.py")]
    return sorted(".".join(folder.parts) for folder in folders)


# Tests and benchmarks read the flags with runpy, under another name.
if __name__ == "__main__":
    # pip does not look with --no-build-isolation, and setuptools would only call the file invalid.
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"issp: setuptools {setuptools.__version__} is too old: "
            f'pip install "setuptools>={OLDEST_SETUPTOOLS}"'
        )
    libraries = [CpuLibrary(), *([CudaLibrary()] if wants_cuda() else [])]
    setup(
        packages=[*packages(), "issp.triton_kernels"],
        ext_modules=libraries if wants_native() else [],
        cmdclass={"build_ext": BuildNative, "dist_info": Metadata},
        options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )
