"""Pruning in a loop of Accelerate, against a plain loop, bit for bit."""

import pytest
import torch

from tests.integrations.loops import (
    ENGINES,
    METHODS,
    RESUMED,
    STEPS,
    Net,
    arguments,
    assert_same,
    assert_sparse,
    batches,
    optimizer_of,
    pretend,
    train_plainly,
)

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
from issp.integrations.accelerate import attach  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps its precision for the process."""
    reset = accelerate.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)
    yield
    reset(reset_partial_state=True)


class Loop:
    """A user's loop."""

    def __init__(self, name, accumulate=1, seed=0, **options):
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, **options
        )
        model = Net(seed)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer_of(model))
        torch.manual_seed(3)
        self.pruner = attach(self.accelerator, self.model, self.optimizer, **arguments(name))

    def train(self, first=0, last=STEPS, folder=None):
        accelerator = self.accelerator
        accumulate = accelerator.gradient_accumulation_steps
        for i, (x, y) in enumerate(batches(STEPS * accumulate)):
            if not first * accumulate <= i < last * accumulate:
                continue
            with accelerator.accumulate(self.model):
                loss = (self.model(x) - y).abs().mean() + self.pruner.loss()
                accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if folder is not None:
                accelerator.save_state(str(folder / str(i + 1)))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_equals_a_plain_loop(name, accumulate):
    loop = Loop(name, accumulate)
    loop.train()
    assert loop.pruner.step_count == STEPS
    model = loop.pruner.finalize()
    assert_same(model, train_plainly(name, accumulate)[0])
    assert_sparse(model, loop.pruner)


@pytest.mark.parametrize("name, step", RESUMED)
def test_resumes_with_equal_bits(name, step, tmp_path):
    Loop(name).train(last=step, folder=tmp_path)
    loop = Loop(name, seed=1)
    loop.accelerator.load_state(str(tmp_path / str(step)))
    assert loop.pruner.step_count == step
    loop.train(first=step)
    model = loop.pruner.finalize()
    expected, pruner = train_plainly(name)
    assert_same(model, expected)
    for kept, mask in zip(loop.pruner.masks().values(), pruner.masks().values(), strict=True):
        assert torch.equal(kept, mask)


def test_a_state_is_not_loaded_past_a_pruner_that_comes_later(tmp_path):
    Loop("iss-p").train(last=3, folder=tmp_path)
    accelerator = accelerate.Accelerator(cpu=True)
    model = Net()
    accelerator.prepare(model, optimizer_of(model))
    with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
        accelerator.load_state(str(tmp_path / "3"))


def test_reduced_precision_on_a_cpu():
    loop = Loop("iss-r", mixed_precision="bf16")
    loop.train()
    assert_sparse(loop.pruner.finalize(), loop.pruner)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_that_shard_are_refused(engine, monkeypatch):
    accelerator = accelerate.Accelerator(cpu=True)
    model = Net()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    pretend(monkeypatch, accelerator.state, engine)
    with pytest.raises(ValueError, match=f"{engine} splits the weights.*DistributedDataParallel"):
        attach(accelerator, model, optimizer)


def test_what_cannot_be_right_is_refused():
    accelerator = accelerate.Accelerator(cpu=True)
    model = Net()
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsty'"):
        attach(accelerator, model, optimizer_of(model), sparsty=0.9)
    with pytest.raises(ValueError, match="needs the optimizer's hook"):
        attach(accelerator, model, optimizer_of(model), hook=False)
