"""A whole step in one CUDA graph, emulated: equal bits, counted replays, refusals."""

import pytest
import torch

import issp
from tests.asserts import assert_bitwise_equal
from tests.pruning.graph_emulator import Graph, on_cpu
from tests.pruning.networks import net

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "torch": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "issp SGD": lambda p: issp.optim.SGD(p, 0.1, momentum=0.9),
    "issp Adam": lambda p: issp.optim.Adam(p, 1e-2),
}


@pytest.fixture(autouse=True)
def _graphs_on_the_cpu(monkeypatch):
    on_cpu(monkeypatch)


class Run:
    """A model with input and target in fixed memory, as a graph needs them."""

    def __init__(self, name="torch", **options):
        self.model = net()
        self.opt = OPTIMIZERS[name](self.model.parameters())
        self.pruner = issp.attach(self.model, self.opt, **({"sparsity": 0.8} | options))
        self.x, self.y = torch.empty(4, 3, 6, 6), torch.empty(4, 10)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)

    def load(self, seed):
        rng = torch.Generator().manual_seed(seed)
        self.x.copy_(torch.randn(4, 3, 6, 6, generator=rng))
        self.y.copy_(torch.randn(4, 10, generator=rng))

    def iterate(self):
        self.opt.zero_grad(set_to_none=False)
        (self.model(self.x) - self.y).square().mean().backward()
        self.opt.step()

    def step(self, seed):
        self.load(seed)
        self.iterate()

    def tensors(self):
        states = [x for s in self.opt.state.values() for x in s.values() if x is not None]
        own = [x for b in self.pruner.buckets for x in vars(b.state).values()]
        grads = [p.grad for p in self.model.parameters()]
        replays = [self.pruner._counter._replays]
        tensors = [*self.model.parameters(), *grads, *states, *own, *replays]
        return [x for x in tensors if isinstance(x, torch.Tensor)]

    def capture(self, monkeypatch):
        graph = Graph()
        with graph.capture(monkeypatch, self.tensors()):
            self.iterate()
        return graph


def assert_same(actual, expected, when):
    for a, b in zip(actual.model.parameters(), expected.model.parameters(), strict=True):
        assert_bitwise_equal(a.detach(), b.detach(), f"a weight {when}")
    for name, mask in expected.pruner.masks().items():
        assert_bitwise_equal(actual.pruner.masks()[name], mask, f"mask of {name} {when}")
    assert actual.pruner.flips() == expected.pruner.flips(), when
    assert actual.pruner.thresholds() == expected.pruner.thresholds(), when
    assert actual.pruner.step_count == expected.pruner.step_count, when


@pytest.mark.parametrize("frozen", [False, True], ids=["pruning", "frozen"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replays_equal_eager_steps_and_are_counted(name, frozen, monkeypatch):
    captured, eager = Run(name), Run(name)
    for run in (captured, eager):
        for seed in range(3):
            run.step(seed)
        if frozen:
            run.pruner.freeze()
            run.step(3)
    graph = captured.capture(monkeypatch)
    assert_same(captured, eager, "after the capture, which takes no step")
    for seed in range(10, 15):
        captured.load(seed)
        graph.replay()
        eager.step(seed)
        assert_same(captured, eager, f"after replay {seed}")
    for run in (captured, eager):  # and without the graph again
        run.step(20)
    assert_same(captured, eager, "after one more step")
    kept = 0.2 * captured.model[4].weight.numel()
    assert captured.pruner.masks()["4"].sum() == int(kept)


def test_the_emulator_sees_the_host_wait(monkeypatch):
    run = Run()
    run.step(0)
    run.pruner._finish_step = lambda *args: run.model[0].weight.sum().item()
    run.pruner._attach_hooks()
    with pytest.raises(RuntimeError, match="_local_scalar_dense waits"):
        run.capture(monkeypatch)


@pytest.mark.parametrize(
    ("options", "steps", "reason"),
    [
        ({}, 0, "the first step sets the counts: take one before"),
        (
            {"schedule": issp.Cubic(0.0, 0.8, begin=0, end=5), "sparsity": None},
            2,
            "the schedule changes the counts until step 5: capture a later step",
        ),
        ({"freeze_at": 9}, 2, "a replay does not fix the masks at step 9: leave out freeze_at"),
        ({"method": "iss-r"}, 2, "iss-r decides in Python in every step: freeze() first"),
    ],
)
def test_what_python_decides_in_every_step_is_refused(options, steps, reason, monkeypatch):
    run = Run(**options)
    for seed in range(steps):
        run.step(seed)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph") as error:
        run.capture(monkeypatch)
    assert str(error.value).endswith(reason)
    run.step(5)
    assert run.pruner.step_count == steps + 1


def test_a_schedule_at_its_end_is_captured(monkeypatch):
    run = Run(schedule=issp.Cubic(0.0, 0.8, begin=0, end=3), sparsity=None)
    for seed in range(3):
        run.step(seed)
    graph = run.capture(monkeypatch)
    graph.replay()
    assert run.pruner.step_count == 4


def test_callbacks_are_refused(monkeypatch):
    run = Run()
    run.step(0)
    end = run.pruner.on_step(lambda pruner: None)
    with pytest.raises(RuntimeError, match="a replay calls no callback"):
        run.capture(monkeypatch)
    end()
    run.capture(monkeypatch)


def test_what_a_captured_step_does_not_follow_is_named(monkeypatch):
    run = Run()
    run.step(0)
    run.capture(monkeypatch)
    with pytest.warns(UserWarning, match="replays the pruner's step as it was then") as seen:
        run.pruner.freeze()
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="capture it anew"):
        run.pruner.load_state_dict(run.pruner.state_dict())


def test_an_eager_run_counts_no_replays():
    run = Run()
    for seed in range(3):
        run.step(seed)
    assert run.pruner.step_count == 3 and not run.pruner._counter.captured
