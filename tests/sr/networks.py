"""Small networks of every kind, for tests."""

import pytest
import torch

from issp import models
from issp.sr.models import CAT, EDSR, SwinIR


def small_edsr(**kwargs):
    return EDSR(**{"num_feat": 8, "num_block": 1, "upscale": 2, **kwargs})


def small_swinir(**kwargs):
    defaults = {
        "img_size": 16,
        "window_size": 8,
        "depths": [2],
        "num_heads": [2],
        "embed_dim": 16,
        "mlp_ratio": 2,
        "upsampler": "pixelshuffledirect",
    }
    return SwinIR(**{**defaults, **kwargs})


def small_cat(**kwargs):
    defaults = {
        "img_size": 16,
        "depth": [2],
        "num_heads": [2],
        "embed_dim": 32,
        "split_size_0": [4],
        "split_size_1": [8],
        "block_name": "CATB_regular",
        "upsampler": "pixelshuffle",
    }
    return CAT(**{**defaults, **kwargs})


def small_cat_axial(**kwargs):
    return small_cat(**{"block_name": "CATB_axial", "split_size_1": [0], **kwargs})


SMALL = [small_edsr, small_swinir, small_cat, small_cat_axial]
every_small = pytest.mark.parametrize("make", SMALL, ids=lambda f: f.__name__)


def build_on_meta(name, scale):
    """A preset without memory or initialisation."""
    with torch.device("meta"):
        return models.build(name, scale)
