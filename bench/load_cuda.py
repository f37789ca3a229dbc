"""Loads issp/_CUDA into a CUDA build of torch, lists its registrations, runs every fake: no GPU.

    PYTHON_WITH_A_CUDA_TORCH -m bench.load_cuda [issp/_CUDA.abi3.so]

What only a GPU would show, that kernels compute the right thing, is for bench/on_gpu.sh.
"""

import argparse
import re
import sys
import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

warnings.simplefilter("ignore")  # the slow reference will do where issp/_C was not built

from bench.sanitize import CASES  # noqa: E402  (after the filter of warnings)
from issp import ops  # noqa: E402
from issp.ops import validation  # noqa: E402


class Recorder(TorchDispatchMode):
    """Remembers calls of issp's ops: the overload, its arguments, its keyword arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "issp":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def recorded() -> list:
    """Calls of every op: the sanitizer's small cases, on the CPU."""
    with Recorder() as recorder:
        for cases in CASES:
            for _ in cases("cpu", torch.float32):
                pass
        ops.magnitude_statistics([torch.randn(40), torch.randn(3, 3)])
    return recorder.calls


def runs_fake(func, args, kwargs) -> bool:
    """One call with tensors of a GPU that hold nothing; what it returns must be there, too."""
    with FakeTensorMode():

        def like(x):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

        args, kwargs = tree_map_only(torch.Tensor, like, (args, kwargs))
        results = tree_leaves(func(*args, **kwargs))
        return all(x.device.type == "cuda" for x in results if isinstance(x, torch.Tensor))


def registration(op: str) -> str | None:
    """The dispatcher's line about an op's kernel for CUDA."""
    match = re.search(r"(?m)^CUDA: .*$", torch._C._dispatch_dump(f"issp::{op}"))
    return match[0] if match else None


def main() -> int:
    """Exit status 1 when an op has no kernel or a fake fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", nargs="?", default="issp/_CUDA.abi3.so")
    library = parser.parse_args().library
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {library}")
    names = [*validation.PRUNING_OPS, *validation.SPARSE_OPS]
    before = [op for op in names if registration(op)]
    torch.ops.load_library(library)
    lines = {op: registration(op) for op in names if op not in before}
    for op, line in lines.items():
        print(f"{op:28s} {line}")
    calls = recorded()
    ran = {func._schema.name.removeprefix("issp::") for func, *_ in calls}
    failed = {
        func._schema.name.removeprefix("issp::")
        for func, *arguments in calls
        if not runs_fake(func, *arguments)
    }
    registered, right = sum(map(bool, lines.values())), len((ran - failed) & set(names))
    print(
        f"{registered} of {len(names)} ops registered for CUDA, {right} of {len(names)} fakes ran "
        f"({len(calls)} calls)"
    )
    return 0 if registered == right == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
