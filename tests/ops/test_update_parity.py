"""The optimizer ops on every back end that has them: bitwise equal to the reference."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import issp
from issp.ops import ShrinkState
from issp.optim.plan import no_state
from tests.asserts import assert_bitwise_equal
from tests.backends import BACK_ENDS, FAST
from tests.cases import (
    ADAM,
    ADAM_RULES,
    LARGE,
    NAMED,
    REST,
    SGD,
    SGD_RULES,
    Case,
    random_shapes,
    tensors_like,
)
from tests.tiers import FULL, some

# Infinities and NaNs are provoked here; Triton's interpreter computes with numpy, which warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.sampled(slow_only=True, most=4),
]

REFERENCE = issp.backends.implementations("reference")
RANDOM = random_shapes(60, 20_000)
RANDOM_SMALL = random_shapes(40, 400, per_call=20)
MIXED = Case("a conv, a linear and odd ends", ((12, 5, 3, 3), (30, 21), (37,)), (400, 598, 20))
KINDS = {"adam": (ADAM, ADAM_RULES), "sgd": (SGD, SGD_RULES)}
RULES = [(kind, name) for kind, (_, rules) in KINDS.items() for name in rules]


class Training:
    """The tensors of one parameter group, stepped by the op of one table."""

    def __init__(self, kind, rule, case, device="cpu", rest=REST, fill=None, t=0):
        base, rules = KINDS[kind]
        self.kind, self.shrink = kind, case.shrink
        self.options = base | rules.get(rule, {})
        self.scale = self._scalar("scale", device)
        self.lr_tensor = self._scalar("lr_tensor", device)
        fill = fill or case.fill
        extra = Case("others", rest, (0,) * len(rest), fill).build(torch.float32, device)
        pruned = case.build(torch.float32, device) if case.shapes else []
        self.weights = pruned + extra
        self.first = tensors_like(self.weights, fill, 11)
        self.second = tensors_like(self.weights, fill, 12, positive=True)
        self.steps = [torch.full((), float(t), device=device) for _ in self.weights]
        self.fresh = t == 0
        patterns = getattr(case, "patterns", None)
        self.state = ShrinkState(pruned, case.k, patterns) if pruned else None

    def _scalar(self, name, device):
        value = self.options.pop(name, None)
        return None if value is None else torch.tensor(value, device=device)

    def step(self, table, grads, found_inf=None, frozen=False, bracket=True):
        s = self.state
        k, *state = (
            no_state(self.weights[0].device)
            if s is None
            else (s.k, s.thresholds, s.packed, s.flips, s.scratch)
        )
        scalars = (*self.options.values(), self.lr_tensor, self.scale)
        patterns = [] if s is None else s.patterns
        tail = (*scalars, k, self.shrink, *state, found_inf, frozen, bracket, patterns)
        if self.kind == "adam":
            lists = (grads, self.first, self.second, self.steps)
            table["adam_soft_shrink_"](self.weights, *lists, *tail)
        else:
            buffers = self.first if self.options["momentum"] else []
            table["sgd_soft_shrink_"](
                self.weights, grads, buffers, [self.fresh] * len(buffers), *tail
            )
        self.fresh = False

    def tensors(self):
        lists = {"weights": self.weights, "first moments": self.first}
        lists |= {"second moments": self.second, "steps": self.steps}
        tensors_by_name = {
            f"{name}[{i}]": x for name, xs in lists.items() for i, x in enumerate(xs)
        }
        if self.state is not None:
            s = self.state
            tensors_by_name |= {"thresholds": s.thresholds, "masks": s.packed, "flips": s.flips}
        return tensors_by_name


def with_equal_nans(x):
    """NaNs made equal: the op schemas do not specify their payloads."""
    return torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x


def assert_same(back_end, actual, expected, when):
    assert_same_tensors(back_end, actual, expected.tensors(), when)


def assert_same_tensors(back_end, actual, expected, when):
    for name, x in actual.tensors().items():
        what = f"{back_end}, {name} {when}"
        assert_bitwise_equal(with_equal_nans(x.cpu()), with_equal_nans(expected[name].cpu()), what)


@cache
def reference_steps(kind, rule, case, steps, **options):
    """Per step of the reference: the gradients, and all tensors after it.

    Gradients of every other step are bfloat16 for every other weight; the fourth step is frozen.
    """
    training, history = Training(kind, rule, case, **options), []
    for number in range(steps):
        grads = tensors_like(training.weights, options.get("fill") or case.fill, 100 + number)
        if number % 2:
            grads = [g.bfloat16() if i % 2 else g for i, g in enumerate(grads)]
        training.step(REFERENCE, [g.clone() for g in grads], frozen=number == 3)
        history.append((grads, {name: x.clone() for name, x in training.tensors().items()}))
    return history


def check(back_end, kind, rule, case, steps=3, bracket=True, **options):
    """Several steps on a back end; see `reference_steps`."""
    table = back_end.load()
    actual = Training(kind, rule, case, back_end.device, **options)
    history = reference_steps(kind, rule, case, steps, **options)
    for number, (grads, expected) in enumerate(history):
        copied = [g.to(back_end.device, copy=True) for g in grads]
        actual.step(table, copied, frozen=number == 3, bracket=bracket)
        assert_same_tensors(back_end, actual, expected, f"after step {number} of {case.name}")
        for g, before in zip(copied, grads, strict=True):
            assert_bitwise_equal(g.cpu(), before, f"{back_end}, a gradient")


@pytest.mark.parametrize(("kind", "rule"), RULES, ids=lambda x: x.replace(" ", "-"))
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_every_rule_and_then_frozen(back_end, kind, rule):
    check(back_end, kind, rule, MIXED, steps=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_the_bracket_misses_behind_an_update(back_end, kind):
    """The update is made once, whatever becomes of the shrink in front of which it stands."""
    for factor in (1e-6, 1e6):
        expected = Training(kind, "plain", MIXED)
        actual = Training(kind, "plain", MIXED, back_end.device)
        misses = []
        for number in range(2):
            grads = tensors_like(expected.weights, "normal", 7 + number)
            expected.step(REFERENCE, grads)
            actual.step(back_end.load(), [g.to(back_end.device) for g in grads])
            assert_same(back_end, actual, expected, f"with thresholds times {factor}")
            expected.state.thresholds.mul_(factor)
            actual.state.thresholds.mul_(factor)
            misses.append(int(actual.state.scratch[0]))
        assert misses[1] - misses[0] == len(MIXED.k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_named_cases(back_end, kind):
    for case in some(NAMED, back_end):
        if case.fill != "special":
            check(back_end, kind, "plain", case, steps=1 if back_end.slow else 2)


@pytest.mark.parametrize("rule", ["plain", "coupled decay", "odd scale, decay"])
@pytest.mark.parametrize("fill", ["special", "magnitudes"])
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_adam_on_every_kind_of_float(back_end, fill, rule):
    """Selecting stops short of the NaNs: their order among themselves is not defined."""
    case = Case(f"floats of kind {fill}", ((600,), (65,)), (200, 9), fill)
    check(back_end, "adam", rule, case, steps=1, t=5)


@pytest.mark.parametrize("rule", ["plain", "no momentum", "nesterov", "odd scale"])
@pytest.mark.parametrize("fill", ["special", "magnitudes"])
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_sgd_on_every_kind_of_float(back_end, fill, rule):
    case = Case(f"floats of kind {fill}", ((600,), (65,)), (200, 9), fill)
    check(back_end, "sgd", rule, case, steps=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_random_shapes(back_end, kind):
    for case in RANDOM_SMALL if back_end.slow else RANDOM:
        if case.fill not in ("special", "magnitudes"):
            check(back_end, kind, "coupled decay", case, steps=2)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_shared_by_threads(back_end, kind, count, threads):
    threads(count)
    check(back_end, kind, "plain", LARGE[0], steps=2, rest=((300_000,), (513,)), fill="normal")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_without_weights_to_prune(back_end, kind):
    check(back_end, kind, "plain", Case("none", (), ()), rest=(*REST, (31, 33)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_without_other_weights_and_without_the_bracket(back_end, kind):
    check(back_end, kind, "plain", MIXED, rest=(), bracket=False)


@pytest.mark.parametrize("t", [0, 9, 1_000, 1_000_000])
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_bias_corrections_at_any_step(back_end, t):
    check(back_end, "adam", "plain", MIXED, steps=2, t=t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_thirty_steps_find_the_bracket_again_and_again(back_end, kind):
    short = back_end.interpreted or (back_end.slow and not FULL)
    check(back_end, kind, "plain", MIXED, steps=3 if short else 30)


@pytest.mark.parametrize("flag", [1.0, 2.0, float("nan")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_found_inf_leaves_everything_unmodified(back_end, kind, flag):
    table = back_end.load()
    training = Training(kind, "plain", MIXED, back_end.device)
    grads = tensors_like(training.weights, "normal", 1)
    training.step(table, grads)
    before = {name: x.clone() for name, x in training.tensors().items()}
    for frozen in (False, True):
        found_inf = torch.tensor(flag, device=back_end.device)
        training.step(table, grads, found_inf, frozen)
        for name, x in training.tensors().items():
            assert_bitwise_equal(x, before[name], f"{back_end}, {name} under found_inf {flag}")
    training.step(table, grads, torch.zeros((), device=back_end.device))
    assert not torch.equal(training.weights[0], before["weights[0]"])


@pytest.mark.parametrize("flush", [False, True], ids=["gradual", "flush-to-zero"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_bits_do_not_depend_on_the_floating_point_mode(back_end, kind, flush):
    case = Case("tiny and huge", ((3000,),), (2000,), "magnitudes")
    rule = "coupled decay" if kind == "adam" else "nesterov"
    ((grads, expected),) = reference_steps(kind, rule, case, 1)
    actual = Training(kind, rule, case, back_end.device)
    grads, table = [g.to(back_end.device) for g in grads], back_end.load()
    assert torch.set_flush_denormal(flush)
    try:
        actual.step(table, grads)
    finally:
        torch.set_flush_denormal(False)
    assert_same_tensors(back_end, actual, expected, f"with flush {flush}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_does_not_depend_on_the_floating_point_mode(kind):
    case = Case("tiny and huge", ((3000,),), (2000,), "magnitudes")
    results = []
    for flush in (False, True):
        training = Training(kind, "plain", case)
        grads = tensors_like(training.weights, "magnitudes", 1)
        assert torch.set_flush_denormal(flush)
        try:
            training.step(REFERENCE, grads)
        finally:
            torch.set_flush_denormal(False)
        results.append(training)
    assert_same("reference", *results, "under flush-to-zero")
