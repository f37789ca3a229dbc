"""Scores on whole images, by the protocol of the papers (docs/method.md, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from issp.sr import data, metrics, models


@dataclass(frozen=True)
class Score:
    """PSNR in dB and SSIM of one image or, as a mean, of a set."""

    name: str
    psnr: float
    ssim: float | None


def super_resolve(
    model: nn.Module, lr: np.ndarray, tile: int | None = None, tile_overlap: int | None = None
) -> np.ndarray:
    """One image through a network.

    Args:
        model: its device is used.
        lr: [h, w, 3] uint8 RGB.
        tile, tile_overlap: see `issp.models.upscale`.

    Returns:
        [h * scale, w * scale, 3] uint8, clamped and rounded half to even.
    """
    weight = next(model.parameters())
    x = data.to_tensor(lr)[None].to(weight.device, weight.dtype)
    return data.to_image(models.upscale(model, x, tile, tile_overlap))


def evaluate(
    upscaler: Callable[[np.ndarray], np.ndarray],
    dataset: data.EvalDataset,
    crop_border: int | None = None,
    y_channel: bool = True,
    with_ssim: bool = True,
    on_image: Callable[[str, np.ndarray, Score], None] | None = None,
) -> list[Score]:
    """Scores of every image of a data set.

    Args:
        upscaler: [h, w, 3] uint8 to [h * scale, w * scale, 3] uint8.
        dataset: images with their originals.
        crop_border: pixels cut from each side; None: the scale.
        y_channel: score the luma, otherwise RGB.
        with_ssim: also compute SSIM, which takes several times as long as PSNR.
        on_image: called as (name, result, score), to save images or show progress.
    """
    border = dataset.scale if crop_border is None else crop_border
    scores = []
    for i in range(len(dataset)):
        lr, hr = dataset.load(i)
        sr, name = upscaler(lr), dataset.pairs.names[i]
        ssim = metrics.ssim(sr, hr, border, y_channel) if with_ssim else None
        scores.append(Score(name, metrics.psnr(sr, hr, border, y_channel), ssim))
        if on_image:
            on_image(name, sr, scores[-1])
    return scores


def mean(scores: Sequence[Score], name: str = "mean") -> Score:
    """Mean of the per-image values, as tables report it."""
    similarities = [s.ssim for s in scores if s.ssim is not None]
    average = float(np.mean(similarities)) if similarities else None
    return Score(name, float(np.mean([s.psnr for s in scores])), average)


def bicubic(scale: int) -> Callable[[np.ndarray], np.ndarray]:
    """Bicubic interpolation as an upscaler."""
    return lambda lr: data.imresize(lr, scale)


def of_model(model: nn.Module, tile: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A network as an upscaler, without gradients and in evaluation mode."""
    return lambda lr: super_resolve(model, lr, tile)
