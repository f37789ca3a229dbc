"""torch's FLOP counter knows the sparse ops, whichever of the two is imported first."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import issp
from issp.nn import NMConv2d, NMLinear, SparseConv2d, SparseLinear

KEEP = issp.Keep(1, of=4, v=2)
LAYERS = [
    (NMConv2d(8, 6, 3, stride=2, padding=1, keep=KEEP), (2, 8, 9, 7), 2 * 5 * 4),
    (SparseConv2d(8, 6, (5, 3), sparsity=0.7, v=3), (2, 8, 9, 7), 2 * 5 * 5),
    (NMLinear(8, 6, keep=KEEP), (2, 3, 5, 8), 2 * 3 * 5),
    (SparseLinear(8, 6, sparsity=0.7), (8,), 1),
]


@pytest.mark.parametrize(("layer", "shape", "places"), LAYERS, ids=lambda x: type(x).__name__)
def test_two_for_each_stored_weight_at_each_place(layer, shape, places):
    """Forward as much as each of the two gradients; that of x runs over the pixels of x."""
    product = 2 * layer.values.numel() * places
    x = torch.randn(shape)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == product
    x.requires_grad_()
    y = layer(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    pixels = x.shape[0] * x.shape[2:].numel() if hasattr(layer, "kernel_size") else places
    assert counter.get_total_flops() == product + 2 * layer.values.numel() * pixels


def test_a_dense_layer_of_stored_weights_counts_as_much():
    layer = SparseConv2d(8, 6, 3, sparsity=0.0)
    x, counts = torch.randn(2, 8, 9, 7), []
    for module in (layer, layer.to_dense()):
        with FlopCounterMode(display=False) as counter:
            module(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    "order", ["issp, torch.utils.flop_counter", "torch.utils.flop_counter, issp"]
)
def test_either_is_imported_first(fresh_python, order):
    program = (
        f"import torch, {order}\n"
        "layer = issp.nn.SparseLinear(8, 6, sparsity=0.5)\n"
        "with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:\n"
        "    layer(torch.zeros(3, 8))\n"
        "print(counter.get_total_flops())"
    )
    done = fresh_python.run(program)
    assert done.stdout.split() == [str(2 * 24 * 3)], done.stderr


def test_the_counter_is_not_imported_with_issp(fresh_python):
    program = "import sys, issp; print('torch.utils.flop_counter' in sys.modules)"
    done = fresh_python.run(program)
    assert done.stdout.split() == ["False"], done.stderr
