"""Compiles every kernel without a GPU: registers, shared memory, spills.

    python -m triton_kernels.compile [--targets 80 90 100] [--dtypes float32 ...] [--kernels step]

prints one row per kernel, dtype and target as JSON lines. It needs a process without
TRITON_INTERPRET, since the interpreter replaces the compiler. Targets are NVIDIA's (90 for sm_90),
or AMD's where torch is a ROCm build (gfx942): target.py differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .adam_soft_shrink import adam
from .apply_masks import apply_masks
from .compile_sparse import SPARSE_ARGUMENTS, SPARSE_KERNELS, sparse_variants
from .count_zeros import zeros
from .magnitude_statistics import CHUNK, MERGE_LAUNCH, merge, parts
from .nm_shrink import TILE as GROUP_TILE
from .nm_shrink import options as group_options
from .nm_shrink import shrink_groups
from .regularize import regularize
from .select import radix_pass
from .sgd_soft_shrink import sgd
from .soft_shrink import AXIS, apply, count
from .tables import ADDRESSES, TILE, launch, write_addresses
from .target import NVIDIA
from .units import LAUNCH as UNIT_LAUNCH
from .units import UNITS, score, shrink_selected
from .updates import LAUNCH as UPDATE_LAUNCH

DTYPES = ("float32", "float16", "bfloat16", "float64")
_BITS = {"float32": "*i32", "float16": "*i16", "bfloat16": "*i16", "float64": "*i64"}
_VALUES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "float64": "*fp64"}

# Types of the arguments by name; `bits` stands for a pointer to the weights' bits, `keys` for one
# to scores, and in a sparse op `values` for one to numbers of their dtype, `sums` for one to sums
# of them.
_ARGUMENTS = {
    "rows": "*i64", "tiles": "*i32", "k": "*i64", "radix_state": "*i64", "flips": "*i64",
    "thresholds": "bits", "patterns": "*i64", "target_offset": "i64", "scores": "keys",
    "unit_masks": "*i32",
    "masks": "*i32", "scratch": "*i32", "found_inf": "*fp32", "counts": "*i64",
    "sums": "*fp64", "statistics": "*fp64", "state_table": "*i64", "arrivals": "*i32",
    "lr_tensor": "*fp32", "grad_scale": "*fp32", "table": "*i64",
    "addresses": ("i64",) * ADDRESSES,
}  # fmt: skip


def _variants(dtype: str) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Kernel, constants and options of what the ops launch for this dtype."""
    tiled = {"DTYPE": dtype, "TILE": TILE}
    multi_tile = tiled | {"NUM_TILES": 8}
    if dtype != "float64":
        yield count, multi_tile | {"AXIS": AXIS}, launch(dtype)
    yield apply, multi_tile | {"ALIGNED": True}, launch(dtype)
    yield radix_pass, multi_tile | {"ALIGNED": True}, launch(dtype)
    yield apply_masks, tiled | {"SETS": 3, "SIZES": 0b111}, launch(dtype)
    yield regularize, tiled, launch(dtype)
    yield zeros, tiled | {"ALIGNED": True}, launch(dtype)
    yield parts, tiled | {"ALIGNED": True}, launch(dtype)
    yield merge, {"TILE": TILE, "CHUNK": CHUNK}, MERGE_LAUNCH
    if dtype == "float32":
        # the rules with the most arithmetic; the others leave some of it out
        yield write_addresses, {}, {}
        update = {"FROZEN": False, "COUNT": True, "NUM_TILES": 8, "TILE": TILE, "AXIS": AXIS}
        update |= {"MAXIMIZE": False}
        yield adam, update | {"COUPLED": True, "DECOUPLED": False}, UPDATE_LAUNCH
        frozen = update | {"FROZEN": True, "COUNT": False, "TILE": TILE // 2}
        yield adam, frozen | {"COUPLED": False, "DECOUPLED": True}, UPDATE_LAUNCH
        yield sgd, update | {"DECAY": True, "MOMENTUM": True, "NESTEROV": True}, UPDATE_LAUNCH
    for positions in (4, 32, 128):
        shape = {"DTYPE": dtype, "POSITIONS": positions, "GROUPS": GROUP_TILE // positions}
        yield shrink_groups, shape | {"INDEX": tl.int32}, group_options(dtype)
    yield shrink_groups, shape | {"INDEX": tl.int64}, group_options(dtype, wide=True)
    for index in (tl.int32, tl.int64):
        for kernel in (score, shrink_selected):
            yield kernel, {"DTYPE": dtype, "UNITS": UNITS, "INDEX": index}, UNIT_LAUNCH


_SHOWN = ("PRECISION", "V", "ROWS", "PIXELS")  # constants of a sparse op

KERNELS = {"step": _variants, "sparse": sparse_variants}


def _source(kernel, constants: dict, dtype: str) -> ASTSource:
    sums = "*fp64" if dtype == "float64" else "*fp32"
    keys = "*i64" if dtype == "float64" else "*i32"
    pointers = {"bits": _BITS[dtype], "values": _VALUES[dtype], "sums": sums, "keys": keys}
    types = {}
    known = SPARSE_ARGUMENTS if kernel in SPARSE_KERNELS else _ARGUMENTS
    for name in kernel.arg_names:
        kind = "constexpr" if name in constants else known.get(name, "i32")
        types[name] = pointers.get(kind, kind) if isinstance(kind, str) else kind
    if "factors" in types:
        types["factors"] = "*fp64" if dtype == "float64" else "*fp32"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if str(types[name]).startswith("*")
    }
    return ASTSource(kernel, types, constexprs=constants, attrs=aligned)


def _resources(built) -> dict[str, int]:
    """Registers and local memory (stack and spills) per thread, and what the instructions are."""
    if "cubin" not in built.asm:
        about = r"(?m)^\s+\.(vgpr_count|private_segment_fixed_size):\s+(\d+)"
        usage = {name: int(value) for name, value in re.findall(about, built.asm["amdgcn"])}
        return {
            "registers": usage["vgpr_count"],
            "local_bytes": usage["private_segment_fixed_size"],
        }
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(built.asm["cubin"])
        listing, code = (
            subprocess.run(
                [tools / tool, option, file], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    ptx = built.asm["ptx"]
    return {
        "registers": usage["REG"],
        "local_bytes": usage["STACK"] + usage["LOCAL"],
        "matrix": len(re.findall(r"\b(?:H|D|HG|UTCH|UTCQ)MMA\b", code)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v(?:4\.b32|2\.b64)", ptx)),
        "ftz": ptx.count(".ftz"),
        "fma": len(re.findall(r"\bfma\.\S*f(?:32|64)", ptx)),
    }


def compile_all(
    targets: Sequence[int | str] = (80, 90, 100),
    dtypes: Sequence[str] = DTYPES,
    kernels: Sequence[str] = tuple(KERNELS),
) -> list:
    """Compiles every kernel for every target and dtype.

    Args:
        targets: compute capabilities, 90 for sm_90; AMD's architectures by name.
        dtypes: names of the weights' dtypes.
        kernels: which of `KERNELS`.

    Returns:
        One dictionary per compiled kernel: kernel, dtype, target, registers, local_bytes (0 when
        nothing spills), shared_bytes, and the constants of a sparse op. For NVIDIA also wide_loads
        (16-byte loads in the PTX), ftz and fma (float instructions that would break the step's
        bitwise equality; 0), matrix (tensor core instructions).

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so there is no compiler.
        ValueError: a target is of another vendor than this torch.
    """
    wrong = [x for x in targets if isinstance(x, int) != NVIDIA.value]
    if wrong:
        raise ValueError(f"torch {torch.__version__} runs nothing on {wrong[0]}")
    if not isinstance(count, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: compile in a process without it")
    rows = []
    for dtype in dtypes:
        variants = (variant for name in kernels for variant in KERNELS[name](dtype))
        for (kernel, constants, options), target in itertools.product(variants, targets):
            source = _source(kernel, constants, dtype)
            gpu = GPUTarget("cuda", target, 32)
            if isinstance(target, str):
                # Those of the data centre have 64 lanes, those of a desktop 32.
                gpu = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
            built = triton.compile(source, target=gpu, options=options)
            rows.append(
                {
                    "kernel": kernel.__name__,
                    "dtype": dtype,
                    "target": target,
                    **_resources(built),
                    "shared_bytes": built.metadata.shared,
                    **{name: constants[name] for name in _SHOWN if name in constants},
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every kernel without a GPU")
    parser.add_argument("--targets", nargs="+", default=["80", "90", "100"], metavar="GPU")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    arguments = parser.parse_args()
    targets = [int(x) if x.isdigit() else x for x in arguments.targets]
    for row in compile_all(targets, arguments.dtypes, arguments.kernels):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
