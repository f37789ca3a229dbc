"""What holds for every method: exact counts at the end, resume to the same bits, refusals."""

import copy

import pytest
import torch

import issp
from issp import methods
from issp.pruning.methods import METHODS
from tests.asserts import assert_bitwise_equal
from tests.pruning.methods.runs import batch, network, train, weights

# Of sls the counts differ, and networks of its own are needed: test_sls.py.
ALL = [name for name in METHODS if name != "sls"]
PRUNING = [name for name in ALL if METHODS[name].prunes]
FREEZE = 24


def attached(name, model, kind=torch.optim.Adam, **arguments):
    optimizer = kind(model.parameters(), lr=1e-2)
    arguments.setdefault("freeze_at", FREEZE)
    return optimizer, issp.attach(model, optimizer, method=name, **arguments)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", [torch.optim.Adam, issp.optim.Adam])
@pytest.mark.parametrize("name", PRUNING)
def test_ends_with_the_exact_count_of_zeros(name, kind):
    model = network()
    optimizer, pruner = attached(name, model, kind, sparsity=0.9)
    train(model, optimizer, FREEZE + 6, pruner)
    assert pruner.finalize() is model
    for layer, weight in weights(model).items():
        zeros = int((weight == 0).sum())
        assert zeros == issp.num_pruned(weight.numel(), 0.9), f"{name}: {layer}"


@pytest.mark.parametrize("name", PRUNING)
def test_both_optimizers_end_with_the_same_bits(name):
    first, second = network(), network()
    for model, kind in ((first, torch.optim.SGD), (second, issp.optim.SGD)):
        torch.manual_seed(3)
        optimizer, pruner = attached(name, model, kind, sparsity=0.9)
        train(model, optimizer, FREEZE + 2, pruner)
    for (layer, a), b in zip(weights(first).items(), weights(second).values(), strict=True):
        assert_bitwise_equal(b, a, f"{name}: {layer}")


@pytest.mark.sampled
@pytest.mark.parametrize("stop", [7, FREEZE + 3])
@pytest.mark.parametrize("name", ALL)
def test_resumes_to_the_same_bits(name, stop):
    arguments = {} if name == "dense" else {"sparsity": 0.9}
    whole = network()
    optimizer, pruner = attached(name, whole, **arguments)
    train(whole, optimizer, FREEZE + 6, pruner)

    broken = network()
    optimizer, pruner = attached(name, broken, **arguments)
    train(broken, optimizer, stop, pruner)
    state = copy.deepcopy((broken.state_dict(), optimizer.state_dict(), pruner.state_dict()))

    resumed = network(seed=0)
    optimizer, pruner = attached(name, resumed, **arguments)
    for part, saved in zip((resumed, optimizer, pruner), state, strict=True):
        part.load_state_dict(saved)
    train(resumed, optimizer, FREEZE + 6 - stop, pruner, first=stop)
    for (layer, a), b in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert_bitwise_equal(b, a, f"{name}: {layer}")


@pytest.mark.parametrize("name", PRUNING)
def test_state_is_plain(name, tmp_path):
    model = network()
    optimizer, pruner = attached(name, model, sparsity=0.9)
    train(model, optimizer, 5, pruner)
    torch.save(pruner.state_dict(), tmp_path / "state")
    pruner.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert pruner.step_count == 5


@pytest.mark.parametrize("name", [n for n in PRUNING if METHODS[n].takes_patterns])
def test_ends_in_the_pattern(name):
    model = network()
    keep = issp.Keep(2, of=8)
    exclude = ["head"]  # 3 input channels
    optimizer, pruner = attached(name, model, pattern=keep, exclude=exclude)
    train(model, optimizer, FREEZE + 3, pruner)
    pruner.finalize()
    for layer, weight in weights(model).items():
        if layer != "head":
            kept = (weight != 0).sum(1)  # 8 input channels: one group
            assert kept.unique().tolist() == [2], f"{name}: {layer}"


def test_a_pattern_without_meaning_is_refused():
    class OfWholeLayers(methods.ISSP):
        takes_patterns = False

    with pytest.raises(ValueError, match="an N:M pattern has no meaning for iss-p"):
        attached(OfWholeLayers(), network(), pattern=issp.Keep(2, of=8), exclude=["head"])


@pytest.mark.parametrize(
    "name", [n for n in PRUNING if METHODS[n].fixes_masks or not METHODS[n].ranks]
)
def test_a_schedule_without_meaning_is_refused(name):
    schedule = issp.Cubic(0.0, 0.9, begin=0, end=10)
    with pytest.raises(ValueError, match=f"schedule has no meaning for {name}"):
        attached(name, network(), schedule=schedule)


@pytest.mark.parametrize("name", ALL)
def test_copies_and_pickles(name):
    arguments = {} if name == "dense" else {"sparsity": 0.9}
    model = network()
    optimizer, pruner = attached(name, model, **arguments)
    train(model, optimizer, 3, pruner)
    other, opt, twin = copy.deepcopy((model, optimizer, pruner))
    twin.reattach(opt)
    train(model, optimizer, 4, pruner, first=3)
    train(other, opt, 4, twin, first=3)
    for (layer, a), b in zip(weights(model).items(), weights(other).values(), strict=True):
        assert_bitwise_equal(b, a, f"{name}: {layer}")


def test_dense_training_is_torchs():
    model, plain = network(), network()
    optimizer, pruner = attached("dense", model)
    train(model, optimizer, FREEZE + 3, pruner)
    train(plain, torch.optim.Adam(plain.parameters(), lr=1e-2), FREEZE + 3)
    for (layer, a), b in zip(weights(plain).items(), weights(model).values(), strict=True):
        assert_bitwise_equal(b, a, layer)
    assert pruner.frozen and pruner.summary().selected == 0


def test_dense_refuses_a_sparsity():
    with pytest.raises(ValueError, match="dense prunes nothing: drop sparsity"):
        attached("dense", network(), sparsity=0.9)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match='no method "iss": did you mean \'iss-'):
        methods.create("iss")
    with pytest.raises(ValueError, match="no option \"limt\": did you mean 'limit'"):
        methods.create("srp", limt=1)
    with pytest.raises(ValueError, match='"l1" has no option "limit": it has none'):
        methods.create("l1", limit=1)
    with pytest.raises(TypeError, match="method must be a name or a method of issp.methods"):
        methods.create(3)
    with pytest.raises(ValueError, match="pass limit to SRP"):
        methods.create(methods.SRP(), limit=1)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: methods.ISSP(1.5), "shrink is 1.5: it must be a number in 0..1"),
        (lambda: methods.SRP(seed=2**63), "seed is 9223372036854775808"),
        (lambda: methods.SRP(limit=0), "limit is 0"),
        (lambda: methods.ISSR(interval=0), "interval is 0"),
        (lambda: methods.ISSR(delta=-1.0), "delta is -1"),
    ],
)
def test_options_outside_their_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("value", ["x", True, [1], float("nan"), float("inf"), {}])
def test_options_of_a_wrong_kind_are_refused_by_name(value):
    options = [(cls, option) for cls in METHODS.values() for option in cls().options()]
    assert len(options) > 25
    for cls, option in options:
        if (option, value) != ("constrained", "x"):
            with pytest.raises((ValueError, TypeError), match=rf"^{option} (is|must be) .*\S$"):
                cls(**{option: value})


def test_whole_numbers_may_be_written_as_floats():
    made = methods.SRP(interval=20.0, seed=3.0), methods.SLS(of=16.0, epoch=2.0)
    assert [type(x) for x in (made[0].interval, made[0].seed, made[1].of, made[1].epoch)] == [
        int
    ] * 4


def test_one_method_serves_several_pruners():
    method = methods.ISSR(limit=0.25)
    pruners = [attached(method, network())[1] for _ in range(2)]
    assert pruners[0].method is not pruners[1].method and method.setting is None
    assert pruners[0].method.limit == 0.25


def test_a_method_that_has_learned_begins_anew_elsewhere():
    model = network()
    method = methods.StaleISSR(limit=0.5, interval=1, delta=0.125)
    optimizer, pruner = attached(method, model, torch.optim.SGD)
    train(model, optimizer, 2, pruner)
    _, other = attached(pruner.method, network())
    assert other.method.state_dict() == {"lambdas": {}} != pruner.method.state_dict()


def test_shrink_belongs_to_iss_p():
    assert attached("iss-p", network(), shrink=0.9)[1].method.factor == 0.9
    with pytest.warns(UserWarning, match='method "iht" does not use shrink'):
        assert attached("iht", network(), shrink=0.9)[1].method.factor == 0.0
    with pytest.raises(ValueError, match=r"pass it to ISSP\(\)"):
        attached(methods.ISSP(), network(), shrink=0.9)


def test_a_state_of_other_options_is_refused():
    _, first = attached(methods.ISSR(limit=0.25), network())
    _, second = attached(methods.ISSR(limit=0.5), network())
    with pytest.raises(ValueError, match="options"):
        second.load_state_dict(first.state_dict())


def test_masked_is_the_model_that_a_freeze_would_give():
    model = network()
    optimizer, pruner = attached("iss-p", model, sparsity=0.9)
    average = copy.deepcopy(model)
    train(model, optimizer, 5, pruner)
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model)
    for name, mask in pruner.masks().items():
        expected.get_submodule(name).weight.data.mul_(mask)
    x = batch(99)
    with pruner.masked(), torch.no_grad():
        assert_bitwise_equal(model(x), expected(x), "masked")
    with pruner.masked(average):
        assert int((average.after.weight == 0).sum()) == issp.num_pruned(576, 0.9)
    with pytest.raises(KeyError), pruner.masked():
        raise KeyError
    for name, value in model.state_dict().items():
        assert_bitwise_equal(value, before[name], name)
    assert int((average.after.weight == 0).sum()) == 0


def test_loss_is_zero_without_one():
    model = network()
    _, pruner = attached("iss-p", model)
    assert pruner.loss().item() == 0.0 and pruner.loss().shape == ()


@pytest.mark.parametrize("name", ["iss-r", "srp"])
def test_by_hand_the_penalty_is_asked_for(name):
    model, hooked = network(), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    pruner = issp.attach(model, optimizer, method=name, freeze_at=FREEZE, hook=False)
    with pytest.raises(RuntimeError, match=r"call pruner.regularize\(\) before each step"):
        pruner.step()
    for step in range(FREEZE + 2):
        x = batch(step)
        optimizer.zero_grad()
        (model(x) - x.mean(1, keepdim=True)).square().mean().backward()
        pruner.regularize()
        optimizer.step()
        pruner.step()
    other, hooks = attached(name, hooked)
    train(hooked, other, FREEZE + 2, hooks)
    for (layer, a), b in zip(weights(hooked).items(), weights(model).values(), strict=True):
        assert_bitwise_equal(b, a, layer)


def test_layers_that_join_late_are_pruned_too():
    model = network()
    optimizer = torch.optim.SGD([*model.head.parameters(), *model.after.parameters()], lr=1e-2)
    with pytest.warns(UserWarning, match="not in the optimizer"):
        pruner = issp.attach(model, optimizer, method="srp", freeze_at=FREEZE)
    train(model, optimizer, 2, pruner)
    optimizer.add_param_group({"params": [*model.blocks.parameters(), *model.tail.parameters()]})
    train(model, optimizer, FREEZE, pruner, first=2)
    masks = pruner.masks()
    assert torch.equal(masks["after"], masks["blocks.0.conv2"]), "one set for the group"
    for layer, weight in weights(model).items():
        assert int((weight == 0).sum()) == issp.num_pruned(weight.numel(), 0.95), layer
