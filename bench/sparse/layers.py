"""The layers that are timed: those of the networks at an image size, or of chosen shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from issp.sr import models

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One sparse conv or matmul: a weight and the shape of what it is applied to.

    Attributes:
        weight: [O, I] of a linear layer, [O, I, kh, kw] of a convolution (stride 1, padded so that
            the size stays).
        x: shape of the input, [..., I] or [N, I, H, W].
        models: where it occurs.
        groups: of the convolution; only 1 has a sparse op.
    """

    weight: Shape
    x: Shape
    models: tuple[str, ...] = ()
    groups: int = 1

    @property
    def conv(self) -> bool:
        """Whether it is a convolution."""
        return len(self.weight) == 4

    @property
    def padding(self) -> tuple[int, int]:
        """Of the convolution, (0, 0) for 1x1."""
        return self.weight[2] // 2, self.weight[3] // 2

    @property
    def y(self) -> Shape:
        """Shape of the output."""
        if not self.conv:
            return (*self.x[:-1], self.weight[0])
        size = [
            n + 2 * p - k + 1
            for n, p, k in zip(self.x[2:], self.padding, self.weight[2:], strict=True)
        ]
        return (self.x[0], self.weight[0], *size)

    @property
    def applications(self) -> int:
        """How often each weight is multiplied with something."""
        return math.prod(self.y) // self.weight[0]

    @property
    def name(self) -> str:
        """As printed: "3x3 60->60 at 64x64", "linear 60->180, 2304 tokens"."""
        outputs, inputs = self.weight[0], self.weight[1] * self.groups
        if not self.conv:
            return f"linear {inputs}->{outputs}, {self.applications} tokens"
        grouped = f" in {self.groups} groups" if self.groups > 1 else ""
        kernel, size = (f"{a}x{b}" for a, b in (self.weight[2:], self.x[2:]))
        return f"{kernel} {inputs}->{outputs}{grouped} at {size}"

    def cut(self, flops: float) -> Layer:
        """The same on fewer pixels or tokens, so that the dense op needs at most `flops`."""
        share = flops / (2.0 * math.prod(self.weight) * self.applications)
        if share >= 1:
            return self
        if not self.conv:
            return replace(self, x=(max(1, int(self.applications * share)), self.x[-1]))
        sides = [max(3, int(n * math.sqrt(share))) for n in self.x[2:]]
        return replace(self, x=(1, self.x[1], *sides))


def of_models(
    names: Sequence[str], sizes: Sequence[tuple[int, int]], conv: bool, scale: int = 4
) -> list[Layer]:
    """All distinct prunable layers of the networks, convolutions or linear ones.

    The networks run on the meta device, which computes shapes and nothing else.

    Args:
        names: of `issp.models`.
        sizes: of the low-resolution image, height and width.
        conv: convolutions, otherwise linear layers.
        scale: of super-resolution.
    """
    models_of: dict[tuple, list[str]] = {}
    for name in names:
        with torch.device("meta"):
            network = models.build(name, scale).eval()
        for height, width in sizes:
            for key in _seen(network, height, width, conv):
                models_of.setdefault(key, [])
                models_of[key] += [name] * (name not in models_of[key])
    return [Layer(weight, x, tuple(who), groups) for (weight, x, groups), who in models_of.items()]


@torch.no_grad()
def _seen(network: nn.Module, height: int, width: int, conv: bool) -> list[tuple]:
    """Weight, input shape and groups of every layer that a forward pass meets, once each."""
    seen: dict[tuple, None] = {}

    def note(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        x, groups = args[0], getattr(module, "groups", 1)
        seen[tuple(module.weight.shape), tuple(x.shape), groups] = None

    kind = nn.Conv2d if conv else nn.Linear
    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, kind)]
    network(torch.empty(1, 3, height, width, device="meta"))
    for hook in hooks:
        hook.remove()
    return list(seen)


def from_shapes(
    shapes: Sequence[Shape], sizes: Sequence[tuple[int, int]], conv: bool
) -> list[Layer]:
    """Layers of these weights at these image sizes; a linear layer sees a token per pixel.

    Raises:
        ValueError: a shape that is none of a convolution or a linear layer.
    """
    dims = 4 if conv else 2
    for shape in shapes:
        if len(shape) != dims:
            raise ValueError(
                f"--shape {'x'.join(map(str, shape))} has {len(shape)} numbers: give "
                + ("OxIxKHxKW, such as 256x256x3x3" if conv else "OxI, such as 180x60")
            )
    return [
        Layer(shape, (1, shape[1], h, w) if conv else (1, h * w, shape[1]))
        for shape in shapes
        for h, w in sizes
    ]


def parse_numbers(text: str) -> tuple[int, ...]:
    """Parses "256x256x3x3".

    Raises:
        ValueError: it is something else, or has a number below 1.
    """
    if not re.fullmatch(r"\d+(x\d+)*", text) or 0 in map(int, text.split("x")):
        raise ValueError(f"{text!r} is not a product of positive numbers such as 48x48")
    return tuple(map(int, text.split("x")))


def parse_size(text: str) -> tuple[int, int]:
    """Parses an image size: "48" for 48x48, or "48x64", height first.

    Raises:
        ValueError: it is something else.
    """
    sides = parse_numbers(text)
    if len(sides) > 2:
        raise ValueError(f"{text!r} is no image size: give 48 or 48x64, height first")
    return sides[0], sides[-1]
