"""N:M tensors in the fused step, as the CUDA kernels see them: boxes, shared words, schedules.

What every back end must do stands in tests/ops/test_nm_step.py; here are the cases that know how
csrc/cuda/nm_shrink.cuh is built.
"""

from __future__ import annotations

import pytest
import torch

import issp
from issp.ops import reference
from tests.asserts import assert_bitwise_equal
from tests.cases import DTYPES, Case, tensors_like
from tests.kernels import cuda_emulator
from tests.kernels.cuda_emulator.model import NAN, Model, normal
from tests.ops.test_update_parity import Training, assert_same

pytestmark = [cuda_emulator.needs_compiler, pytest.mark.sampled(most=4)]
REFERENCE = issp.backends.implementations("reference")

# shape, (n, m, v, c); v == 0: flat. In small shapes a tile has 512 elements, a box at most 1024
# columns (512 in float64), 8 is the largest group whose elements compare themselves.
SHAPES = {
    "whole words, compared": ((8, 40, 3, 3), (2, 4, 1, 1)),
    "shared words, compared": ((12, 10, 3, 3), (1, 5, 1, 1)),
    "shared words, by warps": ((11, 90), (1, 90, 1, 1)),
    "bands in pieces": ((8, 40, 3, 3), (1, 10, 4, 1)),
    "pieces in shared words": ((6, 35, 3, 3), (2, 7, 3, 1)),
    "whole bands": ((32, 20), (2, 10, 4, 1)),
    "whole bands, the last short": ((33, 20), (7, 10, 3, 1)),
    "a band of many rows": ((64, 60), (1, 10, 32, 1)),
    "a box above a tile": ((4, 40, 5, 5), (7, 40, 4, 1)),
    "a group of 1024": ((2, 1024), (5, 1024, 1, 1)),
    "a warp for a group": ((3, 1024, 2), (1, 1024, 1, 1)),
    "a warp for a group, several rows": ((6, 1025, 2), (1000, 1025, 3, 1)),
    "flat": ((30, 33), (2, 33, 0, 1)),
    "flat, all": ((49, 51), (3, 49 * 51, 0, 1)),
    "all kept": ((6, 10), (5, 5, 2, 1)),
    "pairs in whole words": ((8, 40, 3, 3), (4, 8, 1, 2)),
    "pairs in pieces": ((8, 40, 3, 3), (2, 10, 4, 2)),
    "fives in shared words": ((6, 35, 3, 3), (5, 35, 3, 5)),
    "pairs in whole bands": ((33, 20), (6, 10, 3, 2)),
    "pairs by warps": ((12, 60), (2, 60, 1, 2)),
    "a warp for a group of pairs": ((6, 2050, 2), (1000, 2050, 3, 2)),
}


def pruned_by(shape, pattern) -> int:
    n, m, *_ = pattern
    return torch.Size(shape).numel() // m * (m - n)


def model_of(*names: str, dtype=torch.float32, seed: int = 0, unstructured: tuple[int, ...] = ()):
    """A model of these N:M tensors between unstructured ones."""
    source = torch.Generator().manual_seed(seed)
    weights, k, patterns = [], [], []
    for name in names:
        shape, pattern = SHAPES[name]
        weights.append(torch.randn(shape, generator=source).to(dtype))
        k.append(pruned_by(shape, pattern))
        patterns += pattern
    for numel in unstructured:
        weights.append(torch.randn(numel, generator=source).to(dtype))
        k.append(numel // 2)
        patterns += (0, 0, 0, 0)
    order = torch.randperm(len(weights), generator=source).tolist()
    return Model(
        [weights[i] for i in order],
        [k[i] for i in order],
        patterns=[x for i in order for x in patterns[4 * i : 4 * i + 4]],
    )


@pytest.fixture(autouse=True)
def _machine():
    yield
    cuda_emulator.machine()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_of_a_box(name, dtype):
    for seed in range(5):
        cuda_emulator.seed(seed, small=True)
        model = model_of(name, dtype=dtype, seed=seed)
        for step in range(2):
            model.step(bracket=step == 0)
            model.perturb(0.1, step)


def test_the_shapes_are_what_they_are_called():
    """(boxes, columns of a box): no columns where a warp takes a group."""
    cuda_emulator.seed(0, small=True)
    boxes = {name: cuda_emulator.nm_tiles(torch.empty(s), *p) for name, (s, p) in SHAPES.items()}
    assert boxes["whole words, compared"] == (10, 288)
    assert boxes["shared words, compared"] == (3, 495)
    assert boxes["shared words, by warps"] == (3, 450)
    assert boxes["bands in pieces"] == (8, 90) and boxes["pieces in shared words"] == (6, 126)
    assert boxes["whole bands"] == (2, 6 * 20)
    assert boxes["whole bands, the last short"] == (2, 8 * 20)
    assert boxes["a box above a tile"] == (1, 1000) and boxes["a group of 1024"] == (2, 1024)
    by_warps = {name for name, (_, columns) in boxes.items() if columns == 0}
    assert by_warps == {
        *("a warp for a group", "a warp for a group, several rows", "flat, all"),
        "a warp for a group of pairs",
    }
    assert boxes["pairs in whole words"] == (10, 144) and boxes["pairs in pieces"] == (8, 45)
    assert boxes["fives in shared words"] == (2, 63) and boxes["pairs in whole bands"] == (2, 80)
    cuda_emulator.seed(0)
    for pattern, expected in (
        *(((2, 32, 1), 8064), ((2, 32, 4), 2016), ((2, 32, 32), 288)),
        *(((2, 32, 16, 2), 144), ((2, 64, 16, 2), 288)),
    ):
        assert cuda_emulator.nm_tiles(torch.empty(256, 256, 3, 3), *pattern)[1] == expected
    assert cuda_emulator.nm_tiles(torch.empty(1, 1024, 3, 3), 1, 1024, 1) == (1, 9216)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["whole words, compared", "whole bands", "a group of 1024"])
def test_real_shapes(name, dtype):
    cuda_emulator.seed(3)
    model = model_of(name, dtype=dtype, unstructured=(700,))
    model.step()
    model.perturb(0.1, 1)
    model.step()


@pytest.mark.parametrize("m", [4, 7, 16, 20, 32, 40, 44])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_n_with_ties(m, dtype):
    """The best or the worst in registers, or a warp's cut: of equal scores the first are pruned."""
    source = torch.Generator().manual_seed(m)
    for n in range(1, m + 1):
        cuda_emulator.seed(n, small=True)
        for v, shape in ((1, (3, m, 3)), (2, (4, m))):
            weight = (torch.randn(shape, generator=source) * 4).round().to(dtype) / 4
            actual = cuda_emulator.nm_prune(weight, n, m, v, "channels", 0.5)
            expected = reference.nm_prune(weight, n, m, v, "channels", 0.5)
            for name, a, e in zip(("weights", "mask"), actual, expected, strict=True):
                assert_bitwise_equal(a, e, f"{name}, {n} of {m}, v={v}")


MIXES = (
    ("whole words, compared", "shared words, by warps", "pieces in shared words"),
    ("whole bands, the last short", "a warp for a group", "flat"),
    ("bands in pieces", "shared words, compared", "a band of many rows"),
    ("pairs in whole words", "fives in shared words", "pairs in whole bands"),
)


@pytest.mark.parametrize("mix", range(len(MIXES)))
def test_a_hundred_schedules(mix):
    """N:M tensors and unstructured ones."""
    for seed in cuda_emulator.schedules():
        cuda_emulator.machine(processors=1 + seed % 4)
        cuda_emulator.seed(seed, resident=(0, 1, 2, 7)[seed % 4], small=True)
        model = model_of(*MIXES[mix], dtype=DTYPES[seed % 4], seed=seed, unstructured=(600, 40))
        model.step()
        model.perturb(0.1, seed)
        model.step()


def test_ties_and_special_values():
    tiny = torch.finfo(torch.float32).tiny
    kinds = torch.tensor([0.0, -0.0, tiny, -tiny / 4, 1.0, -1.0, 2.0, torch.inf, -torch.inf, NAN])
    kinds = torch.cat([kinds, torch.tensor([0x7FC00005, -0x400001]).int().view(torch.float32)])
    for seed in cuda_emulator.schedules(30):
        cuda_emulator.seed(seed, small=True)
        model = model_of(*MIXES[seed % 3], seed=seed, unstructured=(300,))
        source = torch.Generator().manual_seed(seed)
        drawn = [
            kinds[torch.randint(len(kinds) if seed % 2 else 7, w.shape, generator=source)]
            for w in model.weights
        ]
        model = Model(drawn, model.k, shrink=(0.95, 0.0)[seed % 2], patterns=model.patterns)
        model.step()
        model.step()


@pytest.mark.parametrize("name", ["whole words, compared", "a warp for a group", "whole bands"])
def test_counts_that_select_nothing_or_are_out_of_range(name):
    """k is read on the device: 0 keeps everything, any other than the pattern's changes nothing."""
    for seed, k in enumerate((0, -1, 1, 2**40)):
        cuda_emulator.seed(seed, small=True)
        model = model_of(name, unstructured=(700,), seed=seed)
        model.step()
        which = model.k.index(pruned_by(*SHAPES[name]))
        flips = model.sides[1]["flips"].clone()
        for side in model.sides:
            side["k"][which] = k
        model.perturb(0.1, seed)
        model.step()
        if k:
            assert model.sides[1]["flips"][which] == flips[which]
        else:
            assert model.sides[1]["thresholds"][which] == 0
            assert model.sides[1]["flips"][which] == pruned_by(*SHAPES[name])


@pytest.mark.parametrize("found_inf", [1.0, float("inf"), NAN])
def test_found_inf_stops_everything(found_inf):
    cuda_emulator.seed(1, small=True)
    model = model_of(*MIXES[1], unstructured=(700,))
    model.step(found_inf)
    assert (model.sides[1]["flips"] == -7).all()
    model.step(0.0)
    model.step(found_inf)
    assert not (model.sides[1]["flips"] == -7).any()


def test_patterns_change_between_calls():
    """The scratch that an unstructured step leaves behind serves an N:M step, and back."""
    cuda_emulator.seed(2, small=True)
    model = model_of("whole words, compared", "flat", unstructured=(2000,))
    plain, k = model.patterns, model.k
    for patterns in ([], plain, [], plain):
        model.patterns = patterns
        for side in model.sides:
            side["k"].copy_(torch.tensor(k))
        model.step()
        model.perturb(0.1, 1)
        model.step()


def test_weights_need_no_alignment():
    base = normal(3001)[0].half()
    for offset in (1, 3):
        cuda_emulator.seed(offset, small=True)
        results = []
        for op in (reference.soft_shrink_, cuda_emulator.soft_shrink_):
            whole = base.clone()
            state = issp.ops.ShrinkState([whole[:2900]], [0])
            arguments = (state.thresholds, state.packed, state.flips, state.scratch)
            view = whole[offset : offset + 2900].view(10, 290)
            op([view], torch.tensor([1450]), 0.95, *arguments, None, True, (5, 10, 2, 1))
            results.append(whole)
        assert_bitwise_equal(results[1], results[0], f"weights at offset {offset}")


def launches_of(call) -> int:
    before = cuda_emulator.launches()
    call()
    return cuda_emulator.launches() - before


def test_one_more_launch_for_single_weights_and_one_for_units():
    cuda_emulator.seed(0, small=True)
    weights, units = ("flat", "a group of 1024"), ("whole bands", "pairs in pieces")
    for names in (weights, units):
        assert launches_of(model_of(*names).step) == 1
        assert launches_of(model_of(*names, unstructured=(40, 700)).step) == 3
    assert launches_of(model_of(*weights, *units).step) == 2
    table = cuda_emulator.shapes(small=True)[2]
    many = ["whole bands"] * (table + 1)
    assert launches_of(model_of(*many).step) == 2


# For the optimizers: pruned tensors, of which all but the second have a pattern.
GROUP = ("whole words, compared", None, "bands in pieces", "a warp for a group", "whole bands")
GROUP += ("pairs in pieces", "a warp for a group of pairs")


def group() -> tuple[Case, list[int]]:
    shapes, k, patterns = [], [], []
    for name in GROUP:
        shape, pattern = SHAPES[name] if name else ((700,), (0, 0, 0, 0))
        shapes.append(shape)
        k.append(pruned_by(shape, pattern) if name else 500)
        patterns += pattern
    return Case("patterns among others", tuple(shapes), tuple(k)), patterns


def by_patterns(table: dict, patterns: list[int]) -> dict:
    """The ops with `patterns`, their last argument."""
    return {name: lambda *args, op=op: op(*args[:-1], patterns) for name, op in table.items()}


def update_many(kind: str, rule: str, seeds, steps: int = 2, removed: int = -1) -> None:
    """The reference and the kernels take the same steps; the third one is frozen."""
    case, patterns = group()
    for seed in seeds:
        cuda_emulator.machine(processors=1 + seed % 3)
        cuda_emulator.seed(seed, removed=removed, small=True)
        expected = Training(kind, rule, case, rest=((7,), (600,)))
        actual = Training(kind, rule, case, rest=((7,), (600,)))
        tables = (REFERENCE, cuda_emulator.implementations())
        for number in range(steps):
            grads = tensors_like(expected.weights, case.fill, seed + number)
            grads = [g.bfloat16() if i % 2 == number % 2 else g for i, g in enumerate(grads)]
            for side, table in zip((expected, actual), tables, strict=True):
                side.step(by_patterns(table, patterns), grads, frozen=number == 2)
            assert_same("cuda-emulated", actual, expected, f"after step {number}, seed {seed}")
        assert not actual.state.scratch[1:64].any()


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_updates_under_many_schedules(kind):
    update_many(kind, "plain", cuda_emulator.schedules(25))


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("adam", "decoupled decay"), ("adam", "odd scale, decay"), ("sgd", "nesterov")],
)
def test_rules_and_then_frozen(kind, rule):
    update_many(kind, rule, range(5), steps=4)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_bad_k_updates_its_tensor_only(kind):
    case, patterns = group()
    for seed, bad in enumerate((-1, 3, 10**6)):
        cuda_emulator.seed(seed, small=True)
        sides = [Training(kind, "plain", case, rest=()) for _ in range(2)]
        grads = tensors_like(sides[0].weights, "normal", seed)
        for t in (0, 2, 3):
            sides[1].state.k[t] = bad
            sides[0].state.k[t] = 0
        before = {name: x.clone() for name, x in sides[1].tensors().items()}
        with cuda_emulator.unchecked():
            sides[1].step(by_patterns(cuda_emulator.implementations(), patterns), grads)
        sides[0].step(by_patterns(REFERENCE, patterns), grads)
        expected, actual = (side.tensors() for side in sides)
        for name in ("thresholds", "flips"):
            for t in (0, 2, 3):
                assert_bitwise_equal(actual[name][t], before[name][t], f"{name}[{t}]")
                expected[name][t] = before[name][t]
        del expected["masks"]
        for name, x in expected.items():
            assert_bitwise_equal(actual[name], x, f"{name}, k {bad}")


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_two_more_launches_behind_an_update(kind):
    case, patterns = group()
    cuda_emulator.seed(0, small=True)
    training = Training(kind, "plain", case, rest=((7,), (600,)))
    grads = tensors_like(training.weights, "normal", 1)
    table = by_patterns(cuda_emulator.implementations(), patterns)
    assert launches_of(lambda: training.step(table, grads)) == 4
