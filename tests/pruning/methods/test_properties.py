"""The defining property of each method."""

import copy

import pytest
import torch
from torch import nn

import issp
from issp import methods
from tests.asserts import assert_bitwise_equal
from tests.pruning.methods.runs import CONSTRAINED, batch, network, train, weights
from tests.pruning.methods.test_all import attached


def loss_of(model, step):
    x = batch(step)
    return (model(x) - x.mean(1, keepdim=True)).square().mean()


def test_iht_unimportant_weights_are_zero_after_each_step():
    model = network()
    optimizer, pruner = attached("iht", model, sparsity=0.9)
    for step in range(5):
        train(model, optimizer, 1, pruner, first=step)
        for name, kept in pruner.masks().items():
            assert torch.equal(weights(model)[name] == 0, ~kept), name


def test_iss_p_bounds_weights_that_are_always_unimportant():
    """|w| <= alpha lr u / (1 - alpha) plus what is left of the start; u = 1 for sign updates."""
    alpha, lr, steps = 0.8, 1e-3, 60
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.0, 0.0), eps=1e-12)
    pruner = issp.attach(model, optimizer, sparsity=0.9, shrink=alpha)
    start = {n: w.detach().abs().clone() for n, w in weights(model).items()}
    always = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights(model).items()}
    for step in range(steps):
        train(model, optimizer, 1, pruner, first=step)
        for name, kept in pruner.masks().items():
            always[name] &= ~kept
    for name, weight in weights(model).items():
        bound = alpha * lr / (1 - alpha) + alpha**steps * start[name]
        below = weight.detach().abs() <= bound * (1 + 1e-5)
        assert always[name].any() and bool(below[always[name]].all()), name


def test_iss_r_penalizes_the_current_set_alone():
    model, plain = network(), network()
    method = methods.ISSR(limit=0.5, interval=1, delta=0.25)
    optimizer, pruner = attached(method, model, torch.optim.SGD, sparsity=0.9)
    train(model, optimizer, 1, pruner)
    plain.load_state_dict(model.state_dict())
    kept, before = pruner.masks(), {n: w.detach().clone() for n, w in weights(model).items()}
    grads = torch.autograd.grad(loss_of(plain, 1), list(weights(plain).values()))
    train(model, optimizer, 1, pruner, first=1)
    for (name, weight), grad in zip(weights(model).items(), grads, strict=True):
        dense = before[name] - 1e-2 * grad
        penalized = before[name] - 1e-2 * (grad + 0.5 * before[name])
        torch.testing.assert_close(weight[~kept[name]], penalized[~kept[name]])
        plain_step = torch.optim.SGD([p := before[name].clone().requires_grad_()], lr=1e-2)
        p.grad = grad
        plain_step.step()
        assert_bitwise_equal(weight[kept[name]], p.detach()[kept[name]], name)
        assert not torch.equal(dense[~kept[name]], weight[~kept[name]]), name


def test_lambda_grows_in_steps_to_its_limit():
    method = methods.ISSR(limit=0.5, interval=20, delta=1e-4)
    assert [method.lambda_after(n) for n in (0, 19, 20, 39, 40)] == [0, 0, 1e-4, 1e-4, 2e-4]
    assert method.lambda_after(100_000) == 0.5 and method.lambda_after(10**9) == 0.5


@pytest.mark.parametrize(
    "name, freeze_at, steps",
    [("iss-r", 100_000, 100_000), ("srp", 1000, 700), ("iss-r", 8000, 8000)],
)
def test_lambda_reaches_its_limit_in_the_pruning_stage(name, freeze_at, steps):
    _, pruner = attached(name, network(), freeze_at=freeze_at)
    assert pruner.method.lambda_after(steps) == 0.5
    assert pruner.method.lambda_after(steps - 20) < 0.5
    if freeze_at == 100_000:
        assert pruner.method.lambda_after(20) == 1e-4  # the authors' increment


def test_stale_iss_r_keeps_the_penalty_of_what_became_important():
    model = network()
    method = methods.StaleISSR(limit=0.5, interval=1, delta=0.125)
    optimizer, pruner = attached(method, model, torch.optim.SGD, sparsity=0.5)
    expected = {n: torch.zeros_like(w) for n, w in weights(model).items()}
    for step in range(12):
        train(model, optimizer, 1, pruner, first=step)
        for name, kept in pruner.masks().items():
            expected[name] = torch.where(
                kept, expected[name], (expected[name] + 0.125).clamp(max=0.5)
            )
    actual = pruner.state_dict()["method_state"]["lambdas"]
    kept = pruner.masks()
    for name, value in expected.items():
        assert_bitwise_equal(actual[name], value, name)
    assert any(bool((v[kept[n]] > 0).any()) for n, v in expected.items()), "none came back"
    before = {n: w.detach().clone() for n, w in weights(model).items()}
    plain = copy.deepcopy(model)
    grads = torch.autograd.grad(loss_of(plain, 12), list(weights(plain).values()))
    train(model, optimizer, 1, pruner, first=12)
    for (name, weight), grad in zip(weights(model).items(), grads, strict=True):
        torch.testing.assert_close(
            weight, before[name] - 1e-2 * (grad + expected[name] * before[name])
        )


@pytest.mark.parametrize("state", [{}, {"lambdas": 3}, {"lambdas": {"after": torch.zeros(2)}}])
def test_damaged_lambdas_are_refused(state):
    _, pruner = attached("iss-r-stale", network())
    with pytest.raises(ValueError, match="lambdas of the pruner's state are damaged"):
        pruner.method.load_state_dict(state)


def test_l1_fixes_the_smallest_magnitudes_at_once():
    model = network()
    before = {n: w.detach().clone() for n, w in weights(model).items()}
    optimizer, pruner = attached("l1", model, sparsity=0.9)
    assert pruner.frozen
    for name, weight in weights(model).items():
        order = before[name].abs().flatten().argsort(stable=True)
        expected = (
            before[name].flatten().index_fill(0, order[: issp.num_pruned(order.numel(), 0.9)], 0.0)
        )
        assert_bitwise_equal(weight.detach().flatten(), expected, name)
    masks = pruner.masks()
    train(model, optimizer, 5, pruner)
    assert all(torch.equal(masks[n], w != 0) for n, w in weights(model).items())


def test_scratch_has_the_masks_of_l1_and_other_weights_in_every_layer():
    first, second = network(), network()
    l1, scratch = attached("l1", first)[1], attached("scratch", second)[1]
    for name, kept in l1.masks().items():
        assert torch.equal(scratch.masks()[name], kept)
        a, b = weights(first)[name][kept], weights(second)[name][kept]
        assert bool((a != b).all()), name
        assert int((weights(second)[name] == 0).sum()) == int((~kept).sum())


def test_scratch_draws_as_the_network_does():
    """SwinIR initialises its Linear layers by itself: std 0.02, which nn.Linear's own would not."""
    torch.manual_seed(0)
    config = {"type": "SwinIR", "upscale": 2, "img_size": 8, "window_size": 4, "depths": [2]}
    config |= {"num_heads": [2], "embed_dim": 32, "upsampler": "pixelshuffledirect"}
    model = issp.models.from_config(config)
    before = copy.deepcopy(model.state_dict())
    issp.attach(model, torch.optim.Adam(model.parameters()), method="scratch", sparsity=0.5)
    fc1 = model.layers[0].residual_group.blocks[0].mlp.fc1.weight
    assert fc1.abs().max() < 0.11 and 0.01 < fc1[fc1 != 0].std() < 0.03
    assert not torch.equal(before["conv_first.bias"], model.conv_first.bias)


def test_scratch_refuses_what_it_cannot_draw():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    model = nn.Sequential(Own())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="scratch: 0 has no reset_parameters"):
        issp.attach(model, optimizer, method="scratch", types=Own)
    issp.attach(model, optimizer, types=Own)  # the refused one has left no hook


class TestSRP:
    def masks(self, seed=0, **options):
        return attached(methods.SRP(seed=seed, **options), network(), sparsity=0.9)[1].masks()

    def test_constrained_layers_share_one_random_set(self):
        masks = self.masks()
        first, *others = [masks[name] for name in CONSTRAINED]
        assert all(torch.equal(first, other) for other in others)
        by_magnitude = attached("l1", network(), sparsity=0.9)[1].masks()
        assert not torch.equal(first, by_magnitude[CONSTRAINED[0]])
        for name in ("head", "blocks.0.conv1", "blocks.1.conv1", "tail"):
            assert torch.equal(masks[name], by_magnitude[name]), "free layers go by magnitude"

    def test_sets_differ_between_seeds_and_not_between_runs(self):
        name = CONSTRAINED[0]
        assert torch.equal(self.masks(1)[name], self.masks(1)[name])
        assert not torch.equal(self.masks(1)[name], self.masks(2)[name])

    def test_without_a_seed_it_is_torchs_and_the_random_state_stays(self):
        model = network(seed=5)
        state = torch.get_rng_state()
        _, pruner = attached("srp", model, sparsity=0.9)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(pruner.masks()["after"], self.masks(seed=5)["after"])

    def test_sets_are_fixed_and_the_weights_go_to_zero(self):
        model = network()
        method = methods.SRP(limit=5.0, interval=1, delta=1.0)
        optimizer, pruner = attached(method, model, torch.optim.SGD, freeze_at=200)
        before = pruner.masks()
        start = {n: w.detach().abs().clone() for n, w in weights(model).items()}
        train(model, optimizer, 150, pruner)
        for name, kept in pruner.masks().items():
            assert torch.equal(kept, before[name])
            left = weights(model)[name].detach().abs()[~kept].mean() / start[name][~kept].mean()
            assert left < 0.1, name

    def test_ranks_must_agree_on_the_seed(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match="srp: pass the same seed on all ranks"):
            self.masks(seed=None)
        assert self.masks(seed=1)

    def test_a_name_pattern_overrides_the_graph(self):
        masks = self.masks(constrained="blocks.*.conv1")
        assert torch.equal(masks["blocks.0.conv1"], masks["blocks.1.conv1"])
        assert not torch.equal(masks["blocks.0.conv2"], masks["blocks.1.conv2"])
        with pytest.raises(ValueError, match="constrained"):
            self.masks(constrained="nothing")


@pytest.mark.parametrize(
    "kind, options",
    [
        (torch.optim.SGD, {}),
        (torch.optim.Adam, {"fused": True}),  # gets scaled gradients
        (issp.optim.Adam, {}),
        (issp.optim.SGD, {}),
    ],
)
def test_the_penalty_follows_the_scale_of_the_gradients(kind, options):
    results = []
    for enabled in (False, True):
        model = network()
        optimizer = kind(model.parameters(), lr=1e-2, **options)
        method = methods.SRP(limit=2.0, interval=1, delta=0.25)
        pruner = issp.attach(model, optimizer, method=method, freeze_at=50)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert pruner.step_count == 6
        results.append(weights(model))
    for name, weight in results[0].items():
        assert_bitwise_equal(results[1][name], weight, name)


def test_a_closure_is_followed_by_the_penalty():
    models = [network(), network()]
    for model, closed in zip(models, (False, True), strict=True):
        optimizer, pruner = attached(methods.SRP(interval=1, delta=0.5), model, torch.optim.SGD)
        for step in range(3):

            def closure(step=step, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            if closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        assert pruner.step_count == 3
    for (name, a), b in zip(weights(models[0]).items(), weights(models[1]).values(), strict=True):
        assert_bitwise_equal(b, a, name)


def test_the_penalty_is_added_once_in_a_subclass_step():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    models = [network(), network()]
    for model, kind in zip(models, (torch.optim.SGD, Twice), strict=True):
        optimizer, pruner = attached(methods.SRP(interval=1, delta=0.5), model, kind)
        train(model, optimizer, 3, pruner)
    for (name, a), b in zip(weights(models[0]).items(), weights(models[1]).values(), strict=True):
        assert_bitwise_equal(b, a, name)


def test_channels_last_gradients_are_penalized_alike():
    models = [network(), network().to(memory_format=torch.channels_last)]
    for model in models:
        optimizer, pruner = attached(methods.SRP(interval=1, delta=0.5), model, torch.optim.SGD)
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(1)
        for weight in weights(model).values():  # contiguous, whatever the weight is
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    for (name, a), b in zip(weights(models[0]).items(), weights(models[1]).values(), strict=True):
        assert_bitwise_equal(b.contiguous(), a, name)
