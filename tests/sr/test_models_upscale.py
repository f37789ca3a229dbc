"""Super-resolving images of any size: padding, cropping, tiles."""

import numpy as np
import pytest
import torch
from torch import nn

from issp import models
from issp.sr.models import inference, tiling
from issp.sr.models.tiling import tile_spans
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


def test_pad_knows_two_modes():
    with pytest.raises(ValueError, match="must be 'reflect' or 'symmetric', got 'zeros'"):
        models.pad(torch.zeros(1, 3, 5, 5), 4, "zeros")


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


@pytest.mark.parametrize("length", [*range(1, 80, 3), 3000])
@pytest.mark.parametrize(
    "tile, overlap, multiple", [(16, 8, 1), (16, 0, 1), (24, 16, 4), (8, 6, 2), (48, 16, 16)]
)
def test_tile_spans_partition_the_axis(length, tile, overlap, multiple):
    length = -(-length // multiple) * multiple
    spans = tile_spans(length, tile, overlap, multiple)
    assert spans[0].first == 0 and spans[-1].last == length
    assert len({span.end - span.start for span in spans}) == 1, "one size serves all tiles"
    for span, following in zip(spans, spans[1:] + [None], strict=True):
        assert span.start <= span.first < span.last <= span.end <= min(length, span.start + tile)
        assert span.start % multiple == span.end % multiple == 0
        if following:
            assert span.last == following.first
            assert span.end - span.last >= overlap // 2 <= following.first - following.start


def test_tiles_are_aligned_where_that_needs_no_larger_ones():
    for length in (260, 1000, 3000):
        (size,) = {span.end - span.start for span in tile_spans(length, 256, 40, 1, align=64)}
        assert size in (192, 256)
    (size,) = {span.end - span.start for span in tile_spans(100, 60, 12, 1, align=64)}
    assert size == 56, "the evenly divided size where the tile holds no aligned one"


@pytest.mark.parametrize("scale, blocks", [(2, 1), (3, 2), (4, 1), (8, 1)])
def test_the_receptive_radius_is_what_results_depend_on(scale, blocks):
    model = small_edsr(upscale=scale, num_block=blocks)
    for parameter in model.parameters():  # no path through the network cancels another
        torch.nn.init.uniform_(parameter, 0.1, 1.0)
    x = torch.rand(1, 3, 41, 41, requires_grad=True)
    cell = slice(20 * scale, 21 * scale)
    model(x)[..., cell, cell].sum().backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    reach = (20 - rows.min().item(), rows.max().item() - 20)
    assert reach == (model.receptive_radius,) * 2


WINDOWED = {
    "swinir": small_swinir,
    "swinir, two groups": lambda: small_swinir(depths=[3, 2], num_heads=[2, 2]),
    "swinir, odd window": lambda: small_swinir(img_size=15, window_size=5),
    "swinir x4, pixelshuffle": lambda: small_swinir(upscale=4, upsampler="pixelshuffle"),
    "swinir x4, nearest+conv": lambda: small_swinir(upscale=4, upsampler="nearest+conv"),
    "swinir x2, nearest+conv": lambda: small_swinir(upsampler="nearest+conv"),
    "swinir, 3conv": lambda: small_swinir(resi_connection="3conv"),
    "swinir, restoration": lambda: small_swinir(upsampler=""),
    "cat": small_cat,
    "cat, restoration": lambda: small_cat(upsampler=""),
    "cat, three blocks": lambda: small_cat(depth=[3]),
}


QUICK = ("swinir, restoration", "cat, restoration")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.full) for n in WINDOWED]
)
def test_the_receptive_radius_covers_all_that_windows_see(name):
    model = WINDOWED[name]().eval()
    scale, period = model.scale, model.pad_multiple
    side = (-(-2 * model.receptive_radius // period) + 4) * period
    reaches = []
    for offset in range(period):
        x = torch.rand(1, 3, side, side, requires_grad=True)
        place = side // 2 // period * period + offset
        cell = slice(place * scale, (place + 1) * scale)
        model(x)[..., cell, cell].sum().backward()
        for axis in (2, 3):
            seen = x.grad.abs().amax([d for d in range(4) if d != axis])
            needed = seen.nonzero().flatten()
            reaches += [place - needed.min().item(), needed.max().item() - place]
    assert max(reaches) == model.receptive_radius


@pytest.mark.parametrize("name", ["swinir", "cat"])
def test_tiles_of_windows_are_exact(name):
    model = WINDOWED[name]().eval()
    overlap = -(-2 * model.receptive_radius // model.pad_multiple) * model.pad_multiple
    tile = 2 * overlap
    x = torch.rand(1, 3, tile + 13, tile + 21)
    whole = models.upscale(model, x)
    assert tiling.fixed_tiling(model, tile) == tiling.Tiling(tile, overlap, exact=True)
    torch.testing.assert_close(models.upscale(model, x, tile=tile), whole, rtol=0, atol=1e-5)
    rough = models.upscale(model, x, tile=tile, tile_overlap=0)
    assert (rough - whole).abs().max() > 1e-4


def test_the_radius_of_the_presets():
    radii = {name: build_on_meta(name, 2).receptive_radius for name in models.names()}
    assert radii == {
        "edsr-tiny": 20,
        "edsr-baseline": 36,
        "edsr-l": 68,
        "swinir-light": 103,
        "cat-r": 301,
    }


def test_the_default_overlap_is_exact_where_the_tile_allows_it():
    model = small_edsr().eval()
    assert model.receptive_radius == 6
    assert tiling.fixed_tiling(model, 24) == tiling.Tiling(24, 12, exact=True)
    assert tiling.fixed_tiling(model, 20) == tiling.Tiling(20, 10, exact=False)
    axial = small_cat_axial()
    assert axial.receptive_radius is None, "its windows are as long as the image"
    assert tiling.fixed_tiling(axial, 64) == tiling.Tiling(64, 32, exact=False)
    x = torch.rand(1, 3, 50, 67)
    torch.testing.assert_close(
        models.upscale(model, x, tile=24), models.upscale(model, x), rtol=0, atol=1e-6
    )


def test_tiles_of_an_image_have_one_size():
    model, sizes = small_edsr(), set()
    model.register_forward_pre_hook(lambda module, args: sizes.add(args[0].shape))
    models.upscale(model, torch.rand(1, 3, 61, 83), tile=32)
    assert len(sizes) == 1


def test_live_bytes_are_those_of_the_largest_moment():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    x, wide, y = 4 * 8 * 8, 16 * 8 * 8, 8 * 8 * 8
    assert tiling.peak_bytes(network, (1, 1, 8, 8)) == x + wide + y
    deeper = nn.Sequential(*network, nn.Conv2d(2, 1, 1))
    assert tiling.peak_bytes(deeper, (1, 1, 8, 8)) == x + wide + y, "the wide one is freed by then"
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())


@every_small
def test_a_fitting_tile_takes_no_more_memory_than_there_is(make, monkeypatch):
    model = make()
    monkeypatch.setattr(tiling, "_free_memory", lambda device: 2 * 2**20)
    side = tiling.fitting_tiling(model, 3).tile
    assert tiling.peak_bytes(model, (1, 3, side, side)) <= 2 * 2**20 and side < 256
    monkeypatch.setattr(tiling, "_free_memory", lambda device: 2**34)
    assert tiling.fitting_tiling(model, 3).tile == (512 if make is small_cat_axial else 384)
    monkeypatch.setattr(tiling, "_free_memory", lambda device: 1)
    assert tiling.fitting_tiling(model, 3).tile == model.pad_multiple


def test_a_fitting_tiling_is_exact_unless_that_costs_too_much(monkeypatch):
    tiny, large = (build_on_meta(name, 2) for name in ("edsr-tiny", "edsr-l"))
    assert tiny.receptive_radius == 20 and large.receptive_radius == 68
    monkeypatch.setattr(tiling, "_free_memory", lambda device: 768 * 2**20)
    assert tiling.fitting_tiling(tiny, 3) == tiling.Tiling(384, 40, exact=True)
    rough = tiling.fitting_tiling(large, 3)
    assert rough.overlap == 32 and not rough.exact and 128 < rough.tile < 8 * 68
    monkeypatch.setattr(tiling, "_free_memory", lambda device: 2**35)
    assert tiling.fitting_tiling(large, 3) == tiling.Tiling(680, 136, exact=True)


def test_tile_auto_cuts_what_is_large(monkeypatch):
    monkeypatch.setattr(tiling, "_SIDE", 24)
    model, sizes = small_edsr().eval(), []
    x = torch.rand(1, 3, 30, 70)
    whole = models.upscale(model, x)
    model.register_forward_pre_hook(lambda module, args: sizes.append(args[0]))
    out = models.upscale(model, x, tile="auto")
    computed = [tuple(x.shape[-2:]) for x in sizes[1:]]  # the first counts memory
    assert computed == [(30, 41)] * 2, "two tiles of at most 60 pixels that share 12"
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-6)


def test_choosing_tiles_changes_nothing_in_the_model():
    class Normed(nn.Sequential):
        receptive_radius = 1

    model = Normed(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    models.upscale(model, torch.rand(1, 3, 8, 8), tile="auto")
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_parts_take_images_of_another_dtype_and_restore_the_mode():
    model = small_edsr().train()
    x = torch.rand(1, 3, 40, 31).double()
    parts = inference.upscale_parts(model, x, tiling.Tiling(24, 12))
    first = next(parts)
    assert first.pixels.dtype == torch.float32 and first.total == 6 and not model.training
    assert (first.rows.start, first.cols.start, first.scale) == (0, 0, 2)
    last = list(parts)[-1]
    assert (last.rows.stop, last.cols.stop) == (80, 62) and model.training


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"tile": 12}, "positive multiple of 8"),
        ({"tile": 0}, "positive multiple of 8"),
        ({"tile": 16, "tile_overlap": 16}, "below the tile size 16"),
        ({"tile": 16, "tile_overlap": 4}, "multiple of 8"),
        ({"tile_overlap": 8}, "needs a tile size"),
        ({"tile": "automatic"}, "'automatic'"),
        ({"tile": "auto", "tile_overlap": 8}, "without an overlap"),
    ],
)
def test_tile_errors(kwargs, words):
    with pytest.raises(ValueError, match=words):
        models.upscale(small_swinir(), torch.rand(1, 3, 20, 20), **kwargs)


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8), (1, 3, 0, 8)])
def test_upscale_refuses_what_is_no_batch_of_images(shape):
    with pytest.raises(ValueError, match="not empty"):
        models.upscale(small_edsr(), torch.rand(shape))
