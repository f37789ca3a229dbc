"""ISS-R: the unimportant weights get a growing L2 penalty instead of a factor.

g <- g + lambda * w for the weights below the threshold of the latest step; no other weight has a
penalty. lambda grows by delta every few steps. The authors' code keeps the penalties of weights
that have become important again (docs/method.md, section 2.11, B6): that variant is `iss-r-stale`.

Source: docs/method.md, sections 1.2 and 2.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from issp.pruning.methods.penalty import PenaltyMethod

if TYPE_CHECKING:
    from issp.pruning.buckets import WeightBucket


@dataclass
class ISSR(PenaltyMethod):
    """Ranks the weights after every step; see `PenaltyMethod` for the options."""

    name: ClassVar[str] = "iss-r"

    def penalty(self, step: int, bucket: WeightBucket) -> list[float] | None:
        value = self.lambda_after(step)
        return [value] * len(bucket.layers) if value else None


@dataclass
class StaleISSR(PenaltyMethod):
    """The authors' variant: every weight has a lambda, which grows while it is unimportant.

    A weight that becomes important again keeps its lambda. The weights are ranked when the lambdas
    grow. A lambda that has reached the limit grows no further.
    """

    name: ClassVar[str] = "iss-r-stale"
    _lambdas: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def ranks_after(self, step: int) -> bool:
        return step % self.interval == 0

    def after_step(self, step: int) -> None:
        if not self.ranks_after(step):
            return
        assert self.setting is not None
        for bucket in self.setting.buckets:
            for layer, kept in zip(bucket.layers, bucket.masks(), strict=True):
                previous = self._lambdas.get(layer.name)
                if previous is None:
                    previous = torch.zeros(kept.shape, dtype=torch.float32, device=kept.device)
                grown = (previous + self._delta).clamp_(max=self.limit)
                self._lambdas[layer.name] = torch.where(kept, previous, grown)

    def penalty(self, step: int, bucket: WeightBucket) -> list[Tensor] | None:
        if not self._lambdas:
            return None
        return [
            self._lambdas.get(layer.name, torch.zeros_like(w, dtype=torch.float32)).to(w.device)
            for layer, w in zip(bucket.layers, bucket.weights, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"lambdas": {name: x.clone() for name, x in self._lambdas.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert self.setting is not None
        shapes = {x.name: x.weight.shape for x in self.setting.buckets.prunable}
        lambdas = state.get("lambdas")
        if not isinstance(lambdas, Mapping) or any(
            not isinstance(x, Tensor) or x.dtype != torch.float32 or x.shape != shapes.get(name)
            for name, x in lambdas.items()
        ):
            raise ValueError("the lambdas of the pruner's state are damaged or of other layers")
        self._lambdas = {name: x.clone() for name, x in lambdas.items()}
