"""Loads the native libraries, registers the implementations, chooses: the only file that knows all.

Order on the CPU: cpp, reference. On a GPU: cuda, triton, reference; products that tensor cores may
compute go to Triton beside cuda. `ISSP_BACKEND` forces one of reference, cpp, triton, cuda;
`ISSP_STRICT=1` turns a fall-back to the reference into an error.
"""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from issp.ops import reference, schemas
from issp.ops.validation import (
    pruning as checks,
)
from issp.ops.validation import (
    sparse as checks_products,
)
from issp.ops.validation import (
    updates as checks_update,
)

NAMES = ("reference", "cpp", "triton", "cuda")
OPS = {
    "soft_shrink_": checks.soft_shrink,
    "magnitude_threshold": checks.magnitude_threshold,
    "apply_masks_": checks.apply_masks,
    "nm_prune": checks.nm_prune,
    "regularize_": checks.regularize,
    "magnitude_statistics": checks.magnitude_statistics,
    "count_zeros": checks.count_zeros,
    "adam_soft_shrink_": checks_update.adam_soft_shrink,
    "sgd_soft_shrink_": checks_update.sgd_soft_shrink,
}
# The sparse products; their files stand beside those of the passes.
PRODUCTS = {
    "sparse_conv2d": checks_products.sparse_conv2d,
    "sparse_conv2d_values_grad": checks_products.sparse_conv2d_values_grad,
    "sparse_matmul": checks_products.sparse_matmul,
    "sparse_matmul_values_grad": checks_products.sparse_matmul_values_grad,
}
_CHECKS = OPS | PRODUCTS
_LIBRARIES = {"cpp": "_C", "cuda": "_CUDA"}

_active: dict[str, str] = {}
_problems: dict[str, str] = {}


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
        return {op: _oracle(op) for op in _CHECKS}
    if name == "triton":
        table = _import_triton().implementations()
        return {op: _checked(check, table[op]) for op, check in _CHECKS.items()}
    if name not in _active.values():
        raise RuntimeError(
            f"back end {name} is not active here: {_problems.get(name, 'not loaded')}"
        )
    return {op: getattr(torch.ops.issp, op).default for op in _CHECKS}


def _oracle(op: str) -> Callable:
    return getattr(reference, op)


def _checked(check: Callable, call: Callable) -> Callable:
    def checked(*args, **kwargs):
        check(*args, **kwargs)
        return call(*args, **kwargs)

    return checked


def _import_triton():
    # Installed as issp.triton_kernels; in a checkout the folder stands beside issp/.
    try:
        return importlib.import_module("issp.triton_kernels")
    except ModuleNotFoundError as error:
        if error.name != "issp.triton_kernels":
            raise
        return importlib.import_module("triton_kernels")


def _load_library(name: str) -> str | None:
    """Loads issp/_C or issp/_CUDA; returns what stopped it, or None."""
    found = sorted(Path(__file__).parents[1].glob(f"{_LIBRARIES[name]}.*"))
    found = [path for path in found if path.suffix in (".so", ".pyd")]
    if not found:
        return f"issp/{_LIBRARIES[name]} was not built (no compiler at installation time)"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{found[0].name} does not load with torch {torch.__version__}: {error}"
    return None


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
    """Products that tensor cores may compute go to Triton, the others stay where they are."""
    try:
        triton = _import_triton()
        native = {op: torch.library.get_kernel(f"issp::{op}", key) for op in PRODUCTS}
    except (ImportError, AttributeError) as error:
        _problems["tensor cores"] = f"products run without them: {error}"
        return
    table = triton.implementations()
    for op, check in PRODUCTS.items():
        call = _either(op, check, table[op], native[op], triton.prefers_tensor_cores)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that a kernel is replaced
            schemas.library.impl(op, call, key, with_keyset=True, allow_override=True)


def _either(op: str, check: Callable, by_triton: Callable, native, prefers: Callable) -> Callable:
    # torch leaves trailing defaults out, but a boxed kernel of the stable ABI needs them all.
    defaults = [p.default for p in inspect.signature(check).parameters.values()]
    sums = op.endswith("values_grad")

    def call(keys, *args):
        v = args[4] if sums else args[1].shape[1]
        if prefers(args[0].dtype, v):
            check(*args)
            return by_triton(*args)
        return native.call_boxed(keys, *args, *defaults[len(args) :])

    return call


def _choose(device: str, order: tuple[str, ...], forced: str | None) -> None:
    wanted = [name for name in order if forced in (None, name)]
    _active[device] = next((name for name in wanted if _try(name)), "reference")
    if _active[device] == "reference" and forced != "reference":
        why = "; ".join(_problems[name] for name in wanted if name in _problems)
        sentence = (
            f"issp runs its slow reference on {device}: {why or f'{forced} has no {device} ops'}"
        )
        if os.environ.get("ISSP_STRICT") == "1":
            raise RuntimeError(sentence)
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)


def register() -> None:
    """Registers the reference for every device, then the best back end of each."""
    forced = os.environ.get("ISSP_BACKEND")
    if forced is not None and forced not in NAMES:
        raise ValueError(f"ISSP_BACKEND={forced}: use one of {', '.join(NAMES)}")
    for op in _CHECKS:
        schemas.library.impl(op, _oracle(op), "CompositeExplicitAutograd")
    _choose("cpu", ("cpp",), forced if forced in ("reference", "cpp") else None)
    if torch.cuda.is_available():
        _choose("cuda", ("cuda", "triton"), forced if forced != "cpp" else None)
        if active("cuda") == "cuda" and forced is None:
            _share_with_triton()
    else:
        _problems["cuda"] = "torch sees no CUDA device"
