"""Super-resolution networks, with the argument names and checkpoint layout of BasicSR and CAT."""

import inspect
from typing import Any

from issp.sr.models.base import SuperResolver, unknown_argument, wrong_value
from issp.sr.models.cat import CAT
from issp.sr.models.edsr import EDSR
from issp.sr.models.inference import pad, upscale
from issp.sr.models.swinir import SwinIR
from issp.utils.text import suggest

__all__ = ["CAT", "EDSR", "SuperResolver", "SwinIR"]
__all__ += ["build", "from_config", "names", "pad", "upscale"]

SCALES = (2, 3, 4)

_CLASSES = {cls.__name__: cls for cls in (EDSR, SwinIR, CAT)}

# The networks of the paper's tables (docs/method.md, section 5), the usual small EDSR, and one for
# a CPU. edsr-tiny x2 at 90 % sparsity (shrink 0.95, Adam 1e-3, 16 patches of 24x24 LR pixels, mask
# frozen half-way) scores 34.89 dB on Set5 (Y; bicubic: 33.67 dB) after 1 152 steps, which take
# 150 s on one core.
_PRESETS = {
    "edsr-tiny": (EDSR, {"num_feat": 32, "num_block": 8}),
    "edsr-baseline": (EDSR, {"num_feat": 64, "num_block": 16}),
    "edsr-l": (EDSR, {"num_feat": 256, "num_block": 32, "res_scale": 0.1}),
    "swinir-light": (
        SwinIR,
        {
            "img_size": 64,
            "window_size": 8,
            "depths": [6, 6, 6, 6],
            "embed_dim": 60,
            "num_heads": [6, 6, 6, 6],
            "mlp_ratio": 2,
            "upsampler": "pixelshuffledirect",
        },
    ),
    "cat-r": (
        CAT,
        {
            "img_size": 64,
            "depth": [6] * 6,
            "embed_dim": 180,
            "num_heads": [6] * 6,
            "split_size_0": [4] * 6,
            "split_size_1": [16] * 6,
            "mlp_ratio": 4,
            "upsampler": "pixelshuffle",
            "block_name": "CATB_regular",
        },
    ),
}


def names() -> list[str]:
    """Names that `build` knows."""
    return list(_PRESETS)


def build(name: str, scale: int, **overrides: Any) -> SuperResolver:
    """Build a network by name, randomly initialised.

    Args:
        name: one of `names()`:
            edsr-tiny (32 channels, 8 blocks: trains in minutes on a CPU), edsr-baseline (64, 16),
            edsr-l (256, 32, res_scale 0.1), swinir-light, cat-r.
        scale: 2, 3 or 4.
        **overrides: keyword arguments of the class that differ from the preset.

    Returns:
        The network, with `.scale`, `.arch` (the name) and `.config` (for `from_config`).

    Raises:
        ValueError: unknown name (the nearest is suggested) or scale; a value of another type.
        TypeError: a keyword that the class does not have.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown model {name!r}: {suggest(name, _PRESETS)}")
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r} for {name}: it must be 2, 3 or 4")
    if "upscale" in overrides:
        raise TypeError(f"pass the scale of {name} as scale={overrides['upscale']}, not upscale")
    cls, preset = _PRESETS[name]
    problem = wrong_value(name, overrides, inspect.unwrap(cls.__init__))
    if problem:
        raise ValueError(problem)
    model = cls(**{**preset, "upscale": int(scale), **overrides})
    model.arch = name
    return model


def from_config(config: dict[str, Any]) -> SuperResolver:
    """Build a network from its configuration: `model.config`, or BasicSR's `network_g`.

    Args:
        config: `{"type": "EDSR" | "SwinIR" | "CAT", keyword: value, ...}`; it is not changed.

    Raises:
        TypeError: not a dict.
        ValueError: no type, an unknown type or keyword (the nearest is suggested), or a value of
            another type.
    """
    if not isinstance(config, dict):
        raise TypeError(f"a model configuration must be a dict, got {type(config).__name__}")
    arguments = dict(config)
    kind = arguments.pop("type", None)
    if kind is None:
        raise ValueError(f"the model configuration has no 'type': use one of {list(_CLASSES)}")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ValueError(f"unknown model type {kind!r}: {suggest(kind, _CLASSES)}")
    constructor = inspect.unwrap(_CLASSES[kind].__init__)
    known = [p for p in inspect.signature(constructor).parameters if p != "self"]
    problem = unknown_argument(kind, arguments, known) or wrong_value(kind, arguments, constructor)
    if problem:
        raise ValueError(problem)
    return _CLASSES[kind](**arguments)
