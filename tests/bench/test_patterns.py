"""`python -m bench step --pattern`: N:M groups in place of unstructured selection."""

import math

import pytest

import bench
from bench import baselines, step
from bench.harness import bandwidth, settings, timing
from bench.harness.errors import ParityError
from bench.harness.workload import Workload, divides
from issp import Keep, ops
from issp.sr import shapes

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = [(32, 16), (5, 2), (16, 16, 3, 3)]
FAST = {"rounds": 2, "seconds": 0.05, "settle": 2, "whole": False}
FAST |= {"flush_bytes": 1 << 16, "probe_bytes": 1 << 16}
PATTERNS = [Keep(2, of=4), Keep(1, of=8, v=4), Keep(3, of=16, v=2), Keep(1, of=48, layout="flat")]
each_pattern = pytest.mark.parametrize("keep", PATTERNS, ids=lambda keep: keep.name)


@pytest.fixture
def tiny_model(monkeypatch):
    """`swinir-light` becomes three small tensors."""
    monkeypatch.setattr(shapes, "prunable_shapes", lambda name, scale: MODEL)
    monkeypatch.setattr(settings, "CpuClock", lambda flush_bytes: timing.CpuClock(1 << 16))
    monkeypatch.setitem(bandwidth.DEFAULT_BYTES, "cpu", 1 << 16)


def command(*words: str) -> int:
    return bench.main(["step", "--model", "swinir-light", *words])


def rows(markdown: str) -> list[str]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [line.split("|")[1].strip() for line in lines[2:]]


@each_pattern
def test_the_workload_keeps_n_of_every_m(keep):
    divided = step.Settings(keep=keep).divided(MODEL)
    assert divided == [MODEL[0], MODEL[2]] if keep.layout == "channels" else [MODEL[2]]
    workload = Workload(divided, 0.1, keep=keep)
    workload.warm_up(3)
    assert workload.k == [math.prod(shape) * (keep.of - keep.n) // keep.of for shape in divided]
    for mask in workload.state.masks():
        if keep.layout == "flat":
            groups = mask.view(-1, keep.of)
        else:
            groups = mask.unflatten(1, (-1, keep.of)).movedim(2, -1)
        assert (groups.sum(-1) == keep.n).all()


@each_pattern
@pytest.mark.parametrize("whole", [True, False])
def test_the_step_passes_in_every_pattern(keep, whole):
    step.check_parity(MODEL, step.Settings(keep=keep, whole=whole))


@each_pattern
def test_what_is_compared_is_cut_to_whole_groups(keep):
    model = [(1024, 256, 3, 3), (256, 256, 3, 3), (720, 48)]
    divided = step.Settings(keep=keep).divided(model)
    cut = step.parity_shapes(divided, step.Settings(keep=keep, whole=False))
    assert all(divides(keep, shape) and math.prod(shape) <= step.PARITY_NUMEL for shape in cut)
    assert {shape[1:] for shape in cut} == {shape[1:] for shape in divided}
    assert max(divided, key=math.prod) in step.parity_shapes(divided, step.Settings(keep=keep))


def test_a_step_that_ignores_the_groups_is_refused(monkeypatch, tiny_model, capsys):
    right = ops.soft_shrink_

    def wrong(weights, state, shrink, bracket):
        state.patterns = []
        right(weights, state, shrink, bracket=bracket)

    monkeypatch.setattr(ops, "soft_shrink_", wrong)
    grouped = step.Settings(keep=Keep(2, of=4))
    with pytest.raises(ParityError, match="weight of 512 elements, step 0"):
        step.check_parity(MODEL, grouped)
    assert command("--quick", "--pattern", "2:4") == 1
    assert capsys.readouterr().out == ""


@pytest.mark.full
def test_the_table_names_the_pattern_and_what_is_left_out():
    grouped = step.Settings(keep=Keep(1, of=8, v=4), **FAST)
    text = step.measure("tiny", MODEL, grouped, baselines.OPERATIONS[:4]).markdown()
    assert "### tiny: 2 tensors, 2816 weights, float32, 1:8 v=4 (87.5 %), shrink 0.95" in text
    assert "The step prunes 1:8 v=4 groups" in text and "The bracket around" not in text
    assert "1 of 3 tensors, which the pattern does not divide, are left out" in text
    plain = step.measure("tiny", MODEL, step.Settings(**FAST), baselines.OPERATIONS[:4]).markdown()
    assert "groups" not in plain and "The bracket around" in plain


@pytest.mark.full
def test_command_times_the_pattern(tiny_model, capsys):
    assert command("--quick", "--pattern", "2:4", "--seconds", "0.01", "--settle", "1") == 0
    text = capsys.readouterr().out
    assert "2 tensors, 2816 weights, float32, 2:4 v=1 (50 %)" in text
    assert rows(text) == [row.name for row in baselines.OPERATIONS if row.name != baselines.COLD]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--pattern", "2:4", "--sparsity", "0.5"), "leave --sparsity out"),
        (("--pattern", "2:4", "--scaling"), "leave --pattern out"),
        (("--pattern", "1:7"), "the pattern 1:7 v=1 divides no layer"),
        (("--pattern", "two of four"), 'pattern "two of four": write n:of'),
        (("--pattern", "5:4"), "n must lie in 1..of"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(words, sentence, tiny_model, capsys):
    assert command("--quick", *words) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err and shown.err.count("\n") == 1 and shown.out == ""
