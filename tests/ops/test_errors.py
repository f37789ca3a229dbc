"""Bad input: one clear sentence of the right kind, and nothing modified."""

from __future__ import annotations

import pytest
import torch

import issp
from issp import Keep, backends, ops
from issp.ops import ShrinkState
from issp.ops.validation import pruning as validation
from tests.asserts import assert_bitwise_equal
from tests.backends import BACK_ENDS

BIG = torch.arange(1.0, 301.0)


def good():
    weights = [BIG[:100].clone(), BIG[:60].clone().view(6, 10)]
    return weights, ShrinkState(weights, [50, 30])


def replace(i, value):
    def change(weights, state):
        weights[i] = value

    return change


def set_state(**values):
    def change(weights, state):
        for name, value in values.items():
            setattr(state, name, value)

    return change


BAD = {
    "integer weights": (replace(0, torch.arange(100)), TypeError, "float32"),
    "mixed dtypes": (replace(0, BIG[:100].double()), TypeError, "group by dtype"),
    "another device": (replace(0, torch.empty(100, device="meta")), ValueError, "group by device"),
    "not contiguous": (replace(1, BIG[:60].view(10, 6).T), ValueError, "contiguous"),
    "an empty tensor": (replace(0, torch.empty(0)), ValueError, "leave it out"),
    "another size": (replace(0, BIG[:999].clone()), ValueError, "masks|ShrinkState|elements"),
    "overlapping weights": (
        lambda weights, state: weights.__setitem__(
            slice(None), [BIG[:100], BIG[50:110].view(6, 10)]
        ),
        ValueError,
        "overlap",
    ),
    "an empty list": (lambda weights, state: weights.clear(), ValueError, "empty list"),
    "not a tensor": (replace(0, "weights"), TypeError, "tensor"),
    "k too large": (set_state(k=torch.tensor([101, 30])), ValueError, "0..100"),
    "k negative": (set_state(k=torch.tensor([50, -1])), ValueError, "0..60"),
    "k as floats": (set_state(k=torch.tensor([50.0, 30.0])), TypeError, "int64"),
    "k too short": (set_state(k=torch.tensor([50])), ValueError, "2 elements"),
    "masks of another dtype": (set_state(packed=torch.zeros(32)), TypeError, "int32"),
    "masks too short": (set_state(packed=torch.zeros(16, dtype=torch.int32)), ValueError, "32"),
    "scratch too short": (
        set_state(scratch=torch.zeros(9, dtype=torch.int32)),
        ValueError,
        "scratch",
    ),
    "thresholds of another dtype": (
        set_state(thresholds=torch.zeros(2).half()),
        TypeError,
        "float32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_soft_shrink_refuses(name):
    change, kind, words = BAD[name]
    weights, state = good()
    issp.ops.soft_shrink_(weights, state)
    change(weights, state)
    watched = [x for x in (*weights, state.thresholds, state.packed, state.flips)]
    watched = [x for x in watched if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    before = [x.clone() for x in watched]
    with pytest.raises(kind, match=words) as caught:
        issp.ops.soft_shrink_(weights, state)
    assert "\n" not in str(caught.value).strip()
    for x, y in zip(watched, before, strict=True):
        assert_bitwise_equal(x, y, name)


@pytest.mark.parametrize("shrink", [-0.1, 1.5, float("nan")])
def test_shrink_out_of_range(shrink):
    weights, state = good()
    with pytest.raises(ValueError, match="0..1"):
        issp.ops.soft_shrink_(weights, state, shrink=shrink)
    assert_bitwise_equal(weights[0], BIG[:100], "weights")


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_every_back_end_refuses_by_itself(back_end, name):
    """Outside scripts may call torch.ops.issp directly: the native checks stand on their own."""
    change, _, _ = BAD[name]
    weights, state = good()
    change(weights, state)
    before = [w.clone() for w in weights if isinstance(w, torch.Tensor)]
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        back_end["soft_shrink_"](
            *(weights, state.k, 0.95, state.thresholds, state.packed, state.flips, state.scratch)
        )
    for w, y in zip([w for w in weights if isinstance(w, torch.Tensor)], before, strict=True):
        assert w.device.type != "cpu" or torch.equal(w, y)


@pytest.mark.parametrize(
    ("k", "words"), [([5], "2 tensors"), ([5, 61], "0..60"), ([-1, 5], "0..100")]
)
def test_magnitude_threshold_refuses(k, words):
    weights, _ = good()
    with pytest.raises(ValueError, match=words):
        issp.ops.magnitude_threshold(weights, k)


def test_apply_masks_refuses_other_sizes_and_overlaps():
    weights, state = good()
    with pytest.raises(ValueError, match="sizes"):
        issp.ops.apply_masks_(weights[:1], state)
    with pytest.raises(ValueError, match="overlap"):
        issp.ops.apply_masks_([BIG[:100], BIG[90:150]], state)
    assert BIG.tolist() == list(range(1, 301))


@pytest.mark.parametrize(
    ("shape", "keep", "words"),
    [
        ((8, 60), issp.Keep(2, of=32), "leave the layer dense"),
        ((6, 64), issp.Keep(2, of=32, v=4), "leave the layer dense"),
        ((7,), issp.Keep(1, of=2, layout="flat"), "does not divide"),
        ((64,), issp.Keep(2, of=32), "flat"),
    ],
)
def test_nm_prune_refuses_a_pattern_that_does_not_fit(shape, keep, words):
    with pytest.raises(ValueError, match=words):
        issp.ops.nm_prune(torch.randn(shape), keep)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"n": 0, "of": 4}, "1..of"), ({"n": 5, "of": 4}, "1..of"), ({"n": 1, "of": 4, "v": 0}, "v")]
    + [
        ({"n": 1, "of": 4, "layout": "rows"}, "layout"),
        ({"n": 1, "of": 4, "v": 2, "layout": "flat"}, "v=1"),
    ],
)
def test_keep_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        issp.Keep(**arguments)


def test_state_refuses_what_belongs_to_other_weights():
    weights, state = good()
    saved = state.state_dict()
    other = ShrinkState([BIG[:99].clone()], [5])
    with pytest.raises(ValueError, match="does not belong"):
        other.load_state_dict(saved)
    assert other.k.tolist() == [5]
    with pytest.raises(ValueError, match="shapes"):
        state.set_masks([torch.ones(3, dtype=torch.bool)])


def test_an_unknown_back_end_is_refused(fresh_python):
    result = fresh_python.run("import issp", ISSP_BACKEND="fast")
    assert result.returncode != 0
    assert "ISSP_BACKEND=fast: use one of" in result.stderr


def test_the_reference_can_be_forced_without_a_warning(fresh_python):
    code = "import issp; print(issp.backends.active('cpu'))"
    result = fresh_python.run(code, warnings="error", ISSP_BACKEND="reference")
    assert result.stdout.strip() == "reference", result.stderr


def test_strict_refuses_to_fall_back(fresh_python):
    code = (
        "from issp import backends\n"
        "backends._load_library = lambda name: 'was not built'\n"
        "backends._choose('cpu', ('cpp',), None)"
    )
    result = fresh_python.run(code, ISSP_STRICT="1", ISSP_BACKEND="reference")
    assert result.returncode != 0
    assert "BackendError: issp runs its slow reference on cpu: was not built" in result.stderr
    relaxed = fresh_python.run(code, ISSP_BACKEND="reference")
    assert relaxed.returncode == 0
    assert relaxed.stderr.count("RuntimeWarning: issp runs its slow reference") == 1


def test_a_forced_back_end_that_cannot_run_says_why(fresh_python):
    code = (
        "from issp import backends\n"
        "backends._load_library = lambda name: 'was not built'\n"
        "backends._choose('cpu', ('cpp',), 'cpp')"
    )
    result = fresh_python.run(code, ISSP_BACKEND="reference")
    assert result.returncode != 0
    said = "ISSP_BACKEND=cpp cannot run on cpu: was not built; unset it to let issp choose"
    assert f"BackendError: {said}" in result.stderr


def test_the_ops_of_a_back_end_that_is_not_active_are_refused():
    if issp.backends.active("cuda") == "cuda":
        pytest.skip("the CUDA back end is active here")
    with pytest.raises(RuntimeError, match="back end cuda is not active here: "):
        issp.backends.implementations("cuda")


@pytest.mark.parametrize(
    "setting, said",
    [
        ({"ISSP_BACKEND": "triton"}, "ISSP_BACKEND=triton cannot run: torch sees no CUDA device"),
        ({"ISSP_STRICT": "true"}, "ISSP_STRICT=true: use 0 or 1, or unset it"),
        ({"ISSP_BACKEND": "fast"}, "ISSP_BACKEND=fast: use one of reference"),
    ],
)
def test_the_command_names_a_setting_that_cannot_be_used(fresh_python, setting, said):
    code = "from issp.cli import main; print('status', main(['info']))"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ISSP_STRICT": "", **setting}
    # As the command `issp`, which imports the ops when it runs.
    result = fresh_python.run(f"import sys; sys.argv[0] = 'issp'; {code}", **hidden)
    assert result.stdout == "status 2\n"
    assert f"issp info: error: {said}" in result.stderr and "Traceback" not in result.stderr


def test_import_needs_torch_and_numpy_alone(fresh_python):
    code = (
        "import sys; import issp, torch, numpy\n"
        "heavy = {'PIL', 'yaml', 'rich', 'matplotlib', 'tensorboard', 'skimage', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert fresh_python.run(code).stdout.strip() == "[]"


def test_problems_are_named():
    assert backends.active("cpu") in ("cpp", "reference")
    if not torch.cuda.is_available():
        assert "no CUDA device" in backends.problems()["cuda"]


def freed(x, nbytes=0):
    """The tensor as FSDP leaves a parameter between its uses: shape without memory."""
    x = x.clone()
    x.untyped_storage().resize_(nbytes)
    return x


def off_by_one(x):
    """The same numbers, one element behind the start of the memory."""
    return torch.cat([x[:1], x])[1:]


# What is wrong with the memory of each argument -> words of the refusal.
MEMORY = {
    "weights freed": (lambda w, s: w.__setitem__(1, freed(w[1])), "0 of its 240 bytes in memory"),
    "weights cut": (lambda w, s: w.__setitem__(0, freed(w[0], 399)), "399 of its 400 bytes"),
    **{
        f"{name} freed": (
            lambda w, s, name=name: setattr(s, name, freed(getattr(s, name))),
            "bytes in memory: call this where it is there",
        )
        for name in ("k", "thresholds", "packed", "flips", "scratch")
    },
    **{
        f"{name} off": (
            lambda w, s, name=name: setattr(s, name, off_by_one(getattr(s, name))),
            "does not start on 8 bytes",
        )
        for name in ("packed", "scratch")
    },
    "weights between elements": (
        lambda w, s: w.__setitem__(
            0, torch.frombuffer(bytearray(401), dtype=torch.float32, count=100, offset=1)
        ),
        "does not start on 4 bytes",
    ),
    "negative view": (lambda w, s: w.__setitem__(0, torch._neg_view(w[0])), "computes when it is"),
}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("back_end", [None, *(b for b in BACK_ENDS if b.device == "cpu")], ids=str)
def test_what_is_not_in_memory(back_end, name):
    """Refused by the public function in words, by every back end on its own; nothing is written."""
    change, words = MEMORY[name]
    weights, state = good()
    watched = [*weights, state.thresholds, state.packed, state.flips]
    before = [x.clone() for x in watched]
    change(weights, state)
    if back_end is None:
        with pytest.raises((ValueError, RuntimeError), match=words):
            issp.ops.soft_shrink_(weights, state)
    elif name != "negative view" or not back_end.name.startswith("cpp"):
        with pytest.raises((ValueError, RuntimeError), match="cannot be used|" + words):
            back_end["soft_shrink_"](
                *(weights, state.k, 0.95, state.thresholds, state.packed, state.flips),
                state.scratch,
            )
    for x, y in zip(watched, before, strict=True):
        assert_bitwise_equal(x, y, name)


@pytest.mark.parametrize("name", ["k", "thresholds", "packed", "flips", "scratch"])
def test_state_without_data_is_no_silent_skip(name):
    """One tensor on "meta" sends the call to the fake, which used to return without a word."""
    weights, state = good()
    setattr(state, name, getattr(state, name).to("meta"))
    with pytest.raises((ValueError, RuntimeError), match="meta|several devices"):
        issp.ops.soft_shrink_(weights, state)
    assert_bitwise_equal(weights[0], BIG[:100], name)


def test_an_instruction_set_that_is_none():
    if backends.active("cpu") != "cpp":
        pytest.skip("the C++ back end is not built")
    for want in ("sse9", "\0"):
        with pytest.raises(RuntimeError, match="use scalar, avx2, avx512 or avx512fp16, not"):
            torch.ops.issp._cpu_capability(want)


def test_a_mixed_pattern_list_is_refused_before_anything_is_written():
    """The first tensor is N:M, a later one does not fit: no back end may have begun."""
    for back_end in [b for b in BACK_ENDS if b.device == "cpu"]:
        for wrong, k in (([2, 4, 1, 0, 0, 0, 2, 7, 1], 30), ([2, 4, 1, 0, 0, 0], 30)):
            weights = [BIG[:64].clone().view(8, 8).bfloat16(), BIG[:30].clone().bfloat16()]
            weights.append(BIG[:60].clone().view(6, 10).bfloat16())
            state = ShrinkState(weights, [32, 15, k])
            before = [x.clone() for x in (*weights, state.thresholds, state.packed, state.flips)]
            with pytest.raises((ValueError, RuntimeError)):
                back_end["soft_shrink_"](
                    *(weights, state.k, 0.95, state.thresholds, state.packed, state.flips),
                    *(state.scratch, None, True, wrong),
                )
            for x, y in zip(
                (*weights, state.thresholds, state.packed, state.flips), before, strict=True
            ):
                assert_bitwise_equal(x, y, f"{back_end}, {wrong}")


def test_one_tensor_is_no_list_of_tensors():
    weights, state = good()
    with pytest.raises(TypeError, match="weights must be a list of tensors, not Tensor"):
        ops.soft_shrink_(weights[0], state, 0.95)


def test_a_weight_with_more_bits_than_one_mask_holds():
    huge = torch.empty(2**20, 2**17, device="meta")
    with pytest.raises(ValueError, match="w of shape .* is too large for one packed mask"):
        validation.check_pattern_divides(huge, "w", Keep(2, of=4))


def test_a_negative_view_is_refused_before_anything_is_written():
    """torch's fallback for such views writes the weights and raises afterwards."""
    weights, state = good()
    before = [w.clone() for w in weights]
    state.thresholds = torch._neg_view(state.thresholds)
    with pytest.raises(ValueError, match="computes when it is"):
        torch.ops.issp.soft_shrink_(
            *(weights, state.k, 0.95, state.thresholds, state.packed, state.flips, state.scratch)
        )
    for weight, old in zip(weights, before, strict=True):
        assert_bitwise_equal(weight, old, "weight")
