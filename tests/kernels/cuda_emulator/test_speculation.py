"""Speculate and settle: forecasts that hold and that fail, undone passes, many schedules.

In small shapes a chunk has 1024 weights and a strip 2048: all blocks search a larger tensor.
"""

from __future__ import annotations

import pytest
import torch

import issp
from tests.asserts import assert_bitwise_equal
from tests.cases import DTYPES, Case, tensors_like
from tests.kernels import cuda_emulator
from tests.kernels.cuda_emulator.model import NAN, Model, capacity, normal, share, with_candidates
from tests.ops.test_update_parity import Training, assert_same

pytestmark = [cuda_emulator.needs_compiler, pytest.mark.sampled(most=4)]
REFERENCE = issp.backends.implementations("reference")
# 5000 weights are 3 strips.
SIZES = (40, 512, 700, 1030, 2600, 5000)


def scale(model: Model, factor: float) -> None:
    for side in model.sides:
        for w in side["weights"]:
            w.mul_(factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_schedules(dtype):
    """A cold start, a first guess, forecasts that hold, thresholds that jump."""
    for seed in cuda_emulator.schedules():
        cuda_emulator.seed(seed, resident=(0, 1, 3)[seed % 3], small=True)
        weights = normal(*SIZES, dtype=dtype, seed=seed)
        model = Model(weights, share(weights, (0.9, 0.5, 0.97)[seed % 3]))
        factors = (1.0, 1e6, 1e-6) if dtype is not torch.float16 else (1.0, 1e3, 1e-3)
        for factor in factors if seed % 2 else (1.0, 1.0, 1.0):
            scale(model, factor)
            model.step()
            model.perturb(1e-4, seed)
        model.step()


@pytest.mark.parametrize("shrink", [0.0, 0.6, 0.6001, 0.8, 0.999, 1.0])
def test_every_miss_is_undone(shrink):
    """A forecast far above the threshold: nearly all weights are shrunk, then none is."""
    for seed in cuda_emulator.schedules(20):
        for dtype in DTYPES:
            cuda_emulator.seed(seed, small=True)
            weights = normal(700, 5000, dtype=dtype, seed=seed)
            model = Model(weights, share(weights, 0.3), previous=2.5, shrink=shrink)
            model.step()
            assert model.misses == 2


def test_the_undone_pass_finds_every_weight():
    """Neighbours that have the same product, over the whole range of exponents."""
    for seed, dtype in enumerate(DTYPES[:3]):
        integer = torch.int32 if dtype is torch.float32 else torch.int16
        first = torch.tensor([1.0, 1e-3, 1e-30, 3.0], dtype=torch.float32).to(dtype).view(integer)
        weights = (first[:, None] + torch.arange(1250, dtype=integer)).view(dtype).flatten()
        for shrink in (0.6001, 0.75, 0.95, 0.9999):
            cuda_emulator.seed(seed, small=True)
            order = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))
            model = Model([weights[order]], [1], previous=float(weights.float().max()) * 2)
            model.shrink = shrink
            model.step()
            assert model.misses == 1


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_ties_under_many_schedules(ratio):
    """Equal magnitudes in every chunk, more than are selected, among candidates and searched."""
    for seed in cuda_emulator.schedules():
        cuda_emulator.seed(seed, small=True)
        weights = [(w * 4).round() / 8 for w in normal(5000, 1700, 900, seed=seed)]
        for w in weights:
            w[w.abs() == 0.25] += 2.0
            w[:: w.numel() // 20] = 0.25  # few enough to be candidates
        k = [int((w.abs() < 0.25).sum() + 10 * (1 + seed % 2)) for w in weights]
        k = share(weights, ratio) if seed % 2 else k
        model = Model(weights, k, previous=NAN if seed % 2 else 0.25)
        model.step()
        model.step()


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_candidates_at_capacity_under_many_schedules(beyond):
    numel = 5000
    room = capacity(numel, cuda_emulator.shapes(small=True)[1])
    for seed in cuda_emulator.schedules():
        cuda_emulator.seed(seed, small=True)
        weights, k = with_candidates(numel, room + beyond)
        model = Model([*weights, *normal(1200, seed=seed)], [k, 1000], previous=1.0)
        model.step()
        assert model.misses - (beyond > 0) in (0, 1)  # of the other tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_that_are_flushed_postpone_their_rows(dtype):
    """Weights that are denormal or become so, in some rows: shrunk by the second launch."""
    tiny = torch.finfo(dtype).tiny
    for seed in cuda_emulator.schedules():
        for missed in (False, True):
            cuda_emulator.seed(seed, small=True)
            weights = normal(5000, 1030, seed=seed)
            for w in weights:
                w[600:700] = torch.linspace(-3 * tiny, 3 * tiny, 100)
                w[950] = 1.01 * tiny
                w[20] = -0.0
            weights = [w.to(dtype) for w in weights]
            model = Model(weights, share(weights, 0.8))
            for step in range(3):
                model.step()
                if missed:
                    scale(model, 3.0 ** (step + 1))
        assert (model.misses > 0) == missed


@pytest.mark.parametrize("found_inf", [0.0, 1.0, NAN])
def test_special_values_bad_counts_and_skipped_steps(found_inf):
    kinds = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 1.0, -2.0, torch.inf, NAN])
    for seed in cuda_emulator.schedules():
        cuda_emulator.seed(seed, small=True)
        source = torch.Generator().manual_seed(seed)
        weights = [kinds[torch.randint(9, (n,), generator=source)] for n in (2800, 700, 900, 600)]
        model = Model(weights, [1500, -1, 400, 601 if seed % 3 else 600])
        model.step(found_inf)
        model.step(bracket=seed % 2 == 0)
        model.step()


def launches_of(model: Model) -> int:
    before = cuda_emulator.launches()
    model.step()
    return cuda_emulator.launches() - before


def test_number_of_launches():
    """Two whatever the sizes; twice that for two tables."""
    cuda_emulator.seed(0, small=True)
    weights = normal(40, 700, 9000)
    model = Model(weights, share(weights, 0.9))
    assert [launches_of(model) for _ in range(3)] == [2, 2, 2]
    many = normal(*[40] * (cuda_emulator.shapes(small=True)[2] + 1))
    assert launches_of(Model(many, share(many, 0.9))) == 4


def test_a_wait_that_never_ends_is_trapped_in_debug_mode():
    """A tensor whose phase is already ahead: nobody would ever open the one that is waited for."""
    for seed in range(4):
        cuda_emulator.seed(seed, small=True)
        cuda_emulator.machine(debugs=True)
        model = Model(normal(5000, 3000), [4500, 2700])
        model.step()
        model.sides[1]["scratch"][2] = 9  # tickets of phase 0 count as claimed
        model.sides[1]["thresholds"].fill_(NAN)
        with pytest.raises(RuntimeError, match="trap"):
            model.step()


GROUP = Case(
    "tensors of a chunk, of a strip and larger",
    ((600,), (41, 37), (90,), (5000,)),
    (500, 900, 45, 4500),
)


def update_many(kind, rule, seeds, case=GROUP, steps=2, removed=-1):
    for seed in seeds:
        cuda_emulator.seed(seed, removed=removed, small=True)
        expected = Training(kind, rule, case, rest=((7,), (1300,)))
        actual = Training(kind, rule, case, rest=((7,), (1300,)))
        for number in range(steps):
            grads = tensors_like(expected.weights, case.fill, seed + number)
            grads = [g.bfloat16() if i % 2 == number % 2 else g for i, g in enumerate(grads)]
            frozen = number == 3
            expected.step(REFERENCE, grads, frozen=frozen)
            actual.step(cuda_emulator.implementations(), grads, frozen=frozen)
            assert_same("cuda-emulated", actual, expected, f"after step {number}, seed {seed}")
        scratch = actual.state.scratch
        assert not scratch[1:64].any(), "the scratch buffer is not clean for the next call"


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_updates_under_a_hundred_schedules(kind):
    """A cold start and a forecast, which may fail: the update is not undone."""
    update_many(kind, "plain", cuda_emulator.schedules(), steps=3)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("adam", "decoupled decay"), ("adam", "odd scale, decay"), ("sgd", "nesterov")],
)
def test_rules_and_then_frozen(kind, rule):
    update_many(kind, rule, cuda_emulator.schedules(10), steps=5)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_two_launches_for_a_parameter_group(kind):
    cuda_emulator.seed(0, small=True)
    training = Training(kind, "plain", GROUP, rest=((7,), (30_000,)))
    for frozen in (False, True):
        before = cuda_emulator.launches()
        grads = tensors_like(training.weights, "normal", 1)
        training.step(cuda_emulator.implementations(), grads, frozen=frozen)
        assert cuda_emulator.launches() - before == 2


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("bad", [-1, 601])
def test_a_bad_k_updates_its_tensor_only(kind, bad):
    """As on a GPU, where k is not checked on the host."""
    for seed in cuda_emulator.schedules(10):
        cuda_emulator.seed(seed, small=True)
        case = Case("a bad count", ((600,), (1600,)), (500, 1400))
        expected = Training(kind, "plain", Case("a bad count", ((1600,),), (1400,)), rest=((600,),))
        actual = Training(kind, "plain", case, rest=())
        for i, j in ((0, 1), (1, 0)):
            for name in ("weights", "first", "second"):
                getattr(expected, name)[j].copy_(getattr(actual, name)[i])
        actual.state.k[0] = bad
        grads = tensors_like(actual.weights, "normal", seed)
        with cuda_emulator.unchecked():
            actual.step(cuda_emulator.implementations(), grads)
        expected.step(REFERENCE, grads[::-1])
        for i, j in ((0, 1), (1, 0)):
            for name in ("weights", "first"):
                pair = (getattr(actual, name)[i], getattr(expected, name)[j])
                assert_bitwise_equal(*pair, f"{name}[{i}]")
        assert torch.equal(actual.state.thresholds[1:], expected.state.thresholds)
        assert actual.state.thresholds[0].isnan()
