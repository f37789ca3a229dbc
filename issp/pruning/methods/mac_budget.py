"""The budget of SLS: a share of the dense layers' multiply-accumulates (MACs), and its loss.

The cost is the sum of N / M * MACs over the layers. The loss is weight * c * cost, and c grows
after two epochs in which dense / cost rose too little.

Source: docs/method.md, section 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from issp.pruning.methods.masked_weight import MaskedWeight

_ROUNDING = 1 + 1e-9

Masked = Mapping[str, MaskedWeight]  # by layer
Kept = Mapping[str, Tensor]  # by layer which units are kept, bool [of] on the CPU


def leaves_a_unit(sparsity: float, of: int) -> bool:
    """Whether at least one of `of` weights is kept."""
    return (1 - sparsity) * of * _ROUNDING >= 1


class MacBudget:
    """What the masked layers may cost, and the factor that leads them there.

    Args:
        share: of the dense cost, 0..1.
        weight: of the cost in the loss, per MAC of one image.
        growth: factor of c.
        threshold: what dense / cost must gain between the ends of two epochs, or c grows.

    Attributes:
        coefficient: c.
        gains: dense / cost at the end of the epochs since c was looked at.
    """

    def __init__(self, share: float, weight: float, growth: float, threshold: float) -> None:
        self.share, self.weight = share, weight
        self.growth, self.threshold = growth, threshold
        self.coefficient = 1.0
        self.gains: list[float] = []

    def used(self, masked: Masked, kept: Kept) -> float:
        """The cost as a share of that of the dense layers."""
        macs = _macs(masked)
        cost = sum(x * int(kept[name].sum()) / len(kept[name]) for name, x in macs.items())
        return cost / sum(macs.values())

    def is_met(self, masked: Masked, kept: Kept) -> bool:
        """Whether the cost is within the budget."""
        return self.used(masked, kept) <= self.share * _ROUNDING

    def loss(self, masked: Masked, kept: Kept, numbers: Tensor) -> Tensor:
        """The term of the training loss.

        Args:
            masked: the layers that train; others of `kept` cost nothing.
            kept: in the order of `numbers`.
            numbers: N of each layer with its gradient, float32 [layers].
        """
        macs = _macs(masked)
        per_unit = [macs.get(name, 0.0) / len(units) for name, units in kept.items()]
        costs = torch.tensor(per_unit, dtype=numbers.dtype, device=numbers.device)
        return self.weight * self.coefficient * (costs * numbers).sum()

    def anneal(self, masked: Masked, kept: Kept) -> None:
        """At the end of an epoch: c grows if the cost falls too slowly."""
        self.gains.append(1 / self.used(masked, kept))
        if len(self.gains) == 2:
            if self.gains[1] - self.gains[0] < self.threshold:
                self.coefficient *= self.growth
            self.gains = []

    def enforce(self, masked: Masked, kept: Kept, priorities: Mapping[str, Tensor]) -> bool:
        """Drops the units of the lowest priorities from `kept` until the budget is met.

        Args:
            priorities: by layer those of the units from 1 on, float32 [of - 1].

        Returns:
            Whether any was dropped; a warning says so.
        """
        if self.is_met(masked, kept):
            return False
        used = self.used(masked, kept)
        order = [
            (p, -unit, name)
            for name in masked
            for unit, p in enumerate(priorities[name].tolist(), start=1)
            if kept[name][unit]
        ]
        for _, unit, name in sorted(order):
            if self.is_met(masked, kept):
                break
            kept[name][-unit] = False
        warnings.warn(
            f"sls has {used:.4g} of the dense cost at the freeze, and the budget is "
            f"{self.share:.4g}: it drops the units of the lowest priorities; train longer before "
            "the freeze, or raise weight or lr",
            stacklevel=4,
        )
        return True


def _macs(masked: Masked) -> dict[str, float]:
    """By layer, for one image; a layer that nothing has called is taken for one of the largest.

    Windows of an image count as images in some layers' outputs: the smallest first dimension of
    all is the batch.
    """
    seen = {name: [x for x in m.outputs if x] for name, m in masked.items()}
    batch = min((size for outputs in seen.values() for _, size in outputs), default=1)
    places = {name: sum(n for n, _ in outputs) / batch for name, outputs in seen.items()}
    most = max(places.values(), default=0) or 1
    return {n: m.layer.weight.numel() * (places[n] or most) for n, m in masked.items()}
