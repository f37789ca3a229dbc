"""Convolutions in the tile layout: shapes, units and epilogues, and the tensors of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from issp.ops import TiledImage, TiledWeight, to_tiles


class Inputs(NamedTuple):
    """What `tiled_conv2d` takes."""

    image: Tensor
    weight: Tensor
    t: TiledImage
    w: TiledWeight
    bias: Tensor | None
    residual: TiledImage | None

    def args(self, case: TileCase) -> tuple[Any, ...]:
        """The arguments of the raw op."""
        residual = None if self.residual is None else self.residual.data
        geometry = [case.channels, case.size[1], case.rows, case.kernel, case.shuffle]
        plan = (self.w.values, self.w.positions, self.w.tile_starts)
        return (self.t.data, *plan, self.bias, residual, geometry, case.activation, case.scale)


@dataclass(frozen=True)
class TileCase:
    """A convolution. keep: the share of units that are not zero."""

    name: str
    rows: int
    channels: int
    kernel: int = 3
    size: tuple[int, int] = (5, 20)
    batch: int = 1
    v: int = 16
    unit: tuple[int, int] = (16, 2)
    keep: float = 0.5
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    scale: float = 1.0
    shuffle: int = 1

    def build(self) -> Inputs:
        source = torch.Generator().manual_seed(len(self.name) + self.rows)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source)

        image = random(self.batch, self.channels, *self.size)
        weight = random(self.rows, self.channels, self.kernel, self.kernel)
        kept = self.mask(torch.rand(self.grid(), generator=source) < self.keep)
        weight = torch.where(kept, weight, 0.0)
        bias = random(self.rows) if self.bias else None
        residual = to_tiles(random(self.batch, self.rows, *self.size)) if self.residual else None
        tiled = TiledWeight.from_weight(weight, self.v)
        return Inputs(image, weight, to_tiles(image), tiled, bias, residual)

    def grid(self) -> tuple[int, ...]:
        """How many units there are along each axis of the weight."""
        v, c = self.unit
        return (-(-self.rows // v), -(-self.channels // c), self.kernel, self.kernel)

    def mask(self, units: Tensor) -> Tensor:
        """The kept weights of kept units."""
        v, c = self.unit
        return units.repeat_interleave(v, 0).repeat_interleave(c, 1)[: self.rows, : self.channels]


CASES = [
    TileCase("one block", 16, 2, kernel=1, size=(1, 16), keep=1.0),
    TileCase("all empty", 16, 4, keep=0.0),
    TileCase("an empty block", 64, 3, size=(2, 5), keep=0.1),
    TileCase("relu, residual", 32, 8, batch=2, activation="relu", residual=True, scale=0.1),
    TileCase("odd everything", 33, 7, size=(4, 37), batch=3, residual=True),
    TileCase("v 32", 64, 12, size=(7, 48), v=32, unit=(32, 2), residual=True, activation="relu"),
    TileCase("v 32, odd rows", 33, 7, size=(3, 37), v=32, unit=(32, 2), activation="relu"),
    TileCase("v 32 of 16", 96, 10, v=32, keep=0.3, bias=False),
    TileCase("single channels", 32, 9, unit=(16, 1), keep=0.3),
    TileCase("rows of 4", 20, 6, unit=(4, 1), keep=0.3),
    TileCase("dense", 40, 10, keep=1.0, size=(6, 6)),
    TileCase("head", 48, 3, keep=1.0, size=(4, 65), batch=2),
    TileCase("tail", 3, 20, keep=1.0, size=(3, 33)),
    TileCase("pointwise", 60, 30, kernel=1, size=(3, 50), keep=0.2, residual=True, scale=-0.7),
    TileCase("pointwise v 32", 60, 31, kernel=1, size=(3, 50), v=32, unit=(32, 2), keep=0.3),
    TileCase("tokens", 48, 20, kernel=1, size=(1, 101), keep=0.4),
    TileCase("one pixel", 17, 3, size=(1, 1), keep=1.0),
    TileCase("one column", 17, 5, size=(9, 1)),
    TileCase("wide", 16, 4, size=(2, 112), keep=0.6),
    TileCase("shuffle 2", 64, 6, size=(3, 17), shuffle=2, activation="relu"),
    TileCase("shuffle 2 v 32", 64, 6, size=(3, 32), shuffle=2, v=32, unit=(32, 2), scale=2.0),
    TileCase("shuffle 2, odd", 12, 6, size=(3, 24), shuffle=2, batch=2),
    TileCase("shuffle 2, v 32, odd", 44, 4, size=(2, 7), shuffle=2, v=32, unit=(32, 2)),
    TileCase("shuffle 3", 27, 5, size=(3, 17), shuffle=3, batch=2),
    TileCase("shuffle 4", 48, 10, kernel=1, size=(3, 50), shuffle=4, v=32, unit=(32, 2)),
    TileCase("gelu", 32, 8, kernel=1, size=(4, 30), activation="gelu", keep=0.8),
]
NAMES = [case.name for case in CASES]
