"""Configurations with values of the wrong type or size: one sentence that names the argument."""

import inspect

import pytest

from issp import models
from issp.sr.models import CAT, EDSR, SwinIR

EDSR_CONFIG = {"type": "EDSR", "num_feat": 8, "num_block": 1, "upscale": 2}
SWINIR_CONFIG = {"type": "SwinIR", "img_size": 16, "window_size": 8, "depths": [2]}
SWINIR_CONFIG |= {"num_heads": [2], "embed_dim": 12, "upsampler": "pixelshuffledirect"}


@pytest.mark.parametrize(
    "base, name, value, sentence",
    [
        (EDSR_CONFIG, "num_feat", "8", "EDSR: num_feat must be a whole number from 1 to 1000000"),
        (EDSR_CONFIG, "num_feat", True, "num_feat must be a whole number"),
        (EDSR_CONFIG, "num_feat", 8.0, "num_feat must be a whole number"),
        (EDSR_CONFIG, "num_block", -1, "num_block must be a whole number"),
        (EDSR_CONFIG, "upscale", 10**40, "upscale must be a whole number"),
        (EDSR_CONFIG, "res_scale", float("nan"), "res_scale must be a number up to .*, got nan"),
        (EDSR_CONFIG, "res_scale", 2**63, "res_scale must be a number up to 1000000"),
        (EDSR_CONFIG, "res_scale", 10**400, "res_scale must be a number"),
        (EDSR_CONFIG, "img_range", "255", "img_range must be a number"),
        (EDSR_CONFIG, "img_range", 0, "EDSR needs an img_range above 0"),
        (EDSR_CONFIG, "rgb_mean", ["a", 0, 0], "rgb_mean must be a list of numbers"),
        (EDSR_CONFIG, "rgb_mean", 0.4, "rgb_mean must be a list of numbers"),
        (SWINIR_CONFIG, "img_size", [16], "img_size must be one or two sides"),
        (SWINIR_CONFIG, "depths", "22", "depths must be a list of whole numbers"),
        (SWINIR_CONFIG, "depths", [2.5], "depths must be a list of whole numbers"),
        (SWINIR_CONFIG, "num_heads", [0], "embed_dim 12 must be divisible by num_heads 0"),
        (SWINIR_CONFIG, "window_size", 0, "window_size must be a whole number"),
        (SWINIR_CONFIG, "qk_scale", "x", "qk_scale must be a number"),
        (SWINIR_CONFIG, "upsampler", 3, "upsampler must be text"),
        (SWINIR_CONFIG, "ape", "no", "ape must be true or false"),
        (SWINIR_CONFIG, "type", ["SwinIR"], "unknown model type"),
    ],
)
def test_a_value_of_another_kind_is_named(base, name, value, sentence):
    config = {**base, name: value}
    with pytest.raises(ValueError, match=sentence) as error:
        models.from_config(config)
    assert "\n" not in str(error.value)


def test_overrides_of_a_preset_are_checked_too():
    with pytest.raises(ValueError, match="swinir-light: depths must be a list of whole numbers"):
        models.build("swinir-light", 2, depths="6666")


@pytest.mark.parametrize("cls", [EDSR, SwinIR, CAT])
def test_every_default_is_of_the_kind_that_is_asked_for(cls):
    """The annotations are the rules: one that is missing or wrong would check nothing."""
    from issp.sr.models.base import _FORMS

    constructor = inspect.unwrap(cls.__init__)
    for name, parameter in inspect.signature(constructor).parameters.items():
        if name not in ("self", "norm_layer", "act_layer"):
            suits, _ = _FORMS[parameter.annotation]
            assert suits(parameter.default), name
