"""Bad input to the auxiliary ops: one clear sentence of the right kind, and nothing modified."""

from __future__ import annotations

import pytest
import torch

import issp
from issp.ops import ShrinkState
from tests.backends import BACK_ENDS
from tests.ops.test_auxiliary import assert_all_equal


def good(device="cpu"):
    weights = [torch.arange(1.0, 101.0, device=device), torch.ones(6, 10, device=device)]
    grads = [torch.full_like(w, 2.0) for w in weights]
    masks = torch.zeros(32, dtype=torch.int32, device=device)
    return {"grads": grads, "weights": weights, "factors": torch.ones(2), "masks": masks}


def lists_of(change):
    """Bad lists that every op refuses."""
    return {
        f"{change}: an empty list": (lambda t: t.clear(), ValueError, "empty list|entries for"),
        f"{change}: integers": (
            lambda t: t.__setitem__(0, torch.arange(100)), TypeError, "dtype|float32",
        ),
        f"{change}: no tensor": (lambda t: t.__setitem__(0, "x"), TypeError, "must be a tensor"),
        f"{change}: not contiguous": (
            lambda t: t.__setitem__(1, torch.ones(10, 6).T), ValueError, "contiguous",
        ),
        f"{change}: empty tensor": (
            lambda t: t.__setitem__(0, torch.empty(0)), ValueError, "empty|elements",
        ),
        f"{change}: another device": (
            lambda t: t.__setitem__(0, torch.empty(100, device="meta")), ValueError, "is on",
        ),
    }  # fmt: skip


BAD_REGULARIZE = {
    **lists_of("grads"),
    **lists_of("weights"),
    "grads: one too few": (lambda t: t.pop(), ValueError, "1 entries for 2"),
    "grads: another size": (
        lambda t: t.__setitem__(0, torch.ones(99)), ValueError, "has 99 elements",
    ),
    "grads: another dtype": (
        lambda t: t.__setitem__(0, torch.ones(100).half()), TypeError, "float16",
    ),
    "factors: another dtype": (torch.ones(2).double(), TypeError, "factors has dtype"),
    "factors: another device": (
        torch.empty(2, device="meta"), ValueError, "factors is on meta but the weights are on cpu",
    ),
    "factors: a list": ([1.0, 1.0], TypeError, "factors must be a tensor"),
    "factors: one too few": (torch.ones(1), ValueError, "2 elements, one per weight"),
    "masks: too short": (torch.zeros(16, dtype=torch.int32), ValueError, "32 elements"),
    "masks: another dtype": (torch.zeros(32), TypeError, "int32"),
}  # fmt: skip


def watched(arguments):
    both = [x for x in (*arguments["grads"], *arguments["weights"]) if isinstance(x, torch.Tensor)]
    tensors = [x for x in both if x.device.type == "cpu"]
    return tensors, [x.clone() for x in tensors]


@pytest.mark.parametrize("name", BAD_REGULARIZE)
@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_regularize_refuses(back_end, name):
    change, kind, words = BAD_REGULARIZE[name]
    arguments, which = good(), name.partition(":")[0]
    if callable(change):
        change(arguments[which])
    else:
        arguments[which] = change
    tensors, before = watched(arguments)
    state = ShrinkState([torch.ones(100), torch.ones(60)], [0, 0])
    state.packed = arguments.pop("masks")
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        back_end["regularize_"](*arguments.values(), state.packed)
    with pytest.raises(kind, match=f"{words}|those of the state") as caught:
        issp.ops.regularize_(*arguments.values(), state)
    assert "\n" not in str(caught.value).strip()
    assert_all_equal(tensors, before, name)


@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_what_is_written_may_overlap_nothing(back_end):
    memory = torch.arange(1.0, 201.0)
    masks, factors = torch.zeros(32, dtype=torch.int32), torch.ones(2)
    parts = [memory[:100], memory[100:160]]
    for grads, weights in (
        (parts, [memory[90:190], torch.ones(60)]),
        ([memory[:100], memory[50:110]], [torch.ones(100), torch.ones(60)]),
    ):
        with pytest.raises((RuntimeError, ValueError), match="overlap in memory"):
            back_end["regularize_"](grads, weights, factors, masks)
    with pytest.raises((RuntimeError, ValueError), match="overlap in memory"):
        back_end["apply_masks_"]([*parts, memory[95:195], torch.ones(60)], masks, 2)
    assert memory.tolist() == list(range(1, 201))


@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_what_is_only_read_may_be_listed_twice(back_end):
    x = torch.tensor([0.0, 1.0, 2.0, 0.0, 2.0])
    assert back_end["count_zeros"]([x, x, x[:2]]).tolist() == [2, 2, 1]
    assert back_end["magnitude_statistics"]([x, x])[:, 2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("op", ["magnitude_statistics", "count_zeros"])
@pytest.mark.parametrize("name", lists_of("tensors"))
def test_readers_refuse(op, name):
    change, kind, words = lists_of("tensors")[name]
    tensors = good()["weights"]
    change(tensors)
    for back_end in BACK_ENDS:
        if back_end.device == "cpu":
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                back_end[op](tensors)
    with pytest.raises(kind, match=words) as caught:
        getattr(issp.ops, op)(tensors)
    assert "\n" not in str(caught.value).strip()


def test_statistics_refuse_mixed_dtypes():
    with pytest.raises(TypeError, match="group by dtype"):
        issp.ops.magnitude_statistics([torch.ones(3), torch.ones(3).half()])


@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_masks_refuse_sets_that_do_not_fit(back_end):
    weights = good()["weights"]
    masks = torch.zeros(32, dtype=torch.int32)
    three = [*weights, torch.ones(100)]
    swapped = [*weights, torch.ones(60), torch.ones(100)]
    for tensors, sets in ((three, 2), (weights, 0), (weights, -1), (swapped, 2), (weights, 2)):
        with pytest.raises((RuntimeError, ValueError), match="set|mask"):
            back_end["apply_masks_"](tensors, masks, sets)
    state = ShrinkState(weights, [50, 30])
    for tensors in (three, swapped, [], weights[:1]):
        with pytest.raises(ValueError, match="sizes of the state's weights"):
            issp.ops.apply_masks_(tensors, state)
    assert_all_equal(weights, good()["weights"], "weights")
