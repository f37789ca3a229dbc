"""The pruner: selection of layers, the step, schedules, counters."""

import warnings
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from issp import Keep, num_pruned, ops
from issp.pruning.attach import attach
from issp.pruning.schedules import Constant, Cubic, Linear
from tests.pruning.networks import adam, net, same, sgd, step, train, weights

# Selection of layers


def names(model=None, **kwargs):
    model = model or net()
    return list(attach(model, adam(model), **kwargs).masks())


def test_types_excludes_and_containers_choose_the_layers():
    assert names() == ["0", "2.0", "4"]
    assert names(types=nn.Linear) == ["4"]
    assert names(exclude="2") == ["0", "4"]  # a container stands for what is in it
    assert names(exclude=["re:2\\..*", "4.weight"]) == ["0"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"exclude": ["*mean*"]}, 'exclude: "\\*mean\\*" matches no module'),
        (
            {
                "exclude": [
                    "re:[",
                ]
            },
            "no regular expression",
        ),
        ({"overrides": {"tail": 0.5}}, 'overrides: "tail" matches no module'),
        ({"overrides": {"1": 0.5}}, 'overrides: "1" matches no pruned layer'),
        ({"overrides": {"4": 0.5}, "exclude": "4"}, 'overrides: "4" matches no pruned layer'),
        ({"overrides": {"4": 1.5}}, "sparsity is 1.5"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": 0.9, "schedule": Constant(0.8)}, "give one of them"),
        ({"schedule": Cubic(0.0, 0.9, 0, 100), "freeze_at": 99}, "at least step 100"),
        ({"freeze_at": 0}, "freeze_at is 0"),
        ({"from_zeros": True, "freeze_at": 5}, "drop schedule and freeze_at"),
        ({"overrides": {"0": Keep(2, of=4)}}, "0: weight .* m = 4 input channels"),
        ({"method": "magic"}, "there is no method"),
    ],
)
def test_bad_arguments_are_refused_and_leave_everything_alone(arguments, sentence):
    model = net()
    opt, before = adam(model), weights(model)
    with pytest.raises(ValueError, match=sentence):
        attach(model, opt, **arguments)
    assert not opt._optimizer_step_post_hooks and same(weights(model), before)


def test_wrong_kinds_are_type_errors():
    model = net()
    with pytest.raises(TypeError, match="torch optimizer"):
        attach(model, "adam")
    with pytest.raises(TypeError, match="ema must be"):
        attach(model, adam(model), ema=3)


def test_parametrized_weight_is_refused_by_name():
    model = net()
    nn.utils.parametrizations.weight_norm(model[4])
    with pytest.raises(ValueError, match="4 has no parameter `weight`"):
        attach(model, adam(model))
    assert names(model, exclude="4") == ["0", "2.0"]


def test_overrides_the_last_match_wins():
    model = net()
    pruner = attach(model, adam(model), 0.9, overrides={"*": 0.5, "2.*": 0.7})
    step(model, pruner._buckets.optimizers[0], 0)
    counts = {row.name: row.selected for row in pruner.summary().rows}
    sizes = {"0": (216, 0.5), "2.0": (576, 0.7), "4": (2880, 0.5)}
    assert counts == {name: num_pruned(*size) for name, size in sizes.items()}


def test_names_are_those_inside_wrappers():
    model = net()
    wrapped = nn.DataParallel(model)
    pruner = attach(wrapped, adam(model))
    assert list(pruner.masks()) == ["0", "2.0", "4"]
    assert pruner.finalize() is wrapped


# The step


def test_one_step_is_the_op_after_the_optimizer():
    model, twin = net(), net()
    opt, plain = adam(model), adam(twin)
    pruner = attach(model, opt, sparsity=0.8, shrink=0.9)
    for seed in range(3):
        step(model, opt, seed)
        step(twin, plain, seed)
        expected = [twin[0].weight, twin[2][0].weight, twin[4].weight]
        if seed == 0:
            state = ops.ShrinkState(expected, k=[num_pruned(w.numel(), 0.8) for w in expected])
        ops.soft_shrink_(expected, state, 0.9)
        assert same(weights(model), weights(twin))
    assert list(pruner.flips().values()) == state.flips.tolist()
    assert list(pruner.thresholds().values()) == state.thresholds.tolist()
    assert all(torch.equal(*m) for m in zip(pruner.masks().values(), state.masks(), strict=True))


def test_gradient_accumulation_and_closures_count_optimizer_steps():
    model = net()
    opt = sgd(model.parameters())
    pruner = attach(model, opt)
    for _ in range(4):
        model(torch.randn(1, 3, 6, 6)).sum().backward()
    assert pruner.step_count == 0
    opt.step()
    assert pruner.step_count == 1

    def closure():
        opt.zero_grad()
        loss = model(torch.randn(1, 3, 6, 6)).sum()
        loss.backward()
        return loss

    opt.step(closure)
    lbfgs_like = torch.optim.LBFGS([model[4].bias], max_iter=3)
    lbfgs_like.step(closure)
    assert pruner.step_count == 2


def test_by_hand_without_optimizer_or_hook():
    model = net()
    pruner = attach(model, sparsity=0.9)
    assert not pruner.attached
    pruner.step()
    pruner.step(found_inf=torch.ones(()))
    assert pruner.step_count == 1 and pruner.flips()["4"] == num_pruned(2880, 0.9)
    pruner.detach()
    unhooked = attach(model, adam(model), hook=False)
    step(model, unhooked._buckets.optimizers[0], 0)
    assert unhooked.step_count == 0


def test_a_step_by_hand_behind_the_hook_is_named():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.step()
        step(model, opt, 0)
    with pytest.warns(UserWarning, match="optimizer.step\\(\\) has pruned already") as caught:
        pruner.step()
    assert [w.filename for w in caught] == [__file__] and pruner.step_count == 3
    pruner.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.step()


def test_several_optimizers_shrink_their_own_weights():
    model = net()
    first = sgd([model[0].weight, model[2][0].weight], momentum=0.9)
    second = adam(model[4])
    pruner = attach(model, [first, second], sparsity=0.9, freeze_at=3)
    model(torch.randn(2, 3, 6, 6)).square().mean().backward()
    first.step()
    assert [bool(f) for f in pruner.flips().values()] == [True, True, False]
    second.step()
    assert pruner.flips()["4"] == num_pruned(2880, 0.9) and pruner.step_count == 1
    for _ in range(2):
        first.step()
        second.step()
    assert pruner.frozen and pruner.summary().zeros == pruner.summary().selected
    for opt, p in ((first, model[0].weight), (second, model[4].weight)):
        moment = opt.state[p].get("momentum_buffer", opt.state[p].get("exp_avg"))
        assert (moment[p == 0] == 0).all() and moment.any()


def test_schedule_counts_follow_the_ratio_and_overrides_scale():
    model = net()
    opt = adam(model)
    schedule = Linear(0.0, 0.8, begin=0, end=4)
    pruner = attach(model, opt, schedule=schedule, overrides={"4": 0.4})
    for t in range(1, 7):
        step(model, opt, t)
        selected = {row.name: row.selected for row in pruner.summary().rows}
        ratio = schedule(t)
        assert selected["0"] == num_pruned(216, ratio)
        assert selected["4"] == num_pruned(2880, 0.4 if t >= 4 else 0.4 * (ratio / 0.8))


def test_schedule_counts_have_no_rounding_error_of_their_own():
    layer, schedule = nn.Linear(20, 10), Linear(0.0, 0.7, begin=0, end=4)
    pruner = attach(layer, schedule=schedule)
    pruner.step()
    assert num_pruned(200, 0.7 * (schedule(1) / 0.7)) != num_pruned(200, schedule(1))
    assert pruner.flips()[""] == num_pruned(200, schedule(1))


def test_k_is_written_only_when_it_changes(monkeypatch):
    calls = []
    plain = ops.ShrinkState.set_k
    monkeypatch.setattr(ops.ShrinkState, "set_k", lambda s, k: (calls.append(k), plain(s, k))[1])
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, schedule=Linear(0.0, 0.8, begin=0, end=3))
    calls.clear()
    train(model, opt, range(8))
    assert len(calls) == 3 and pruner.step_count == 8
    slow = attach(net(), schedule=Linear(0.0, 0.8, begin=0, end=10**6))
    calls.clear()
    for _ in range(8):
        slow.step()
    assert calls == [[1, 1, 1]]  # the ratio grows, its counts do not


def test_callbacks_see_every_step_until_removed():
    model = net()
    opt, seen = adam(model), []
    pruner = attach(model, opt)
    stop = pruner.on_step(lambda p: seen.append((p.step_count, p.flips()["4"])))
    train(model, opt, range(2))
    stop()
    step(model, opt, 2)
    assert [t for t, _ in seen] == [1, 2] and seen[0][1] == num_pruned(2880, 0.95)


# What one sees


def test_repr_says_what_the_pruner_is_doing():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9, overrides={"4": Keep(2, of=32)}, method="iht")
    assert repr(pruner) == "Pruner(iht, step 0, pruning, 3 layers, target 0.9 2:32)"
    step(model, opt, 0)
    pruner.freeze()
    assert repr(pruner) == "Pruner(iht, step 1, frozen, 3 layers, target 0.9 2:32)"
    pruner.finalize()
    assert "final" in repr(pruner)


def test_a_notebook_shows_the_summary_as_a_table():
    model = nn.ModuleDict({"a<b": nn.Linear(4, 4), "up": nn.ConvTranspose2d(4, 4, 3)})
    summary = attach(model, sparsity=0.5).summary()
    page = summary._repr_html_()
    root = ElementTree.fromstring(f"<div>{page}</div>".replace("<br>", "<br/>"))
    lines = [[cell.text or "" for cell in row] for row in root.iter("tr")]
    header = ["layer", "shape", "target", "selected", "zeros", "flips", "threshold", ""]
    assert lines[0] == header and len(lines) == 3
    assert lines[1] == ["a<b", "4x4", "0.5", "0 (0.00%)", "0 (0.00%)", "0", "nan", ""]
    assert lines[2][:2] == ["total", "16"]
    assert root.find("table/caption").text == summary.title
    assert "not pruned: up.weight" in page


# Arguments of a wrong kind


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"sparsity": "0.9"}, "sparsity must be a number in 0..1 .*, not '0.9'"),
        ({"sparsity": True}, "sparsity must be a number in 0..1 .*, not True"),
        ({"sparsity": {"0": 0.5}}, "sparsity must be a number .*overrides= names single layers"),
        ({"shrink": [0.9]}, "shrink must be a number in 0..1, not"),
        ({"types": "Conv2d"}, "types must be a module class or several, not \\('Conv2d',\\)"),
        ({"exclude": nn.Linear}, "exclude must be a name pattern or several, not the class Linear"),
        ({"exclude": ["0", 3]}, "exclude must be a name pattern or several, not \\('0', 3\\)"),
        ({"pattern": (2, 4)}, "pattern must be an issp.Keep, not \\(2, 4\\)"),
        ({"overrides": [("0", 0.5)]}, "overrides must be a dict from name pattern to a number"),
        ({"overrides": {"0": "0.5"}}, "overrides must be a dict .*, not {'0': '0.5'}"),
        ({"schedule": "cubic"}, "schedule must be an issp.Constant, .*, not 'cubic'"),
        ({"schedule": Cubic}, "schedule must be an issp.Constant, .*, not the class Cubic"),
        ({"freeze_at": 2.5}, "freeze_at must be a whole number of optimizer steps, not 2.5"),
        ({"freeze_at": "9"}, "freeze_at must be a whole number of optimizer steps, not '9'"),
    ],
    ids=str,
)
def test_an_argument_of_a_wrong_kind_is_one_sentence(argument, sentence):
    with pytest.raises(TypeError, match=sentence):
        attach(nn.Linear(4, 4), None, **argument)


def test_model_and_optimizer_in_the_wrong_order_are_named():
    model = nn.Linear(4, 4)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="model must be a torch module, not SGD"):
        attach(opt, model)


def test_numbers_of_numpy_and_torch_lists_and_generators_are_taken():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Conv2d(1, 1, 3))
    pruner = attach(
        model,
        None,
        sparsity=torch.tensor(0.5),
        types=[nn.Linear],
        exclude=(name for name in ["0"]),
        freeze_at=3.0,
    )
    for _ in range(3):
        pruner.step()
    assert pruner.frozen and int((model[1].weight == 0).sum()) == 50
    assert list(pruner.summary().unpruned) == ["2.weight"]  # the excluded layer is not listed
