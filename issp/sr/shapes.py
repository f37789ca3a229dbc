"""Shapes of the prunable weights of the networks, in module order, without building a network.

Source: the architectures of EDSR, SwinIR-light and CAT-R as the paper's configurations have them.
"""

from __future__ import annotations

Shape = tuple[int, ...]


def _upsampler(features: int, scale: int) -> list[Shape]:
    # Pixel shuffle: 3 at once, otherwise one factor of 2 after the other.
    factors = [3] if scale == 3 else [2] * (scale // 2)
    return [(features * factor**2, features, 3, 3) for factor in factors]


def _edsr(features: int, blocks: int, scale: int) -> list[Shape]:
    body = [(features, features, 3, 3)] * (2 * blocks + 1)
    last = (3, features, 3, 3)
    return [(features, 3, 3, 3), *body, *_upsampler(features, scale), last]


def _swinir_light(scale: int) -> list[Shape]:
    block = [(180, 60), (60, 60), (120, 60), (60, 120)]  # qkv, proj, fc1, fc2
    group = [*block * 6, (60, 60, 3, 3)]
    return [(60, 3, 3, 3), *group * 4, (60, 60, 3, 3), (3 * scale**2, 60, 3, 3)]


def _cat_r(scale: int) -> list[Shape]:
    position = [(5, 2), (5, 5), (5, 5), (3, 5)]  # pos_proj, pos1, pos2, pos3
    mlp = [(720, 180), (180, 720)]
    block = [(540, 180), (180, 180), *position * 2, *mlp, (180, 1, 3, 3)]
    group = [*block * 6, (180, 180, 3, 3)]
    tail = [(180, 180, 3, 3), (64, 180, 3, 3), *_upsampler(64, scale), (3, 64, 3, 3)]
    return [(180, 3, 3, 3), *group * 6, *tail]


_TABLES = {
    "swinir-light": _swinir_light,
    "edsr-l": lambda scale: _edsr(256, 32, scale),
    "edsr-baseline": lambda scale: _edsr(64, 16, scale),
    "cat-r": _cat_r,
}
MODELS = tuple(_TABLES)
SCALES = (2, 3, 4)


def prunable_shapes(model: str, scale: int = 4) -> list[Shape]:
    """Shapes of every Conv2d and Linear weight, in the order of `model.named_modules()`.

    Args:
        model: one of `MODELS`.
        scale: 2, 3 or 4.

    Raises:
        ValueError: unknown model or scale.
    """
    if model not in _TABLES:
        raise ValueError(f"no shape table for {model!r}: known are {', '.join(MODELS)}")
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}: it must be 2, 3 or 4")
    return _TABLES[model](scale)
