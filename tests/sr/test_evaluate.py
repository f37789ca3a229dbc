"""Scores of whole sets: protocols, exact images, sizes, and networks of one channel."""

from math import inf

import numpy as np
import pytest
import torch
from PIL import Image

from issp import data, metrics, models
from issp.sr import builders, config, evaluate
from issp.sr.evaluate import Protocol, Score
from issp.utils.errors import ConfigError


def noise(height, width, seed, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_an_exact_image_does_not_make_the_mean_infinite():
    scores = [Score("a", 30.0, 0.5), Score("b", inf, 1.0, exact=1), Score("c", 40.0, 0.75)]
    assert evaluate.mean(scores, "set") == Score("set", 35.0, 0.75, exact=1)
    assert evaluate.mean(scores[1:2]) == Score("mean", inf, 1.0, exact=1)


def test_every_metric_has_its_own_protocol():
    images = {"a": noise(40, 44, 0), "b": noise(48, 40, 1)}
    dataset = data.EvalDataset(data.PairedArrays(images, 2))
    upscaler = evaluate.bicubic(2)
    psnr, ssim = Protocol(5, y_channel=False), Protocol(0, y_channel=True)
    scores = evaluate.evaluate(upscaler, dataset, psnr, ssim)
    for score, (name, hr) in zip(scores, images.items(), strict=True):
        sr = upscaler(data.imresize(hr, 1 / 2))
        wanted = (metrics.psnr(sr, hr, 5, False), metrics.ssim(sr, hr, 0, True))
        assert score == Score(name, *wanted)
    default = evaluate.evaluate(upscaler, dataset, ssim=None)[0]
    sr = upscaler(data.imresize(images["a"], 1 / 2))
    assert default == Score("a", metrics.psnr(sr, images["a"], 2, True), None)


def settings(network, **val):
    return config.parse(
        {
            "name": "run",
            "scale": 2,
            "network_g": network,
            "datasets": {"train": {"type": "SamplePhotographs", "gt_size": 16}},
            "train": {"total_iter": 1},
            "val": val,
        }
    )


def test_protocols_of_a_configuration():
    psnr = {"type": "calculate_psnr", "crop_border": 4}
    ssim = {"type": "calculate_ssim", "test_y_channel": True}
    found = builders.protocols(settings({"type": "edsr-tiny"}, metrics={"p": psnr, "s": ssim}))
    assert found == {"psnr": Protocol(4, False), "ssim": Protocol(None, True)}
    found = builders.protocols(settings({"type": "edsr-tiny"}))
    assert found == {"psnr": Protocol(None, True), "ssim": None}
    twice = {"psnr_y": psnr, "psnr_rgb": psnr}
    with pytest.raises(ConfigError, match="metrics psnr_y and psnr_rgb are both calculate_psnr"):
        settings({"type": "edsr-tiny"}, metrics=twice)


@pytest.mark.parametrize(
    "size,psnr,ssim,sentence",
    [
        ((14, 30), Protocol(), Protocol(), "30 x 14 pixels: .* 2 .* 11 x 11 that SSIM needs"),
        ((14, 30), Protocol(7), None, "30 x 14 pixels: .* border of 7 .* 1 x 1 that PSNR needs"),
        ((14, 30), Protocol(), Protocol(1), None),
        ((14, 30), Protocol(), None, None),
    ],
)
def test_sizes_are_checked_before_anything_is_scored(tmp_path, size, psnr, ssim, sentence):
    data.write_image(tmp_path / "large.png", noise(40, 40, 0))
    data.write_image(tmp_path / "small.png", noise(*size, 0))
    dataset = data.EvalDataset(data.PairedFolder(tmp_path, 2, cache_dir=False))
    if sentence is None:
        evaluate.check_sizes(dataset, psnr, ssim)
        evaluate.evaluate(evaluate.bicubic(2), dataset, psnr, ssim)
    else:
        with pytest.raises(ValueError, match=f"small.png is {sentence}"):
            evaluate.check_sizes(dataset, psnr, ssim)


ONE_CHANNEL = [
    {"type": "EDSR", "num_in_ch": 1, "num_out_ch": 1, "rgb_mean": [0.5], "num_feat": 8},
    {
        "type": "SwinIR",
        "in_chans": 1,
        "embed_dim": 8,
        "depths": [1],
        "num_heads": [2],
        "window_size": 8,
    },
]


@pytest.fixture(params=ONE_CHANNEL, ids=lambda network: network["type"])
def one_channel(request):
    network = {**request.param, "upscale": 2}
    network |= {"num_block": 1} if network["type"] == "EDSR" else {"upsampler": "pixelshuffle"}
    return models.from_config(network)


def test_a_network_of_one_channel_gets_the_grey_levels(one_channel):
    grey = noise(24, 28, 0, channels=1)
    with torch.no_grad():
        wanted = data.to_image(models.upscale(one_channel, data.to_tensor(grey)[None]))
    got = evaluate.super_resolve(one_channel, grey.repeat(3, axis=2))
    assert got.shape == (48, 56, 3)
    assert np.array_equal(got, wanted.repeat(3, axis=2))
    tiled = evaluate.super_resolve(one_channel, grey.repeat(3, axis=2), tile=16)
    assert tiled.shape == got.shape and np.array_equal(tiled[..., 0], tiled[..., 2])


def test_colours_around_a_network_of_one_channel_are_bicubic():
    class Bicubic(torch.nn.Module):
        """Takes grey alone, and does with it what imresize does."""

        channels, scale = 1, 2

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            assert x.shape[:2] == (1, 1)
            return data.to_tensor(data.imresize(data.to_image(x), 2))[None]

    smooth = np.asarray(Image.fromarray(noise(6, 7, 0)).resize((28, 24), Image.Resampling.BICUBIC))
    got = evaluate.super_resolve(Bicubic(), smooth).astype(int)
    assert np.abs(got - data.imresize(smooth, 2)).max() <= 2  # rounded twice
    assert np.ptp(got, axis=2).max() > 50, "the colours are lost"


def test_crops_for_a_network_of_one_channel(tmp_path):
    grey = noise(32, 32, 0, channels=1)
    data.write_image(tmp_path / "grey" / "a.png", grey)
    colour = noise(32, 32, 1)
    data.write_image(tmp_path / "colour" / "a.png", colour)
    red, green, blue = np.moveaxis(colour.astype(int), 2, 0)
    luma = ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)
    options = {"gt_size": 32, "hflip": False, "rot": False, "channels": 1}
    for folder, levels in (("grey", grey[:, :, 0]), ("colour", luma)):
        pairs = data.PairedFolder(tmp_path / folder, 2, cache_dir=False)
        sample = data.TrainDataset(pairs, **options)[0]
        assert sample["lq"].shape == (1, 16, 16) and sample["gt"].shape == (1, 32, 32)
        assert torch.equal(sample["gt"][0], torch.from_numpy(levels / np.float32(255)))
    with pytest.raises(ValueError, match="a network of 4 channels cannot be trained on image"):
        data.TrainDataset(pairs, **{**options, "channels": 4})


@pytest.mark.parametrize("network", ONE_CHANNEL, ids=lambda network: network["type"])
def test_the_loader_gives_what_the_network_takes(network):
    batches = builders.loader(settings(network), pin_memory=False)
    assert next(batches)["lq"].shape[1] == 1
    assert next(builders.loader(settings({"type": "edsr-tiny"}), False))["lq"].shape[1] == 3
