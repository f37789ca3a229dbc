"""ASSL: the alignment loss, its stage, one set per group at the end."""

import copy
import itertools
import math
import warnings

import pytest
import torch

import issp
from issp import methods
from issp.pruning.methods import assl
from tests.asserts import assert_bitwise_equal
from tests.pruning.methods.runs import CONSTRAINED, network, train, weights
from tests.pruning.methods.test_all import attached

FREE = ["head", "blocks.0.conv1", "blocks.1.conv1", "tail"]


# The loss.


def random_weights(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 5, 3, 3)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [w.to(dtype).requires_grad_() for w in values]


def scores(tensors, k):
    """One row of s_l for each layer, by torch's own selection."""
    flat = [w.abs().flatten() for w in tensors]
    return torch.stack([(w - w.kthvalue(k).values).sigmoid() for w in flat])


@pytest.mark.parametrize("k", [1, 37, 256, 270])
def test_value_and_gradient_are_those_of_the_sum_over_pairs(k):
    first, second = random_weights(k), random_weights(k)
    loss = assl.alignment_loss(first, k)
    s = scores(second, k)
    plain = -sum((a * b).sum() for a, b in itertools.product(s, s)) / len(s) ** 2
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    loss.backward()
    plain.backward()
    for a, b in zip(first, second, strict=True):
        assert bool((a.grad != 0).all())
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-14)


def test_the_gradient_goes_through_the_magnitude():
    first = random_weights(3)
    second = [(-w.detach()).requires_grad_() for w in first]
    for tensors in (first, second):
        assl.alignment_loss(tensors, 100).backward()
    assert all(torch.equal(a.grad, -b.grad) for a, b in zip(first, second, strict=True))


def test_ties_have_the_gradient_of_one_threshold():
    tied = torch.tensor([1.0, -1.0, 0.5, 3.0], requires_grad=True)
    assl.alignment_loss([tied], 2).backward()
    alone = torch.tensor([1.0, -1.0, 0.5, 3.0], requires_grad=True)
    (-(alone.abs() - alone.abs()[0]).sigmoid().square().sum()).backward()
    torch.testing.assert_close(tied.grad, alone.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_descent_brings_the_score_vectors_together(seed):
    """By more than a third: one minus the mean cosine of every two of them."""
    tensors, k = random_weights(seed), issp.num_pruned(270, 0.9)

    def distance():
        with torch.no_grad():
            s = torch.nn.functional.normalize(scores(tensors, k), dim=1)
        return 1 - (s @ s.T)[~torch.eye(len(s), dtype=torch.bool)].mean().item()

    optimizer = torch.optim.SGD(tensors, lr=0.05)
    before = distance()
    for _ in range(100):
        optimizer.zero_grad()
        assl.alignment_loss(tensors, k).backward()
        optimizer.step()
    assert before > 0.05 and distance() < before * 2 / 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_memory_order_and_half_precision_do_not_matter(dtype):
    plain = random_weights(7, dtype)
    mixed = [w.detach().clone().requires_grad_() for w in plain]
    mixed[1:3] = [
        w.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        for w in mixed[1:3]
    ]
    losses = [assl.alignment_loss(tensors, 200) for tensors in (plain, mixed)]
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for a, b in zip(plain, mixed, strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    exact = assl.alignment_loss([w.detach().double() for w in plain], 200)
    torch.testing.assert_close(losses[0].double(), exact, rtol=1e-5, atol=0)


# The stages.


def sets_of(model, names, ratio=0.9):
    """Masks by the magnitudes that the weights have now."""
    masks = {}
    for name in names:
        weight = weights(model)[name].detach()
        k = issp.num_pruned(weight.numel(), ratio)
        order = weight.abs().flatten().argsort(stable=True)
        kept = torch.ones(weight.numel(), dtype=torch.bool)
        masks[name] = kept.index_fill(0, order[:k], False).view(weight.shape)
    return masks


def test_the_loss_is_that_of_the_groups_with_its_weight():
    model = network()
    _, pruner = attached(methods.ASSL(weight=0.25), model, sparsity=0.9)
    group = [weights(model)[name] for name in CONSTRAINED]
    expected = 0.25 * assl.alignment_loss(group, issp.num_pruned(group[0].numel(), 0.9))
    assert pruner.loss().requires_grad
    assert_bitwise_equal(pruner.loss().detach(), expected.detach(), "the loss")
    pruner.loss().backward()
    assert all(bool(w.grad.ne(0).all()) for w in group)
    assert all(weights(model)[name].grad is None for name in FREE)


def test_the_loss_is_a_sum_over_the_groups():
    model = network()
    both = methods.ASSL(weight=1.0, constrained=["blocks.*", "head"])
    _, pruner = attached(both, model, sparsity=0.9, overrides={"blocks.0": 0.5, "blocks.1": 0.8})
    expected = 0.0
    for block, ratio in (("blocks.0", 0.5), ("blocks.1", 0.8)):
        group = [weights(model)[f"{block}.{name}"].detach() for name in ("conv1", "conv2")]
        expected += assl.alignment_loss(group, issp.num_pruned(group[0].numel(), ratio)).item()
    assert math.isclose(pruner.loss().item(), expected, rel_tol=1e-6)


def test_after_the_stage_the_loss_is_zero_and_costs_nothing(monkeypatch):
    model = network()
    optimizer, pruner = attached(methods.ASSL(align_steps=3), model)
    train(model, optimizer, 2, pruner)
    assert pruner.loss().item() < 0
    train(model, optimizer, 1, pruner, first=2)
    monkeypatch.setattr(assl, "alignment_loss", None)  # would raise when called
    assert pruner.loss().item() == 0 and not pruner.loss().requires_grad
    train(model, optimizer, 30, pruner, first=3)
    assert pruner.frozen and pruner.loss().item() == 0


def test_a_loss_that_is_left_out_is_named_once():
    model = network()
    optimizer, pruner = attached("assl", model)
    with pytest.warns(UserWarning, match=r"assl has a loss: add pruner.loss\(\)") as caught:
        train(model, optimizer, 5)
    assert len(caught) == 1
    other = network()
    optimizer, pruner = attached("assl", other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, optimizer, 5, pruner)


def test_without_a_stage_there_is_no_loss():
    _, pruner = attached(methods.ASSL(align_steps=0), network())
    assert pruner.loss().item() == 0 and not pruner.loss().requires_grad


def test_first_the_free_layers_are_penalized_then_all():
    options = {"weight": 0.0, "align_steps": 4, "interval": 1, "delta": 0.125}
    model, dense = network(), network()
    optimizer, pruner = attached(methods.ASSL(**options), model, torch.optim.SGD, sparsity=0.9)
    plain = torch.optim.SGD(dense.parameters(), lr=1e-2)
    for step in range(8):
        dense.load_state_dict(model.state_dict())
        before = copy.deepcopy(weights(model))
        masks = pruner.masks()
        train(dense, plain, 1, first=step)
        train(model, optimizer, 1, pruner, first=step)
        for name, weight in weights(model).items():
            late = step + 1 - (4 if name in CONSTRAINED else 0)
            lam = min(0.5, 0.125 * max(0, late)) if step >= 4 or name in FREE else 0.0
            kept = masks[name] if lam else torch.ones_like(masks[name])
            expected = weights(dense)[name]
            assert_bitwise_equal(weight.detach()[kept], expected.detach()[kept], f"{step} {name}")
            penalized = expected.detach() - 1e-2 * lam * before[name].detach()
            torch.testing.assert_close(weight.detach()[~kept], penalized[~kept])
            assert lam == 0 or not torch.equal(weight[~kept], expected[~kept]), f"{step} {name}"


def test_at_the_end_of_the_stage_all_are_ranked_and_groups_take_the_first_set():
    model = network()
    optimizer, pruner = attached(methods.ASSL(align_steps=6), model, sparsity=0.9)
    at_start = sets_of(model, [*CONSTRAINED, *FREE])
    train(model, optimizer, 5, pruner)
    for name, kept in pruner.masks().items():  # fixed until then
        assert torch.equal(kept, at_start[CONSTRAINED[0] if name in CONSTRAINED else name]), name
    train(model, optimizer, 1, pruner, first=5)
    now = sets_of(model, [*CONSTRAINED, *FREE])
    assert any(not torch.equal(now[name], at_start[name]) for name in FREE)
    assert not torch.equal(now[CONSTRAINED[0]], at_start[CONSTRAINED[0]])
    assert not torch.equal(now[CONSTRAINED[0]], now[CONSTRAINED[1]])
    expected = {n: now[CONSTRAINED[0] if n in CONSTRAINED else n] for n in now}
    for steps in (0, 10, 20):
        train(model, optimizer, steps, pruner, first=pruner.step_count)
        for name, kept in pruner.masks().items():
            assert torch.equal(kept, expected[name]), f"{pruner.step_count}: {name}"
    assert pruner.frozen
    pruner.finalize()
    for name, weight in weights(model).items():
        assert torch.equal(weight != 0, expected[name])


def test_masks_that_are_fixed_early_are_one_set_too():
    model = network()
    optimizer, pruner = attached("assl", model, freeze_at=None, sparsity=0.9)
    train(model, optimizer, 3, pruner)
    pruner.freeze()
    first, *others = [pruner.masks()[name] for name in CONSTRAINED]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("align_steps", [0, 2, 30])
def test_a_layer_that_is_trained_later_takes_the_set_of_its_group(align_steps):
    model = network()
    first = weights(model)[CONSTRAINED[0]].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    pruner = issp.attach(
        model, optimizer, 0.9, method=methods.ASSL(align_steps=align_steps), freeze_at=40
    )
    train(model, optimizer, 4, pruner)
    before = pruner.masks()
    assert bool(before.pop(CONSTRAINED[0]).all())
    optimizer.add_param_group({"params": [first.requires_grad_()]})
    train(model, optimizer, 1, pruner, first=4)
    after = pruner.masks()
    assert torch.equal(after[CONSTRAINED[0]], before[CONSTRAINED[1]])
    assert all(torch.equal(after[name], kept) for name, kept in before.items())
    train(model, optimizer, 40, pruner, first=5)
    final = [pruner.masks()[name] for name in CONSTRAINED]
    assert all(torch.equal(final[0], other) for other in final)


@pytest.mark.parametrize("stop", [4, 10, 13])
@pytest.mark.parametrize("kind", [torch.optim.Adam, issp.optim.Adam])
def test_resumes_in_every_stage_to_the_same_bits(stop, kind):
    method = methods.ASSL(weight=1e-3, align_steps=10, interval=1)
    whole = network()
    optimizer, pruner = attached(method, whole, kind, sparsity=0.9)
    train(whole, optimizer, 18, pruner)

    broken = network()
    optimizer, pruner = attached(method, broken, kind, sparsity=0.9)
    train(broken, optimizer, stop, pruner)
    saved = copy.deepcopy((broken.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    resumed = network(seed=1)
    optimizer, pruner = attached(method, resumed, kind, sparsity=0.9)
    for part, state in zip((resumed, optimizer, pruner), saved, strict=True):
        part.load_state_dict(state)
    assert pruner.loss().requires_grad == (stop < 10)
    train(resumed, optimizer, 18 - stop, pruner, first=stop)
    for name, weight in weights(whole).items():
        assert_bitwise_equal(weights(resumed)[name].detach(), weight.detach(), name)


# How long the stages are.


def test_the_authors_stages():
    method = attached("assl", network(), freeze_at=160_430)[1].method
    bucket = next(iter(method.setting.buckets))
    names = [layer.name for layer in bucket.layers]

    def lambdas(step):
        values = dict(zip(names, method.penalty(step, bucket) or [0.0] * 99, strict=False))
        return values["head"], values["after"]

    assert lambdas(19) == (0, 0)
    assert lambdas(20) == (pytest.approx(1e-4, rel=1e-3), 0)
    assert lambdas(17_260) == (pytest.approx(863e-4, rel=1e-3), 0)
    method.after_step(17_259)
    assert method.loss() is not None
    method.after_step(17_260)
    assert method.loss() is None
    assert lambdas(17_280) == (pytest.approx(864e-4, rel=1e-3), pytest.approx(1e-4, rel=1e-3))
    assert lambdas(100_020) == (0.5, pytest.approx(0.5 - 863e-4, rel=1e-3))
    assert lambdas(117_279)[1] < 0.5
    assert lambdas(117_280) == lambdas(160_430) == (0.5, 0.5)


def test_a_late_end_of_the_alignment_speeds_the_penalty_up():
    method = attached(methods.ASSL(align_steps=900), network(), freeze_at=1000)[1].method
    assert method.lambda_after(1000 - 900) == 0.5


def test_without_freeze_at_the_stages_are_the_authors():
    method = attached("assl", network(), freeze_at=None)[1].method
    method.after_step(17_259)
    assert method.loss() is not None
    method.after_step(17_260)
    assert method.loss() is None and method.lambda_after(20) == 1e-4


# The networks, and refusals.


SMALL = {
    "EDSR": {"num_feat": 8, "num_block": 2, "upscale": 2},
    "SwinIR": {
        **{"upscale": 2, "upsampler": "pixelshuffledirect", "img_size": 8, "window_size": 4},
        **{"embed_dim": 12, "depths": [2, 1], "num_heads": [2, 2]},
    },
}
GROUPS = {
    "EDSR": [["body.0.conv2", "body.1.conv2", "conv_after_body"]],
    "SwinIR": [
        [f"layers.{i}.residual_group.blocks.{j}.attn.proj" for i, j in ((0, 0), (0, 1), (1, 0))],
        [f"layers.{i}.residual_group.blocks.{j}.mlp.fc2" for i, j in ((0, 0), (0, 1), (1, 0))],
        ["layers.0.conv", "layers.1.conv", "conv_after_body"],
    ],
}


@pytest.mark.parametrize("name", SMALL)
def test_networks_end_aligned(name):
    torch.manual_seed(0)
    model = issp.models.from_config({"type": name, **SMALL[name]})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pruner = issp.attach(model, optimizer, 0.9, method="assl", freeze_at=12)
    for _ in range(13):
        optimizer.zero_grad()
        (model(torch.rand(1, 3, 8, 8)).mean() + pruner.loss()).backward()
        optimizer.step()
    pruner.finalize()
    masks = pruner.masks()
    for group in GROUPS[name]:
        assert all(torch.equal(masks[group[0]], masks[other]) for other in group)
        assert all(torch.equal(masks[x], model.get_submodule(x).weight != 0) for x in group)
    first = [group[0] for group in GROUPS[name]]
    alone = [mask for x, mask in masks.items() if x in first or x not in sum(GROUPS[name], [])]
    assert not any(
        torch.equal(a, b) for a, b in itertools.combinations(alone, 2) if a.shape == b.shape
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"pattern": issp.Keep(2, of=8), "exclude": "head"},
        {"sparsity": 0.9, "overrides": {"tail": issp.Keep(2, of=8)}},
    ],
)
def test_patterns_are_refused(arguments):
    with pytest.raises(ValueError, match="an N:M pattern has no meaning for assl") as error:
        attached("assl", network(), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"weight": -1.0}, "weight is -1.0: it must be a number from 0"),
        ({"weight": math.nan}, "weight is nan"),
        ({"align_steps": -1}, "align_steps is -1: it must be a whole number from 0"),
        ({"align_steps": 1.5}, "align_steps is 1.5"),
        ({"align_steps": 24}, "the alignment must end before freeze_at, step 24"),
        ({"constrained": "nothing"}, '"nothing" matches no module'),
        ({"constrained": "head"}, "no two of the layers .* name others by constrained="),
    ],
)
def test_wrong_options_are_refused(options, sentence):
    model = network()
    with pytest.raises(ValueError, match=sentence):
        attached(methods.ASSL(**options), model)


@pytest.mark.parametrize("state", [{}, {"aligned": 1}, {"aligned": True, "more": 0}])
def test_a_damaged_state_is_refused(state):
    _, pruner = attached("assl", network())
    with pytest.raises(ValueError, match="the stage of assl in the pruner's state is damaged"):
        pruner.method.load_state_dict(state)
    assert pruner.loss().requires_grad
