"""The back ends that can run on this machine, as the tests see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from issp import backends


@dataclass(frozen=True)
class BackEnd:
    """A table of ops and where its tensors live.

    Slow ones get the small cases only; interpreted ones, at 40 ms a step, fewer steps as well.
    """

    name: str
    device: str
    load: Callable[[], dict[str, Callable]]
    slow: bool = False
    interpreted: bool = False

    def __getitem__(self, op: str) -> Callable:
        return self.load()[op]

    def __str__(self) -> str:
        return self.name


def _cpp(capability: str) -> Callable[[], dict[str, Callable]]:
    def load():
        torch.ops.issp._cpu_capability(capability)
        return backends.implementations("cpp")

    return load


def _emulator() -> dict[str, Callable]:
    from tests.kernels import cuda_emulator

    cuda_emulator.seed(1)  # no test inherits another's schedule or planted fault
    return cuda_emulator.implementations()


def back_ends() -> list[BackEnd]:
    """Reference excluded: it is what the others are compared with."""
    runnable = []
    if backends.active("cpu") == "cpp":
        # avx512fp16 differs in float16 convolutions alone: tests/ops/sparse/test_half.py.
        best = torch.ops.issp._cpu_capability().removesuffix("fp16")
        known = ["scalar", "avx2", "avx512"]
        usable = known[: known.index(best) + 1]
        runnable += [BackEnd(f"cpp-{name}", "cpu", _cpp(name)) for name in usable]
    if torch.cuda.is_available():
        runnable.append(BackEnd("triton", "cuda", lambda: backends.implementations("triton")))
        if backends.active("cuda") == "cuda":
            runnable.append(BackEnd("cuda", "cuda", lambda: backends.implementations("cuda")))
        runnable.append(
            BackEnd("reference-on-cuda", "cuda", lambda: backends.implementations("reference"))
        )
    else:
        runnable.append(
            BackEnd(
                "triton-interpreted",
                "cpu",
                lambda: backends.implementations("triton"),
                slow=True,
                interpreted=True,
            )
        )
    runnable.append(BackEnd("cuda-emulated", "cpu", _emulator, slow=True))
    return runnable


BACK_ENDS = back_ends()
FAST = [b for b in BACK_ENDS if not b.slow]
