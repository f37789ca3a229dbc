"""issp.optim on a GPU: the bits of the CPU, captured graphs, overflow only the device knows of."""

from __future__ import annotations

import pytest
import torch

import issp
from tests.asserts import assert_bitwise_equal
from tests.optim.twins import KINDS, Twin, network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu():
    return network().cuda()


def put_gradients(twin, number, scale=1.0):
    """The same on every device: a backward pass would round differently."""
    source = torch.Generator().manual_seed(number)
    for p in twin.model.parameters():
        grad = torch.randn(p.shape, generator=source) * scale
        p.grad = grad.to(p.device) if p.grad is None else p.grad.copy_(grad)


def assert_same(gpu, cpu, when):
    expected = cpu.tensors()
    for name, x in gpu.tensors().items():
        assert_bitwise_equal(x.cpu(), expected[name].cpu(), f"{name} {when}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.replace(", ", "-"))
def test_the_bits_are_those_of_the_cpu(kind):
    options = {"schedule": issp.Cubic(0.0, 0.9, begin=0, end=10), "freeze_at": 20}
    cpu, gpu = Twin(kind, True, **options), Twin(kind, True, model=on_gpu, **options)
    for number in range(25):
        for twin in (cpu, gpu):
            put_gradients(twin, number)
            twin.opt.step()
        assert_same(gpu, cpu, f"after step {number}")
    assert gpu.opt.report[0].fused


def test_captured_steps_replay_with_another_rate():
    twins = []
    for _ in range(2):
        options = {"capturable": True, "lr": torch.tensor(1e-2, device="cuda")}
        twins.append(Twin("adam", True, model=on_gpu, options=options))
    eager, captured = twins
    for number in range(3):
        for twin in twins:
            put_gradients(twin, number)
            twin.opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.opt.step()
    for number in range(3, 8):
        for twin in twins:
            twin.opt.param_groups[0]["lr"].fill_(1e-2 / number)
            put_gradients(twin, number)
        graph.replay()
        eager.opt.step()
        assert_same(captured, eager, f"after replay {number}")


@pytest.mark.parametrize("kind", ["adamw", "sgd, dampening"])
def test_overflow_is_no_step(kind):
    gpu, cpu = Twin(kind, True, model=on_gpu), Twin(kind, True)
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0, growth_interval=1000)
    scaler.scale(torch.ones((), device="cuda"))
    for number in range(8):
        overflow = number in (0, 3, 4)  # the first step among them
        put_gradients(gpu, number, scaler.get_scale())
        if overflow:
            gpu.model[2].weight.grad[0, 0, 0, 0] = float("inf")
        scaler.step(gpu.opt)
        scaler.update()
        if not overflow:
            put_gradients(cpu, number)
            cpu.opt.step()
        assert gpu.pruner.step_count == cpu.pruner.step_count
        if cpu.pruner.step_count:
            assert_same(gpu, cpu, f"after step {number}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.replace(", ", "-"))
def test_a_group_on_two_devices_is_stepped_by_torch(kind):
    def halved():
        model = network()
        model[2].cuda()
        return model

    ours, torchs = Twin(kind, True, model=halved), Twin(kind, False, model=halved)
    torchs.opt.param_groups[0]["fused"] = None
    for number in range(4):
        for twin in (ours, torchs):
            put_gradients(twin, number)
            twin.opt.step()
        assert_same(ours, torchs, f"after step {number}")
    assert "several devices" in ours.opt.report[0].fallback_reason


def test_counters_that_torchs_default_keeps_on_the_cpu_are_moved():
    """Dense training comes first; the op wants the counters where the weights are."""
    model = network().cuda()
    opt = issp.optim.AdamW(model.parameters(), lr=1e-3)
    for number in range(4):
        if number == 2:
            assert all(not state["step"].is_cuda for state in opt.state.values())
            issp.attach(model, opt, sparsity=0.5)
        source = torch.Generator("cuda").manual_seed(number)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=source, device="cuda")
        opt.step()
    assert opt.report[0].fused
    assert all(state["step"].is_cuda and state["step"] == 4 for state in opt.state.values())
