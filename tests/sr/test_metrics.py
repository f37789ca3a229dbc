"""PSNR and SSIM against the published bicubic table, scikit-image and hand-made cases."""

from math import inf, log10
from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from issp.sr.data import imresize, list_images, mod_crop, read_image
from issp.sr.metrics import psnr, rgb_to_y, ssim

BENCHMARKS = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"
needs_benchmarks = pytest.mark.skipif(
    not BENCHMARKS.is_dir(), reason=f"benchmark images are not at {BENCHMARKS}"
)


def noisy_pair(height=40, width=53, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    hr = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    sr = (hr + rng.normal(0, 15, hr.shape)).round().clip(0, 255).astype(np.uint8)
    return sr, hr


def bicubic(file, scale):
    hr = mod_crop(read_image(file), scale)
    return imresize(imresize(hr, 1 / scale), scale), hr


@needs_benchmarks
@pytest.mark.parametrize(
    "scale,decibel,similarity", [(2, 33.673, 0.9303), (3, 30.403, 0.8689), (4, 28.429, 0.8111)]
)
def test_bicubic_table_on_set5(scale, decibel, similarity):
    pairs = [bicubic(file, scale) for file in list_images(BENCHMARKS / "Set5" / "HR")]
    assert len(pairs) == 5
    assert np.mean([psnr(*p, scale) for p in pairs]) == pytest.approx(decibel, abs=0.002)
    assert np.mean([ssim(*p, scale) for p in pairs]) == pytest.approx(similarity, abs=0.0002)
    if scale == 4:
        # 26.70 in the literature is from LR files with clamped borders, scaled up in float
        rgb = np.mean([psnr(*p, scale, y_channel=False) for p in pairs])
        assert rgb == pytest.approx(26.692, abs=0.002)


@needs_benchmarks
def test_bicubic_table_on_set14_with_its_grey_images():
    pairs = [bicubic(file, 4) for file in list_images(BENCHMARKS / "Set14" / "HR")]
    assert len(pairs) == 14
    assert np.mean([psnr(*p, 4) for p in pairs]) == pytest.approx(26.088, abs=0.002)
    assert np.mean([ssim(*p, 4) for p in pairs]) == pytest.approx(0.7048, abs=0.0002)


@needs_benchmarks
def test_bicubic_values_on_b100():
    files = list_images(BENCHMARKS / "B100" / "HR")[:3]
    got = [(psnr(*bicubic(f, 3), 3), ssim(*bicubic(f, 3), 3)) for f in files]
    assert np.allclose(got, B100_FIRST, rtol=0, atol=(0.002, 0.0002))


B100_FIRST = [
    (23.9731, 0.58404),
    (28.3659, 0.8122),
    (26.1018, 0.7965),
]  # of our own full run, whose mean over 100 images is the table's 27.209 / 0.7391


@pytest.mark.parametrize("y_channel", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("border", [0, 4])
def test_ssim_equals_scikit_image(channels, y_channel, border):
    sr, hr = noisy_pair(channels=channels, seed=border)
    inner = np.s_[border : 40 - border, border : 53 - border]
    options = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 255,
    }
    if y_channel:
        want = structural_similarity(
            rgb_to_y(sr[inner]).astype(float), rgb_to_y(hr[inner]).astype(float), **options
        )
    else:
        want = structural_similarity(sr[inner], hr[inner], channel_axis=2, **options)
    assert ssim(sr, hr, border, y_channel) == pytest.approx(want, abs=1e-9)


def test_ssim_of_an_image_of_several_strips():
    sr, hr = noisy_pair(150, 700, 1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    want = structural_similarity(sr[:, :, 0], hr[:, :, 0], data_range=255, **options)
    assert ssim(sr, hr, 0, y_channel=False) == pytest.approx(want, abs=1e-9)


def test_ssim_of_the_smallest_image_and_of_equal_ones():
    sr, hr = noisy_pair(11, 11)
    assert 0 < ssim(sr, hr, 0) < 1
    assert ssim(hr, hr, 0) == 1
    with pytest.raises(ValueError, match="less than 11 x 11"):
        ssim(sr, hr, 1)


def test_psnr_by_hand():
    hr = np.full((6, 7, 3), 100, np.uint8)
    sr = hr.copy()
    sr[2, 3] = (110, 100, 100)
    sr[0, 0] = 0  # in the border
    mse = 10**2 / (4 * 5 * 3)
    assert psnr(sr, hr, 1, y_channel=False) == pytest.approx(20 * log10(255 / mse**0.5), rel=1e-12)
    luma = (65.481 * 10 / 255) ** 2 / (4 * 5)
    assert psnr(sr, hr, 1) == pytest.approx(20 * log10(255 / luma**0.5), rel=1e-4)
    assert psnr(hr, hr, 0) == inf
    assert psnr(sr, hr, 0) < psnr(sr, hr, 1)


def test_luma_range_and_grey():
    assert rgb_to_y(np.zeros((1, 1, 3), np.uint8)) == 16
    assert rgb_to_y(np.full((1, 1, 3), 255, np.uint8)) == 235
    primaries = np.eye(3, dtype=np.uint8)[None] * 255
    assert np.allclose(rgb_to_y(primaries), [[81.481, 144.553, 40.966]], atol=1e-5)
    sr, hr = noisy_pair(channels=1)
    colour = [img.repeat(3, axis=2) for img in (sr, hr)]
    for y_channel in (True, False):
        for metric in (psnr, ssim):
            grey = metric(sr[:, :, 0], hr, 2, y_channel)
            assert grey == pytest.approx(metric(*colour, 2, y_channel), rel=1e-6)
            assert metric(colour[0], hr, 2, y_channel) == pytest.approx(grey, rel=1e-6)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metrics_refuse(metric):
    sr, hr = noisy_pair()
    with pytest.raises(TypeError, match="float64"):
        metric(sr / 255, hr, 0)
    with pytest.raises(ValueError, match="53 x 40 pixels and hr 52 x 40"):
        metric(sr, hr[:, 1:], 0)
    with pytest.raises(ValueError, match="4"):
        metric(np.zeros((40, 53, 4), np.uint8), hr, 0)
    for border in (-1, 0.5, 20):
        with pytest.raises(ValueError, match="border"):
            metric(sr, hr, border)
