"""Random argument lists of the raw ops: no crash, no endless loop, no half-written tensor.

A find names its call: `call_of(seed, number, ops)` of child.py makes its arguments again.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from issp import backends
from issp.ops import validation
from tests.backends import BACK_ENDS
from tests.ops.fuzz import calls, child
from tests.ops.fuzz.harness import fuzz
from tests.tiers import quick_or_full

CHECKS = validation.PRUNING_OPS | validation.SPARSE_OPS
NATIVE = backends.active("cpu") == "cpp"
SETS = [b.name for b in BACK_ENDS if b.name.startswith("cpp-")]
needs_native = pytest.mark.skipif(not NATIVE, reason="the C++ back end is not built")


def assert_nothing_found(findings, count):
    told = "\n\n".join(findings.problems[:5])
    assert not findings.problems, f"{len(findings.problems)} of {count} calls:\n{told}"
    assert sum(findings.outcomes.values()) == count
    for refused in (True, False):
        reached = {op for (op, outcome) in findings.outcomes if outcome == refused}
        assert len(reached) > 5, f"refused = {refused} for {reached} only: nothing is tested"


@needs_native
def test_registered_ops():
    """As a script calls them: `torch.ops.issp`."""
    count = quick_or_full(200, 8000)
    assert_nothing_found(fuzz("raw", 1, count), count)


@pytest.mark.full
@needs_native
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set(name):
    assert_nothing_found(fuzz(name, 2, 1500), 1500)


@pytest.mark.full
@pytest.mark.parametrize(("name", "count"), [("reference", 1500), ("triton", 300)])
def test_back_ends_that_check_in_python(name, count):
    """Called past the dispatcher, as `issp.backends.implementations` gives them."""
    ops = () if name == "reference" else tuple(validation.PRUNING_OPS)
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here, and the calls are on the CPU")
    assert_nothing_found(fuzz(name, 3, count, *ops), count)


@pytest.mark.full
def test_emulated_cuda_kernels():
    ops = tuple(validation.PRUNING_OPS)
    findings = fuzz("emulator", 4, 200, *ops, environment={"ISSP_FUZZ_UNLIMITED": "1"})
    assert_nothing_found(findings, 200)


SEARCH = settings(
    max_examples=quick_or_full(15, 150),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("op", CHECKS)
@SEARCH
@given(st.randoms(use_true_random=False))
def test_arguments_are_checked_before_anything_is_written(op, source):
    """The check that users meet: a sentence of one line, or the reference computes to the end."""
    state = random.Random(source.getrandbits(32)).getstate()
    arguments, before = [], []
    for made in (arguments, before):
        again = random.Random()
        again.setstate(state)
        made += calls.draw(op, again)[0]
    try:
        CHECKS[op](*arguments)
    except (TypeError, ValueError) as error:
        assert str(error) and "\n" not in str(error)
        assert not child.changed(arguments, before)
        return
    except RuntimeError as error:  # torch's own: a tensor without data, or of another layout
        assert any(word in str(error) for word in ("meta", "Meta", "sparse", "Sparse")), error
        return
    outcome = child.run(op, arguments, backends.implementations("reference"))
    assert not outcome.get("problem"), outcome


@needs_native
@pytest.mark.parametrize("op", calls.OPS)
def test_a_seed_names_a_call(op):
    """Equal arguments, overlaps included: else "nothing modified" could not be seen."""
    for number in range(20):
        first, second = (child.call_of(5, number, (op,))[1] for _ in range(2))
        for x, y in zip(*map(calls.tensors_of, (first, second)), strict=True):
            assert child.same_memory(x, y)
            assert (x.dtype, x.shape, x.device, x.layout) == (y.dtype, y.shape, y.device, y.layout)
            if calls.memory_of(x) is not None and x.numel():
                assert x.data_ptr() != y.data_ptr()


@pytest.mark.full
def test_the_harness_survives_and_reports(tmp_path, monkeypatch):
    """A call that ends its process, one that stops, one that writes and raises, one that fails."""
    faults = tmp_path / "faults.py"
    faults.write_text(FAULTS, encoding="utf-8")
    monkeypatch.setattr("tests.ops.fuzz.harness.PATIENCE", 20)
    monkeypatch.setattr("tests.ops.fuzz.harness.CHILD", str(faults))
    findings = fuzz("raw", 0, 8, "count_zeros")
    assert sum(findings.outcomes.values()) == 6
    ended, hung, wrote, failed = findings.problems
    assert "ended with status -8" in ended and "call 1 of seed 0: count_zeros(" in ended
    assert "hung for 20 s" in hung and "call 3 of seed 0" in hung
    assert "modified tensors [0] and raised" in wrote and "call 5 of seed 0" in wrote
    assert "no refusal KeyError" in failed and "call 6 of seed 0" in failed


# Another table for child.py: what its calls 1, 3, 5 and 6 do.
FAULTS = """
import os, signal, sys, time
import issp
from tests.ops.fuzz import child

def count_zeros(tensors, number=iter(range(8))):
    now = FIRST + next(number)
    if now == 1:
        os.kill(os.getpid(), signal.SIGFPE)
    if now == 3:
        time.sleep(1000)
    if now == 5:
        child.calls.memory_of(tensors[0]).add_(1)
        raise ValueError("too late")
    if now == 6:
        raise KeyError("x")
    return 0

FIRST = int(sys.argv[3])
child.calls.draw = lambda op, source: ([[child.torch.ones(3)]], 1)
child.table_of = lambda name: {"count_zeros": count_zeros}
child.main(sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:])
"""
