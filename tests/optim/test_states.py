"""issp.optim: states, copies, memory layouts, several optimizers, what torch steps and why."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import issp
from tests.asserts import assert_bitwise_equal
from tests.optim.twins import Twin, assert_twins, backward, network, together, twins

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _even_by_the_reference(monkeypatch):
    """Where no native back end is, the op is still what is tested."""
    monkeypatch.setattr(issp.backends, "by_reference", lambda device: [])


@pytest.mark.parametrize("kind", ["adam", "sgd, momentum"])
def test_states_load_both_ways(kind):
    pair = twins(kind)
    together(*pair, 5)
    fresh = twins(kind)
    for twin, other in zip(fresh, pair[::-1], strict=True):  # each from the other's state
        twin.model.load_state_dict(other.model.state_dict())
        twin.opt.load_state_dict(copy.deepcopy(other.opt.state_dict()))
        twin.pruner.load_state_dict(other.pruner.state_dict())
        # A state brings its options along; ours leaves `fused` open, as torch's default does.
        assert twin.opt.param_groups[0]["fused"] is (True if twin is fresh[1] else None)
    fresh[0].opt.param_groups[0]["fused"] = True
    together(*fresh, 5, begin=5)
    together(*pair, 5, begin=5)
    assert_twins(pair[0], fresh[1], "resumed")
    assert fresh[1].opt.report[0].fused


def test_a_state_of_torchs_default_step_goes_on_fused():
    model, other = network(), Twin("adam", True)
    opt = torch.optim.Adam(model.parameters())
    backward(model, 0)
    opt.step()
    other.opt.load_state_dict(opt.state_dict())
    (group,) = other.opt.param_groups
    assert group["fused"] is None and group["lr"] == 1e-3
    assert other.opt.state_dict()["state"].keys() == opt.state_dict()["state"].keys()
    other.step(1)
    assert other.opt.report[0].fused


def test_a_state_from_before_torch_had_fused_goes_on_fused():
    twin = Twin("sgd, momentum", True)
    twin.step(0)
    saved = copy.deepcopy(twin.opt.state_dict())
    del saved["param_groups"][0]["fused"]
    twin.opt.load_state_dict(saved)
    twin.step(1)
    assert twin.opt.report[0].fused


@pytest.mark.parametrize("fused", [None, True, False])
def test_without_a_pruner_the_step_is_torchs(fused):
    results = []
    for library in (torch.optim, issp.optim):
        model = network()
        opt = library.Adam(model.parameters(), lr=1e-2, fused=fused)
        for number in range(3):
            backward(model, number)
            opt.step()
        results.append(model)
    for a, b in zip(*(m.parameters() for m in results), strict=True):
        assert_bitwise_equal(b.detach(), a.detach(), "a parameter")
    (info,) = opt.report
    assert not info.fused and "no pruner" in info.fallback_reason


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_after_reattach(copied):
    twin, expected = Twin("adam", True), Twin("adam", True)
    for number in range(4):
        twin.step(number)
        expected.step(number)
    model, opt = copied((twin.model, twin.opt))
    assert "no pruner" in opt.report[0].fallback_reason
    twin.pruner.reattach(opt, model)
    twin.model, twin.opt = model, opt
    for number in range(4, 8):
        twin.step(number)
        expected.step(number)
    assert_twins(expected, twin, "after reattach")
    assert opt.report[0].fused


def test_channels_last_weights_and_moments_from_elsewhere():
    def last():
        return network().to(memory_format=torch.channels_last)

    pair = twins("adam", model=last)
    together(*pair, 4)
    assert pair[1].opt.report[0].fused
    plain = Twin("adam", True)  # its contiguous moments meet channels_last weights
    for number in range(4):
        plain.step(number)
    ours = pair[1]
    ours.opt.load_state_dict(plain.opt.state_dict())
    before = {n: x.clone() for n, x in ours.tensors().items() if n.startswith("state")}
    backward(ours.model, 9)
    for p in ours.model.parameters():
        p.grad.zero_()
    ours.opt.step()
    for i, p in enumerate(ours.model.parameters()):
        moment = ours.opt.state[p]["exp_avg"]
        assert p.dim() < 4 or moment.is_contiguous(memory_format=torch.channels_last)
        expected = before[f"state {i} exp_avg"] * torch.tensor(0.9)
        assert torch.allclose(moment, expected, rtol=1e-5)


def test_bfloat16_gradients_of_float32_weights():
    """torch refuses them; here they are widened exactly: as if they had come as float32."""
    pair = twins("adam")
    for p in pair[1].model.parameters():
        p.grad_dtype = torch.bfloat16
    for number in range(4):
        for twin in pair:
            source = torch.Generator().manual_seed(number)
            for p in twin.model.parameters():
                grad = torch.randn(p.shape, generator=source).bfloat16()
                p.grad = grad if twin is pair[1] else grad.float()
            twin.opt.step()
        assert_twins(*pair, f"after step {number}")


def test_tied_and_patterned_weights():
    def tied():
        model = network()
        model.append(nn.Linear(64, 16, bias=False))
        model.append(nn.Linear(16, 64))
        model[7].weight = model[4].weight
        return model

    pair = twins("adam", model=tied, overrides={"2": issp.Keep(2, of=16)}, freeze_at=3)
    together(*pair, 6)
    assert pair[1].opt.report[0].pruned == 4  # the N:M layer is shrunk in the same call
    assert int(pair[1].pruner.masks()["2"].sum()) == 64 * 64 * 9 // 8


def test_several_optimizers_and_two_pruners():
    def build(library, **options):
        model = network()
        first = library.SGD(model[0].parameters(), lr=0.1, momentum=0.9, **options)
        rest = [p for n, p in model.named_parameters() if n[0] != "0"]
        second = library.AdamW(rest, lr=1e-2, **options)
        pruner = issp.attach(model, [first, second], sparsity=0.8, types=nn.Conv2d)
        other = issp.attach(model, second, sparsity=0.5, types=nn.Linear)
        return model, (first, second), (pruner, other)

    built = [build(torch.optim, fused=True), build(issp.optim)]
    for number in range(4):
        for model, opts, _ in built:
            backward(model, number)
            for opt in opts:
                opt.step()
        for name, a in built[0][0].named_parameters():
            assert_bitwise_equal(built[1][0].get_parameter(name).detach(), a.detach(), name)
    for a, b in zip(built[0][2], built[1][2], strict=True):
        assert str(a.summary()) == str(b.summary())
    first, second = built[1][1]
    assert (first.report[0].pruned, second.report[0].pruned) == (1, 1)


def test_freezing_within_a_step_and_leaving():
    pair = twins("adam")
    for twin in pair:
        twin.pruner.on_step(lambda pruner: pruner.freeze() if pruner.step_count == 3 else None)
    together(*pair, 6)
    assert pair[1].pruner.frozen
    for twin in pair:
        twin.pruner.detach()
        twin.opt.param_groups[0]["fused"] = None
    together(*pair, 2, begin=6)
    assert "no pruner" in pair[1].opt.report[0].fallback_reason


def test_state_entries_that_somebody_replaced_or_emptied_are_used():
    pair = twins("adam")
    together(*pair, 3)
    for twin in pair:
        twin.opt.state[twin.model[2].weight] = {}
        twin.opt.state[twin.model[0].bias].clear()
    together(*pair, 3, begin=3)
    assert pair[1].opt.state[pair[1].model[2].weight]["step"] == 3


def test_capturable_is_refused_on_a_cpu_as_torch_does():
    for library in (torch.optim, issp.optim):
        model = network()
        opt = library.Adam(model.parameters(), capturable=True)
        issp.attach(model, opt)
        backward(model, 0)
        with pytest.raises(AssertionError, match="capturable"):
            opt.step()


def test_a_learning_rate_in_a_tensor():
    pair = twins("adam", options={"lr": torch.tensor(2e-3)})
    together(*pair, 3)
    assert pair[1].opt.report[0].fused


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"amsgrad": True}, "amsgrad"), ({"foreach": True}, "foreach"), ({"fused": False}, "fused")],
)
def test_the_report_says_why_torch_steps(options, reason):
    twin = Twin("adam", True, options=options)
    assert reason in twin.opt.report[0].fallback_reason
    twin.step(0)
    assert reason in twin.opt.report[0].fallback_reason
    assert twin.pruner.summary().selected > 0


STATES = {
    "the state holds only exp_avg": lambda state: state.pop("step") and state.pop("exp_avg_sq"),
    "the state's step is no number in a tensor": lambda state: state.update(step=3),
    "the state's exp_avg is not like its weight": lambda state: state.update(
        exp_avg=state["exp_avg"].double()
    ),
}


@pytest.mark.parametrize("reason", STATES)
def test_states_that_the_op_does_not_take_are_left_to_torch(reason):
    """Somebody's own state: the step ends as torch's does, in the same error if it is one."""
    outcomes = []
    for twin in twins("adam"):
        twin.opt.param_groups[0]["fused"] = None
        twin.step(0)
        STATES[reason](twin.opt.state[twin.model[2].weight])
        try:
            twin.step(1)
            outcomes.append(None)
        except (KeyError, RuntimeError, AssertionError, AttributeError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
    (info,) = twin.opt.report
    assert not info.fused and info.fallback_reason == reason


def test_the_slow_reference_does_not_step(monkeypatch):
    """Torch's own step is faster than the reference of the op; the pruner's hook prunes."""
    names = ["adam_soft_shrink_", "sgd_soft_shrink_"]
    monkeypatch.setattr(issp.backends, "by_reference", lambda device: names)
    for kind, op in (("adam", names[0]), ("sgd", names[1])):
        torchs, ours = twins(kind)
        torchs.opt.param_groups[0]["fused"] = None
        together(torchs, ours, 3)
        (info,) = ours.opt.report
        assert not info.fused
        assert info.fallback_reason == f"the slow reference would serve {op} on cpu"


def test_other_dtypes_are_stepped_by_torch():
    def double():
        return nn.Sequential(nn.Linear(16, 64)).double()

    twin = Twin("adam", True, model=double)
    for p in twin.model.parameters():
        p.grad = torch.randn_like(p)
    twin.opt.step()
    assert "float64" in twin.opt.report[0].fallback_reason
    assert twin.pruner.summary().selected > 0


def test_parameters_of_another_type_are_stepped_by_torch():
    class Own(nn.Parameter):
        pass

    def model():
        net = network()
        net[5].weight = Own(net[5].weight.detach())
        return net

    pair = twins("adam", model=model)
    pair[0].opt.param_groups[0]["fused"] = None
    together(*pair, 2)
    assert pair[1].opt.report[0].fallback_reason == "weights of type Own"


def test_impossible_options_are_refused_before_anything_is_written():
    twin = Twin("adam", True)
    twin.step(0)
    before = twin.tensors()
    twin.opt.param_groups[0]["lr"] = -1.0
    backward(twin.model, 1)
    with pytest.raises(ValueError, match="lr is -1.0"):
        twin.opt.step()
    for name, x in twin.tensors().items():
        assert_bitwise_equal(x, before[name], name)
    twin.opt.param_groups[0]["lr"] = 1e-3
    twin.step(1)
    assert twin.pruner.step_count == 2


def test_arguments_are_torchs():
    for name in ("Adam", "AdamW", "SGD"):
        expected, actual = getattr(torch.optim, name), getattr(issp.optim, name)
        assert issubclass(actual, expected)
        assert inspect.signature(actual) == inspect.signature(expected)
        p = nn.Parameter(torch.zeros(2))
        assert actual([p]).defaults == expected([p]).defaults
        named = actual([("p", p)])
        assert named.state_dict()["param_groups"][0]["param_names"] == ["p"]
        with pytest.raises(ValueError, match="learning rate"):
            actual([p], lr=-1.0)
        with pytest.raises(TypeError, match="iterable"):
            actual(p)
