"""Sparse layers as one program: exported or compiled once, for inputs of every size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.export import Dim

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


@pytest.mark.sampled
@every_mask
@every_layer
def test_one_compilation_serves_every_size(name, mask):
    """Trained: one more, because the first backward makes the lists of the transposed weight."""
    layer, xs = LAYERS[name](mask), inputs(name)
    torch._dynamo.reset()
    compiled = torch.compile(
        copy.deepcopy(layer), dynamic=True, fullgraph=True, backend="aot_eager"
    )
    for _ in range(2):
        step(compiled, xs[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in xs:
            torch.testing.assert_close(step(compiled, x), step(layer, x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(
        copy.deepcopy(layer), dynamic=True, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for x in xs:
            assert_bitwise_equal(compiled(x), layer(x), f"the result for {tuple(x.shape)}")
