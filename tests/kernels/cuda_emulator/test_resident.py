"""The resident kernel under many schedules: groups of blocks that wait for one another.

Machines are small, so that there are more groups than blocks and groups of every size.
"""

from __future__ import annotations

import pytest
import torch

import issp
from issp.ops.schemas import scratch_region
from tests.asserts import assert_bitwise_equal
from tests.cases import DTYPES, Case, tensors_like
from tests.kernels import cuda_emulator
from tests.kernels.cuda_emulator.model import (
    HEADER,
    NAN,
    RECORD,
    Model,
    normal,
    share,
    with_candidates,
)
from tests.ops.test_update_parity import Training, assert_same

pytestmark = [cuda_emulator.needs_compiler, pytest.mark.sampled(most=4)]
REFERENCE = issp.backends.implementations("reference")
# processors, bytes of shared memory: blocks x slots of float32 are 8 x 1, 4 x 2, 6 x 3, 1 x 1
MACHINES = {"8x1": (4, 5400), "4x2": (2, 10_240), "6x3": (3, 13_600), "1x1": (1, 2700)}


@pytest.fixture(autouse=True)
def _machine():
    yield
    cuda_emulator.machine()


def use(machine: str, seed: int, removed: int = -1) -> None:
    processors, shared = MACHINES[machine]
    cuda_emulator.machine(processors, shared)
    cuda_emulator.seed(seed, removed=removed, small=True)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_hundred_schedules(machine):
    """Groups and lone blocks, a cold start, a bracket that holds, thresholds that jump."""
    sizes = (700, 1100, 40, 2600, 1500, 512, 1030, 4000)
    for seed in cuda_emulator.schedules():
        use(machine, seed)
        weights = normal(*sizes, dtype=DTYPES[seed % 7 % 4], seed=seed)
        model = Model(weights, share(weights, 0.9 if seed % 3 else 0.5))
        for scale in (1.0, 1e6, 1e-6) if seed % 4 == 0 else (1.0, 1.0):
            for side in model.sides:
                for w in side["weights"]:
                    w.mul_(scale)
            model.step()
            model.perturb(1e-4, seed)


@pytest.mark.parametrize("machine", ["8x1", "4x2"])
def test_a_hundred_schedules_of_ties(machine):
    """Equal magnitudes in every part, more than are selected, by the bracket and by the search."""
    for seed in cuda_emulator.schedules():
        use(machine, seed)
        weights = [(w * 4).round() / 8 for w in normal(2600, 1700, 900, seed=seed)]
        ratio = (0.3, 0.5, 0.7, 0.0, 1.0)[seed % 5]
        model = Model(weights, share(weights, ratio), previous=NAN if seed % 2 else 0.25)
        model.step()
        model.step()


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_candidates_at_capacity_under_many_schedules(beyond):
    numel = 3000
    capacity = scratch_region(numel) - HEADER - RECORD * 6  # tiles
    for seed in cuda_emulator.schedules():
        use("8x1", seed)
        weights, k = with_candidates(numel, capacity + beyond)
        model = Model([*weights, *normal(1200, seed=seed)], [k, 1000], previous=1.0)
        before = model.fallbacks
        model.step()
        assert model.fallbacks - before >= (beyond > 0)


@pytest.mark.parametrize("found_inf", [0.0, 1.0, NAN])
def test_special_values_bad_counts_and_skipped_steps(found_inf):
    kinds = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 1.0, -2.0, torch.inf, NAN])
    for seed in cuda_emulator.schedules():
        use(("8x1", "4x2")[seed % 2], seed)
        source = torch.Generator().manual_seed(seed)
        weights = [kinds[torch.randint(9, (n,), generator=source)] for n in (1800, 700, 900, 600)]
        model = Model(weights, [1500, -1, 400, 601 if seed % 3 else 600])
        model.step(found_inf)
        model.step(bracket=seed % 2 == 0)


def launches_of(model: Model) -> int:
    before = cuda_emulator.launches()
    model.step()
    return cuda_emulator.launches() - before


def test_number_of_launches():
    """One for what fits, two more for what does not; twice that for two tables."""
    fits, large = normal(40, 700, 4000), normal(4097)
    use("4x2", 0)
    assert launches_of(Model([*fits], share(fits, 0.9))) == 1
    both = [fits[0], *large, *fits[1:]]
    assert launches_of(Model(both, share(both, 0.9))) == 3
    assert launches_of(Model(large, share(large, 0.9))) == 2
    many = normal(*[40] * (cuda_emulator.shapes(small=True)[2] + 1))
    assert launches_of(Model(many, share(many, 0.9))) == 2
    cuda_emulator.machine(shared=2000)  # no room for a slot
    assert launches_of(Model([*fits], share(fits, 0.9))) == 2


GROUP = Case(
    "parts of one and of several tiles", ((600,), (41, 37), (90,), (3000,)), (500, 900, 45, 2700)
)


def update_many(kind, rule, machine, seeds, case=GROUP, steps=2):
    """With `machine` None, the machine and the schedule are the caller's."""
    for seed in seeds:
        if machine:
            use(machine, seed)
        expected = Training(kind, rule, case, rest=((7,), (1300,)))
        actual = Training(kind, rule, case, rest=((7,), (1300,)))
        for number in range(steps):
            grads = tensors_like(expected.weights, case.fill, seed + number)
            grads = [g.bfloat16() if i % 2 == number % 2 else g for i, g in enumerate(grads)]
            frozen = number == 2
            expected.step(REFERENCE, grads, frozen=frozen)
            actual.step(cuda_emulator.implementations(), grads, frozen=frozen)
            assert_same("cuda-emulated", actual, expected, f"after step {number}, seed {seed}")
        scratch = actual.state.scratch
        assert not scratch[1:64].any(), "the scratch buffer is not clean for the next call"


@pytest.mark.parametrize("machine", ["8x1", "4x2", "1x1"])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_updates_under_a_hundred_schedules(kind, machine):
    """The largest tensor is streamed on the smaller machines."""
    update_many(kind, "plain", machine, cuda_emulator.schedules())


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("adam", "decoupled decay"), ("adam", "odd scale, decay"), ("sgd", "nesterov")],
)
def test_rules_and_then_frozen(kind, rule):
    update_many(kind, rule, "8x1", cuda_emulator.schedules(10), steps=4)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_one_launch_for_a_parameter_group(kind):
    use("6x3", 0)
    training = Training(kind, "plain", GROUP, rest=((7,), (30_000,)))
    before = cuda_emulator.launches()
    training.step(cuda_emulator.implementations(), tensors_like(training.weights, "normal", 1))
    assert cuda_emulator.launches() - before == 1


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("bad", [-1, 601])
def test_a_bad_k_updates_its_tensor_only(kind, bad):
    """As on a GPU, where k is not checked on the host."""
    for seed in cuda_emulator.schedules(10):
        use(("8x1", "1x1")[seed % 2], seed)
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
