"""Pictures through a network: grey and colours, 16 bits, transparency, packed layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from issp.deploy.pack import pack
from issp.deploy.parts import dtype_note
from issp.sr import checkpoint, data
from issp.sr.data.pictures import copy_with
from issp.sr.models import SuperResolver
from issp.sr.models.inference import upscale_parts
from issp.sr.models.tiling import Tiling

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as `issp.sr.data.images.luma`
_ROWS = 64  # of a result whose colours are added at once

# Below this share of zeros no layer has been seen to gain.
_FEW_ZEROS = 0.3
# Packing measures on a square of input pixels, which takes as long as the dense network on some 35
# of them, and saves half of the time afterwards: the work must be four times as long.
_EXAMPLE_SIDES, _WORTH = (64, 48), 140


def no_part(total: int) -> None:
    """What is called after each of `total` parts of an image, where nobody listens."""


def upscale_picture(
    model: nn.Module,
    picture: data.Picture,
    tiling: Tiling,
    on_part: Callable[[int], None] = no_part,
) -> data.Picture:
    """A picture through a network; transparency becomes larger by bicubic interpolation.

    Args:
        model, tiling, on_part: see `upscale_samples`.
        picture: grey ones stay grey, 16 bits stay 16.
    """
    samples = upscale_samples(model, picture.samples, tiling, on_part)
    alpha = picture.alpha
    if alpha is not None:
        alpha = data.imresize(alpha, samples.shape[0] // alpha.shape[0])
    return copy_with(picture, samples, alpha)


def upscale_samples(
    model: nn.Module,
    samples: np.ndarray,
    tiling: Tiling,
    on_part: Callable[[int], None] = no_part,
) -> np.ndarray:
    """The samples of an image through a network.

    A network of three channels gets grey images three times and the luma of the result is taken. A
    network of one channel gets the luma of colours; the colours themselves are bicubic.

    Args:
        model: its device is used.
        samples: [H, W, 1] or [H, W, 3], uint8 or (one channel) uint16.
        tiling: how the image is cut.
        on_part: called with the number of parts after each of them.

    Returns:
        [H * scale, W * scale, C] of the same dtype, clamped and rounded half to even.

    Raises:
        ValueError: a network of another number of channels, or a result that is not finite.
    """
    check_channels(model)
    channels = getattr(getattr(model, "module", model), "channels", samples.shape[2])
    if channels >= samples.shape[2]:
        return _through_network(model, samples, channels, tiling, on_part)
    luma = np.rint(data.images.luma(samples)).astype(np.uint8)[:, :, None]
    return _with_colours_of(samples, _through_network(model, luma, 1, tiling, on_part))


def check_channels(model: nn.Module) -> None:
    """Refuses a network that takes no pictures.

    Raises:
        ValueError: it has another number of channels than 1 and 3.
    """
    channels = getattr(getattr(model, "module", model), "channels", 3)
    if channels not in (1, 3):
        raise ValueError(f"the network takes {channels} channels: pictures have 1 or 3")


def _through_network(
    model: nn.Module,
    samples: np.ndarray,
    channels: int,
    tiling: Tiling,
    on_part: Callable[[int], None],
) -> np.ndarray:
    most = int(np.iinfo(samples.dtype).max)
    whole = samples if most == 255 else samples.astype(np.int32)  # torch pads no uint16
    x = torch.from_numpy(whole).permute(2, 0, 1)[None].expand(-1, channels, -1, -1)
    result = None
    for part in upscale_parts(model, x, tiling, white=most):
        if result is None:
            height, width = (side * part.scale for side in samples.shape[:2])
            result = np.empty((height, width, samples.shape[2]), samples.dtype)
        result[part.rows, part.cols] = _levels(part.pixels[0], samples.shape[2], most)
        on_part(part.total)
    assert result is not None  # an image has at least one part
    return result


def _levels(y: Tensor, colours: int, most: int) -> np.ndarray:
    """[C, H, W] float to [H, W, colours] whole numbers from 0 to `most`."""
    y = y.float()
    if not torch.isfinite(y).all():
        raise ValueError("the result holds NaN or infinite values: the model is damaged")
    if colours < y.shape[0]:
        y = torch.einsum("chw,c->hw", y, y.new_tensor(_LUMA))[None]
    levels = y.clamp(0, 1).mul(most).round().permute(1, 2, 0)
    return levels.to(torch.uint8 if most == 255 else torch.int32).cpu().numpy()


def _with_colours_of(rgb: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Bicubic colours for a grey result, which becomes their luma."""
    result = data.imresize(rgb, grey.shape[0] // rgb.shape[0])
    for start in range(0, len(result), _ROWS):
        around = result[start : start + _ROWS]
        # The same number added to R, G and B changes the luma alone.
        difference = grey[start : start + _ROWS] - data.images.luma(around)[:, :, None]
        around[:] = np.rint((around + difference).clip(0, 255))
    return result


def packing_example(
    model: nn.Module, pixels: int, dtype: torch.dtype | None = None
) -> tuple[int | None, str]:
    """Side of the image to pack a network on; None where that is not worth the time, and why.

    Args:
        model: dense.
        pixels: of all images together.
        dtype: asked for, see `issp.pack`.

    Returns:
        The side, and one line; "" where hardly a weight is zero and nobody asks.
    """
    if checkpoint.sparsity(model)["ratio"] < _FEW_ZEROS:
        if dtype is None:
            return None, ""
        return None, f"dense: hardly a weight is zero, and {dtype} is for sparse networks"
    sides = [side for side in _EXAMPLE_SIDES if side * side * _WORTH <= pixels]
    if not sides:
        least = round(_EXAMPLE_SIDES[-1] ** 2 * _WORTH)
        return None, f"dense: below {least:,} pixels packing takes longer than it saves"
    multiple = getattr(model, "pad_multiple", 1)
    return -(-sides[0] // multiple) * multiple, ""


def pack_on(
    model: SuperResolver, side: int, dtype: torch.dtype | None = None
) -> tuple[nn.Module, str]:
    """The network in its fastest form, by `issp.pack`, and a line about it.

    Args:
        model: on the device that will compute.
        side: of the square image that layers are measured on.
        dtype: in which parts may compute on a CPU, see `issp.pack`.
    """
    weight = next(model.parameters())
    shape = (1, model.channels, side, side)
    example = torch.full(shape, 0.5, device=weight.device, dtype=weight.dtype)
    packed: Any = pack(model.eval(), example, dtype=dtype)
    summary = packed.report.summary()
    if dtype is not None:
        summary += f" {dtype_note(packed.report.lines, dtype)}."
    if any(line.is_sparse for line in packed.report.lines):
        return packed, f"packed: {summary}"
    return model, f"dense: {summary}"
