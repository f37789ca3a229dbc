"""SRP: random index sets, shared within a residual stream, and a growing L2 penalty.

Layers of one weight shape that stand directly before a residual addition share one set of weight
indices, drawn before training; all other layers take their smallest magnitudes. The sets stay. The
penalty on their weights grows, so that the network does without them when they are removed.

Source: docs/method.md, sections 3.1 and 3.2 (Zhang et al., "Learning Efficient Image
Super-Resolution Networks via Structure-Regularized Pruning", ICLR 2022, adapted to weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from issp.nn.selection import Layer
from issp.pruning.buckets import smallest
from issp.pruning.methods.base import Setting
from issp.pruning.methods.constraints import check_constrained, constrained_groups
from issp.pruning.methods.options import whole_number
from issp.pruning.methods.penalty import PenaltyMethod

if TYPE_CHECKING:
    from issp.pruning.buckets import WeightBucket


@dataclass
class SRP(PenaltyMethod):
    """Prunes fixed random sets by a penalty; see `PenaltyMethod` for the other options.

    Args:
        seed: of the random sets. None: torch's initial seed, which `torch.manual_seed` sets; ranks
            of one training must pass the same number.
        constrained: name patterns of the layers that share sets; None: those directly before a
            residual addition, from the model's graph.
        example: an input of the model, for graphs that torch.fx cannot trace.

    Raises:
        ValueError: no number, or one outside its range.
        TypeError: `constrained` or `example` of a wrong kind.
    """

    name: ClassVar[str] = "srp"
    ranks: ClassVar[bool] = False
    growth: ClassVar[float] = 0.7  # the authors' 100 020 of 143 170 steps

    seed: int | None = None
    constrained: str | Sequence[str] | None = None
    example: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is not None:
            self.seed = whole_number("seed", self.seed, -(2**63), 2**63 - 1)
        check_constrained(self)

    def start(self, setting: Setting) -> None:
        super().start(setting)
        waiting = setting.buckets.unranked()
        if not waiting:
            return
        groups = constrained_groups(self, setting)
        generator = torch.Generator(device="cpu").manual_seed(_seed(self.seed, self.name))
        masks: dict[str, Tensor] = {}
        for group in groups:  # all of them: further layers must not change the draw
            mask = smallest(group[0], _random_like(group[0], generator))
            masks |= {x.name: mask for x in group if x.name in waiting}
        setting.buckets.rank(waiting - masks.keys())
        setting.buckets.set_masks(masks)

    def penalty(self, step: int, bucket: WeightBucket) -> list[float] | None:
        value = self.lambda_after(step)
        return [value] * len(bucket.layers) if value else None


def _random_like(layer: Layer, generator: torch.Generator) -> Tensor:
    shape = layer.weight.shape
    scores = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return scores.to(layer.weight.device)


def _seed(seed: int | None, name: str) -> int:
    distributed = torch.distributed
    is_parallel = distributed.is_available() and distributed.is_initialized()
    if seed is None and is_parallel and distributed.get_world_size() > 1:
        raise ValueError(
            f"{name}: pass the same seed on all ranks, as in method=issp.methods.SRP(seed=0): "
            "their random index sets must be equal"
        )
    return torch.initial_seed() if seed is None else seed
