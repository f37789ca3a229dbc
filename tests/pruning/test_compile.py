"""torch.compile around the training step: the pruner stays in Python, with the bits of eager."""

import pytest
import torch
from torch._dynamo.utils import counters

import issp
from tests.asserts import assert_bitwise_equal
from tests.pruning.networks import net
from tests.pruning.wrapping_optimizers import Lookahead

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = {"schedule": issp.Cubic(0.0, 0.9, begin=0, end=4), "freeze_at": 6}
STEPS = 9


@pytest.fixture(autouse=True)
def _own_caches():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(call):
    return torch.compile(call, backend="aot_eager")


def iterate(model, opt_step, opt, number):
    rng = torch.Generator().manual_seed(number)
    opt.zero_grad()
    model(torch.randn(4, 3, 6, 6, generator=rng)).square().mean().backward()
    opt_step()


def assert_same(a, b, pruners):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert_bitwise_equal(x.detach(), y.detach(), "a weight under compile")
    first, second = pruners
    assert first.step_count == second.step_count and first.flips() == second.flips()
    for name, mask in second.masks().items():
        assert_bitwise_equal(first.masks()[name], mask, f"mask of {name} under compile")
    assert first.frozen and second.frozen


@pytest.mark.full
def test_a_compiled_model_with_an_eager_optimizer():
    runs = []
    for wrap in (compiled, lambda model: model):
        model = net()
        opt = torch.optim.Adam(model.parameters(), 1e-2, fused=True)
        pruner = issp.attach(model, opt, **SCHEDULE)
        called = wrap(model)
        for number in range(STEPS):
            iterate(called, opt.step, opt, number)
        runs.append((model, pruner))
    (a, first), (b, second) = runs
    assert_same(a, b, (first, second))


@pytest.mark.parametrize(
    "name",
    [
        "Adam",
        pytest.param("SGD", marks=pytest.mark.full),
        pytest.param("AdamW", marks=pytest.mark.full),
    ],
)
def test_a_compiled_step_of_issp_optim_has_the_bits_of_eager(name):
    runs = []
    for wrap in (compiled, lambda step: step):
        model = net()
        options = {"momentum": 0.9} if name == "SGD" else {}
        opt = getattr(issp.optim, name)(model.parameters(), lr=1e-2, **options)
        pruner = issp.attach(model, opt, **SCHEDULE)
        step = wrap(opt.step)
        for number in range(STEPS):
            # Another k in every step, then fixed masks: nothing is compiled anew for it.
            with torch._dynamo.config.patch(error_on_recompile=number > 1):
                iterate(model, step, opt, number)
        assert opt.report[0].fused
        runs.append((model, pruner))
    (a, first), (b, second) = runs
    assert_same(a, b, (first, second))


@pytest.mark.full
def test_the_hook_in_a_compiled_step_of_torch_is_a_step_by_hand():
    """torch's compiled update rounds otherwise than its eager one: both runs compile it."""
    runs = []
    for hook in (True, False):
        torch._dynamo.reset()
        model = net()
        opt = torch.optim.Adam(model.parameters(), 1e-2)
        pruner = issp.attach(model, opt, hook=hook, **SCHEDULE)
        step = compiled(opt.step)
        for number in range(STEPS):
            iterate(model, step, opt, number)
            if not hook:
                pruner.step()
        runs.append((model, pruner))
    (a, first), (b, second) = runs
    assert_same(a, b, (first, second))


def test_the_pruner_is_not_traced():
    model = net()
    opt = issp.optim.SGD(model.parameters(), lr=0.1)
    issp.attach(model, opt, sparsity=0.9)
    step = compiled(opt.step)
    for number in range(3):
        iterate(model, step, opt, number)
    assert counters["frames"]["total"] < 20  # 120 when dynamo follows the pruner's Python


def test_fullgraph_is_refused_in_one_sentence():
    model = net()
    opt = issp.optim.SGD(model.parameters(), lr=0.1)
    issp.attach(model, opt, sparsity=0.9)
    step = torch.compile(opt.step, backend="eager", fullgraph=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(Exception, match="leave out fullgraph=True"):
        step()


def test_a_compiled_step_of_a_wrapper_is_refused():
    model = net()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    opt = Lookahead(inner)
    issp.attach(model, opt, sparsity=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="compile the model, and let the optimizer step as it is"):
        torch.compile(opt.step, backend="eager")()
