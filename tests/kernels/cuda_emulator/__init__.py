"""The CUDA kernels on CPU tensors: every CUDA thread a fiber, in a seeded random order.

`implementations()` has the signatures of `torch.ops.issp`. Built by g++ on first use.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from issp.ops import validation
from issp.ops.schemas import mask_words
from tests.tiers import quick_or_full

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
SCHEDULES = int(os.environ.get("ISSP_TEST_SCHEDULES", quick_or_full(8, 100)))
_EMULATOR = ("emulator", "memory", "order", "control")
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
options = {"seed": 0, "resident": 0, "removed": -1, "small": False}
options |= {"processors": 4, "shared": None, "refused": -1, "debugs": False, "checked": True}


def schedules(most: int = 100) -> range:
    """Seeds of the schedules that one test tries: `SCHEDULES` of them, at most `most`."""
    return range(min(most, SCHEDULES))


def compiler() -> str | None:
    """The C++ compiler, or None when this machine has none."""
    return shutil.which(os.environ.get("CXX", "g++"))


needs_compiler = pytest.mark.skipif(
    compiler() is None, reason="no C++ compiler (g++) to build the emulator"
)


def seed(number: int, resident: int = 0, removed: int = -1, small: bool = False) -> None:
    """Chooses the schedule of the following calls.

    Args:
        number: seed of the order in which threads run.
        resident: blocks that run at a time; 0 draws it from the seed.
        removed: number of a barrier, a fence or a wait for copies to leave out, -1 for none.
        small: the kernels built with small tiles, few bins and short tables.
    """
    options.update(seed=number, resident=resident, removed=removed, small=small)


def machine(
    processors: int = 4, shared: int | None = None, refused: int = -1, debugs: bool = False
) -> None:
    """Chooses the machine of the following calls.

    Args:
        processors: how many; two blocks run on each (one for float64), if they have the room.
        shared: bytes of shared memory of a processor; None: 228 KiB, 10 KiB for small kernels.
        refused: number of a kernel that the device cannot run, as a call asks for them.
        debugs: as ISSP_CUDA_DEBUG=1.
    """
    options.update(processors=processors, shared=shared, refused=refused, debugs=debugs)


@functools.cache
def library(small: bool = False, sparse: bool = False) -> ctypes.CDLL:
    """The kernels, or those of the sparse ops, built once per state of their sources."""
    own = ("products",) if sparse else ("kernels", "planted", "optimizers")
    sources = [HERE / f"{part}.cpp" for part in (*_EMULATOR, *own)]
    flags = ["-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off", "-DISSP_EMULATOR"]
    flags += ["-DISSP_SMALL_SHAPES"] if small else []
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{HERE}"]
    read = [*sources, *HERE.glob("*.h"), *(ROOT / "csrc").glob("*.h")]
    read += (ROOT / "csrc" / "cuda").glob("*.cuh")
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted(read):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_emulator"
    built = folder / f"{digest.hexdigest()[:20]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(built.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be compiling the same library
        if not built.exists():
            _compile([*flags, *map(str, sources)], built)
    loaded = ctypes.CDLL(str(built))
    for name in ("emulator_site_name", *(() if sparse else ("planted_name", "run_planted"))):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.emulator_switches.restype = ctypes.c_uint64
    loaded.emulator_launches.restype = ctypes.c_uint64
    return loaded


def _compile(arguments: list[str], target: Path) -> None:
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler found: install g++ or set CXX")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        output = Path(folder) / "emulator.so"
        done = subprocess.run(
            [command, *arguments, "-o", str(output)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the emulator does not compile:\n{done.stderr}")
        os.replace(output, target)


def shapes(small: bool = False) -> tuple[int, int, int, int]:
    """Elements per tile and per chunk of the step, tensors per table, elements per strip."""
    values = [ctypes.c_uint32() for _ in range(4)]
    library(small).emulator_shapes(*map(ctypes.byref, values))
    return tuple(value.value for value in values)


@contextlib.contextmanager
def unchecked():
    """Calls within are not checked, as on a GPU, where k is not known to the host."""
    options["checked"] = False
    try:
        yield
    finally:
        options["checked"] = True


def launches() -> int:
    """Kernels launched so far."""
    return library(options["small"]).emulator_launches()


def run(name: str, *arguments, sparse: bool = False) -> None:
    """Calls an entry of the library; raises what the emulator has noticed."""
    loaded = library(options["small"], sparse)
    loaded.emulator_options(
        ctypes.c_uint64(options["seed"]),
        ctypes.c_uint32(options["resident"]),
        ctypes.c_int(options["removed"]),
        ctypes.c_uint32(options["processors"]),
        ctypes.c_uint32(options["shared"] or (10 if options["small"] else 228) * 1024),
        ctypes.c_int(options["refused"]),
        ctypes.c_int(options["debugs"]),
    )
    entry = getattr(loaded, f"emulated_{name}")
    entry.restype = ctypes.c_char_p
    message = entry(*arguments)
    if message is not None:
        raise RuntimeError(message.decode())


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first element."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _list(tensors: list[Tensor]) -> tuple:
    pointers = (ctypes.c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])
    numels = (ctypes.c_int64 * len(tensors))(*[x.numel() for x in tensors])
    return len(tensors), pointers, numels


def _dtypes(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_int * len(tensors))(*[DTYPE_CODES[x.dtype] for x in tensors])


def soft_shrink_(
    weights: list[Tensor],
    k: Tensor,
    shrink: float,
    thresholds: Tensor,
    masks: Tensor,
    flips: Tensor,
    scratch: Tensor,
    found_inf: Tensor | None = None,
    bracket: bool = True,
    patterns: Sequence[int] = (),
) -> None:
    """See issp/ops/schemas."""
    state = (k, shrink, thresholds, masks, flips, scratch)
    validation.check_soft_shrink(weights, *state, found_inf, bracket, patterns)
    unchecked_soft_shrink_(weights, *state, found_inf, bracket, patterns)


def unchecked_soft_shrink_(
    weights,
    k,
    shrink,
    thresholds,
    masks,
    flips,
    scratch,
    found_inf=None,
    bracket=True,
    patterns=(),
) -> None:
    """As on a GPU, where k is not checked on the host."""
    run(
        "soft_shrink",
        DTYPE_CODES[weights[0].dtype],
        *_list(weights),
        pointer(k),
        ctypes.c_double(shrink),
        *map(pointer, (thresholds, masks, flips, scratch, found_inf)),
        int(bracket),
        _fields(weights, patterns),
    )


def _pattern(weight: Tensor, n: int, m: int, v: int, c: int) -> list[int]:
    """The fields of struct Pattern in csrc/layout.h; v == 0: layout "flat"."""
    if m == 0 and v * c > 1:
        raise NotImplementedError("the CUDA kernels select no units of weights: Triton does")
    if v == 0 or m == 0:
        return [n, m, 1, 1, weight.numel(), 1, 1]
    rows, channels = weight.shape[:2]
    return [n, m, v, rows, channels, weight.numel() // (rows * channels), c]


def _fields(weights: list[Tensor], patterns: Sequence[int]) -> ctypes.Array | None:
    if not patterns:
        return None
    fields = []
    for t in range(len(patterns) // 4):
        fields += _pattern(weights[t], *patterns[4 * t : 4 * t + 4])
    return (ctypes.c_int64 * len(fields))(*fields)


def nm_tiles(weight: Tensor, n: int, m: int, v: int, c: int = 1) -> tuple[int, int]:
    """Tiles that an N:M weight takes, and columns of one; 0 columns: a warp takes a group."""
    values = [ctypes.c_uint32() for _ in range(2)]
    pattern = _fields([weight], (n, m, v, c))
    pointers = map(ctypes.byref, values)
    library(options["small"]).emulator_nm_tiles(
        DTYPE_CODES[weight.dtype], pattern, ctypes.c_int64(weight.numel()), *pointers
    )
    return values[0].value, values[1].value


def magnitude_threshold(weights: list[Tensor], k: list[int]) -> Tensor:
    """See issp/ops/schemas."""
    validation.check_magnitude_threshold(weights, k)
    result = torch.empty(len(weights), dtype=weights[0].dtype)
    ranks = (ctypes.c_int64 * len(k))(*k)
    arguments = (*_list(weights), ranks, pointer(result))
    run("magnitude_threshold", DTYPE_CODES[weights[0].dtype], *arguments)
    return result


def apply_masks_(tensors: list[Tensor], masks: Tensor, sets: int = 1) -> None:
    """See issp/ops/schemas."""
    validation.check_apply_masks(tensors, masks, sets)
    run("apply_masks", _dtypes(tensors), *_list(tensors), pointer(masks), sets)


def regularize_(grads: list[Tensor], weights: list[Tensor], factors: Tensor, masks: Tensor) -> None:
    """See issp/ops/schemas."""
    validation.check_regularize(grads, weights, factors, masks)
    both = _list([*grads, *weights])
    run("regularize", DTYPE_CODES[grads[0].dtype], *both, pointer(factors), pointer(masks))


def magnitude_statistics(tensors: list[Tensor]) -> Tensor:
    """See issp/ops/schemas."""
    validation.check_magnitude_statistics(tensors)
    result = torch.empty(len(tensors), 4, dtype=torch.float64)
    run("magnitude_statistics", DTYPE_CODES[tensors[0].dtype], *_list(tensors), pointer(result))
    return result


def count_zeros(tensors: list[Tensor]) -> Tensor:
    """See issp/ops/schemas."""
    validation.check_count_zeros(tensors)
    zeros = torch.zeros(len(tensors), dtype=torch.int64)
    run("count_zeros", _dtypes(tensors), *_list(tensors), pointer(zeros))
    return zeros


def nm_prune(
    weight: Tensor, n: int, m: int, v: int, layout: str, shrink: float = 0.0, c: int = 1
) -> tuple[Tensor, Tensor]:
    """See issp/ops/schemas."""
    validation.check_nm_prune(weight, n, m, v, layout, shrink, c)
    numel = weight.numel()
    pruned, mask = torch.empty_like(weight), torch.zeros(mask_words(numel), dtype=torch.int32)
    run(
        "nm_prune",
        DTYPE_CODES[weight.dtype],
        pointer(weight),
        ctypes.c_int64(numel),
        _fields([weight], (n, m, 0 if layout == "flat" else v, c)),
        ctypes.c_double(shrink),
        pointer(pruned),
        pointer(mask),
    )
    return pruned, mask


class _Group(ctypes.Structure):
    """struct Group of optimizers.cpp."""

    _fields_ = (
        *(("count", ctypes.c_int64), ("pruned", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("weights", "numels", "grads", "bfloat16")),
        *((name, ctypes.c_void_p) for name in ("first", "second", "steps", "is_first")),
        *(("lr", ctypes.c_double), ("lr_tensor", ctypes.c_void_p), ("lr_dtype", ctypes.c_int64)),
        *(("grad_scale", ctypes.c_void_p), ("maximize", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("k", "thresholds", "masks", "flips", "scratch")),
        *(("found_inf", ctypes.c_void_p), ("shrink", ctypes.c_double)),
        *(("frozen", ctypes.c_int64), ("bracket", ctypes.c_int64)),
        ("patterns", ctypes.c_void_p),
    )


def _update(
    op: str,
    weights: list[Tensor],
    lists: dict[str, list],
    numbers: tuple,
    lr: float,
    maximize: bool,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    k: Tensor,
    shrink: float,
    thresholds: Tensor,
    masks: Tensor,
    flips: Tensor,
    scratch: Tensor,
    found_inf: Tensor | None = None,
    frozen: bool = False,
    bracket: bool = True,
    patterns: Sequence[int] = (),
) -> None:
    count, pointers, numels = _list(weights)
    arrays = {"weights": pointers, "numels": numels}
    if patterns:
        arrays["patterns"] = _fields(weights, patterns)
    for name, values in lists.items():
        if values and isinstance(values[0], Tensor):
            arrays[name] = _list(values)[1]
        elif values:
            arrays[name] = (ctypes.c_int32 * len(values))(*values)
    group = _Group(count=count, pruned=k.numel(), lr=lr, maximize=maximize, shrink=shrink)
    group.frozen, group.bracket = frozen, bracket
    group.lr_dtype = 0 if lr_tensor is None else DTYPE_CODES[lr_tensor.dtype]
    for name, array in arrays.items():
        setattr(group, name, ctypes.addressof(array))
    single = {"lr_tensor": lr_tensor, "grad_scale": grad_scale, "found_inf": found_inf, "k": k}
    single |= {"thresholds": thresholds, "masks": masks, "flips": flips, "scratch": scratch}
    for name, x in single.items():
        setattr(group, name, None if x is None else x.data_ptr())
    run(op, ctypes.byref(group), *numbers)


def adam_soft_shrink_(
    weights,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    decoupled,
    *rest,
) -> None:
    """See issp/ops/schemas."""
    if options["checked"]:
        validation.check_adam_soft_shrink(
            *(weights, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps),
            *(weight_decay, decoupled, *rest),
        )
    lists = {"grads": grads, "bfloat16": [g.dtype == torch.bfloat16 for g in grads]}
    lists |= {"first": exp_avgs, "second": exp_avg_sqs, "steps": steps}
    numbers = (*map(ctypes.c_double, (beta1, beta2, eps, weight_decay)), int(decoupled))
    _update("adam_soft_shrink", weights, lists, numbers, lr, *rest)


def sgd_soft_shrink_(
    weights, grads, momentum_buffers, first, lr, momentum, dampening, weight_decay, nesterov, *rest
) -> None:
    """See issp/ops/schemas."""
    if options["checked"]:
        validation.check_sgd_soft_shrink(
            *(weights, grads, momentum_buffers, first, lr, momentum, dampening),
            *(weight_decay, nesterov, *rest),
        )
    lists = {"grads": grads, "bfloat16": [g.dtype == torch.bfloat16 for g in grads]}
    lists |= {"first": momentum_buffers, "is_first": first}
    numbers = (*map(ctypes.c_double, (momentum, dampening, weight_decay)), int(nesterov))
    _update("sgd_soft_shrink", weights, lists, numbers, lr, *rest)


def implementations() -> dict[str, Callable]:
    """The ops by name, with the arguments of their schemas."""
    from tests.kernels.cuda_emulator import sparse

    return {
        "soft_shrink_": soft_shrink_,
        "adam_soft_shrink_": adam_soft_shrink_,
        "sgd_soft_shrink_": sgd_soft_shrink_,
        "magnitude_threshold": magnitude_threshold,
        "apply_masks_": apply_masks_,
        "nm_prune": nm_prune,
        "regularize_": regularize_,
        "magnitude_statistics": magnitude_statistics,
        "count_zeros": count_zeros,
        **sparse.implementations(),
    }
