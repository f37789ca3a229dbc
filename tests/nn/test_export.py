"""Sparse layers as one program: exported or compiled once, for inputs of every size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from issp import Keep
from issp.nn import NMConv2d, NMLinear, SparseConv2d, SparseLinear
from tests.asserts import assert_bitwise_equal

KEEP = Keep(1, of=4, v=2)
LAYERS = {
    "NMConv2d": lambda mask: NMConv2d(8, 6, 3, stride=2, padding=1, keep=KEEP, mask=mask),
    "NMLinear": lambda mask: NMLinear(8, 6, keep=KEEP, mask=mask),
    "SparseConv2d": lambda mask: SparseConv2d(
        *(8, 6, (5, 3)), dilation=(1, 2), sparsity=0.7, activation="gelu", mask=mask
    ),
    "SparseLinear": lambda mask: SparseLinear(8, 6, sparsity=0.7, activation="relu", mask=mask),
}
SIZES = [(2, 10, 11), (7, 12, 17), (4, 31, 33), (5, 20, 13), (6, 64, 10)]
every_layer = pytest.mark.parametrize("name", LAYERS)
every_mask = pytest.mark.parametrize("mask", ["fixed", "ste", "sr-ste"])


def inputs(name: str) -> list[torch.Tensor]:
    return [
        torch.randn(n, 8, height, width) if "Conv" in name else torch.randn(n, height, 8)
        for n, height, width in SIZES
    ]


@pytest.mark.sampled
@pytest.mark.parametrize("strict", [False, True])
@every_mask
@every_layer
def test_one_exported_program_serves_every_size(name, mask, strict):
    layer, xs = LAYERS[name](mask), inputs(name)
    sizes = {0: Dim("n", max=64), 1: Dim("tokens", max=512)}
    if "Conv" in name:
        sizes = {0: Dim("n", max=64), 2: Dim("h", min=8, max=512), 3: Dim("w", min=8, max=512)}
    program = torch.export.export(layer, (xs[0],), dynamic_shapes=(sizes,), strict=strict)
    with torch.no_grad():
        for x in xs:
            torch.testing.assert_close(program.module()(x), layer(x))


def step(module, x):
    """The result and all gradients."""
    x = x.clone().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def compiled(layer, **more):
    torch._dynamo.reset()
    return torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager", **more)


@pytest.mark.sampled
@every_mask
@every_layer
def test_one_compilation_serves_every_size(name, mask):
    """Where gradients are wanted, and where they are not."""
    layer, xs = LAYERS[name](mask), inputs(name)
    with torch._dynamo.config.patch(error_on_recompile=True):
        trained = compiled(layer, dynamic=True)
        for x in xs:
            torch.testing.assert_close(step(trained, x), step(layer, x), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            inferred = compiled(layer, dynamic=True)
            for x in xs:
                assert_bitwise_equal(inferred(x), layer(x), f"the result for {tuple(x.shape)}")


@pytest.mark.sampled
@pytest.mark.parametrize("load", [True, False])
@every_layer
def test_a_compiled_layer_takes_other_positions(name, load):
    """Loaded or written in place, between two steps."""
    layer, other, x = LAYERS[name]("fixed"), LAYERS[name]("fixed"), inputs(name)[0]
    twin = copy.deepcopy(layer)
    step(twin, x)
    torch._dynamo.reset()
    twin_step = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(twin_step, x), step(layer, x))
    if load:
        twin.load_state_dict(other.state_dict())
    else:
        with torch.no_grad():
            for own, new in zip(
                twin.state_dict().values(), other.state_dict().values(), strict=True
            ):
                own.copy_(new)
    torch.testing.assert_close(step(twin_step, x), step(other, x))


@pytest.mark.sampled
@every_mask
@every_layer
def test_activation_checkpointing_compiles(name, mask):
    layer, x = LAYERS[name](mask), inputs(name)[0]
    torch._dynamo.reset()
    kept = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    results = []
    for call in (kept, layer):
        one = x.clone().requires_grad_()
        y = call(one)
        results.append([y, *torch.autograd.grad(y.square().sum(), [one, *layer.parameters()])])
    torch.testing.assert_close(*results)


@every_mask
@every_layer
def test_onnx_gets_torchs_own_ops(name, mask, monkeypatch):
    """torch's exporter for ONNX traces by torch.export, and says so by this function."""
    layer, xs = LAYERS[name](mask), inputs(name)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.warns(RuntimeWarning, match="ONNX get sparse layers as dense ones"):
        program = torch.export.export(layer, (xs[0],))
    monkeypatch.undo()
    assert "issp" not in str(program.graph)
    torch.testing.assert_close(program.module()(xs[0]), layer(xs[0]))
