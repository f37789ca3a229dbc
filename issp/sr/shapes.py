"""Shapes of the prunable weights of the networks, read off a network on the meta device."""

from __future__ import annotations

import torch
from torch import nn

from issp.sr import models

Shape = tuple[int, ...]
MODELS = tuple(models.names())
SCALES = models.SCALES


def prunable_shapes(model: str, scale: int = 4) -> list[Shape]:
    """Shapes of every Conv2d and Linear weight, in the order of `model.named_modules()`.

    Args:
        model: one of `MODELS`.
        scale: 2, 3 or 4.

    Raises:
        ValueError: unknown model or scale.
    """
    # The meta device allocates nothing and initialises nothing.
    with torch.device("meta"):
        network = models.build(model, scale)
    layers = (m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return [tuple(layer.weight.shape) for layer in layers]
