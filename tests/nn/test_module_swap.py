"""Hooks and attributes are transferred to a sparse layer, or the layer stays dense for a reason."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import issp
from issp import Keep, ops
from issp.deploy import pack
from issp.nn import NMConv2d, NMLinear, SparseConv2d, SparseLinear, convert, module_swap
from tests.deploy.networks import kinds, line, prune_

KEEP = Keep(2, of=4)
LAYERS = {"conv": (lambda: nn.Conv2d(8, 8, 3, padding=1), (2, 8, 5, 6))}
LAYERS["linear"] = (lambda: nn.Linear(8, 8), (3, 8))


def pruned(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(ops.nm_prune(layer.weight.detach(), KEEP))
    return layer


@pytest.fixture(params=LAYERS)
def net(request):
    """One 2:4 layer in a model; `net.x` suits it."""
    make, shape = LAYERS[request.param]
    model = nn.Sequential(pruned(make()))
    model.x = torch.randn(shape)
    return model


def stay_dense(model: nn.Module) -> str:
    """Converts a model whose only layer cannot be converted; returns the reason."""
    layer = model[0]
    (reason,) = convert(model, keep=KEEP).values()
    assert model[0] is layer
    return reason


@pytest.mark.parametrize("mask", ["fixed", "sr-ste"])
def test_hooks_see_and_change_what_they_did(net, mask):
    seen = []

    def note(name, result=None):
        def hook(module, *args):
            seen.append((name, type(module).__name__, args))
            return result(args) if result else None

        return hook

    layer = net.double()[0]
    layer.register_forward_pre_hook(note("pre", lambda args: (2 * args[0][0],)))
    layer.register_forward_pre_hook(note("pre named"), with_kwargs=True)
    layer.register_forward_hook(note("after", lambda args: args[-1] + 1), with_kwargs=True)
    layer.register_forward_hook(note("always"), always_call=True)
    layer.register_full_backward_pre_hook(note("back pre", lambda args: (3 * args[0][0],)))
    layer.register_full_backward_hook(note("back", lambda args: (5 * args[0][0],)))
    results = []
    for sparse in (False, True):
        if sparse:
            convert(net, keep=KEEP, mask=mask)
        x = net.x.double().requires_grad_()
        y = net(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, seen.copy()))
        seen.clear()
    (y, grad, before), (sparse_y, sparse_grad, after) = results
    torch.testing.assert_close(sparse_y, y)
    torch.testing.assert_close(sparse_grad, grad)
    assert [s[0] for s in before] == ["pre", "pre named", "after", "always", "back pre", "back"]
    assert [s[0] for s in after] == [s[0] for s in before]
    assert {s[1] for s in after} == {type(net[0]).__name__} <= {"NMConv2d", "NMLinear"}
    for (_, _, dense), (name, _, sparse) in zip(before, after, strict=True):
        torch.testing.assert_close(sparse, dense, msg=lambda text, name=name: f"{name}: {text}")


def test_handles_still_remove_their_hooks(net):
    calls = []
    register = (net[0].register_forward_hook, net[0].register_forward_pre_hook)
    handles = [r(lambda *args, **kwargs: calls.append(1), with_kwargs=True) for r in register]
    handles.append(net[0].register_full_backward_hook(lambda *args: calls.append(1)))
    convert(net, keep=KEEP)
    net(net.x.requires_grad_()).sum().backward()
    assert len(calls) == 3
    for handle in handles:
        handle.remove()
    net(net.x).sum().backward()
    assert len(calls) == 3
    assert not net[0]._forward_hooks_with_kwargs and not net[0]._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("mask", ["fixed", "ste"])
def test_mode_gradients_and_attributes_follow(net, mask):
    net[0].eval()
    net[0].weight.requires_grad_(False)
    net[0].label = "own label"
    convert(net, keep=KEEP, mask=mask)
    assert not net[0].training and net.training and net[0].label == "own label"
    wanted = {name: p.requires_grad for name, p in net[0].named_parameters()}
    assert wanted == {"values" if mask == "fixed" else "weight": False, "bias": True}
    assert pack.unpack(net)[0].label == "own label"


def test_what_cannot_follow_leaves_the_layer_as_it_is(net):
    prune.l1_unstructured(net[0], "bias", amount=2)
    assert "bias_orig, bias_mask besides weight and bias" in stay_dense(net)


def test_hooks_on_the_weight_cannot_follow(net):
    handles = [net[0].weight.register_hook(lambda grad: None)]
    assert "its weight has hooks of its own" in stay_dense(net)
    handles += [net[0].bias.register_post_accumulate_grad_hook(lambda p: None)]
    handles.pop(0).remove()
    assert "its bias has hooks of its own" in stay_dense(net)
    handles.pop().remove()
    assert convert(net, keep=KEEP) == {}


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_state_dict_post_hook(lambda *args: None),
        lambda layer: layer.register_state_dict_pre_hook(lambda *args: None),
        lambda layer: layer.register_load_state_dict_pre_hook(lambda *args: None),
        lambda layer: layer.register_load_state_dict_post_hook(lambda *args: None),
    ],
)
def test_hooks_on_the_state_cannot_follow(net, register):
    register(net[0])
    assert "it has hooks on its state_dict" in stay_dense(net)


def test_old_backward_hooks_cannot_follow(net):
    net[0].register_backward_hook(lambda *args: None)
    assert "use register_full_backward_hook" in stay_dense(net)


@pytest.mark.parametrize("name", ["forward", "_conv_forward", "keep", "values", "sparsity"])
def test_attributes_that_mean_something_cannot_follow(name):
    net = nn.Sequential(pruned(nn.Conv2d(8, 8, 3)))
    setattr(net[0], name, net[0].forward)
    assert stay_dense(net) == f"its attribute {name} means something else in a sparse layer"


def test_a_parametrized_weight_is_refused(net):
    parametrizations.weight_norm(net[0])
    with pytest.raises(ValueError, match="0 has no parameter `weight` .parametrized.*remove the"):
        convert(net, keep=KEEP)


@pytest.mark.parametrize("mask", ["fixed", "sr-ste"])
@pytest.mark.parametrize(
    "make",
    [
        lambda mask: NMConv2d(8, 8, 3, keep=KEEP, mask=mask),
        lambda mask: NMLinear(8, 8, keep=KEEP, mask=mask),
        lambda mask: SparseConv2d(8, 8, 3, sparsity=0.5, mask=mask),
        lambda mask: SparseLinear(8, 8, sparsity=0.5, mask=mask),
    ],
)
def test_a_new_sparse_layer_has_nothing_of_a_user(make, mask):
    layer = make(mask)
    layer(torch.randn(1, 8, 8, 8)).sum().backward()
    assert module_swap.user_attributes(layer) == []
    layer.label = "own label"
    assert module_swap.user_attributes(layer) == ["label"]


class TestPack:
    @staticmethod
    def net():
        return nn.Sequential(prune_(nn.Conv2d(8, 8, 3, padding=1)), nn.ReLU())

    @pytest.mark.parametrize("fastest", ["rows", "dense channels_last", "dense"])
    def test_hooks_and_attributes_follow_there_and_back(self, cache, timed, fastest):
        net, x, calls = self.net(), torch.randn(1, 8, 6, 6), []
        net[0].register_forward_hook(lambda module, args, y: calls.append(type(module)) or y + 1)
        net[0].label = "own label"
        timed[fastest] = 0.1
        expected = net(x)
        packed = issp.pack(net, x, cache=cache)
        assert line(packed, "0").choice == fastest
        for model in (packed, pack.unpack(packed)):
            calls.clear()
            torch.testing.assert_close(model(x), expected)
            assert calls == [type(model[0])] and model[0].label == "own label"

    def test_hooks_do_not_see_what_a_layer_is_timed_on(self, cache, timed):
        net, x, seen = self.net(), torch.randn(1, 8, 6, 6), []
        net[0].register_forward_hook(lambda module, args, y: seen.append(args[0]))
        issp.pack(net, x, cache=cache)
        assert seen and all(args is x for args in seen)

    def test_a_layers_own_mode_follows(self, cache, timed):
        net = self.net()
        net[0].eval()
        packed = issp.pack(net, torch.randn(1, 8, 6, 6), cache=cache)
        assert kinds(packed)["0"] == "SparseConv2d"
        assert packed.training and packed[1].training and not packed[0].training

    def test_a_layer_that_cannot_follow_stays_dense(self, cache, timed):
        net = self.net()
        net[0].register_load_state_dict_post_hook(lambda *args: None)
        packed = issp.pack(net, torch.randn(1, 8, 6, 6), cache=cache)
        assert kinds(packed) == kinds(net) and "state_dict" in line(packed, "0").reason
