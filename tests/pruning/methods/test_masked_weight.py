"""Modules that compute with a masked weight: ranks, values, gradients, and nothing left behind."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import issp
from issp import ops
from issp.nn.selection import Layer
from issp.pruning.methods.masked_weight import MaskedWeight, magnitude_ranks
from tests.asserts import assert_bitwise_equal

OF = 8


def conv(seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(2 * OF, 4, 3, padding=1)


def masked(module, kept=(0, 1, 4), of=OF):
    """Keeps units 0, 1 and 4 of the module's weight."""
    result = MaskedWeight(Layer("", module, 0.5), [module], of)
    result.keep(torch.tensor([unit in kept for unit in range(of)]))
    result.attach()
    return result


def x_of(dtype=torch.float32, seed=1):
    return torch.rand(2, 2 * OF, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 16, 3, 3), (6, 32), (3, 8, 1, 2, 2)])
def test_the_first_ranks_are_those_that_the_pattern_keeps(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, shape, generator=generator).to(dtype)  # ties and zeros
    weight.flatten()[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    ranks = magnitude_ranks(weight, OF)
    assert ranks.dtype == torch.uint8
    groups = ranks.unflatten(1, (-1, OF)).sort(2).values.movedim(2, -1)
    assert torch.equal(groups, torch.arange(OF).expand(groups.shape).to(torch.uint8))
    for n in range(1, OF + 1):
        _, kept = ops.nm_prune_with_mask(weight.contiguous(), issp.Keep(n, of=OF))
        assert torch.equal(ranks < n, kept), n


def test_ranks_and_mask_have_the_memory_order_of_the_weight():
    module = conv().to(memory_format=torch.channels_last)
    result = masked(module)
    assert result.ranks.stride() == result.kept.stride() == module.weight.stride()
    assert torch.equal(result.ranks, magnitude_ranks(module.weight.detach().contiguous(), OF))


def test_the_call_uses_the_masked_weight_and_the_parameter_stays():
    module, x = conv(), x_of()
    before, keys = module.weight, list(module.state_dict())
    plain = copy.deepcopy(module)
    result = masked(module)
    kept = (result.ranks < 2) | (result.ranks == 4)
    assert torch.equal(result.kept, kept)
    expected = F.conv2d(x, plain.weight * kept, plain.bias, padding=1)
    assert_bitwise_equal(module(x), expected, "output")
    module(x).square().sum().backward()
    expected.square().sum().backward()
    assert module.weight is before and list(module.state_dict()) == keys
    assert "weight" not in vars(module)
    assert_bitwise_equal(module.weight.grad, plain.weight.grad, "gradient")
    assert bool((module.weight.grad[~kept] == 0).all())
    assert result.outputs == [(2 * 25, 2)]
    result.detach()
    assert_bitwise_equal(module(x), plain(x), "without the mask")
    assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_priorities_get_the_gradient_of_a_sum_of_units(memory, dtype):
    module = conv().to(dtype=dtype, memory_format=memory)
    plain = copy.deepcopy(module).double()
    p = torch.linspace(0.9, 0.1, OF - 1, dtype=torch.float64)
    b = (p > 0.5).double()
    result = masked(module, kept=(0, *(j + 1 for j in range(OF - 1) if p[j] > 0.5)))
    result.priorities = p.float().requires_grad_()
    x = x_of(dtype)
    for _ in range(2):  # gradients add up
        module(x).sin().sum().backward()
    p.requires_grad_()
    units = torch.stack([(result.ranks == j).double() for j in range(OF)])
    mask = units[0] + sum(units[j + 1] * (b[j] + p[j] - p[j].detach()) for j in range(OF - 1))
    for _ in range(2):
        out = F.conv2d(x.double(), plain.weight * mask, plain.bias, padding=1)
        out.sin().sum().backward(retain_graph=True)
    rtol = 1e-6 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(result.priorities.grad.double(), p.grad, rtol=rtol, atol=rtol)
    assert bool((p.grad != 0).all()), "of dropped units too"
    expected = plain.weight.grad * result.kept
    torch.testing.assert_close(module.weight.grad.double(), expected, rtol=rtol, atol=rtol)


def test_nothing_is_left_when_a_call_fails():
    module = conv()
    masked(module)
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 3, 4, 4))
    assert "weight" not in vars(module)


def test_copies_and_pickles_of_the_module_are_dense():
    module, x = conv(), x_of()
    result = masked(module)
    dense = F.conv2d(x, module.weight, module.bias, padding=1)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_bitwise_equal(other(x), dense, "copy")
    assert not torch.equal(module(x), dense)
    assert result.outputs == [(50, 2)], "copies are not recorded"


def test_a_copy_with_its_mask_goes_on():
    module, x = conv(), x_of()
    result = masked(module)
    other, twin = copy.deepcopy((module, result))
    twin.attach()
    assert_bitwise_equal(other(x), module(x), "copy")
    twin.detach()
    assert not torch.equal(other(x), module(x))


def checkpointed(module):
    return lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)


def compiled(module):
    return torch.compile(module, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("wrap", [checkpointed, pytest.param(compiled, marks=pytest.mark.full)])
def test_gradients_are_those_of_a_plain_call(wrap):
    module, x = conv(), x_of()
    result = masked(module)
    result.priorities = torch.ones(OF - 1).requires_grad_()
    grads = []
    for call in (module, wrap(module)):
        module.weight.grad = result.priorities.grad = None
        call(x).square().sum().backward()
        grads.append((module.weight.grad, result.priorities.grad))
    for name, a, b in zip(("weight", "priorities"), *grads, strict=True):
        assert_bitwise_equal(b, a, name)


def test_autocast_gives_gradients_in_single_precision():
    module, x = conv(), x_of()
    result = masked(module)
    result.priorities = torch.ones(OF - 1).requires_grad_()
    module(x).square().sum().backward()
    exact, result.priorities.grad = result.priorities.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and result.priorities.grad.dtype == torch.float32
    assert (result.priorities.grad - exact).norm() < 0.05 * exact.norm()


@pytest.mark.full
def test_a_compiled_module_follows_the_mask():
    module, x = conv(), x_of()
    result = masked(module)
    call = torch.compile(module, backend="eager")
    assert_bitwise_equal(call(x), module(x), "first mask")
    result.keep(torch.arange(OF) < 1)
    assert_bitwise_equal(call(x), module(x), "second mask")
    result.detach()
    assert_bitwise_equal(call(x), module(x), "no mask")


def test_a_replica_of_data_parallel_is_masked_call_after_call():
    module, x = conv(), x_of()
    masked(module)
    replica = module._replicate_for_data_parallel()
    weight = module.weight * 1.0  # as broadcast: no leaf
    replica.bias, replica.weight = module.bias * 1.0, weight
    replica._former_parameters = {"weight": weight, "bias": replica.bias}
    for _ in range(2):
        assert_bitwise_equal(replica(x), module(x), "replica")
    assert replica.weight is weight


def test_a_shared_weight_is_masked_in_all_its_modules():
    first, second = conv(), conv()
    second.weight = first.weight
    result = MaskedWeight(Layer("", first, 0.5), [first, second], OF)
    result.keep(torch.arange(OF) < 2)
    result.attach()
    x = x_of()
    assert_bitwise_equal(
        first(x) - first.bias[:, None, None], second(x) - second.bias[:, None, None], ""
    )
    assert result.outputs == [(50, 2), (50, 2)]


def test_sizes_of_outputs_count_images():
    linear = nn.Linear(OF, 4)
    result = masked(linear, kept=(0,))
    with torch.no_grad():
        linear(torch.rand(9, OF))
    assert result.outputs == [None], "only calls with a gradient count"
    linear(torch.rand(3, 7, OF))
    assert result.outputs == [(21, 3)]
    module = conv()
    result = masked(module)
    module(x_of()[0])
    assert result.outputs == [(25, 1)]
