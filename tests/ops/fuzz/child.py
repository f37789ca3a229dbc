"""The process in which random raw calls run, since a call may end it: lines of JSON say how far.

    python tests/ops/fuzz/child.py BACK_END SEED FIRST COUNT [OP ...]

Call i of seed s has the source `Random(f"{s}/{i}")`, whichever calls ran before.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.ops.fuzz import calls

ROOT = Path(__file__).absolute().parents[3]  # the folder of a link to tests, not its target
MEMORY = 24 << 30  # of address space: more than any call needs, and a wrong size asks for more
# A refusal is one of these and comes from a check; anything else is an error of ours.
REFUSALS = (RuntimeError, TypeError, ValueError)
# What may stop a computation that passed the checks: memory, and tensors without data that were
# given to a back end past the dispatcher.
NO_FAULT = ("alloc", "too big", "out of memory", "overflowed", "meta tensor")
GPU = ("triton", "emulator")  # their kernels may rely on zeros in the scratch memory


def call_of(seed: int, number: int, ops: tuple[str, ...]) -> tuple[str, list[Any], int]:
    """Op, arguments and number of faults of a call."""
    op = ops[number % len(ops)]
    return op, *calls.draw(op, random.Random(f"{seed}/{number}"))


def table_of(back_end: str) -> dict[str, Any]:
    """The ops of a back end: "raw" is `torch.ops.issp`, "cpp-avx2" one instruction set of it."""
    from issp import backends

    raw = {op: getattr(torch.ops.issp, op) for op in calls.OPS}
    if back_end == "emulator":
        from tests.kernels import cuda_emulator

        cuda_emulator.seed(1)
        return raw | {op: checked(op, f) for op, f in cuda_emulator.implementations().items()}
    if back_end.startswith("cpp-"):
        torch.ops.issp._cpu_capability(back_end.removeprefix("cpp-"))
    elif back_end != "raw":
        return raw | backends.implementations(back_end)
    return raw


def checked(op: str, call: Any) -> Any:
    """A call after its check: the emulator runs device code, without the checks of its host."""
    from issp.ops import validation

    check = (validation.PRUNING_OPS | validation.SPARSE_OPS)[op]

    def checked_call(*args: Any) -> Any:
        lists = (x if isinstance(x, list) else [x] for x in args)
        if any(isinstance(x, Tensor) and x.device.type != "cpu" for xs in lists for x in xs):
            raise ValueError(
                "the emulator computes on the CPU: the dispatcher sends it nothing else"
            )
        check(*args)
        return call(*args)

    return checked_call


def run(op: str, arguments: list[Any], table: dict[str, Any]) -> dict[str, Any]:
    """Calls an op: its result, or how it refused and what is wrong with that."""
    try:
        return {"result": table[op](*arguments)}
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        return {"refused": f"{type(error).__name__}: {text}"[:300], "problem": _problem_of(error)}


def _problem_of(error: Exception) -> str:
    text = str(error).strip()
    if not isinstance(error, REFUSALS):
        return "no refusal"
    if not text or "INTERNAL ASSERT" in text:
        return "no sentence"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
    place = Path(frames[-1].filename).relative_to(ROOT).as_posix()
    computing = place.startswith(("issp/ops/reference/", "triton_kernels/"))
    if computing and not any(word in text for word in NO_FAULT):
        return f"passed the checks and failed in {place}:{frames[-1].lineno}"
    return ""


def changed(arguments: list[Any], before: list[Any]) -> str:
    """Which tensors differ in memory from those of an equal argument list, "" if none does."""
    pairs = zip(calls.tensors_of(arguments), calls.tensors_of(before), strict=True)
    differ = [i for i, (x, y) in enumerate(pairs) if not same_memory(x, y)]
    return f"modified tensors {differ} and raised" if differ else ""


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have the same bytes in memory; those without memory have."""
    ours, theirs = calls.memory_of(x), calls.memory_of(y)
    return ours is None or theirs is None or torch.equal(ours, theirs)


def difference(op: str, arguments: list[Any], result: Any, again: list[Any]) -> str:
    """How a call without faults differs from the reference with equal arguments, "" if it does not.

    The bits of NaNs that an optimizer's arithmetic makes are free, as is the rounding of products.
    """
    from issp import backends

    if op not in backends.implementations("reference"):
        return ""
    expected = run(op, again, backends.implementations("reference"))
    if "refused" in expected:
        return f"the reference refuses: {expected['refused']}"
    if op.startswith(("sparse", "adam", "sgd")):
        return ""
    if op == "magnitude_statistics":
        close = torch.allclose(result, expected["result"], rtol=1e-12, atol=5e-324, equal_nan=True)
        return "" if close else f"{result.tolist()}, not {expected['result'].tolist()}"
    scratch = arguments[6] if op == "soft_shrink_" else None
    ours, theirs = (
        calls.tensors_of([*x, r]) for x, r in ((arguments, result), (again, expected["result"]))
    )
    for x, y in zip(ours, theirs, strict=True):
        if x is not scratch and not same_memory(x, y):
            return f"a tensor is {calls.describe(x)}, not {calls.describe(y)}"
    return ""


def main(back_end: str, seed: int, first: int, count: int, *ops: str) -> None:
    """Runs the calls first .. first + count - 1."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not os.environ.get("ISSP_FUZZ_UNLIMITED"):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(2 if seed % 2 else 1)
    warnings.simplefilter("ignore")
    table = table_of(back_end)
    for number in range(first, first + count):
        print(json.dumps({"begin": number}), flush=True)
        op, arguments, faults = call_of(seed, number, ops or calls.OPS)
        _, before, _ = call_of(seed, number, ops or calls.OPS)
        if back_end in GPU:
            calls.clear_scratch(op, arguments), calls.clear_scratch(op, before)
        outcome = run(op, arguments, table)
        problems = [outcome.get("problem", "")]
        if "refused" in outcome:
            problems.append(changed(arguments, before))
        elif not faults:
            problems.append(difference(op, arguments, outcome["result"], before))
        report = {
            "refused": outcome.get("refused", ""),
            "problem": " ".join(filter(None, problems)),
        }
        print(json.dumps({"end": number, "op": op, "faults": faults, **report}), flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import issp  # noqa: F401 (registers the ops)

    which, *numbers = sys.argv[1:5]
    main(which, *map(int, numbers), *sys.argv[5:])
