"""Chains of tiled layers as one op: the bits of its layers one by one, in the same places."""

from __future__ import annotations

import random

import pytest
import torch
from torch.library import opcheck

import issp
from issp.ops import TiledWeight, from_tiles, tiled_chain, tiled_conv2d, to_tiles
from issp.ops.schemas.tiles import TILED_ACTIVATIONS, chain_layers
from tests.asserts import assert_bitwise_equal
from tests.tiers import quick_or_full

NATIVE = issp.backends.active("cpu") == "cpp"
REFERENCE = issp.backends.implementations("reference")["tiled_chain"]


def layer(rows, channels, kernel=3, bias=True):
    weight = torch.randn(rows, channels, kernel, kernel)
    weight *= torch.rand(rows, channels, 1, 1) < 0.7
    return TiledWeight.from_weight(weight), torch.randn(rows) if bias else None


# A block with a residual, written into its input, and an upsampling: source, residual, target,
# rows, kernel, shuffle, activation.
PLAN = (0, -1, 1, 24, 3, 1, 1, *(1, -1, 2, 24, 1, 1, 0), *(2, 1, 1, 24, 3, 1, 0))
PLAN += (1, 0, 0, 8, 1, 1, 0, *(1, -1, 3, 12, 3, 2, 0), *(3, -1, 4, 20, 1, 1, 2))
SCALES = (1.0, 1.0, 0.5, 1.0, 1.0, -2.0)


def weights():
    torch.manual_seed(0)
    shapes = ((24, 8), (24, 24, 1), (24, 24), (8, 24, 1), (12, 24), (20, 3, 1))
    return [layer(*shape, bias=i % 2 == 0) for i, shape in enumerate(shapes)]


def one_by_one(images, layers, plan, scales):
    """The slots, by a call for each layer."""
    slots = [t._replace(data=t.data.clone()) for t in images]
    for step, (w, bias), scale in zip(chain_layers(plan), layers, scales, strict=True):
        y = tiled_conv2d(
            slots[step.source],
            w,
            bias,
            None if step.residual < 0 else slots[step.residual],
            TILED_ACTIVATIONS[step.activation],
            scale,
            step.shuffle,
        )
        slots[step.target : step.target + 1] = [y]
    return slots


def raw(images, layers, plan=PLAN, scales=SCALES):
    """The arguments of the raw op."""
    tensors = [x for w, _ in layers for x in (w.values, w.positions, w.tile_starts)]
    biases = [torch.empty(0) if bias is None else bias for _, bias in layers]
    sizes = [size for t in images for size in (t.channels, t.width)]
    return [[t.data for t in images], sizes, tensors, biases, list(plan), list(scales)]


@pytest.mark.parametrize("size", [(2, 5, 20), (1, 1, 1), (0, 3, 4), (1, 30, 70)])
@pytest.mark.parametrize("length", range(1, len(SCALES) + 1))
def test_the_bits_of_single_layers(size, length, threads):
    batch, height, width = size
    layers, image = weights()[:length], to_tiles(torch.randn(batch, 8, height, width))
    plan, scales = PLAN[: 7 * length], SCALES[:length]
    slots = one_by_one([image], layers, plan, scales)
    target = chain_layers(plan)[-1].target
    for count in (1, 2, 3, 4):
        threads(count)
        t = image._replace(data=image.data.clone())
        y = tiled_chain([t], layers, plan, scales)
        assert y.shape == slots[target].shape and (y is t) == (target == 0)
        for actual, expected in ((y, slots[target]), (t, slots[0])):
            assert_bitwise_equal(actual.data, expected.data, f"{size} by {count} threads")


@pytest.mark.skipif(not NATIVE, reason="issp/_C was not built: the reference runs alone")
@pytest.mark.parametrize("length", [4, 6])
def test_the_bits_of_the_reference(length):
    plan = (*PLAN[: 7 * length - 1], 0)  # without gelu
    layers, image = weights()[:length], to_tiles(torch.randn(1, 8, 4, 19))
    one = raw([image], layers, plan, SCALES[:length])
    other = [[image.data.clone()], *one[1:]]
    result, expected = torch.ops.issp.tiled_chain(*one), REFERENCE(*other)
    assert_bitwise_equal(result, expected, "the result")
    assert_bitwise_equal(one[0][0], other[0][0], "what was given")


def test_several_images():
    """The residual of the second layer is given, and written."""
    layers = [layer(8, 4), layer(16, 8)]
    images = [to_tiles(torch.randn(1, c, 6, 18)) for c in (4, 16)]
    plan, scales = (0, -1, 2, 8, 3, 1, 0, *(2, 1, 1, 16, 3, 1, 1)), (1.0, 1.0)
    expected = one_by_one(images, layers, plan, scales)[1]
    assert tiled_chain(images, layers, plan, scales) is images[1]
    assert_bitwise_equal(images[1].data, expected.data, "the result")


def test_opcheck():
    t = to_tiles(torch.randn(2, 8, 4, 21))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(torch.ops.issp.tiled_chain.default, raw([t], weights()), test_utils=tests)


def test_export_with_dynamic_sizes():
    layers = weights()

    class Upscale(torch.nn.Module):
        def forward(self, x):
            return from_tiles(tiled_chain([to_tiles(x)], layers, PLAN, SCALES))

    sizes = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2)}
    example = (torch.randn(1, 8, 8, 20),)
    program = torch.export.export(Upscale(), example, dynamic_shapes={"x": sizes})
    compiled = torch.compile(Upscale(), fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((8, 20), (3, 41)):
        x = torch.randn(1, 8, *size)
        for module in (program.module(), compiled):
            assert_bitwise_equal(module(x), Upscale()(x), f"{size} exported")


def changed(at, number):
    plan = list(PLAN)
    plan[at] = number
    return plan


IMAGE = to_tiles(torch.ones(1, 8, 4, 20))
REFUSED = {
    "sizes": (1, [8], "1 images and 1 sizes"),
    "no layer": (5, [], "0 layers"),
    "width": (1, [8, 50], r"images\[0\] has shape"),
    "no image": (0, [], "0 images"),
    "weights": (2, raw([IMAGE], weights())[2][:-1], "17 tensors of weights"),
    "bias": (3, [torch.ones(23), *raw([IMAGE], weights())[3][1:]], "bias has shape"),
    "plan": (4, PLAN[:-1], "a plan of 41 numbers"),
    "scales": (5, SCALES[:-1], "5 scales"),
    "a source that is not there": (4, changed(0, 1), r"layer 0 reads \[1\]"),
    "a target that is not there": (4, changed(2, 2), "writes 2 of 1 images"),
    "a negative target": (4, changed(2, -1), "writes -1 of 1 images"),
    "a target of another shape": (4, changed(2, 0), "layer 0 gives"),
    "a residual of another shape": (4, changed(1, 0), "layer 0 gives"),
    "a residual that is not there": (4, changed(1, 9), r"layer 0 reads \[0, 9\]"),
    "a target that is the source": (4, changed(9, 1), "another image than its source"),
    "channels of the source": (4, changed(7, 0), "positions do not lie"),
    "rows": (4, changed(3, 40), "tile_starts has shape"),
    "kernel": (4, changed(4, 2), "2 x 2 has no tile layout"),
    "shuffle": (4, changed(5, 5), "shuffle is 5"),
    "activation": (4, changed(6, 3), "activation of layer 0 is 3"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_arguments(what):
    at, value, words = REFUSED[what]
    image = IMAGE._replace(data=IMAGE.data.clone())
    arguments = raw([image], weights())
    arguments[at] = list(value)
    with pytest.raises((TypeError, ValueError), match=words):
        REFERENCE(*arguments)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        torch.ops.issp.tiled_chain(*arguments)
    assert_bitwise_equal(image.data, IMAGE.data, "nothing is written before a refusal")


def test_refused_overlaps():
    """A given image that is written lies apart from the others and from the weights."""
    layers = [layer(8, 8)]
    t = to_tiles(torch.randn(1, 8, 4, 20))
    plan = (0, -1, 1, 8, 3, 1, 0)
    with pytest.raises(ValueError, match="overlaps another argument"):
        tiled_chain([t, t], layers, plan, [1.0])
    assert tiled_chain([t, t], layers, (0, 1, 2, *plan[3:]), [1.0]).shape == t.shape


@pytest.mark.skipif(not NATIVE, reason="issp/_C was not built")
@pytest.mark.parametrize("seed", range(quick_or_full(3, 60)))
def test_random_plans(seed):
    source, refused = random.Random(seed), 0
    layers = weights()
    for _ in range(40):
        image = to_tiles(torch.randn(1, 8, 2, source.choice((1, 16, 17))))
        arguments = raw([image], layers, (*PLAN[:-1], 0))
        for _ in range(source.randint(0, 2)):
            arguments[4][source.randrange(len(PLAN))] = source.choice(
                (-1, 0, 1, 2, 3, 4, 8, 12, 24, 2**31, -(2**40), 2**62)
            )
        other = [[image.data.clone()], *arguments[1:]]
        try:
            result = torch.ops.issp.tiled_chain(*arguments)
        except (RuntimeError, ValueError, TypeError):
            refused += 1
            assert_bitwise_equal(image.data, other[0][0], "what is written before a refusal")
        else:
            expected = REFERENCE(*other)
            if 2 not in arguments[4][6::7]:  # gelu may differ by rounding
                assert_bitwise_equal(result, expected, "the result")
                assert_bitwise_equal(image.data, other[0][0], "what was given")
    assert 10 < refused < 40
