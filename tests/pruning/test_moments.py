"""Masks in the state of any optimizer: its own strided moments are masked, the rest is named."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn

import issp
from tests.asserts import assert_bitwise_equal

STEPS_AFTER_FREEZE = 55


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.LayerNorm(64))


def weights(model):
    return [model[0].weight, model[2].weight]


def backward(model, number):
    source = torch.Generator().manual_seed(number)
    x = torch.randn(4, 64, generator=source)
    model.zero_grad()
    (model(x) - torch.randn(4, 64, generator=source)).square().mean().backward()


def train(model, opt, steps, begin=0):
    for number in range(begin, begin + steps):
        backward(model, number)
        opt.step()


class Coded(Tensor):
    """Numbers kept as int8 codes, as quantized optimizers keep their moments."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def decoded(self):
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"no {func} of codes")


class OwnOptimizer(torch.optim.Optimizer):
    """Descent with a momentum that `form` stores; what else is in the state, `extra` says."""

    def __init__(self, params, form, extra=None):
        super().__init__(params, {"lr": 0.05})
        self.form, self.extra = form, extra

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                grad = p.grad + 0.9 * state.get("plain", torch.zeros_like(p))
                state["plain"] = grad
                state["moment"] = self.form(grad)
                state["step"] = state.get("step", 0) + 1  # a number, another object in every step
                p.sub_(grad, alpha=group["lr"])
                state.update(self.extra(p) if self.extra is not None else {})


def inference(x):
    with torch.inference_mode():
        return x.clone()


FORMS = {
    "subclass": (lambda x: Coded((x * 10).to(torch.int8), 0.1), "moment (Coded)"),
    "codes": (lambda x: (x * 10).to(torch.uint8), "moment (uint8)"),
    "packed codes": (lambda x: (x * 10).to(torch.uint8).flatten()[::2], "moment (uint8 of shape"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "moment (float8_e4m3fn)"),
    "sparse": (lambda x: x.to_sparse(), "moment (sparse_coo)"),
    "stacked": (lambda x: torch.stack([x, x * 2]), "moment (float32 of shape (2, "),
    "stacked at the end": (lambda x: torch.stack([x, x], -1), ", 2))"),
    "flat": (lambda x: x.flatten(), "moment (float32 of shape ("),
    "one number for all": (lambda x: x.mean().expand(x.shape), "moment (float32)"),
    "inference tensor": (inference, "moment (float32)"),
    "complex": (lambda x: torch.complex(x, x), "moment (complex64)"),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_masked_is_named_once(form):
    make, name = FORMS[form]
    model = network()
    opt = OwnOptimizer(model.parameters(), make)
    pruner = issp.attach(model, opt, sparsity=0.75, freeze_at=5)
    with pytest.warns(UserWarning, match="masks will not reach") as caught:
        train(model, opt, 8)
    (message,) = [str(w.message) for w in caught]
    assert name in message and "OwnOptimizer" in message and "plain" not in message
    assert pruner.frozen and pruner.step_count == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, STEPS_AFTER_FREEZE, begin=8)
    for w, mask in zip(weights(model), pruner.masks().values(), strict=True):
        assert int((~mask).sum()) == w.numel() * 3 // 4
        assert torch.equal(w != 0, mask)
        assert torch.equal(opt.state[w]["plain"] != 0, mask)


MASKED = {
    "the moment twice": lambda x: x,
    "with gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.t().contiguous().t(),
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "parameter": lambda x: nn.Parameter(x.clone()),
}


@pytest.mark.parametrize("form", MASKED)
def test_own_strided_moments_are_masked(form):
    model = network()
    opt = OwnOptimizer(model.parameters(), MASKED[form])
    pruner = issp.attach(model, opt, sparsity=0.75, freeze_at=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 8)
    for w, mask in zip(weights(model), pruner.masks().values(), strict=True):
        assert torch.equal(w != 0, mask)
        assert not opt.state[w]["moment"][~mask].any() and opt.state[w]["moment"][mask].any()


def test_small_entries_of_the_state_are_not_named():
    """Counters, step sizes and factored moments hold no number for each weight."""
    model = network()
    rows = {
        "rows": torch.ones(96, 1),
        "columns": torch.ones(1, 64),
        "count": torch.tensor(3),
        "preconditioner": torch.ones(100, 100),
        "chosen": torch.ones(96, 64, dtype=torch.bool),
    }
    opt = OwnOptimizer(model.parameters(), lambda x: x.mean(), lambda p: rows)
    issp.attach(model, opt, sparsity=0.75, freeze_at=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 3)


@pytest.mark.parametrize("attached_late", [False, True])
def test_replaced_moments_are_let_go(attached_late):
    model = network()
    opt = OwnOptimizer(model.parameters(), lambda x: x * 2)
    if attached_late:
        train(model, opt, 1)
    average = {name: x.clone() for name, x in model.state_dict().items()}
    pruner = issp.attach(model, opt, sparsity=0.75, ema=average)
    train(model, opt, 1, begin=1)
    old = [weakref.ref(opt.state[w][name]) for w in weights(model) for name in ("plain", "moment")]
    train(model, opt, 1, begin=2)
    assert [ref() for ref in old] == [None] * 4
    pruner.freeze()


def test_a_state_that_exists_is_named_at_attach():
    model = network()
    opt = OwnOptimizer(model.parameters(), lambda x: (x * 10).to(torch.uint8))
    train(model, opt, 1)
    with pytest.warns(UserWarning, match=r"will not reach moment \(uint8\)"):
        pruner = issp.attach(model, opt, sparsity=0.75)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 1, begin=1)
    other = OwnOptimizer(model.parameters(), lambda x: x.to_sparse())
    pruner.reattach(other)
    with pytest.warns(UserWarning, match="sparse_coo"):
        train(model, other, 1, begin=2)


class SAM(OwnOptimizer):
    """Sharpness-aware minimization: the ascent is undone by the copy in the state."""

    @torch.no_grad()
    def step(self, closure):
        params = self.param_groups[0]["params"]
        for p in params:
            state = self.state[p]
            state["old_p"], state["e_w"] = p.data.clone(), 0.05 * p.grad / p.grad.norm()
            p.add_(state["e_w"])
        with torch.enable_grad():
            closure()
        for p in params:
            state = self.state[p]
            p.data = state["old_p"]  # from now on the weight's own memory
            state["moment"] = p.grad + 0.9 * state.get("moment", torch.zeros_like(p))
            p.sub_(state["moment"], alpha=0.05)


def test_a_copy_that_has_become_the_weight():
    model = network()
    opt = SAM(model.parameters(), None)
    pruner = issp.attach(model, opt, sparsity=0.75, freeze_at=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(6 + STEPS_AFTER_FREEZE):
            backward(model, number)
            opt.step(lambda number=number: backward(model, number))
    assert pruner.step_count == 6 + STEPS_AFTER_FREEZE and pruner.frozen
    for w, mask in zip(weights(model), pruner.masks().values(), strict=True):
        assert w.data_ptr() == opt.state[w]["old_p"].data_ptr()
        assert int((~mask).sum()) == w.numel() * 3 // 4
        assert torch.equal(w != 0, mask)
        assert not opt.state[w]["moment"][~mask].any() and opt.state[w]["moment"][mask].any()


# All or nothing


def everything(model, pruner):
    tensors = {name: x.clone() for name, x in model.state_dict().items()}
    tensors |= {f"mask of {name}": x for name, x in pruner.masks().items()}
    return tensors | {"flips": torch.tensor(list(pruner.flips().values()))}


def assert_unchanged(before, after):
    assert before.keys() == after.keys()
    for name, x in after.items():
        assert_bitwise_equal(x, before[name], name)


def two_buckets():
    """A model whose weights have an optimizer each, and averages that someone else keeps."""
    model = network()
    opts = [
        torch.optim.Adam(model[0].parameters(), lr=1e-2),
        torch.optim.SGD(model[2].parameters(), lr=1e-2, momentum=0.9),
    ]
    average = {name: x.clone() for name, x in model.state_dict().items()}
    return model, opts, average


@pytest.mark.parametrize("late", [False, True], ids=["by hand", "freeze_at"])
def test_a_freeze_that_fails_changes_nothing(late):
    model, opts, average = two_buckets()
    freeze_at = 4 if late else None
    pruner = issp.attach(model, opts, sparsity=0.75, ema=average, freeze_at=freeze_at)
    for number in range(3):
        backward(model, number)
        for opt in opts[::-1]:
            opt.step()
    good, average["2.weight"] = average["2.weight"], average["2.weight"].to_sparse()
    message = "ema: the average of 2 cannot be masked"
    if late:
        backward(model, 3)
        opts[1].step()
        with pytest.raises(ValueError, match=message):
            opts[0].step()
    else:
        before = everything(model, pruner)
        moments = [opts[i].state[w] for i, w in enumerate(weights(model))]
        kept = [{name: x.clone() for name, x in state.items()} for state in moments]
        with pytest.raises(ValueError, match=message):
            pruner.freeze()
        assert_unchanged(before, everything(model, pruner))
        for a, b in zip(kept, moments, strict=True):
            assert_unchanged(a, b)
    assert not pruner.frozen and pruner.step_count == 3 + late
    summary = pruner.summary()
    assert summary.zeros == 0 and summary.selected == 2 * 96 * 64 * 3 // 4
    assert bool((average["0.weight"] != 0).all())
    average["2.weight"] = good
    pruner.freeze()
    assert pruner.frozen and pruner.summary().zeros == 2 * 96 * 64 * 3 // 4
    for name, mask in pruner.masks().items():
        assert torch.equal(average[f"{name}.weight"] != 0, mask)


def test_averages_that_cannot_be_masked_are_refused_when_attaching():
    model, opts, average = two_buckets()
    average["0.weight"] = average["0.weight"].to_sparse()
    with pytest.raises(ValueError, match="ema: the average of 0 cannot be masked"):
        issp.attach(model, opts, sparsity=0.75, ema=average)
    before = model[0].weight.detach().clone()
    backward(model, 0)
    for opt in opts:
        opt.param_groups[0]["lr"] = 0.0
        opt.step()
    assert_bitwise_equal(model[0].weight.detach(), before, "a weight after a refused attach")


def test_a_frozen_state_that_cannot_be_applied_changes_nothing():
    pruners = []
    for _ in range(2):
        model, opts, average = two_buckets()
        pruners.append((issp.attach(model, opts, sparsity=0.75, ema=average), model, average))
    (frozen, *_), (pruner, model, average) = pruners
    frozen.freeze()
    good, average["2.weight"] = average["2.weight"], average["2.weight"].to_sparse()
    before = everything(model, pruner)
    with pytest.raises(ValueError, match="ema: the average of 2 cannot be masked"):
        pruner.load_state_dict(frozen.state_dict())
    assert not pruner.frozen
    assert_unchanged(before, everything(model, pruner))
    average["2.weight"] = good
    pruner.load_state_dict(frozen.state_dict())
    assert pruner.frozen and pruner.summary().zeros == 2 * 96 * 64 * 3 // 4


def test_averages_in_the_memory_of_the_weights():
    model, opts, _ = two_buckets()
    pruner = issp.attach(model, opts, sparsity=0.75, ema=model.state_dict())
    backward(model, 0)
    for opt in opts:
        opt.step()
    pruner.freeze()
    assert pruner.summary().zeros == pruner.summary().selected == 2 * 96 * 64 * 3 // 4


def test_from_zeros_that_is_refused_leaves_no_hook():
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match="no weight to prune is zero"):
        issp.attach(model, opt, from_zeros=True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    train(model, opt, 1)
    assert_unchanged(before, model.state_dict())


# Packages


@pytest.mark.full
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchao(kind):
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    check_quantized(getattr(optim, kind), {"lr": 1e-3, "weight_decay": 0.1}, "exp_avg (OptimState")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit", "SGD8bit", "AdEMAMix8bit"])
def test_bitsandbytes(kind):
    optim = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").optim
    options = {"lr": 1e-3} | ({"momentum": 0.9} if kind == "SGD8bit" else {})
    check_quantized(getattr(optim, kind), options, "state1 (uint8")


def check_quantized(cls, options, name):
    model = network()
    opt = cls(model.parameters(), **options)
    pruner = issp.attach(model, opt, sparsity=0.75, freeze_at=5)
    with pytest.warns(UserWarning) as caught:
        train(model, opt, 5 + STEPS_AFTER_FREEZE)
    messages = [str(w.message) for w in caught if "masks will not reach" in str(w.message)]
    assert len(messages) == 1 and name in messages[0]
    assert pruner.frozen and pruner.step_count == 5 + STEPS_AFTER_FREEZE
    for w, mask in zip(weights(model), pruner.masks().values(), strict=True):
        assert int((~mask).sum()) == w.numel() * 3 // 4
        assert torch.equal(w != 0, mask)
