"""Super-resolving images of any size: padding, cropping, tiles."""

import numpy as np
import pytest
import torch
from torch import nn

from issp import models
from issp.sr.models.inference import tile_spans
from tests.sr.networks import (
    SMALL,
    build_on_meta,
    every_small,
    small_cat,
    small_cat_axial,
    small_edsr,
    small_swinir,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [(8, 8), (9, 16), (13, 10), (5, 7), (3, 20)])
@pytest.mark.parametrize("mode", ["reflect", "symmetric"])
def test_pad_equals_numpy(mode, size):
    x = torch.arange(2.0 * 3 * size[0] * size[1]).reshape(2, 3, *size)
    down, right = (-size[0] % 8, -size[1] % 8)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, down), (0, right)), mode=mode)
    assert torch.equal(models.pad(x, 8, mode), torch.from_numpy(expected))


def test_pad_leaves_a_multiple_alone_and_repeats_one_pixel():
    x = torch.rand(1, 3, 16, 8)
    assert models.pad(x, 8, "reflect") is x
    one = torch.rand(1, 3, 1, 1)
    assert torch.equal(models.pad(one, 4, "reflect"), one.expand(1, 3, 4, 4))


def test_padding_of_each_network():
    needs = {make: (make().pad_multiple, make().pad_mode) for make in SMALL}
    assert needs == {
        small_edsr: (1, None),
        small_swinir: (8, "reflect"),
        small_cat: (8, "symmetric"),
        small_cat_axial: (4, "symmetric"),
    }
    assert build_on_meta("cat-r", 2).pad_multiple == 16
    assert build_on_meta("swinir-light", 2).pad_multiple == 8


@every_small
def test_upscale_pads_runs_and_crops(make):
    model = make()
    x = torch.rand(2, 3, 13, 18)
    mode = {None: "edge"}.get(model.pad_mode, model.pad_mode)
    down, right = -13 % model.pad_multiple, -18 % model.pad_multiple
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, down), (0, right)), mode=mode)
    model.eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(padded))[..., :26, :36]
    model.train()
    out = models.upscale(model, x)
    assert torch.equal(out, expected)
    assert not out.requires_grad


@every_small
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 17)])
def test_upscale_of_tiny_images(make, size):
    out = models.upscale(make(), torch.rand(1, 3, *size))
    assert out.shape == (1, 3, 2 * size[0], 2 * size[1])
    assert out.isfinite().all()


def test_upscale_restores_each_training_mode():
    model = small_swinir()
    model.train()
    model.norm.eval()
    models.upscale(model, torch.rand(1, 3, 8, 8))
    assert model.training and model.conv_first.training and not model.norm.training


def test_upscale_takes_a_model_without_padding_attributes():
    model = nn.Upsample(scale_factor=3)
    x = torch.rand(1, 3, 5, 6)
    assert torch.equal(models.upscale(model, x), model(x))


@pytest.mark.parametrize("size", [(40, 40), (41, 23), (16, 90)])
def test_tiles_are_exact_where_the_overlap_covers_the_receptive_field(size):
    # Six 3x3 convolutions see at most six pixels each way, less than half the overlap.
    model = small_edsr().eval()
    x = torch.rand(1, 3, *size)
    whole = models.upscale(model, x)
    tiled = models.upscale(model, x, tile=24, tile_overlap=14)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)
    rough = models.upscale(model, x, tile=24, tile_overlap=0)
    assert (rough - whole).abs().max() > 1e-4


@every_small
def test_tiles_cover_images_of_any_size(make):
    model = make()
    x = torch.rand(1, 3, 21, 26)
    out = models.upscale(model, x, tile=16, tile_overlap=8)
    assert out.shape == (1, 3, 42, 52)
    assert out.isfinite().all()


@pytest.mark.parametrize("length", range(1, 80, 3))
@pytest.mark.parametrize("tile, overlap", [(16, 8), (16, 0), (24, 16), (8, 6)])
def test_tile_spans_partition_the_axis(length, tile, overlap):
    spans = tile_spans(length, tile, overlap)
    assert spans[0].first == 0 and spans[-1].last == length
    for span, following in zip(spans, spans[1:] + [None], strict=True):
        assert span.start <= span.first < span.last <= span.end <= min(length, span.start + tile)
        assert following is None or span.last == following.first


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"tile": 12}, "positive multiple of 8"),
        ({"tile": 0}, "positive multiple of 8"),
        ({"tile": 16, "tile_overlap": 16}, "below the tile size 16"),
        ({"tile": 16, "tile_overlap": 4}, "multiple of 8"),
        ({"tile_overlap": 8}, "needs a tile size"),
    ],
)
def test_tile_errors(kwargs, words):
    with pytest.raises(ValueError, match=words):
        models.upscale(small_swinir(), torch.rand(1, 3, 20, 20), **kwargs)


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8), (1, 3, 0, 8)])
def test_upscale_refuses_what_is_no_batch_of_images(shape):
    with pytest.raises(ValueError, match="not empty"):
        models.upscale(small_edsr(), torch.rand(shape))
