"""Bad input to the optimizer ops: one clear sentence, and nothing modified."""

from __future__ import annotations

import pytest
import torch

from issp import backends, ops
from issp.ops import ShrinkState
from tests.asserts import assert_bitwise_equal
from tests.backends import BACK_ENDS

BIG = torch.arange(1.0, 401.0) / 100


def good(kind):
    """Named arguments of a call on three weights, two of them pruned."""
    weights = [BIG[:100].clone(), BIG[:60].clone().view(6, 10), BIG[:7].clone()]
    state = ShrinkState(weights[:2], [50, 30])
    lists = {"weights": weights, "grads": [w * 0.1 for w in weights]}
    if kind == "adam":
        lists["exp_avgs"] = [w * 0.2 for w in weights]
        lists["exp_avg_sqs"] = [w * 0.3 for w in weights]
        lists["steps"] = [torch.zeros(()) for _ in weights]
        scalars = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
        scalars["decoupled"] = False
    else:
        lists["momentum_buffers"] = [w * 0.2 for w in weights]
        scalars = {"first": [False] * 3, "lr": 0.1, "momentum": 0.9, "dampening": 0.0}
        scalars |= {"weight_decay": 0.1, "nesterov": False}
    return (
        lists
        | scalars
        | {
            "maximize": False,
            "lr_tensor": None,
            "grad_scale": None,
            "k": state.k,
            "shrink": 0.95,
            "thresholds": state.thresholds,
            "masks": state.packed,
            "flips": state.flips,
            "scratch": state.scratch,
            "found_inf": None,
            "frozen": False,
        }
    )


def put(name, value, i=None):
    def change(arguments):
        if i is None:
            arguments[name] = value
        else:
            arguments[name][i] = value

    return change


def overlap(name, i):
    def change(arguments):
        arguments[name][i] = arguments["weights"][i]

    return change


def more_counts(arguments):
    arguments["k"] = torch.zeros(4, dtype=torch.int64)


BOTH = {
    "no weights": (put("weights", []), ValueError, "empty list"),
    "float64 weights": (put("weights", BIG[:7].double(), 2), TypeError, "float64"),
    "float64 weights alone": (
        lambda a: a.update(weights=[w.double() for w in a["weights"]]),
        TypeError,
        "weights have dtype torch.float64: the optimizer ops take float32",
    ),
    "an empty weight": (put("weights", torch.empty(0), 2), ValueError, "leave it out"),
    "a gradient too few": (lambda a: a["grads"].pop(), ValueError, "grads has 2 entries"),
    "a gradient of another size": (put("grads", BIG[:8], 2), ValueError, "8 elements"),
    "float16 gradients": (put("grads", BIG[:7].half(), 2), TypeError, "bfloat16"),
    "a strided gradient": (put("grads", BIG[:60].view(10, 6).T, 1), ValueError, "contiguous"),
    "a gradient elsewhere": (put("grads", torch.empty(7, device="meta"), 2), ValueError, "meta"),
    "a gradient in a weight": (overlap("grads", 1), ValueError, "overlap"),
    "a negative rate": (put("lr", -0.1), ValueError, "lr is -0.1"),
    "no number as rate": (put("lr", float("nan")), ValueError, "lr is nan"),
    "negative decay": (put("weight_decay", -1.0), ValueError, "weight_decay is -1.0"),
    "shrink above 1": (put("shrink", 1.5), ValueError, "0..1"),
    "an integer rate tensor": (put("lr_tensor", torch.ones(1).int()), TypeError, "lr_tensor"),
    "two scales": (put("grad_scale", torch.ones(2)), ValueError, "grad_scale"),
    "found_inf as integers": (put("found_inf", torch.ones(1).int()), TypeError, "found_inf"),
    "more counts than weights": (more_counts, ValueError, "4 entries"),
    "a count too large": (put("k", torch.tensor([101, 30])), ValueError, "0..100"),
    "masks too short": (put("masks", torch.zeros(16, dtype=torch.int32)), ValueError, "masks"),
    "scratch between two of its words": (
        lambda a: a.update(scratch=torch.zeros(len(a["scratch"]) + 1, dtype=torch.int32)[1:]),
        ValueError,
        "scratch does not start on 8 bytes",
    ),
    "scratch too short": (put("scratch", torch.zeros(9, dtype=torch.int32)), ValueError, "scratch"),
}
ADAM = {
    "beta1 of 1": (put("beta1", 1.0), ValueError, "beta1"),
    "negative beta2": (put("beta2", -0.1), ValueError, "beta2"),
    "negative eps": (put("eps", -1e-8), ValueError, "eps"),
    "a moment too few": (lambda a: a["exp_avgs"].pop(), ValueError, "exp_avgs has 2"),
    "bfloat16 moments": (put("exp_avg_sqs", BIG[:7].bfloat16(), 2), TypeError, "float32"),
    "one moment twice": (
        lambda a: put("exp_avg_sqs", a["exp_avgs"][1], 1)(a),
        ValueError,
        "overlap",
    ),
    "integer steps": (put("steps", torch.zeros((), dtype=torch.int64), 0), TypeError, "steps"),
    "a shared step": (lambda a: put("steps", a["steps"][0], 1)(a), ValueError, "overlap"),
    "two steps in one": (put("steps", torch.zeros(2), 0), ValueError, "steps"),
}
SGD = {
    "negative momentum": (put("momentum", -0.9), ValueError, "momentum"),
    "infinite dampening": (put("dampening", float("inf")), ValueError, "dampening"),
    "nesterov without momentum": (
        lambda a: a.update(momentum=0.0, nesterov=True, momentum_buffers=[], first=[]),
        ValueError,
        "nesterov",
    ),
    "buffers without momentum": (put("momentum", 0.0), ValueError, "empty lists"),
    "a flag too few": (lambda a: a["first"].pop(), ValueError, "first has 2"),
    "a buffer too few": (lambda a: a["momentum_buffers"].pop(), ValueError, "2 momentum"),
    "a buffer in a weight": (overlap("momentum_buffers", 0), ValueError, "overlap"),
}
BAD = [("adam", name, *case) for name, case in (BOTH | ADAM).items()]
BAD += [("sgd", name, *case) for name, case in (BOTH | SGD).items()]
IDS = [f"{kind}-{name}".replace(" ", "-") for kind, name, *_ in BAD]


def watched(arguments):
    lists = [x for x in arguments.values() if isinstance(x, list)]
    values = [*arguments.values(), *(x for values in lists for x in values)]
    tensors = [x for x in values if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    return tensors, [x.clone() for x in tensors]


@pytest.mark.parametrize(("kind", "name", "change", "error", "words"), BAD, ids=IDS)
def test_the_sentence_names_the_argument(kind, name, change, error, words):
    arguments = good(kind)
    change(arguments)
    tensors, before = watched(arguments)
    with pytest.raises(error, match=words) as caught:
        getattr(ops, f"{kind}_soft_shrink_")(*arguments.values())
    assert "\n" not in str(caught.value).strip()
    for x, y in zip(tensors, before, strict=True):
        assert_bitwise_equal(x, y, name)


@pytest.mark.parametrize(("kind", "name", "change", "error", "words"), BAD, ids=IDS)
@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_every_back_end_refuses_by_itself(back_end, kind, name, change, error, words):
    op = back_end[f"{kind}_soft_shrink_"]
    arguments = good(kind)
    change(arguments)
    tensors, before = watched(arguments)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        op(*arguments.values())
    for x, y in zip(tensors, before, strict=True):
        assert_bitwise_equal(x, y, name)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_gradients_may_share_memory(kind):
    """What is only read may be shared: two weights whose gradient is one tensor."""
    arguments = good(kind)
    arguments["weights"][1] = BIG[:100].clone()
    for name in ("exp_avgs", "exp_avg_sqs", "momentum_buffers"):
        if name in arguments:
            arguments[name][1] = torch.zeros(100)
    state = ShrinkState(arguments["weights"][:2], [50, 30])
    arguments |= {"masks": state.packed, "scratch": state.scratch}
    arguments["grads"][1] = arguments["grads"][0]
    before = arguments["weights"][1].clone()
    getattr(ops, f"{kind}_soft_shrink_")(*arguments.values())
    assert not torch.equal(arguments["weights"][1], before)


@pytest.mark.parametrize("back_end", [None, *(b for b in BACK_ENDS if b.device == "cpu")], ids=str)
def test_lists_of_other_shapes_but_equal_sizes(back_end):
    """Only sizes need to agree: no back end updates half of a group and then raises."""
    results = []
    for flat in (True, False):
        arguments = good("adam")
        if not flat:
            for name in ("exp_avgs", "exp_avg_sqs", "grads"):
                arguments[name] = [x.reshape(-1, 1) for x in arguments[name]]
            arguments["steps"] = [step.view(1) for step in arguments["steps"]]
        call = (
            torch.ops.issp.adam_soft_shrink_ if back_end is None else back_end["adam_soft_shrink_"]
        )
        call(*arguments.values())
        lists = ("weights", "exp_avgs", "exp_avg_sqs", "steps")
        results.append([x.flatten() for name in lists for x in arguments[name]])
    for i, (x, y) in enumerate(zip(*results, strict=True)):
        assert_bitwise_equal(x, y, f"{back_end}, tensor {i}")


@pytest.mark.parametrize(
    "step", [float("nan"), float("inf"), -float("inf"), -5.0, -1.0, 3e9, 4294967040.0, 1e20]
)
@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_a_step_counter_that_holds_anything(back_end, step):
    """A damaged training state: the same numbers everywhere, no endless loop, no half a step."""
    results = []
    for table in (backends.implementations("reference"), back_end):
        arguments = good("adam")
        arguments["steps"] = [torch.full((), step) for _ in arguments["weights"]]
        table["adam_soft_shrink_"](*arguments.values())
        lists = ("weights", "exp_avgs", "exp_avg_sqs", "steps")
        results.append([x for name in lists for x in arguments[name]])
    for i, (x, y) in enumerate(zip(*results, strict=True)):
        if x.isnan().any():
            assert torch.equal(x.isnan(), y.isnan()), f"{back_end}, tensor {i}"
        else:
            assert_bitwise_equal(y, x, f"{back_end}, tensor {i}")
