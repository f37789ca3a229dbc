"""Costs of networks: published counts (docs/method.md, sections 2 and 5), bytes, kept weights."""

import math

import pytest
import torch
from torch import nn

import issp
from issp.sr import checkpoint, costs

ZEROS = {  # at x4: weights, and pruned at 0.9, 0.95, 0.99
    "swinir-light": (880_740, 792_666, 836_703, 871_933),
    "edsr-l": (43_070_976, 38_763_906, 40_917_443, 42_640_284),
    "cat-r": (16_506_900, 14_856_320, 15_681_539, 16_341_607),
}
PARAMETERS = {  # at x2, x3, x4
    "swinir-light": (910_152, 918_267, 929_628),
    "edsr-l": (40_729_603, 43_680_003, 43_089_923),
    "cat-r": (16_456_103, 16_640_743, 16_603_815),
}
LAYERS = {"swinir-light": 103, "edsr-l": 69, "cat-r": 480}


def sketch(arch, scale=4):
    with torch.device("meta"):
        return issp.models.build(arch, scale).eval()


def of_sketch(arch, size, scale=4):
    return costs.of_model(sketch(arch, scale), size)


slow = pytest.param("cat-r", marks=pytest.mark.full)


@pytest.mark.full
@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameters_of_every_scale(arch):
    assert tuple(of_sketch(arch, (64, 64), s).parameters for s in (2, 3, 4)) == PARAMETERS[arch]


@pytest.mark.parametrize("arch", ["swinir-light", "edsr-l", slow])
def test_weights_and_how_many_are_pruned(arch):
    layers = [layer for layer in of_sketch(arch, (64, 64)).layers if layer.weights]
    sizes = [layer.weights for layer in layers]
    pruned = (sum(issp.num_pruned(n, ratio) for n in sizes) for ratio in (0.9, 0.95, 0.99))
    assert len(layers) == LAYERS[arch] and (sum(sizes), *pruned) == ZEROS[arch]
    assert all(layer.kept == layer.weights for layer in layers)  # meta has no zeros


def test_macs_of_swinir_light():
    small, large = (of_sketch("swinir-light", size) for size in ((64, 64), (180, 320)))
    assert {layer.kind for layer in small.layers} == {"conv", "linear", "attention"}
    assert round(small.total("macs", "conv", "linear") / 1e9, 2) == 3.61
    # Two products of 64 tokens with 64 others in each of 24 blocks.
    assert small.total("macs", "attention") == 24 * 2 * 64 * 64 * 64 * 60
    assert round(small.total("macs") / 1e9, 2) == 4.36
    assert large.size == (184, 320)  # windows of 8
    share = 180 / 184
    assert round(large.total("macs", "conv", "linear") * share / 1e9, 1) == 50.7
    assert round(large.total("macs", "attention") * share / 1e9, 1) == 10.6
    names = [layer.name for layer in small.layers if layer.kind == "attention"]
    assert len(names) == 24 and names[0] == "layers.0.residual_group.blocks.0.attn"


def test_macs_of_edsr_l():
    assert round(of_sketch("edsr-l", (64, 64)).total("macs") / 1e9, 1) == 205.8
    model = sketch("edsr-l")
    size = costs.default_size(model)
    assert size == (180, 320)
    assert round(costs.of_model(model, size).total("macs") / 1e9, 1) == 2894.5
    assert costs.default_size(sketch("edsr-l", 3)) == (240, 427)


@pytest.mark.full
def test_macs_of_cat_r_are_those_of_its_authors_without_layer_norm():
    """292.7 G in the README of CAT, which count 5 for each number that LayerNorm sees."""
    model, normed = sketch("cat-r"), []
    found = costs.of_model(model, (128, 128))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, args: normed.append(args[0].numel()))
    with torch.no_grad():
        model(torch.empty(1, 3, 128, 128, device="meta"))
    assert round((found.total("macs") + 5 * sum(normed)) / 1e9, 1) == 292.7
    assert round(found.total("macs") / 1e9, 1) == 291.6


@pytest.fixture(scope="module")
def pruned():
    torch.manual_seed(0)
    model = issp.models.build("edsr-tiny", 2, num_feat=8, num_block=2)
    return issp.attach(model, sparsity=0.75).finalize()


def test_kept_weights_and_their_macs(pruned):
    found = costs.of_model(pruned, (10, 12))
    for layer in found.layers:
        weight = pruned.get_submodule(layer.name).weight
        assert layer.kept == int((weight != 0).sum())
        assert layer.kept == weight.numel() - issp.num_pruned(weight.numel(), 0.75)
        pixels = 10 * 12 * (4 if layer.name == "conv_last" else 1)
        assert layer.macs == weight.numel() * pixels
        assert layer.macs_kept == layer.kept * pixels
    zeros = checkpoint.sparsity(pruned)["zeros"]
    assert found.kept_parameters == found.parameters - zeros
    assert found.total("kept") == found.total("weights") - zeros


def test_bytes_are_those_of_a_saved_file_and_of_sparse_rows(pruned, tmp_path):
    pytest.importorskip("safetensors", reason="models are saved as safetensors")
    for model in (pruned, issp.models.build("swinir-light", 2, depths=[2], num_heads=[2])):
        issp.save(model, tmp_path / "m.safetensors")
        content = (tmp_path / "m.safetensors").read_bytes()
        tensors = len(content) - 8 - int.from_bytes(content[:8], "little")
        found = costs.of_model(model, (16, 16))
        assert found.total("dense_bytes") + found.other_bytes == tensors
    for layer in costs.of_model(pruned, (16, 16)).layers:
        dense = pruned.get_submodule(layer.name)
        sparse = issp.nn.SparseConv2d.from_dense(dense)
        stored = sum(t.numel() * t.element_size() for t in sparse.state_dict().values())
        assert layer.sparse_bytes == min(stored, layer.dense_bytes)


def test_counting_leaves_the_model_as_it_was(pruned):
    before = {name: t.clone() for name, t in pruned.state_dict().items()}
    pruned.train()
    costs.of_model(pruned, (8, 8))
    assert pruned.training and not any(m._forward_pre_hooks for m in pruned.modules())
    assert all(torch.equal(t, before[name]) for name, t in pruned.state_dict().items())
    pruned.eval()


def test_another_dtype_is_counted_in_its_own_bytes(pruned):
    single = costs.of_model(pruned, (8, 8))
    double = costs.of_model(
        issp.models.build("edsr-tiny", 2, num_feat=8, num_block=2).double(), (8, 8)
    )
    assert double.total("dense_bytes") == 2 * single.total("dense_bytes")
    assert double.total("macs") == single.total("macs")


def test_latency_is_that_of_the_packed_model(pruned, tmp_path, monkeypatch):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path))
    measured = costs.latency(pruned, (16, 16))
    assert [line.name for line in measured.report.lines] == [
        name for name, m in pruned.named_modules() if isinstance(m, nn.Conv2d)
    ]
    whole = measured.report.whole
    if whole is None:  # no layer was faster sparse on this machine
        assert measured.packed == measured.dense
    else:
        times = (measured.dense, measured.packed)
        assert times == tuple(whole.microseconds[name] / 1e3 for name in ("dense", "packed"))
    dense = costs.latency(issp.models.build("edsr-tiny", 2, num_feat=8, num_block=1), (8, 8))
    assert dense.report.whole is None and dense.packed == dense.dense
    assert math.isfinite(dense.dense) and dense.dense > 0
