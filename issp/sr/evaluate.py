"""Scores on whole images, by the protocol of the papers (docs/method.md, section 6)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from torch import nn

from issp.sr import data, metrics
from issp.sr.models import tiling
from issp.sr.upscale import upscale_samples


@dataclass(frozen=True)
class Score:
    """PSNR in dB and SSIM of one image or, as a mean, of a set.

    Attributes:
        name: of the image or the set.
        psnr: infinite for an image that is reproduced exactly. A mean leaves such images out.
        ssim: None where it was not asked for.
        exact: number of images that are reproduced exactly.
    """

    name: str
    psnr: float
    ssim: float | None
    exact: int = 0


@dataclass(frozen=True)
class Protocol:
    """How a metric is taken.

    Attributes:
        crop_border: pixels cut from each side; None: the scale.
        y_channel: compare the luma, otherwise RGB.
    """

    crop_border: int | None = None
    y_channel: bool = True

    def __post_init__(self) -> None:
        if self.crop_border is not None and self.crop_border < 0:
            raise ValueError(f"the crop border is {self.crop_border}: it must be at least 0")

    def border(self, scale: int) -> int:
        """Pixels cut from each side."""
        return scale if self.crop_border is None else self.crop_border


def super_resolve(
    model: nn.Module, lr: np.ndarray, tile: int | None = None, tile_overlap: int | None = None
) -> np.ndarray:
    """One image through a network.

    A network of one channel gets the luma; the colours, where there are some, are bicubic.

    Args:
        model: its device is used.
        lr: [h, w, 3] uint8 RGB.
        tile, tile_overlap: see `issp.models.upscale`.

    Returns:
        [h * scale, w * scale, 3] uint8, clamped and rounded half to even.
    """
    return upscale_samples(model, lr, tiling.fixed_tiling(model, tile, tile_overlap))


def check_sizes(
    dataset: data.EvalDataset, psnr: Protocol = Protocol(), ssim: Protocol | None = None
) -> None:
    """Compares the sizes of all images, from the headers of their files, with what metrics need.

    Raises:
        ValueError: an image is too small for a metric, or an LR file has the wrong size.
    """
    needs = [("PSNR", psnr, 1)] + ([("SSIM", ssim, metrics.SSIM_WINDOW)] if ssim else [])
    for i, (height, width) in enumerate(dataset.pairs.sizes()):
        for name, protocol, least in needs:
            border = protocol.border(dataset.scale)
            if min(height, width) - 2 * border < least:
                raise ValueError(
                    f"image {dataset.pairs.paths(i)[1]} is {width} x {height} pixels: without a "
                    f"border of {border} it is smaller than the {least} x {least} that {name} "
                    "needs; use a smaller crop border or leave it out"
                )


def fingerprint(dataset: data.EvalDataset, psnr: Protocol) -> str:
    """Equal for what makes PSNRs comparable: names, sizes and LR source of images, and protocol."""
    pairs, border = dataset.pairs, psnr.border(dataset.scale)
    facts = [pairs.names, list(map(tuple, pairs.sizes())), pairs.lr_source, border, psnr.y_channel]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def evaluate(
    upscaler: Callable[[np.ndarray], np.ndarray],
    dataset: data.EvalDataset,
    psnr: Protocol = Protocol(),
    ssim: Protocol | None = Protocol(),
    on_image: Callable[[str, np.ndarray, Score], None] | None = None,
) -> list[Score]:
    """Scores of every image of a data set.

    Args:
        upscaler: [h, w, 3] uint8 to [h * scale, w * scale, 3] uint8.
        dataset: images with their originals.
        psnr, ssim: how they are taken; ssim takes several times as long, None leaves it out.
        on_image: called as (name, result, score), to save images or show progress.
    """
    scores = []
    for i in range(len(dataset)):
        lr, hr = dataset.load(i)
        sr, name = upscaler(lr), dataset.pairs.names[i]
        ratio = metrics.psnr(sr, hr, psnr.border(dataset.scale), psnr.y_channel)
        similarity = None
        if ssim:
            similarity = metrics.ssim(sr, hr, ssim.border(dataset.scale), ssim.y_channel)
        scores.append(Score(name, ratio, similarity, exact=int(ratio == inf)))
        if on_image:
            on_image(name, sr, scores[-1])
    return scores


def mean(scores: Sequence[Score], name: str = "mean") -> Score:
    """Mean of the per-image values, as tables report it; see `Score` for exact images."""
    ratios = [s.psnr for s in scores if s.psnr != inf] or [s.psnr for s in scores]
    similarities = [s.ssim for s in scores if s.ssim is not None]
    average = float(np.mean(similarities)) if similarities else None
    return Score(name, float(np.mean(ratios)), average, sum(s.exact for s in scores))


def bicubic(scale: int) -> Callable[[np.ndarray], np.ndarray]:
    """Bicubic interpolation as an upscaler."""
    return lambda lr: data.imresize(lr, scale)


def of_model(model: nn.Module, tile: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A network as an upscaler, without gradients and in evaluation mode."""
    return lambda lr: super_resolve(model, lr, tile)
