"""Which layers are pruned: tied weights, and what stays dense although it looks prunable."""

import pytest
import torch
from torch import nn

import issp
from issp import Keep


def tied(one, other):
    """A model in which two modules share one weight, between other layers."""
    model = nn.ModuleDict({"one": one, "other": other, "rest": nn.Linear(4, 4)})
    model["other"].weight = model["one"].weight
    return model


def bits(model):
    return {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}


def changed(model, before):
    return [n for n, p in bits(model).items() if not torch.equal(p, before[n])]


@pytest.mark.parametrize("excluded", ["one", "other"])
@pytest.mark.parametrize("first", [nn.Linear, nn.Embedding])
def test_a_weight_excluded_under_one_name_is_excluded(first, excluded):
    """Also where that name is one of another type, as an embedding's beside the output layer."""
    model = tied(first(8, 8), nn.Linear(8, 8))
    before = bits(model)
    pruner = issp.attach(model, sparsity=0.5, exclude=excluded)
    assert list(pruner.masks()) == ["rest"]
    pruner.finalize()
    assert changed(model, before) == ["rest.weight"]


@pytest.mark.parametrize("keep", [0.5, Keep(1, of=2)])
def test_a_weight_shared_with_a_type_that_is_not_pruned_is_left_alone_by_name(keep):
    model = tied(nn.Embedding(8, 6), nn.Linear(6, 8))
    before = bits(model)
    pruner = issp.attach(model, sparsity=0.5, overrides={"other": keep})
    reason = "stays dense: its weight is also one.weight, which is not pruned"
    assert reason in str(pruner.summary())
    assert [row.note for row in pruner.summary().rows] == [reason, ""]
    pruner.finalize()
    assert changed(model, before) == ["rest.weight"]
    both = issp.attach(model, sparsity=0.5, types=(nn.Linear, nn.Embedding))
    assert list(both.masks()) == ["one", "other", "rest"]
    assert both.summary().numel == 8 * 6 + 16


def test_a_weight_that_is_also_a_parameter_of_another_name_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.table = model[0].weight
    row, other = issp.attach(model, sparsity=0.5).summary().rows
    assert row.note == "stays dense: its weight is also table, which is not pruned"
    assert not other.note
    with pytest.raises(ValueError, match="no layer to prune: 0, as all others, stays dense: its"):
        issp.attach(model, sparsity=0.5, exclude="1")


def test_converting_does_not_untie_such_a_weight():
    model = tied(nn.Embedding(8, 6), nn.Linear(6, 8))
    issp.attach(model, sparsity=0.5).finalize()
    dense = issp.nn.convert(model)
    assert dense == {"other": "its weight is also one.weight, which is not pruned"}
    assert model["other"].weight is model["one"].weight


def test_what_looks_prunable_and_is_not_pruned_is_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixing_weight = nn.Parameter(torch.zeros(3, 3))
            self.position_bias = nn.Parameter(torch.zeros(3, 3))

    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "up": nn.ConvTranspose2d(8, 8, 3),
            "conv": nn.Conv1d(8, 8, 3),
            "recurrent": nn.GRU(4, 4),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "embedding": nn.Embedding(8, 8),
            "norm": nn.LayerNorm([4, 4]),
            "own": Own(),
            "excluded": nn.ConvTranspose2d(8, 8, 3),
        }
    )
    summary = issp.attach(nn.DataParallel(model), sparsity=0.5, exclude="excluded").summary()
    assert [row.name for row in summary.rows] == ["attention.out_proj", "depthwise"]
    assert summary.unpruned == {
        "attention.in_proj_weight": "only a parameter `weight` is pruned",
        "up.weight": "ConvTranspose2d is not among the types",
        "conv.weight": "Conv1d is not among the types",
        "recurrent.weight_ih_l0": "only a parameter `weight` is pruned",
        "recurrent.weight_hh_l0": "only a parameter `weight` is pruned",
        "own.mixing_weight": "only a parameter `weight` is pruned",
    }
    assert summary.numel == 8 * 8 + 8 * 9
    assert "not pruned: up.weight: ConvTranspose2d is not among the types" in str(summary)
    types = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
    assert "up.weight" not in issp.attach(model, sparsity=0.5, types=types).summary().unpruned


class Conv1D(nn.Module):
    """As the layer of that name in transformers: a Linear whose weight is [inputs, outputs]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(
    "module",
    [
        Conv1D(),
        nn.ConvTranspose1d(8, 8, 3),
        nn.ConvTranspose2d(8, 8, 3),
        nn.ConvTranspose3d(8, 8, 3),
        nn.Embedding(8, 8),
        nn.Bilinear(8, 8, 8),
    ],
    ids=lambda m: type(m).__name__,
)
def test_patterns_refuse_weights_without_input_channels_in_dimension_1(module):
    model = nn.Sequential(module, nn.Linear(8, 8))
    types = (type(module), nn.Linear)
    name = type(module).__name__
    with pytest.raises(
        ValueError, match=f"0: a pattern groups input channels .* a {name} has none"
    ):
        issp.attach(model, types=types, pattern=Keep(2, of=4))
    pruner = issp.attach(model, types=types, pattern=Keep(2, of=4, tail="dense"))
    assert pruner.summary().rows[0].note.startswith("stays dense: a pattern groups input channels")
    pruner.detach()
    flat = issp.attach(model, types=types, pattern=Keep(2, of=4, layout="flat"))
    flat.finalize()
    assert (module.weight.detach().view(-1, 4) != 0).sum(1).tolist() == [2] * (
        module.weight.numel() // 4
    )


def test_patterns_of_grouped_convolutions_group_the_channels_of_their_own_group():
    model = nn.Sequential(nn.Conv2d(16, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8))
    pruner = issp.attach(model, pattern=Keep(2, of=4, tail="dense"))
    assert "does not divide" in pruner.summary().rows[1].note  # one input channel per group
    pruner.finalize()
    kept = (model[0].weight != 0).view(8, 2, 4, 3, 3).sum(2)
    assert kept.unique().tolist() == [2] and bool(model[1].weight.all())
    with pytest.raises(ValueError, match="0: v = 4 output rows would share positions across the 4"):
        issp.attach(nn.Sequential(nn.Conv2d(16, 8, 3, groups=4)), pattern=Keep(2, of=4, v=4))
    issp.attach(nn.Sequential(nn.Conv2d(16, 8, 3, groups=4)), pattern=Keep(2, of=4, v=2))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_older_parametrizations_are_refused_by_name(norm):
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="0 has no parameter `weight`"):
        issp.attach(model)


def _view_with_overlaps():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 1).expand(4, 4))
    return layer


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.LazyLinear(4), "1 is not initialized: run the model once before attaching"),
        (nn.Linear(4, 4, dtype=torch.complex64), "1 has a weight of torch.complex64: exclude it"),
        (nn.Linear(0, 4), "1 has an empty weight: exclude it"),
        (_view_with_overlaps(), "1: its weight is a view with gaps or overlaps in memory"),
    ],
    ids=["lazy", "complex", "empty", "view"],
)
def test_a_weight_that_cannot_be_pruned_is_named(layer, words):
    with pytest.raises(ValueError, match=words):
        issp.attach(nn.Sequential(nn.Linear(4, 4), layer), sparsity=0.5)
