"""Optimizers in other optimizers: counted once, shrunk once, zeros exact, fused steps kept."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import issp
from issp import num_pruned
from issp.pruning.attach import attach
from tests.pruning import wrapping_optimizers as imitations
from tests.pruning.networks import adam, net, same, sgd, step, train, weights

BASES = {
    "torch": lambda p, lr: torch.optim.Adam(p, lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "issp": lambda p, lr: issp.optim.Adam(p, lr),
}


def lightning(optimizer):
    wrapped = pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer(optimizer)

    class Strategy:
        def optimizer_step(self, optimizer, closure, **kwargs):
            return optimizer.step(closure)

    wrapped._strategy = Strategy()
    return wrapped


def fabric(optimizer):
    module = pytest.importorskip("lightning.fabric", reason="needs lightning")
    return module.Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


def accelerate(optimizer):
    module = pytest.importorskip("accelerate", reason="needs accelerate")
    return module.Accelerator(cpu=True).prepare(optimizer)


def packaged(name, **kwargs):
    def wrap(optimizer):
        module = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
        return getattr(module, name)(optimizer, **kwargs)

    return wrap


WRAPPERS = {
    "Lookahead": imitations.Lookahead,
    "UnhookedLookahead": imitations.UnhookedLookahead,
    "TRAC": imitations.TRAC,
    "OrthoGrad": imitations.OrthoGrad,
    "imitating": imitations.imitating,
    "Accelerated": imitations.Accelerated,
    "Chained": imitations.Chained,
    "nested": lambda o: imitations.Accelerated(imitations.TRAC(imitations.Lookahead(o))),
    "pytorch_optimizer.Lookahead": packaged("Lookahead", k=2),
    "pytorch_optimizer.TRAC": packaged("TRAC"),
    "pytorch_optimizer.OrthoGrad": packaged("OrthoGrad"),
    "accelerate": accelerate,
    "fabric": fabric,
    "lightning": lightning,
    "accelerate of Lookahead": lambda o: accelerate(packaged("Lookahead", k=2)(o)),
}
# Their steps change weights after the inner step, so that the fused step leaves pruning to a pass
# of its own.
AFTERWARDS = ("Lookahead", "TRAC", "nested")


def take_step(model, opt, seed):
    opt.zero_grad()
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    opt.step(*[lambda: None] * ("Lightning" in type(opt).__name__))


@pytest.mark.sampled
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_step_counts_and_shrinks_once(wrapper, base):
    """With a learning rate of 0 the step changes nothing else, whichever optimizer is given."""
    for given in ("wrapper", "inner"):
        model = net()
        inner = BASES[base](model.parameters(), 0.0)
        opt = WRAPPERS[wrapper](inner)
        before = weights(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*pruner's hook")
            pruner = attach(model, opt if given == "wrapper" else inner, sparsity=0.5, shrink=0.5)
            take_step(model, opt, 0)
            assert pruner.step_count == 1 and pruner.attached
            take_step(model, opt, 1)
        assert pruner.step_count == 2
        for name, kept in pruner.masks().items():
            old, new = before[f"{name}.weight"], model.get_submodule(name).weight.detach()
            assert torch.equal(new[kept], old[kept])
            if not wrapper.endswith(AFTERWARDS):  # in their second step they go back halfway
                assert torch.equal(new[~kept], old[~kept] * 0.25)
        if base == "issp":
            (line,) = inner.report
            assert line.fused and line.pruned + line.others == 8
            if wrapper.endswith(AFTERWARDS):
                assert line.pruned == 0 and "shrunk after the step of" in line.fallback_reason
            else:
                assert line.pruned == 3 and not line.fallback_reason


@pytest.mark.sampled
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_frozen_zeros_are_exact_after_the_outermost_step(wrapper, base):
    for given in ("wrapper", "inner"):
        model = net()
        inner = BASES[base](model.parameters(), 0.01)
        opt = WRAPPERS[wrapper](inner)
        attached = opt if given == "wrapper" else inner
        pruner = attach(model, attached, sparsity=0.5, freeze_at=3)
        for seed in range(7):
            take_step(model, opt, seed)
            assert pruner.frozen == (seed >= 2)
            for name, kept in pruner.masks().items() if pruner.frozen else ():
                weight = model.get_submodule(name).weight
                assert torch.equal(weight != 0, kept)
                for one in (inner, opt, getattr(opt, "optimizer", None)):
                    state = getattr(one, "state", None) or {}
                    for moment in state.get(weight, {}).values():
                        if moment.shape == weight.shape:
                            assert not moment[~kept].any() and moment[kept].any()
        assert pruner.step_count == 7


@pytest.mark.parametrize("form", ["closure", "two steps"])
@pytest.mark.parametrize("of", ["imitation", "pytorch_optimizer"])
@pytest.mark.parametrize("base", [torch.optim.SGD, issp.optim.Adam])
def test_sam_in_both_forms(base, of, form):
    model = net()
    cls = imitations.SAM
    if of == "pytorch_optimizer":
        cls = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer").SAM
    opt = cls(model.parameters(), base, lr=0.01)
    pruner = attach(model, opt, sparsity=0.5, shrink=0.5, freeze_at=3)
    x = torch.randn(4, 3, 6, 6)

    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for count in range(1, 7):
        closure()
        if form == "closure":
            opt.step(closure)
        else:
            opt.first_step()
            closure()
            opt.second_step()
        assert pruner.step_count == count
        if base is issp.optim.Adam:
            assert [(x.pruned, x.others) for x in opt.base_optimizer.report] == [(3, 5)]
        for name, kept in pruner.masks().items() if pruner.frozen else ():
            weight = model.get_submodule(name).weight
            assert torch.equal(weight != 0, kept)
            for moment in opt.base_optimizer.state[weight].values():
                if torch.is_tensor(moment) and moment.shape == weight.shape:
                    assert not moment[~kept].any()
    assert pruner.frozen


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.SGD, issp.optim.Adam])
def test_a_step_that_calls_that_of_its_class_is_one_step(base):
    other = base([nn.Parameter(torch.zeros(1))], lr=0.1)  # makes torch wrap the inner step too

    class Mine(base):
        def step(self, closure=None):
            return super().step(closure)

    model = net()
    opt = Mine(model.parameters(), lr=0.0)
    before = weights(model)
    pruner = attach(model, opt, sparsity=0.5, shrink=0.5)
    step(model, opt, 0)
    step(model, opt, 1)
    assert pruner.step_count == 2 and other
    for name, kept in pruner.masks().items():
        new = model.get_submodule(name).weight.detach()
        assert torch.equal(new, torch.where(kept, 1.0, 0.25) * before[f"{name}.weight"])
    if base is issp.optim.Adam:
        assert opt.report[0].pruned == 3


def test_a_step_that_raises_is_forgotten():
    class Failing(imitations.Wrapper):
        def step(self, closure=None):
            self.optimizer.step(closure)
            raise KeyboardInterrupt

    model = net()
    inner = adam(model)
    opt = Failing(inner)
    pruner = attach(model, opt, sparsity=0.5)
    with pytest.raises(KeyboardInterrupt):
        step(model, opt, 0)
    assert pruner.step_count == 0
    train(model, inner, range(3))
    assert pruner.step_count == 3


def test_several_inner_optimizers_count_one_step():
    model = net()
    first, second = sgd([model[0].weight, model[2][0].weight], momentum=0.9), adam(model[4])
    opt = imitations.Chained(first, second)
    pruner = attach(model, opt, sparsity=0.9, freeze_at=3)
    train(model, opt, range(5))
    assert pruner.step_count == 5 and pruner.frozen
    assert pruner.summary().zeros == pruner.summary().selected
    with pytest.raises(TypeError, match="must be a torch optimizer, not int"):
        attach(model, 3)


def test_the_moments_of_an_optimizer_that_does_a_part_of_the_work_are_masked():
    class Mixed(torch.optim.SGD):
        """Steps convolutions itself and the rest by Adam."""

        def __init__(self, model):
            super().__init__([p for p in model.parameters() if p.dim() == 4], 0.1, momentum=0.9)
            self.adam = torch.optim.Adam(model[4].parameters(), 0.1)
            self.add_param_group({"params": list(model[4].parameters()), "lr": 0.0})

        def step(self, closure=None):
            super().step(closure)
            self.adam.step()

    for both in (False, True):
        model = net()
        opt = Mixed(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pruner = attach(model, [opt, opt.adam] if both else opt, sparsity=0.9, freeze_at=3)
            train(model, opt, range(5))
        assert pruner.step_count == 5
        kept, weight = pruner.masks()["4"], model[4].weight
        moments = opt.adam.state[weight]
        assert torch.equal(weight != 0, kept) and kept.sum() == 2880 - num_pruned(2880, 0.9)
        assert not moments["exp_avg"][~kept].any() and moments["exp_avg"].any()


@pytest.mark.parametrize("base", BASES)
def test_a_dry_step_of_distributed_checkpoint_is_no_step(base):
    model = net()
    opt = BASES[base](model.parameters(), 0.01)
    pruner = attach(model, opt, sparsity=0.9, freeze_at=1)
    before = weights(model)
    state = get_optimizer_state_dict(model, opt)
    assert state["state"]
    assert pruner.step_count == 0 and not pruner.frozen and same(weights(model), before)
    assert all(mask.all() for mask in pruner.masks().values())
    step(model, opt, 0)
    assert pruner.step_count == 1 and pruner.frozen
    step(model, opt, 1)
    get_optimizer_state_dict(model, opt)
    assert pruner.step_count == 2 and pruner.summary().zeros == pruner.summary().selected


def test_a_step_with_learning_rate_0_counts():
    model = net()
    opt = sgd(model.parameters(), lr=0.0)
    pruner = attach(model, opt)
    step(model, opt, 0)
    assert pruner.step_count == 1


def test_slow_weights_between_two_wrappers_are_masked_too():
    model = net()
    inner = adam(model)
    middle = imitations.Lookahead(inner)
    outer = imitations.Lookahead(middle)
    pruner = attach(model, inner, sparsity=0.9, freeze_at=3)
    train(model, outer, range(5))
    kept, weight = pruner.masks()["4"], model[4].weight
    for wrapper in (middle, outer):
        assert torch.equal(wrapper.state[weight]["slow_params"] != 0, kept)
    assert torch.equal(weight != 0, kept) and pruner.step_count == 5


def test_a_class_that_changes_over_from_one_optimizer_to_another_is_one_optimizer():
    class ChangingOver(imitations.Wrapper):
        def __init__(self, *optimizers):
            super().__init__(optimizers[0])
            self.both, self.count = optimizers, 0

        def step(self, closure=None):
            self.count += 1
            self.both[self.count > 2].step(closure)

    model = net()
    both = adam(model), sgd(model.parameters(), momentum=0.9)
    pruner = attach(model, ChangingOver(*both), sparsity=0.9, freeze_at=4)
    opt = pruner._buckets.optimizers[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, range(6))
    assert pruner.step_count == 6 and pruner.frozen
    for name, kept in pruner.masks().items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight != 0, kept)
        for one in both:
            moments = [x for x in one.state[weight].values() if x.shape == weight.shape]
            assert moments and not any(x[~kept].any() for x in moments)


def test_optimizers_that_know_what_they_are_in_are_seen_through_too():
    model = net()
    inner = adam(model)
    opt = imitations.TRAC(inner)
    inner.parent = opt
    pruner = attach(model, opt)
    step(model, opt, 0)
    again = imitations.Accelerated(opt)
    inner.grandparent = again
    step(model, again, 1)
    assert pruner.step_count == 2 and pruner._buckets.optimizers == [inner]


def test_copies_come_without_the_wrappers_and_are_reattached_to_them():
    model = net()
    opt = imitations.Lookahead(adam(model))
    pruner = attach(model, opt, sparsity=0.9)
    train(model, opt, range(2))
    copied = copy.deepcopy(pruner)
    twin = copied._model
    copied.reattach(imitations.Lookahead(adam(twin)))
    wrapper = copied._buckets.wrappers[0]
    train(twin, wrapper, range(2, 4))
    copied.freeze()
    assert copied.step_count == 4 and pruner.step_count == 2
    kept, slow = copied.masks()["4"], wrapper.state[twin[4].weight]["slow_params"]
    assert torch.equal(slow != 0, kept)


# Attaching twice


@pytest.mark.parametrize("wrapper", ["inner", "Accelerated"])
def test_attaching_twice_is_refused_with_the_name_of_the_earlier_pruner(wrapper):
    model = net()
    opt = issp.optim.SGD(model.parameters(), 0.1)
    pruner = attach(model, opt, sparsity=0.9)
    train(model, opt, range(2))
    again = opt if wrapper == "inner" else imitations.Accelerated(opt)
    name = "Pruner\\(iss-p, step 2, pruning, 3 layers, target 0.9\\)"
    with pytest.raises(ValueError, match=f"prunes these weights already, for {name}: call"):
        attach(model, again, sparsity=0.5)
    other = net()
    second = attach(other, adam(other), sparsity=0.5)
    with pytest.raises(ValueError, match="already, for Pruner"):
        second.reattach(opt, model)
    assert second.attached and second.finalize() is other
    before = weights(model)
    step(model, opt, 2)
    assert pruner.step_count == 3 and not same(weights(model), before)
    assert opt.report[0].pruned == 3  # the earlier pruner still has the fused step
    pruner.reattach(opt)  # its own hooks are not in its way
    pruner.detach()
    second = attach(model, opt, sparsity=0.5)
    second.finalize()
    third = attach(model, opt, from_zeros=True)
    step(model, opt, 3)
    assert third.step_count == 1 and third.attached


def test_other_layers_of_the_same_optimizer_may_have_their_own_pruner():
    model = net()
    opt = adam(model)
    first = attach(model, opt, types=nn.Conv2d)
    second = attach(model, opt, types=nn.Linear)
    step(model, opt, 0)
    assert first.step_count == second.step_count == 1


def test_a_cell_that_builds_model_optimizer_and_pruner_anew_warns_of_nothing():
    model = net()
    earlier = attach(model, adam(model))
    model = net()
    opt = adam(model)
    pruner = attach(model, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, opt, 0)
    assert pruner.step_count == 1 and earlier.step_count == 0


def test_two_optimizers_do_not_each_get_a_pruner_of_the_same_weights():
    model = net()
    first, second = adam(model), torch.optim.SGD([model[4].weight], 0.1)
    pruner = attach(model, first, sparsity=0.9)
    name = "Pruner\\(iss-p, step 0, pruning, 3 layers, target 0.9\\)"
    sentence = f"another pruner has these weights already, {name}: call its reattach"
    with pytest.raises(ValueError, match=sentence):
        attach(model, second, sparsity=0.5)
    other = net()
    elsewhere = attach(other, adam(other), sparsity=0.5)
    with pytest.raises(ValueError, match=sentence):
        elsewhere.reattach(second, model)
    step(model, first, 0)
    assert pruner.step_count == 1 and elsewhere.attached and elsewhere.step_count == 0
    pruner.detach()
    assert attach(model, second, sparsity=0.5).attached


def test_pruners_of_different_weights_may_share_a_model_and_a_lost_one_is_in_nobodys_way():
    model = net()
    first, second = (torch.optim.SGD(list(part.parameters()), 0.1) for part in (model[0], model[4]))
    with pytest.warns(UserWarning, match="2 weights to prune are not in the optimizer"):
        pruners = [attach(model, opt, sparsity=0.9) for opt in (first, second)]
    step(model, second, 0)
    assert [p.step_count for p in pruners] == [0, 1]
    with pytest.raises(ValueError, match="another pruner has these weights already"):
        attach(model, adam(model))
    del pruners, first, second
    assert attach(model, adam(model)).attached


BY_HAND = {"hook=False": {"hook": False}, "no optimizer": {}, "hooked": {"hook": True}}


@pytest.mark.sampled(most=2)
@pytest.mark.parametrize(
    "first, second",
    [
        (first, second)
        for first in BY_HAND
        for second in BY_HAND
        if (first, second) != ("hooked",) * 2
    ],
)
def test_weights_pruned_by_hand_have_one_pruner(first, second):
    """Weights have one pruner, whether hooks or calls of `step` prune them."""
    model = net()

    def attach_as(kind, model):
        return attach(model, *([] if kind == "no optimizer" else [adam(model)]), **BY_HAND[kind])

    pruner = attach_as(first, model)
    pruner.step()
    sentence = "another pruner has these weights already, Pruner\\(iss-p, step 1, pruning, 3 layers"
    with pytest.raises(ValueError, match=sentence):
        attach_as(second, model)
    elsewhere = attach_as(second, net())
    before = elsewhere.masks()
    with pytest.raises(ValueError, match=sentence):
        elsewhere.reattach(adam(model), model)
    assert all(torch.equal(mask, before[name]) for name, mask in elsewhere.masks().items())
    pruner.reattach()  # it is not in its own way
    pruner.finalize()
    again = attach_as(second, model)
    again.detach()
    again = attach_as(first, model)
    del again
    assert attach_as(second, model).step_count == 0  # nobody has the one before any more


# Refused


def test_optimizers_that_cannot_be_followed_are_refused():
    class PostLocalSGDOptimizer(imitations.Accelerated):
        pass

    class ZeroRedundancyOptimizer(torch.optim.Adam):
        pass

    class ScheduleFreeWrapper(imitations.Chained):
        pass

    class Keeping(imitations.Chained):
        def __init__(self, *optimizers):
            super().__init__(*optimizers)
            self.state = {}

    class WithoutHooks(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups = [{"params": list(params)}]
            self.state = {}

        def step(self):
            pass

    model = net()
    inner = adam(model)
    for opt, sentence in (
        (PostLocalSGDOptimizer(inner), "PostLocalSGDOptimizer averages the weights of all ranks"),
        (ZeroRedundancyOptimizer(model.parameters()), "ZeroRedundancyOptimizer keeps the moments"),
        (ScheduleFreeWrapper(inner), "ScheduleFreeWrapper swaps the weights"),
        (Keeping(inner), "Keeping keeps weights of its own and runs no hooks"),
        (WithoutHooks(model.parameters()), "WithoutHooks runs no hooks after its step"),
    ):
        with pytest.raises(ValueError, match=f"opt: {sentence}"):
            attach(model, opt)
        assert not inner._optimizer_step_post_hooks
    attach(model, inner)
    with pytest.raises(ValueError, match="averages the weights of all ranks"):
        step(model, PostLocalSGDOptimizer(inner), 0)


def test_wsam_is_refused_in_two_steps_and_supported_with_a_closure():
    class WSAM(imitations.SAM):
        def second_step(self):
            super().second_step()
            with torch.no_grad():
                for p in self.parameters():
                    p.add_(0.01)

    model = net()
    opt = WSAM(model.parameters(), torch.optim.SGD, lr=0.01)
    pruner = attach(model, opt, sparsity=0.5)

    def closure():
        model(torch.ones(4, 3, 6, 6)).square().mean().backward()

    closure()
    opt.first_step()
    closure()
    with pytest.raises(ValueError, match="second_step\\(\\) of WSAM changes the weights after"):
        opt.second_step()
    opt.step(closure)
    opt.decouple = False
    opt.first_step()
    opt.second_step()
    assert pruner.step_count == 2


# Schedule-free and Muon


def schedule_free(name):
    def make(params, lr):
        module = pytest.importorskip("schedulefree", reason="needs schedulefree")
        return getattr(module, name)(params, lr)

    return make


SCHEDULE_FREE = {
    "imitation": imitations.ScheduleFreeSGD,
    "SGDScheduleFree": schedule_free("SGDScheduleFree"),
    "AdamWScheduleFree": schedule_free("AdamWScheduleFree"),
    "RAdamScheduleFree": schedule_free("RAdamScheduleFree"),
    "pytorch_optimizer.ScheduleFreeWrapper": lambda p, lr: packaged("ScheduleFreeWrapper")(
        torch.optim.SGD(p, lr)
    ),
}


@pytest.mark.parametrize("kind", SCHEDULE_FREE)
def test_schedule_free_shrinks_what_it_evaluates(kind):
    model = net()
    opt = SCHEDULE_FREE[kind](model.parameters(), 0.1)
    opt.train()
    before = weights(model)
    pruner = attach(model, opt, sparsity=0.5, shrink=0.5)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    opt.eval()
    assert pruner.step_count == 3
    for name, kept in pruner.masks().items():
        expected = torch.where(kept, 1.0, 0.125) * before[f"{name}.weight"]
        actual = model.get_submodule(name).weight.detach()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("frozen_in", ["train", "eval"])
@pytest.mark.parametrize("kind", SCHEDULE_FREE)
def test_schedule_free_zeros_are_exact_in_training_and_evaluation(kind, frozen_in):
    model = net()
    opt = SCHEDULE_FREE[kind](model.parameters(), 0.01)
    opt.train()
    pruner = attach(model, opt, sparsity=0.5)
    train(model, opt, range(3))
    getattr(opt, frozen_in)()
    pruner.freeze()
    for seed in range(3, 6):
        for mode in (opt.eval, opt.train):
            mode()
            for name, kept in pruner.masks().items():
                assert torch.equal(model.get_submodule(name).weight != 0, kept)
        step(model, opt, seed)
    assert pruner.finalize() is model


def test_muon_freezes_to_exact_zeros():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    opt = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], 0.01)
    pruner = attach(model, opt, sparsity=0.5, freeze_at=3)
    for _ in range(6):
        opt.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        opt.step()
    for name, kept in pruner.masks().items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight != 0, kept)
        assert not opt.state[weight]["momentum_buffer"][~kept].any()
    copy.deepcopy(pruner)
