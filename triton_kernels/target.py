"""What depends on who runs the kernels: the only place with options or instructions of one vendor.

Everything else in this folder is plain Triton, which compiles for AMD's GPUs as well.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

NVIDIA: tl.constexpr = tl.constexpr(torch.version.hip is None)
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def registers(most: int | None) -> dict[str, int]:
    """The launch option that bounds the registers of a thread, where the compiler has it.

    Without it NVIDIA's compiler spills to fit more programs on an SM; AMD's has no such option.
    """
    return {"maxnreg": most} if NVIDIA.value and most else {}


@triton.jit
def rounded_to_tf32(value):
    """To nearest, ties away from zero: the tensor cores themselves would cut the bits off."""
    if INTERPRETED or not NVIDIA:
        bits = value.to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)
    else:
        # Two instructions where cvt.rna makes four: the bits that it would clear are not read.
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.num.f32 p, $1, $1; mov.b32 $0, $1; @p add.s32 $0, $0, 0x1000; }",
            "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
