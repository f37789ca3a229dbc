"""PSNR and SSIM as super-resolution papers report them: on Y, border cut, uint8 images."""

from __future__ import annotations

from math import inf, log10

import numpy as np

from issp.sr.data.resize import check_uint8_image

_Y_WEIGHTS = np.array([65.481, 128.553, 24.966])  # of R, G, B in ITU-R BT.601, studio range
SSIM_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def rgb_to_y(img: np.ndarray) -> np.ndarray:
    """Luma of an image, on MATLAB's 16 to 235 range, not rounded.

    Args:
        img: [H, W, 3] uint8 RGB; grey [H, W] or [H, W, 1] counts as R = G = B.

    Returns:
        [H, W] float32.

    Source: docs/method.md, section 6: (65.481 R + 128.553 G + 24.966 B) / 255 + 16.
    """
    check_uint8_image(img, "rgb_to_y: img")
    planes = _with_channels(img, "rgb_to_y: img")
    if planes.shape[2] == 1:
        luma = planes[:, :, 0] * (_Y_WEIGHTS.sum() / 255)
    else:
        luma = planes @ (_Y_WEIGHTS / 255)
    return (luma + 16).astype(np.float32)


def psnr(sr: np.ndarray, hr: np.ndarray, crop_border: int, y_channel: bool = True) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images.

    Args:
        sr: [H, W, 3] uint8 RGB, or grey [H, W] or [H, W, 1]; the result.
        hr: the original, of the same height and width.
        crop_border: pixels cut from each side first; by convention the scale.
        y_channel: compare luma (:func:`rgb_to_y`); otherwise all channels together.

    Returns:
        20 log10(255 / sqrt(mean squared error)), computed in float64.

    Raises:
        TypeError, ValueError: not uint8, different sizes, or the border leaves nothing.
    """
    sr, hr = _prepare(sr, hr, crop_border, y_channel, "psnr", smallest=1)
    mean = float(np.mean(np.square(sr - hr)))
    return inf if mean == 0 else 20 * log10(255 / mean**0.5)


def ssim(sr: np.ndarray, hr: np.ndarray, crop_border: int, y_channel: bool = True) -> float:
    """Structural similarity with the 11 x 11 Gaussian window, over fully covered pixels.

    Args:
        sr, hr, crop_border, y_channel: as in :func:`psnr`; without ``y_channel`` the values of the
            channels are averaged.

    Returns:
        Mean SSIM, at most 1.

    Raises:
        TypeError, ValueError: as :func:`psnr`; at least 11 x 11 pixels must be left.

    Source: Wang et al. 2004; sigma 1.5, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2.
    """
    sr, hr = _prepare(sr, hr, crop_border, y_channel, "ssim", smallest=SSIM_WINDOW)
    return float(np.mean([_ssim_plane(a, b) for a, b in zip(sr, hr, strict=True)]))


def _prepare(
    sr: np.ndarray, hr: np.ndarray, border: int, y_channel: bool, name: str, smallest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both images checked, cut and as [C, H, W] float64."""
    check_uint8_image(sr, f"{name}: sr")
    check_uint8_image(hr, f"{name}: hr")
    sr, hr = _with_channels(sr, f"{name}: sr"), _with_channels(hr, f"{name}: hr")
    if sr.shape[:2] != hr.shape[:2]:
        raise ValueError(
            f"{name}: sr is {sr.shape[1]} x {sr.shape[0]} pixels and hr {hr.shape[1]} x "
            f"{hr.shape[0]}; crop hr to the size of the low-resolution image times the scale"
        )
    if not isinstance(border, int | np.integer) or border < 0:
        raise ValueError(f"{name}: crop_border must be a whole number >= 0, got {border!r}")
    height, width = sr.shape[0] - 2 * border, sr.shape[1] - 2 * border
    if min(height, width) < smallest:
        raise ValueError(
            f"{name}: an image of {sr.shape[1]} x {sr.shape[0]} pixels with crop_border {border} "
            f"leaves less than {smallest} x {smallest}"
        )
    cut = np.s_[border : border + height, border : border + width]
    if y_channel:
        pair = rgb_to_y(sr[cut])[None], rgb_to_y(hr[cut])[None]
    else:  # grey is compared with each channel
        pair = np.broadcast_arrays(sr[cut].transpose(2, 0, 1), hr[cut].transpose(2, 0, 1))
    return pair[0].astype(np.float64), pair[1].astype(np.float64)


def _with_channels(img: np.ndarray, name: str) -> np.ndarray:
    img = img[:, :, None] if img.ndim == 2 else img
    if img.shape[2] not in (1, 3):
        raise ValueError(f"{name} must have 1 or 3 channels, got {img.shape[2]}")
    return img


def _blur(plane: np.ndarray) -> np.ndarray:
    """Valid part of the separable Gaussian filter of a [H, W] float64 plane."""
    half = SSIM_WINDOW // 2
    weight = np.exp(-((np.arange(SSIM_WINDOW) - half) ** 2) / (2 * _SIGMA**2))
    weight /= weight.sum()
    for axis in (0, 1):
        plane = np.swapaxes(plane, 0, axis)
        size = plane.shape[0] - SSIM_WINDOW + 1
        total = plane[half : half + size] * weight[half]
        for i in range(half):  # the window is symmetric: one product for two taps
            mirror = SSIM_WINDOW - 1 - i
            total += (plane[i : i + size] + plane[mirror : mirror + size]) * weight[i]
        plane = np.swapaxes(total, 0, axis)
    return plane


def _ssim_plane(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the valid pixels of a [H, W] plane, by strips of rows which stay in cache."""
    height, width = (side - SSIM_WINDOW + 1 for side in a.shape)
    total, rows = 0.0, max(1, 32_768 // width)
    for top in range(0, height, rows):
        strip = slice(top, min(top + rows, height) + SSIM_WINDOW - 1)
        total += float(np.sum(_ssim_map(a[strip], b[strip])))
    return total / (height * width)


def _ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    mean_a, mean_b = _blur(a), _blur(b)
    cross, squares = mean_a * mean_b, mean_a**2 + mean_b**2
    covariance = _blur(a * b) - cross
    variances = _blur(a * a + b * b) - squares
    structure = (2 * covariance + _C2) / (variances + _C2)
    return (2 * cross + _C1) / (squares + _C1) * structure
