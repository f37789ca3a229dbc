"""The reference's optimizer rules: against exact arithmetic and against torch's fused kernels."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from issp.ops.reference import updates as rules
from tests.asserts import assert_bitwise_equal
from tests.cases import Case

# Divisible by every vector's length: torch's kernels round their scalar tails differently.
NUMEL = 64 * 64


def nearest(value: Fraction) -> float:
    """The float32 nearest to an exact number, ties to even."""
    if value == 0:
        return 0.0
    exponent = -149
    while abs(value) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    return float(round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def test_fma_and_rounding_are_exact():
    """Random floats, near cancellations, and sums on both sides of a tie."""
    case = Case("magnitudes", ((400,),), (0,), "normal")
    (x,) = case.build(torch.float32)
    a, b = x[:200], x[200:].flip(0)
    c = torch.where(torch.arange(200) % 2 == 0, -(a * b), x[100:300] * 1e-8)
    tie = torch.tensor([1.0 + 2.0**-12, 2.0**-24 + 2.0**-60, 3.0, 2.0**-130])
    a, b = torch.cat([a, tie]), torch.cat([b, tie])
    c = torch.cat([c, torch.tensor([-(2.0**-24), 1.0, 2.0**-149, -(2.0**-149)])])
    result = rules.fma(*(rules.widen(y) for y in (a, b, c)))
    for p, q, r, actual in zip(a.tolist(), b.tolist(), c.tolist(), result.tolist(), strict=True):
        assert actual == nearest(Fraction(p) * Fraction(q) + Fraction(r)), (p, q, r)


def test_widening_and_narrowing_keep_every_kind_of_float():
    (x,) = Case("special", ((600,),), (0,), "special").build(torch.float32)
    (y,) = Case("magnitudes", ((600,),), (0,), "magnitudes").build(torch.float32)
    for values in (x, y):
        assert_bitwise_equal(rules.narrow(rules.widen(values)), values, "there and back")


def options(**values):
    return {"weight_decay": 0.0, "maximize": False, "scale": None, **values}


RULES = [
    options(),
    options(weight_decay=0.01, maximize=True),
    options(weight_decay=0.01, scale=1024.0),
    options(weight_decay=0.05, maximize=True, scale=3.7),
]


def gradients(step):
    source = torch.Generator().manual_seed(step)
    exponent = torch.rand(NUMEL, generator=source) * 8 - 6
    return torch.randn(NUMEL, generator=source) * 10**exponent


def follow(optimizer, parameter, rule, scale):
    """Six steps of torch's; before each, `rule` is asked for the result."""
    for step in range(6):
        parameter.grad = gradients(step)
        if scale is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())
        grad = rules.gradient(parameter.grad, getattr(optimizer, "grad_scale", None), rule.maximize)
        state = {k: v.clone() for k, v in optimizer.state.get(parameter, {}).items()}
        expected = rule(rules.widen(parameter.detach()), grad, state, step)
        optimizer.step()
        actual = (parameter.detach(), *rule.moments(optimizer.state[parameter]))
        for i, (x, y) in enumerate(zip(expected, actual, strict=True)):
            assert_bitwise_equal(rules.narrow(x), y, f"tensor {i} after step {step}")


class AdamRule:
    def __init__(self, maximize, **numbers):
        self.maximize, self.numbers = maximize, numbers

    def __call__(self, w, g, state, step):
        moments = [rules.widen(m) for m in self.moments(state)] or [torch.zeros_like(w)] * 2
        return rules.adam_updated(w, g, *moments, step + 1, **self.numbers)

    @staticmethod
    def moments(state):
        return [state[key] for key in ("exp_avg", "exp_avg_sq") if key in state]


class SgdRule(AdamRule):
    def __call__(self, w, g, state, step):
        moments = [rules.widen(m) for m in self.moments(state)]
        buffer = (moments or [torch.zeros_like(w)])[0] if self.numbers["momentum"] else None
        w, buffer = rules.sgd_updated(w, g, buffer, step == 0, **self.numbers)
        return (w,) if buffer is None else (w, buffer)

    @staticmethod
    def moments(state):
        return [x for x in (state.get("momentum_buffer"),) if x is not None]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.999), (0.3, 0.6), (0.0, 0.9)], ids=str)
def test_adam_is_torchs(betas, decoupled, rule):
    parameter = torch.nn.Parameter(torch.randn(NUMEL) * 0.05)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    common = {"lr": 2.3e-3, "eps": 1e-8, "weight_decay": rule["weight_decay"]}
    optimizer = kind([parameter], betas=betas, maximize=rule["maximize"], fused=True, **common)
    numbers = {"beta1": betas[0], "beta2": betas[1], "decoupled": decoupled, **common}
    follow(optimizer, parameter, AdamRule(rule["maximize"], **numbers), rule["scale"])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)],
)
def test_sgd_is_torchs(momentum, dampening, nesterov, rule):
    parameter = torch.nn.Parameter(torch.randn(NUMEL) * 0.05)
    numbers = {"lr": 2.3e-3, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    numbers["weight_decay"] = rule["weight_decay"]
    optimizer = torch.optim.SGD([parameter], maximize=rule["maximize"], fused=True, **numbers)
    follow(optimizer, parameter, SgdRule(rule["maximize"], **numbers), rule["scale"])
