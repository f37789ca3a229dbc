"""The CUDA kernels, run thread by thread on the CPU, are bitwise the reference in any schedule.

tests/ops/test_parity.py runs the common cases; here are those that know how the kernels are built.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from issp.ops import reference
from issp.ops.schemas import mask_layout, scratch_words
from tests.asserts import INTEGERS, assert_bitwise_equal
from tests.cases import DTYPES
from tests.kernels import cuda_emulator
from tests.kernels.cuda_emulator.model import Model, capacity, normal, share, with_candidates

pytestmark = [cuda_emulator.needs_compiler, pytest.mark.sampled(most=4)]
NAN = float("nan")


@pytest.fixture(autouse=True)
def _machine():
    yield
    cuda_emulator.machine()


SMALL_SIZES = (1, 31, 33, 511, 513, 700, 1023, 1024, 1025, 2048, 2049, 5000, 12345)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_training_steps(dtype, seed):
    """Cold start, then forecasts that hold, in tensors of one chunk, a few and many."""
    cuda_emulator.seed(seed, small=True)
    model = Model(normal(*SMALL_SIZES, dtype=dtype), share(normal(*SMALL_SIZES), 0.9))
    for step in range(4):
        model.step()
        model.perturb(1e-3, step)
    assert model.misses <= 6  # of 39 forecasts; the tiniest tensors may jump


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_steps_in_real_shapes(dtype):
    chunk = cuda_emulator.shapes()[1]
    sizes = (100, chunk, chunk + 1, 20_000)
    cuda_emulator.seed(5)
    model = Model(normal(*sizes, dtype=dtype), share(normal(*sizes), 0.95))
    for step in range(2):
        model.step()
        model.perturb(1e-3, step)
    model.step(bracket=False)
    assert model.misses == 0


@pytest.mark.parametrize("resident", [1, 2, 5, 40])
@pytest.mark.parametrize("wrong", [0.0, 0.3, 5.0, float("inf")])
def test_the_forecast_misses(resident, wrong):
    """The search inside the second launch, whatever number of blocks is resident."""
    for seed in range(3):
        cuda_emulator.seed(seed, resident=resident, small=True)
        weights = normal(200, 600, 2000, 9000, seed=seed)
        model = Model(weights, share(weights, 0.9), previous=wrong)
        model.step()
        assert model.misses == (0 if wrong == float("inf") else 4)


def test_one_tensor_misses_and_others_do_not():
    for seed in range(6):
        cuda_emulator.seed(seed, small=True)
        model = Model(normal(3000, 4000, 100, 2500, seed=seed), [2700, 3600, 90, 2250])
        model.step()
        for side in model.sides:
            side["weights"][1] *= 3
        model.step()
        assert model.misses == 1
        model.step(bracket=False)
        assert model.misses == 1


@pytest.mark.parametrize("numel", [513, 800, 5000, 20_000])
@pytest.mark.parametrize("beyond", [-1, 0, 1, 50])
def test_candidates_at_capacity(numel, beyond):
    """One candidate too many costs a search, nothing else."""
    room = capacity(numel, cuda_emulator.shapes(small=True)[1])
    cuda_emulator.seed(numel + beyond, small=True)
    weights, k = with_candidates(numel, room + beyond)
    model = Model(weights, [k], previous=1.0)
    model.step()
    assert model.misses == (beyond > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bracket", [True, False], ids=["bracket", "search"])
def test_ties_are_split_at_the_lowest_index(dtype, bracket):
    """Equal magnitudes spread over the tiles, few enough for the candidates; every cut is tried."""
    numel, equal = 6000, 150
    source = torch.Generator().manual_seed(3)
    weights = torch.rand(numel, generator=source) * 0.5 + 2
    weights[:3000] = torch.rand(3000, generator=source) * 0.5
    weights[3000 : 3000 + equal] = 1.0
    weights = weights[torch.randperm(numel, generator=source)].to(dtype)
    weights *= (torch.randint(0, 2, (numel,), generator=source) * 2 - 1).to(dtype)
    for seed, rank in enumerate((1, 2, 77, 149, 150)):
        cuda_emulator.seed(seed, small=True)
        model = Model([weights, weights[:1000], weights[:400]], [3000 + rank, 600, 250], 1.0)
        model.step(bracket=bracket)


@pytest.mark.parametrize("k", [0, 1, 1024, 2999, 3000])
def test_all_equal(k):
    for seed, value in enumerate((0.0, -0.25, NAN)):
        cuda_emulator.seed(seed, small=True)
        model = Model([torch.full((3000,), value), torch.full((500,), value)], [k, min(k, 500)])
        for _ in range(3):
            model.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shrink", [0.95, 0.6, 0.6001, 0.3, 0.0, 1.0])
def test_special_values(dtype, shrink):
    """Zeros of both signs, denormals, infinities and NaNs of several payloads."""
    tiny = torch.finfo(dtype).tiny
    kinds = [0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 2, tiny * 1.03, 1.0, -2.0, torch.inf, NAN]
    kinds = torch.tensor([*kinds, -torch.inf, -NAN], dtype=torch.float64).to(dtype)
    source = torch.Generator().manual_seed(4)
    weights = kinds[torch.randint(len(kinds), (3333,), generator=source)]
    integer = INTEGERS[weights.element_size()]
    payloads = weights[:40].view(integer)
    payloads |= kinds[10].view(integer) | 5
    for seed, ratio in enumerate((0.0, 0.4, 0.8, 0.95, 1.0)):
        cuda_emulator.seed(seed, small=True)
        model = Model([weights, weights[:300]], share([weights, weights[:300]], ratio))
        model.shrink = shrink
        for _ in range(2):
            model.step()


def test_counts_at_the_ends():
    weights = normal(2000, 2000, 2000, 50, 50, 1, 1)
    cuda_emulator.seed(8, small=True)
    model = Model(weights, [0, 2000, 1, 0, 50, 0, 1])
    for step in range(3):
        model.step()
        model.perturb(1e-3, step)


def test_a_bad_k_leaves_its_tensor_alone():
    for bad in (-1, 2**40, -(2**63), 2001):
        cuda_emulator.seed(9, small=True)
        model = Model(normal(2000, 2000, 50), [1800, bad, 51])
        model.step()
        assert model.sides[1]["flips"].tolist()[1:] == [-7, -7]
        model.step()


@pytest.mark.parametrize("found_inf", [1.0, float("inf"), NAN])
def test_found_inf_stops_everything(found_inf):
    cuda_emulator.seed(10, small=True)
    model = Model(normal(2000, 50), [1800, 45])
    model.step(found_inf)
    assert model.sides[1]["flips"].tolist() == [-7, -7]
    model.step(0.0)
    model.step(found_inf)
    assert model.sides[1]["flips"].tolist() != [-7, -7]


def test_more_tensors_than_a_table_holds():
    table = cuda_emulator.shapes(small=True)[2]
    weights = normal(*([5, 700, 40, 1500, 64] * table)[: 3 * table + 2])
    cuda_emulator.seed(11, small=True)
    model = Model(weights, share(weights, 0.8))
    for step in range(3):
        model.step()
        model.perturb(1e-3, step)
    model.step(bracket=False)


def test_weights_need_no_alignment():
    base = normal(3001)[0].half()
    for offset in (1, 3, 8):  # the last is aligned to 16 bytes
        cuda_emulator.seed(offset, small=True)
        numel = 3001 - offset
        masks = torch.zeros(mask_layout([numel])[1], dtype=torch.int32)
        state = [torch.full((1,), NAN).half(), masks, torch.zeros(1, dtype=torch.int64)]
        state.append(torch.zeros(scratch_words([numel]), dtype=torch.int32))
        results = []
        for call in (reference.soft_shrink_, cuda_emulator.soft_shrink_):
            whole, own = base.clone(), [x.clone() for x in state]
            for _ in range(3):
                call([whole[offset:]], torch.tensor([2500]), 0.95, *own)
            results.append(whole)
        assert_bitwise_equal(results[1], results[0], f"weights at offset {offset}")


def test_thresholds_of_many_tensors():
    sizes = (1, 2, 511, 513, 3000, 100, 7, 9, 11, 13, 800, 900)
    for seed, dtype in enumerate(DTYPES):
        cuda_emulator.seed(seed, small=True)
        weights = normal(*sizes, dtype=dtype, seed=seed)
        for ratio in (0.0, 0.5, 1.0):
            k = share(weights, ratio)
            actual = cuda_emulator.magnitude_threshold(weights, k)
            assert_bitwise_equal(actual, reference.magnitude_threshold(weights, k), str(dtype))


def test_masks_of_mixed_dtypes():
    sizes = (1, 2, 511, 513, 3000, 100, 7, 9, 11, 13, 800, 900)
    tensors = [x.to(DTYPES[i % 4]) for i, x in enumerate(normal(*sizes))]
    source = torch.Generator().manual_seed(2)
    words = mask_layout(sizes)[1]
    masks = torch.randint(-(2**31), 2**31, (words,), generator=source).to(torch.int32)
    for small in (True, False):
        cuda_emulator.seed(3, small=small)
        expected, actual = [[x.clone() for x in tensors] for _ in range(2)]
        reference.apply_masks_(expected, masks)
        cuda_emulator.apply_masks_(actual, masks)
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_bitwise_equal(*pair, f"tensors[{i}]")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_n_of_m(dtype):
    """Groups ranked by their elements' threads and groups selected by a block each."""
    source = torch.Generator().manual_seed(5)
    patterns = [((8, 12, 3, 3), 1, 4, 1), ((8, 12, 3, 3), 2, 12, 4), ((6, 40), 5, 40, 3)]
    patterns += [((4, 6, 2), 6, 6, 2), ((2, 200), 7, 100, 1), ((2, 200), 1, 100, 2)]
    for seed, (shape, n, m, v) in enumerate(patterns):
        cuda_emulator.seed(seed, small=True)
        for few in (False, True):
            weight = torch.randn(shape, generator=source)
            weight = ((weight * 2).round() / 2 if few else weight).to(dtype)
            weight.view(-1)[:3] = torch.tensor([NAN, torch.inf, -0.0], dtype=dtype)
            calls = [(n, m, v, "channels", 0.95)]
            calls += [(n, m, 1, "flat", 0.0)] if weight.numel() % m == 0 else []
            for call in calls:
                expected = reference.nm_prune(weight, *call)
                actual = cuda_emulator.nm_prune(weight, *call)
                for i, name in enumerate(("weight", "mask")):
                    what = f"{name} of {shape} at {call}"
                    assert_bitwise_equal(actual[i], expected[i], what)


PLANTED = {
    "missing barrier": "shared word",  # a race, or a word read before it is written
    "write race": "race on shared word",
    "missing barrier before reuse": "race on shared word",
    "counter without atomics": "race on shared word",
    "global out of bounds": "global access of 4 bytes out of bounds",
    "shared out of bounds": "is out of bounds",
    "unwritten shared word": "read before it is written",
    "different barriers": "barrier",
    "early return": "return",
    "half a warp": "lane",
    "hand-over without a fence": "race on global memory",
    "hand-over without a barrier": "race on global memory",
    "last block without a fence": "race on global memory",
    "global race within a block": "race on global memory",
    "endless wait": "spin for ever",
    "wait for blocks that may not run": "spin for ever",
    "copy without a wait": "read before it is written",
    "slot reused too early": "race on shared word",
    "copy left on its way": "copies on their way",
}


def test_planted_faults_are_found():
    library = cuda_emulator.library(small=True)
    names = []
    while (name := library.planted_name(len(names))) is not None:
        names.append(name.decode())
    assert set(names) == set(PLANTED)
    for number, name in enumerate(names):
        for seed in range(5):
            assert library.run_planted(number, 1, seed) is None, f"{name}, in its sound form"
            message = library.run_planted(number, 0, seed)
            assert message is not None, f"{name} was not found under seed {seed}"
            assert PLANTED[name] in message.decode()


def state_of(model: Model) -> list[torch.Tensor]:
    side = model.sides[1]
    names = ("thresholds", "masks", "flips", "scratch")
    return [x.clone() for x in (*side["weights"], *(side[name] for name in names))]


def test_a_refused_kernel_leaves_everything_unmodified():
    """A step asks for all of its kernels before it launches the first."""
    model = Model(normal(2000, 50, 120), [1800, 45, 60], patterns=[0] * 8 + [1, 2, 0, 1])
    refused = 0
    while True:
        cuda_emulator.seed(refused, small=True)
        cuda_emulator.machine(refused=refused)
        before, launched = state_of(model), cuda_emulator.launches()
        try:
            model.step()
        except RuntimeError as error:
            assert "no kernel image" in str(error)
            assert cuda_emulator.launches() == launched
            for actual, expected in zip(state_of(model), before, strict=True):
                assert_bitwise_equal(actual, expected, f"without kernel {refused}")
            model.sides[0] = {
                name: [x.clone() for x in value] if isinstance(value, list) else value.clone()
                for name, value in model.sides[1].items()
            }
            refused += 1
        else:
            break
    assert refused == 8  # both launches and two kernels for N:M, in two sizes of table


def test_a_tensor_beyond_32_bits_is_refused():
    library, buffer = cuda_emulator.library(), (ctypes.c_byte * 64)()
    pointers, numels = (ctypes.c_void_p * 1)(ctypes.addressof(buffer)), (ctypes.c_int64 * 1)(2**32)
    call = library.emulated_magnitude_threshold
    call.restype = ctypes.c_char_p
    error = call(0, 1, pointers, numels, (ctypes.c_int64 * 1)(5), ctypes.byref(buffer))
    assert "fewer than 2**32" in error.decode()
