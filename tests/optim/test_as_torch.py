"""issp.optim in place of torch.optim: whatever the class it replaces takes, with equal results.

torch's fused steps are narrower than torch's default steps: dtypes, devices, sparse and complex
tensors, memory orders, gradients of another dtype, momentum that only some parameters have. Each
case puts such a parameter into the group of a pruned layer and compares with torch's class as it is
without options. Where torch steps ours too, the bits are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import issp
from tests.asserts import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "Adam": {"lr": 1e-2, "weight_decay": 0.01},
    "AdamW": {"lr": 1e-2},
    "SGD": {"lr": 1e-2},
    "SGD-momentum": {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
SGD_KINDS = [kind for kind in KINDS if kind.startswith("SGD")]


@pytest.fixture(autouse=True)
def _even_by_the_reference(monkeypatch):
    """Where no native back end is, the op is still what is tested."""
    monkeypatch.setattr(issp.backends, "by_reference", lambda device: [])


class Guest(NamedTuple):
    """Parameters beside a pruned layer, and their gradients.

    Args:
        params: makes them.
        grad: the gradient of a parameter in a step; by default random, like the parameter.
        reason: a part of what `report` says with a pruner attached; "" if the op takes the group.
    """

    params: Callable[[], Sequence[Tensor]]
    grad: Callable[[Tensor, int], Tensor | None]
    reason: str


def noise(p: Tensor, number: int) -> Tensor:
    source = torch.Generator().manual_seed(number)
    return torch.randn(p.shape, generator=source, dtype=p.dtype, device="cpu").to(p.device)


def of_dtype(dtype):
    return lambda: [nn.Parameter(torch.linspace(-1, 1, 8).to(dtype))]


def sharing_memory():
    one, other = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    other.data = one.data
    return [one, other]


class Own(nn.Parameter):
    pass


GUESTS = {
    "float64": Guest(of_dtype(torch.float64), noise, "float64"),
    "float16": Guest(of_dtype(torch.float16), noise, "float16"),
    "bfloat16": Guest(of_dtype(torch.bfloat16), noise, "bfloat16"),
    "complex": Guest(of_dtype(torch.complex64), noise, "complex64"),
    "0-dim": Guest(lambda: [nn.Parameter(torch.tensor(0.5))], noise, ""),
    "empty": Guest(lambda: [nn.Parameter(torch.empty(0, 4))], noise, "empty"),
    "another device": Guest(
        lambda: [nn.Parameter(torch.ones(4, device="meta"))], noise, "several devices"
    ),
    "gaps in memory": Guest(
        lambda: [nn.Parameter(torch.ones(4, 6)[:, ::2])], noise, "gaps or overlaps"
    ),
    "shared memory": Guest(sharing_memory, noise, "overlap in memory"),
    "gradient in the weight's memory": Guest(
        of_dtype(torch.float32), lambda p, number: p.detach(), "gradients[2] and weights[2] overlap"
    ),
    "own class": Guest(lambda: [Own(torch.ones(8))], noise, "weights of type Own"),
    "no gradient at first": Guest(
        of_dtype(torch.float32), lambda p, number: noise(p, number) if number else None, ""
    ),
    "no gradient at times": Guest(
        of_dtype(torch.float32), lambda p, number: None if number % 2 else noise(p, number), ""
    ),
    "float64, no gradient at first": Guest(
        of_dtype(torch.float64), lambda p, number: noise(p, number) if number else None, "float64"
    ),
    "transposed gradient": Guest(
        lambda: [nn.Parameter(torch.ones(4, 4))], lambda p, number: noise(p, number).t(), ""
    ),
    "channels_last": Guest(
        lambda: [nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last))],
        noise,
        "",
    ),
}


def sparse(p: Tensor, number: int) -> Tensor:
    return noise(p, number).relu().to_sparse()


def of_changing_dtype(p: Tensor, number: int) -> Tensor:
    p.grad = None  # or torch refuses the next line
    p.grad_dtype = (torch.float32, torch.float16, torch.float64, torch.float32)[number % 4]
    return noise(p, number).to(p.grad_dtype)


SGD_GUESTS = {
    "sparse gradient": Guest(of_dtype(torch.float32), sparse, "sparse"),
    "sparse at times": Guest(
        of_dtype(torch.float32),
        lambda p, number: (sparse if number % 2 else noise)(p, number),
        "sparse",
    ),
    "dtype of the gradient changes": Guest(of_dtype(torch.float32), of_changing_dtype, ""),
}


class Training:
    """A pruned layer and guests in one parameter group, stepped by torch's class or ours."""

    def __init__(self, library, kind: str, guest: Guest, pruned: bool, **options) -> None:
        torch.manual_seed(3)
        self.layer, self.guest = nn.Linear(8, 8), guest
        self.params = [*self.layer.parameters(), *guest.params()]
        name = kind.partition("-")[0]
        self.opt = getattr(library, name)(self.params, **KINDS[kind] | options)
        self.pruner = issp.attach(self.layer, self.opt, sparsity=0.5) if pruned else None

    def put_gradients(self, number: int, scale: float = 1.0) -> None:
        for i, p in enumerate(self.params):
            grad = noise(p, number) if i < 2 else self.guest.grad(p, number)
            p.grad = grad if grad is None or scale == 1 else grad * scale

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"parameter {i}": p.detach() for i, p in enumerate(self.params)}
        for i, state in self.opt.state_dict()["state"].items():
            tensors |= {f"{name} of {i}": x for name, x in state.items() if x is not None}
        return {name: x.to_dense() for name, x in tensors.items() if x.device.type != "meta"}


def assert_same(ours: Training, torchs: Training, bitwise: bool, when: str) -> None:
    expected, actual = torchs.tensors(), ours.tensors()
    assert expected.keys() == actual.keys(), when
    for name, x in actual.items():
        if bitwise:
            assert_bitwise_equal(x, expected[name], f"{name} {when}")
        else:  # torch's fused kernels and our op round in another order
            torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-7)


def both(kind, guest, pruned, **options):
    return (
        Training(issp.optim, kind, guest, pruned, **options),
        Training(torch.optim, kind, guest, pruned, **options),
    )


COMING_AND_GOING = (
    "float64, no gradient at first",
    "sparse at times",
    "dtype of the gradient changes",
)  # The op takes some of the steps.


def without_decay(name):
    """torch's SGD cannot add a decay to a sparse gradient."""
    return {"weight_decay": 0.0} if "sparse" in name else {}


@pytest.mark.parametrize("pruned", [False, True], ids=["alone", "pruned"])
@every_kind
@pytest.mark.parametrize("name", GUESTS | SGD_GUESTS)
def test_odd_parameters_and_gradients(name, kind, pruned):
    if name in SGD_GUESTS and kind not in SGD_KINDS:
        pytest.skip("torch's Adam takes no such gradients")  # see below
    guest = (GUESTS | SGD_GUESTS)[name]
    ours, torchs = both(kind, guest, pruned, **without_decay(name))
    bitwise, reports = True, []
    for number in range(5):
        for training in (ours, torchs):
            training.put_gradients(number)
            training.opt.step()
        if pruned:
            (info,) = ours.opt.report
            assert guest.reason in info.fallback_reason or name in COMING_AND_GOING
            assert info.fused is (info.fallback_reason == "")
            bitwise = bitwise and not info.fused
        assert_same(ours, torchs, bitwise, f"after step {number}")
        reports.append(None if not pruned else ours.opt.report[0].fused)
    if pruned:
        assert ours.pruner.summary().selected == 32 and ours.pruner.step_count == 5
        assert len(set(reports)) == (2 if name in COMING_AND_GOING else 1)


PLAIN = Guest(of_dtype(torch.float32), noise, "")

OPTIONS = {
    "maximize": ({"maximize": True}, KINDS, ""),
    "lr in a tensor": ({"lr": torch.tensor(1e-2)}, KINDS, ""),
    "lr in a vector": ({"lr": torch.tensor([1e-2])}, KINDS, ""),
    "lr in float64": ({"lr": torch.tensor(1e-2, dtype=torch.float64)}, KINDS, ""),
    "lr is an integer": ({"lr": 1}, KINDS, ""),
    "foreach": ({"foreach": True}, KINDS, "foreach is True"),
    "for loop": ({"foreach": False}, KINDS, "foreach is False"),
    "not fused": ({"fused": False}, KINDS, "fused is False"),
    "amsgrad": ({"amsgrad": True}, ["Adam", "AdamW"], "amsgrad"),
    "betas in tensors": (
        {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
        ["Adam", "AdamW"],
        "betas are tensors",
    ),
    "decay in a tensor": ({"weight_decay": torch.tensor(0.1)}, SGD_KINDS, "weight_decay"),
    "nesterov": ({"nesterov": True, "dampening": 0.0}, ["SGD-momentum"], ""),
    "no decay, no momentum": ({"weight_decay": 0, "momentum": 0}, ["SGD-momentum"], ""),
}


@pytest.mark.parametrize("pruned", [False, True], ids=["alone", "pruned"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, pruned):
    options, kinds, reason = OPTIONS[name]
    for kind in kinds:
        ours, torchs = both(kind, PLAIN, pruned, **options)
        for number in range(4):
            for training in (ours, torchs):
                training.put_gradients(number)
                training.opt.step(lambda: torch.tensor(7.0))
            assert_same(ours, torchs, not pruned or bool(reason), f"{kind} after step {number}")
        if pruned:
            assert reason in ours.opt.report[0].fallback_reason
            assert ours.opt.report[0].fused is (reason == "")


@every_kind
def test_differentiable_steps_build_a_graph(kind):
    results = []
    for library in (torch.optim, issp.optim):
        rate = torch.tensor(0.1, requires_grad=True)
        start = torch.linspace(-1, 1, 8, requires_grad=True)
        weight = start.clone()
        options = {"differentiable": True} | ({} if kind in SGD_KINDS else {"lr": rate})
        opt = getattr(library, kind.partition("-")[0])([weight], **KINDS[kind] | options)
        weight.grad = start * 2
        opt.step()
        weight.square().sum().backward()
        results.append([start.grad, rate.grad] if rate.grad is not None else [start.grad])
    assert len(results[0]) == (1 if kind in SGD_KINDS else 2)
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(b, a, "a gradient through the step")


@pytest.mark.parametrize("pruned", [False, True], ids=["alone", "pruned"])
def test_momentum_that_becomes_zero_under_nesterov(pruned):
    options = {"nesterov": True, "dampening": 0.0}
    ours, torchs = both("SGD-momentum", PLAIN, pruned, **options)
    for number, momentum in enumerate((0.9, 0.0, 0.0, 0.8)):
        for training in (ours, torchs):
            training.opt.param_groups[0]["momentum"] = momentum
            training.put_gradients(number)
            training.opt.step()
        assert_same(ours, torchs, not pruned, f"after step {number}")
    assert not pruned or ours.opt.report[0].fused


@pytest.mark.parametrize("pruned", [False, True], ids=["alone", "pruned"])
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize(
    ("guest", "options", "error"),
    [
        (SGD_GUESTS["sparse gradient"], {}, "sparse gradients"),
        (PLAIN, {"capturable": True}, "capturable"),
        (Guest(of_dtype(torch.float32), of_changing_dtype, ""), {}, "dtype|type"),
    ],
    ids=["sparse", "capturable", "dtype of the gradient"],
)
def test_what_torchs_class_refuses_is_refused_as_it_does(guest, options, error, kind, pruned):
    for training in both(kind, guest, pruned, **options):
        with pytest.raises((RuntimeError, AssertionError), match=error):
            for number in range(3):
                training.put_gradients(number)
                training.opt.step()


@pytest.mark.parametrize("pruned", [False, True], ids=["alone", "pruned"])
@every_kind
@pytest.mark.parametrize("name", ["plain", "float64", "no gradient at first", "sparse gradient"])
def test_gradient_scaler(name, kind, pruned):
    """Overflow in the first step, and later; what the op does not take is unscaled for torch."""
    guest = {"plain": PLAIN, **GUESTS, **SGD_GUESTS}[name]
    if name in SGD_GUESTS and kind not in SGD_KINDS:
        pytest.skip("torch's Adam takes no such gradients")
    ours, torchs = both(kind, guest, pruned, **without_decay(name))
    scalers = []
    for _ in range(2):
        scalers.append(torch.amp.GradScaler("cpu", init_scale=3000.0, growth_interval=2))
        scalers[-1].scale(torch.ones(()))  # it has no scale before its first use
    for number, overflow in enumerate((True, False, False, True, False)):
        for training, scaler in zip((ours, torchs), scalers, strict=True):
            training.put_gradients(number, scaler.get_scale())
            if overflow:
                training.params[0].grad[1, 2] = float("inf")
            scaler.step(training.opt)
            scaler.update()
        if number == 0 and not pruned:
            assert not ours.opt.state_dict()["state"]
        if number:
            bitwise = not pruned or bool(guest.reason)
            assert_same(ours, torchs, bitwise, f"after step {number}")
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert not hasattr(ours.opt, "found_inf") and not hasattr(ours.opt, "grad_scale")
    if pruned:
        assert ours.pruner.step_count == torchs.pruner.step_count == 3


@pytest.mark.parametrize("pruned", [False, True], ids=["alone", "pruned"])
@every_kind
def test_clipping_after_unscaling(kind, pruned):
    """The gradients are unscaled already when the step comes, and clipped."""
    ours, torchs = both(kind, GUESTS["float64"], pruned)
    scalers = []
    for _ in range(2):
        scalers.append(torch.amp.GradScaler("cpu", init_scale=3000.0, growth_interval=2))
        scalers[-1].scale(torch.ones(()))
    for number in range(4):
        for training, scaler in zip((ours, torchs), scalers, strict=True):
            training.put_gradients(number, scaler.get_scale())
            if number == 2:
                training.params[2].grad[3] = float("nan")
            scaler.unscale_(training.opt)
            nn.utils.clip_grad_norm_(training.params[:2], 0.5)
            scaler.step(training.opt)
            scaler.update()
        assert_same(ours, torchs, True, f"after step {number}")
    if pruned:
        assert ours.pruner.step_count == torchs.pruner.step_count == 3


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD-momentum"])
def test_a_weight_that_has_got_another_shape(kind, fused):
    """Its moments are those of the old shape: torch's fused kernels would read behind them."""
    ours = Training(issp.optim, kind, PLAIN, True, fused=fused)
    ours.put_gradients(0)
    ours.opt.step()
    ours.params[2].grad = None
    ours.params[2].data = torch.ones(6000)
    ours.put_gradients(1)
    before = ours.tensors()
    with pytest.raises(ValueError, match=r"has shape \(8,\) but its weight \(6000,\)"):
        ours.opt.step()
    for name, x in ours.tensors().items():
        assert_bitwise_equal(x, before[name], name)
    del ours.opt.state[ours.params[2]]
    ours.opt.step()
    assert ours.opt.report[0].fused


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("pruned", [False, True], ids=["alone", "pruned"])
def test_momentum_after_a_skipped_first_step(pruned, fused):
    """Fresh memory is NaN here: what a skipped step leaves unwritten would show."""
    ours, torchs = both("SGD-momentum", PLAIN, pruned)
    ours.opt.param_groups[0]["fused"] = fused
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for training in (ours, torchs):
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            scaler.scale(torch.ones(()))
            for number in range(3):
                training.put_gradients(number, scaler.get_scale())
                if number == 0:
                    training.params[0].grad.fill_(float("inf"))
                scaler.step(training.opt)
                scaler.update()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(ours, torchs, False, "after two steps that count")


def test_a_state_of_torchs_default_under_float64_is_taken_over():
    """torch counts steps in float64 then; the op needs them in float32."""
    torch.set_default_dtype(torch.float64)
    try:
        layer = nn.Linear(8, 8).float()
        opt = issp.optim.Adam(layer.parameters())
        for number in range(4):
            if number == 2:
                assert opt.state[layer.weight]["step"].dtype == torch.float64
                issp.attach(layer, opt, sparsity=0.5)
            for p in layer.parameters():
                p.grad = noise(p, number)
            opt.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert opt.report[0].fused
    assert_bitwise_equal(opt.state[layer.weight]["step"], torch.tensor(4.0), "the counter")


@pytest.mark.parametrize("kind", SGD_KINDS)
def test_sgd_on_a_channels_last_model(kind):
    def train(library, layout):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=layout)
        opt = library.SGD(net.parameters(), **KINDS[kind])
        pruner = issp.attach(net, opt, sparsity=0.5)
        for number in range(4):
            for p in net.parameters():
                p.grad = torch.empty_like(p).copy_(noise(p, number))
            opt.step()
        pruner.freeze()
        return net, opt

    ours, opt = train(issp.optim, torch.channels_last)
    expected, _ = train(issp.optim, torch.contiguous_format)
    torchs, _ = train(torch.optim, torch.channels_last)
    assert opt.report[0].fused
    for a, b, c in zip(*(net.parameters() for net in (ours, expected, torchs)), strict=True):
        assert_bitwise_equal(a.detach(), b.detach(), "a parameter")
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)


def test_entries_of_others_in_the_state_leave_the_step_fused():
    ours, torchs = both("AdamW", PLAIN, True)
    for number in range(4):
        for training in (ours, torchs):
            training.put_gradients(number)
            training.opt.step()
            for p in training.params:
                training.opt.state[p]["slow copy"] = p.detach().clone()
        assert_same(ours, torchs, False, f"after step {number}")
    assert ours.opt.report[0].fused
