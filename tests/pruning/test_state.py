"""A damaged state of a pruner is refused in one sentence, and the pruner stays as it was."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import issp
from tests.asserts import assert_bitwise_equal


def trained(seed=1, freeze_at=None):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = issp.attach(net, opt, sparsity=0.5, freeze_at=freeze_at)
    net(torch.randn(2, 8)).sum().backward()
    opt.step()
    return net, pruner


def damaged(*path, value=None, remove=False):
    def damage(saved):
        for key in path[:-1]:
            saved = saved[key]
        if remove:
            del saved[path[-1]]
        else:
            saved[path[-1]] = value

    return damage


MASK = ("layers", "0", "mask")
DAMAGES = {
    "no version": (damaged("version", remove=True), "lacks version: it is something else"),
    "another version": (damaged("version", value=2), "has version 2"),
    "version in a tensor": (damaged("version", value=torch.ones(2)), "has version"),
    "no stage": (damaged("stage", remove=True), "lacks stage"),
    "stage": (damaged("stage", value="prunink"), "the stage or the step_count"),
    "step_count": (damaged("step_count", value=-4), "the stage or the step_count"),
    "step_count of 1.5": (damaged("step_count", value=1.5), "the stage or the step_count"),
    "shrink in a tensor": (damaged("shrink", value=torch.ones(2)), "saved with shrink"),
    "targets": (damaged("targets", value=3), "saved with targets 3"),
    "layers": (damaged("layers", value=[1]), "the layers of the pruner's state are damaged"),
    "a layer": (damaged("layers", "0", value=[1]), "layer 0 of the pruner's state is damaged"),
    "no mask": (damaged(*MASK, remove=True), "lacks mask of layer 0"),
    "mask is a list": (damaged(*MASK, value=[1, 2]), "the mask of 0"),
    "mask is longer": (damaged(*MASK, value=torch.zeros(9, dtype=torch.int32)), "the mask of 0"),
    "mask of int64": (damaged(*MASK, value=torch.zeros(2, dtype=torch.int64)), "the mask of 0"),
    "k": (damaged("layers", "0", "k", value=49), "k of 0 in the pruner's state is 49"),
    "k of text": (damaged("layers", "0", "k", value="9"), "k of 0"),
    "k is huge": (damaged("layers", "0", "k", value=10**40), "k of 0"),
    "flips": (damaged("layers", "0", "flips", value=10**40), "flips of 0"),
    "threshold": (damaged("layers", "0", "threshold", value=0.5), "the threshold of 0"),
    "thresholds": (damaged("layers", "0", "threshold", value=torch.ones(3)), "the threshold of 0"),
    "shape": (damaged("layers", "0", "shape", value=[6, 9]), "has shape (6, 9) for 0"),
    "shape is a number": (damaged("layers", "0", "shape", value=48), "has shape 48 for 0"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_refused(name):
    damage, message = DAMAGES[name]
    _, pruner = trained()
    before, summary = pruner.masks(), str(pruner.summary())
    saved = copy.deepcopy(trained(seed=2)[1].state_dict())
    damage(saved)
    with pytest.raises(ValueError) as refusal:
        pruner.load_state_dict(saved)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert str(pruner.summary()) == summary and pruner.step_count == 1 and not pruner.frozen
    for layer, mask in pruner.masks().items():
        assert_bitwise_equal(mask, before[layer], f"mask of {layer}")


@pytest.mark.parametrize("thing", [None, 3, [1], "state"])
def test_what_is_no_state_is_refused(thing):
    with pytest.raises(ValueError, match="it is something else"):
        trained()[1].load_state_dict(thing)


@pytest.mark.parametrize("freeze_at", [None, 1])
def test_a_good_state_loads_from_a_file(freeze_at):
    _, pruner = trained(freeze_at=freeze_at)
    _, other = trained(seed=2, freeze_at=freeze_at)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    pruner.load_state_dict(torch.load(file, weights_only=True))
    assert pruner.frozen == other.frozen == (freeze_at == 1)
    for layer, mask in pruner.masks().items():
        assert_bitwise_equal(mask, other.masks()[layer], f"mask of {layer}")
