"""Loads the native libraries, registers the implementations of the ops and chooses between them.

Order on the CPU: cpp, reference. On a GPU: cuda, triton, reference; sparse ops that tensor cores
may compute go to Triton beside cuda. `ISSP_BACKEND` forces one of reference, cpp, triton, cuda:
what cannot be active then is an error, never replaced. Without it, the slow reference, or Triton
where the CUDA library was built but cannot be used, is a warning; with `ISSP_STRICT=1` an error.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from issp.ops import reference, schemas
from issp.ops.validation import CPU_OPS, PRUNING_OPS, SPARSE_OPS
from issp.utils.errors import BackendError

NAMES = ("reference", "cpp", "triton", "cuda")
_ON_GPU = PRUNING_OPS | SPARSE_OPS
_CHECKS = _ON_GPU | CPU_OPS
_LIBRARIES = {"cpp": "_C", "cuda": "_CUDA"}

_active: dict[str, str] = {}
_problems: dict[str, str] = {}
_sharing: set[str] = set()


def active(device: str) -> str:
    """Name of the back end that serves a device type ("cpu", "cuda")."""
    return _active.get(device, "reference")


def problems() -> dict[str, str]:
    """Back ends that are not in use here, and why."""
    return dict(_problems)


def by_reference(device: str) -> list[str]:
    """The ops that the slow reference serves on a device type."""
    return list(_CHECKS) if active(device) == "reference" else []


def implementations(name: str) -> dict[str, Callable]:
    """The ops of one back end as plain callables with the schemas' arguments."""
    if name == "reference":
        # In place on leaves that require gradients, as the native ops.
        in_place = {op: torch.no_grad()(getattr(reference, op)) for op in PRUNING_OPS}
        others = {op: getattr(reference, op) for op in SPARSE_OPS | CPU_OPS}
        table = {**others, **in_place}
        return {op: _checked(check, table[op]) for op, check in _CHECKS.items()}
    if name == "triton":
        table = _import_triton().implementations()
        return {op: _checked(check, table[op]) for op, check in _ON_GPU.items()}
    if name not in _active.values():
        raise RuntimeError(
            f"back end {name} is not active here: {_problems.get(name, 'not loaded')}"
        )
    ops = _CHECKS if name == "cpp" else _ON_GPU
    return {op: getattr(torch.ops.issp, op).default for op in ops}


def _checked(check: Callable, call: Callable) -> Callable:
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return call(*args, **kwargs)

    return checked


def _import_triton() -> ModuleType:
    # Installed as issp.triton_kernels; in a checkout the folder stands beside issp/.
    try:
        return importlib.import_module("issp.triton_kernels")
    except ModuleNotFoundError as error:
        if error.name != "issp.triton_kernels":
            raise
        return importlib.import_module("triton_kernels")


def _library(name: str) -> Path | None:
    """The file of issp/_C or issp/_CUDA, if it was built."""
    found = sorted(Path(__file__).parents[1].glob(f"{_LIBRARIES[name]}.*"))
    return next((path for path in found if path.suffix in (".so", ".pyd")), None)


def _load_library(name: str) -> str | None:
    """Loads issp/_C or issp/_CUDA; returns what stopped it, or None."""
    path = _library(name)
    if path is None:
        how = (
            "ISSP_CUDA=1 builds it where nvcc is" if name == "cuda" else "`pip install .` builds it"
        )
        return f"issp/{_LIBRARIES[name]} was not built ({how})"
    problem = _driver_problem(path) if name == "cuda" else None
    if problem:
        return problem
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # torch names the file, the loader's own words say what is wrong with it.
        why = error.__cause__ or error
        versions = f" ({cuda_versions(path)})" if name == "cuda" else ""
        return f"{path.name} does not load with torch {torch.__version__}{versions}: {why}"
    return None


def _driver_problem(path: Path) -> str | None:
    """Why the CUDA runtime linked into a library cannot work here, or None."""
    built, driver = _nvcc_version(path), _driver_version()
    # A driver serves every runtime of its major version and of older ones.
    if built is None or driver is None or driver[0] >= built[0]:
        return None
    return (
        f"{cuda_versions(path)}: update the driver, or rebuild with CUDA_HOME naming a toolkit of "
        f"CUDA {driver[0]}"
    )


def cuda_versions(path: Path | None = None) -> str:
    """What built the CUDA library, what the driver knows and what torch was built for, in words.

    Args:
        path: of the library; None: the one that was built, if there is one.
    """
    path, by, driver = path or _library("cuda"), "issp/_CUDA was not built", _driver_version()
    if path:
        built = _nvcc_version(path)
        by = f"nvcc {_dotted(built) if built else 'of an unknown version'} built {path.name}"
    knows = f"the driver knows CUDA {_dotted(driver)} at most" if driver else "torch sees no driver"
    cuda = torch.version.cuda
    return f"{by}, {knows}, torch was built {f'for CUDA {cuda}' if cuda else 'without CUDA'}"


def _nvcc_version(path: Path) -> tuple[int, int] | None:
    """Of the nvcc that built a library: its runtime, whose version the library names."""
    runtime = re.search(rb"issp needs a driver for CUDART_VERSION (\d+)", path.read_bytes())
    return _major_minor(int(runtime[1])) if runtime else None


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows; None where torch finds no driver."""
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return _major_minor(driver) if driver else None


def _major_minor(version: int) -> tuple[int, int]:
    """(13, 0) of 13000, as CUDA writes versions."""
    return version // 1000, version % 1000 // 10


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _try(name: str) -> bool:
    problem: str | None
    if name in _LIBRARIES:
        problem = _load_library(name)
    else:
        try:
            table = implementations("triton")
            for op, call in table.items():
                schemas.library.impl(op, call, "CUDA")
            problem = None
        except ImportError as error:
            problem = f"triton cannot be imported: {error}"
    if problem:
        _problems[name] = problem
    return problem is None


def _share_with_triton(key: str = "CUDA") -> None:
    """Sparse ops that tensor cores may compute go to Triton, the others stay where they are."""
    try:
        triton = _import_triton()
        native = {op: torch.library.get_kernel(f"issp::{op}", key) for op in SPARSE_OPS}
    except (ImportError, AttributeError) as error:
        _problems["tensor cores"] = f"sparse ops run without them: {error}"
        return
    table = triton.implementations()
    for op, check in SPARSE_OPS.items():
        call = _either(op, check, table[op], native[op], triton.prefers_tensor_cores)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that a kernel is replaced
            schemas.library.impl(op, call, key, with_keyset=True, allow_override=True)


def _either(
    op: str, check: Callable, by_triton: Callable, native: Any, prefers: Callable
) -> Callable:
    # torch leaves trailing defaults out, but a boxed kernel of the stable ABI needs them all.
    arguments = getattr(torch.ops.issp, op).default._schema.arguments
    defaults = [argument.default_value for argument in arguments]
    traits = _traits_of_gradient if op.endswith("values_grad") else _traits_of_product

    def call(keys: Any, *args: Any) -> Any:
        if prefers(*traits(*args)):
            check(*args)
            return by_triton(*args)
        return native.call_boxed(keys, *args, *defaults[len(args) :])

    return call


def _traits_of_product(x: Tensor, values: Tensor, *_: Any) -> tuple[torch.dtype, int]:
    return x.dtype, values.shape[1]


def _traits_of_gradient(
    x: Tensor, grad: Tensor, col_indices: Tensor, crow_indices: Tensor, v: int, *_: Any
) -> tuple[torch.dtype, int]:
    return x.dtype, v


def share_units(key: str = "CUDA") -> None:
    """Sends calls with units to Triton, or to the reference, which says so: CUDA has none.

    `ShrinkState` calls it where it meets the first unit, so that nobody else pays for the detour.
    """
    if active(key.lower()) != "cuda" or key in _sharing:
        return
    _sharing.add(key)
    try:
        table = implementations("triton")
    except ImportError as error:
        table = implementations("reference")
        _fall_back(f"issp runs its slow reference for units of weights on a GPU: {error}")
    for op in ("soft_shrink_", "adam_soft_shrink_", "sgd_soft_shrink_"):
        call = _units_or(op, table[op], torch.library.get_kernel(f"issp::{op}", key))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that a kernel is replaced
            schemas.library.impl(op, call, key, with_keyset=True, allow_override=True)


def _units_or(op: str, for_units: Callable, native: Any) -> Callable:
    arguments = getattr(torch.ops.issp, op).default._schema.arguments
    defaults = [argument.default_value for argument in arguments]

    def call(keys: Any, *args: Any) -> None:
        args = (*args, *defaults[len(args) :])
        patterns = args[-1]
        if any(m == 0 and v for m, v in zip(patterns[1::4], patterns[2::4], strict=True)):
            for_units(*args)
        else:
            native.call_boxed(keys, *args)

    return call


def _choose(device: str, order: tuple[str, ...], forced: str | None) -> None:
    wanted = [name for name in order if forced in (None, name)]
    chosen = next((name for name in wanted if _try(name)), "reference")
    _active[device] = chosen
    if chosen == forced:
        return
    why = "; ".join(_problems[name] for name in wanted if name in _problems)
    if forced is not None:
        raise BackendError(
            f"ISSP_BACKEND={forced} cannot run on {device}: {why or f'{forced} has no ops there'}; "
            "unset it to let issp choose"
        )
    if chosen == "reference":
        _fall_back(f"issp runs its slow reference on {device}: {why}")
    elif chosen == "triton" and _library("cuda") is not None:
        _fall_back(
            f"issp runs Triton on {device}, not its CUDA library: {why}; build issp anew for this "
            "torch and driver, or choose Triton by ISSP_BACKEND=triton"
        )


def _fall_back(sentence: str) -> None:
    if os.environ.get("ISSP_STRICT") == "1":
        raise BackendError(sentence)
    warnings.warn(sentence, RuntimeWarning, stacklevel=3)


def register() -> None:
    """Registers the reference for every device, then the best back end of each."""
    forced = os.environ.get("ISSP_BACKEND") or None
    if forced is not None and forced not in NAMES:
        raise ValueError(f"ISSP_BACKEND={forced}: use one of {', '.join(NAMES)}")
    strict = os.environ.get("ISSP_STRICT", "")
    if strict not in ("", "0", "1"):
        raise ValueError(f"ISSP_STRICT={strict}: use 0 or 1, or unset it")
    for op, call in implementations("reference").items():
        schemas.library.impl(op, call, "CompositeExplicitAutograd")
        if op.endswith("_"):
            # The check refuses views that torch negates when it reads them. torch's own way, to
            # write a negated copy back, ends in an error after it has written.
            schemas.library.impl(op, call, "Negative")
    # A back end of one device type leaves the choice of the other as it is.
    _choose("cpu", ("cpp",), forced if forced in ("reference", "cpp") else None)
    if torch.cuda.is_available():
        _choose("cuda", ("cuda", "triton"), forced if forced != "cpp" else None)
        if active("cuda") == "cuda" and forced is None:
            _share_with_triton()
    elif forced in ("cuda", "triton"):
        raise BackendError(
            f"ISSP_BACKEND={forced} cannot run: torch sees no CUDA device ({cuda_versions()}); "
            "unset it, or use cpp or reference"
        )
    else:
        _problems["cuda"] = f"torch sees no CUDA device ({cuda_versions()})"
