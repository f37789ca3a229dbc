"""ASSL: a loss that aligns index sets within a residual stream, then one set, and an L2 penalty.

Layers of one weight shape that stand directly before a residual addition are to prune the same
indices. In the alignment stage a loss draws their rankings together, while the free layers get the
growing penalty on their smallest weights already. At its end all layers are ranked anew, those of a
group take the set of the first one, and their penalty begins to grow.

The authors' code builds the loss from detached weights, so that it has no gradient, and multiplies
each layer by itself alone (docs/method.md, section 2.11, B4); in its second stage weights that have
become important keep their penalty (B5). Here the loss is that of the supplement, and the penalty
of a layer acts on its present set.

Source: docs/method.md, sections 3.1 and 3.2 (Zhang et al., "Aligned Structured Sparsity Learning
for Efficient Image Super-Resolution", NeurIPS 2021, adapted to weights).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from issp import ops
from issp.nn.selection import Layer
from issp.pruning.buckets import WeightBucket
from issp.pruning.methods.base import Setting
from issp.pruning.methods.constraints import check_constrained, constrained_groups
from issp.pruning.methods.options import check_number, whole_number
from issp.pruning.methods.penalty import PenaltyMethod

# The authors' stages: 17 260 steps of alignment, the penalty of a layer grows for 100 020, then the
# weights settle until step 160 430.
_ALIGN_STEPS, _GROW_STEPS, _ALL_STEPS = 17_260, 100_020, 160_430


@dataclass
class ASSL(PenaltyMethod):
    """Prunes aligned sets by a penalty; see `PenaltyMethod` for the other options.

    Add `pruner.loss()` to the training loss: it is the sum over the groups of `alignment_loss`.

    Args:
        weight: factor on the loss; the authors' is 1e-8.
        align_steps: optimizer steps of the alignment stage. None: the authors' share of the pruning
            stage, 10.8 %, or their 17 260 where `freeze_at` is not given.
        constrained: name patterns of the layers that share sets; None: those directly before a
            residual addition, from the model's graph.
        example: an input of the model, for graphs that torch.fx cannot trace.

    Raises:
        ValueError: no number, or one outside its range.
        TypeError: `constrained` or `example` of a wrong kind.
    """

    name: ClassVar[str] = "assl"
    ranks: ClassVar[bool] = False
    has_loss: ClassVar[bool] = True
    takes_patterns: ClassVar[bool] = False  # the loss compares weights of a whole layer
    takes_units: ClassVar[bool] = False
    growth: ClassVar[float] = _GROW_STEPS / _ALL_STEPS

    weight: float = 1e-8
    align_steps: int | None = None
    constrained: str | Sequence[str] | None = None
    example: Tensor | None = None

    # The layers of each group, in the model's order; whether the alignment stage is over.
    _groups: list[list[Layer]] = field(default_factory=list, init=False, repr=False, compare=False)
    _is_aligned: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("weight", self.weight, 0)
        if self.align_steps is not None:
            self.align_steps = whole_number("align_steps", self.align_steps, 0)
        self._align_steps = _ALIGN_STEPS if self.align_steps is None else self.align_steps
        check_constrained(self)

    def start(self, setting: Setting) -> None:
        groups = constrained_groups(self, setting)
        if not groups:
            raise ValueError(
                "assl aligns layers, but no two of the layers to prune that stand before a "
                "residual addition have one shape: name others by constrained="
            )
        self._set_stages(setting.freeze_at)
        super().start(setting)
        self._speed_up(setting.freeze_at)
        self._groups = groups
        if waiting := setting.buckets.unranked():
            self._share(waiting)

    def _set_stages(self, freeze_at: int | None) -> None:
        if self.align_steps is None and freeze_at is not None:
            self._align_steps = freeze_at * _ALIGN_STEPS // _ALL_STEPS
        if freeze_at is not None and self._align_steps >= freeze_at:
            raise ValueError(
                f"align_steps is {self._align_steps}: the alignment must end before freeze_at, "
                f"step {freeze_at}"
            )
        self._is_aligned = self._is_aligned or self._align_steps == 0

    def _speed_up(self, freeze_at: int | None) -> None:
        """Lets the penalty that begins after the alignment reach its limit before the freeze."""
        if self.delta is None and freeze_at is not None:
            increments = (freeze_at - self._align_steps) // self.interval
            self._delta = max(self._delta, self.limit / max(1, increments))

    @torch.no_grad()
    def _share(self, names: Collection[str]) -> None:
        """Ranks some layers; those in a group take the set of its first layer.

        A layer that comes late takes the set that the others of its group have already. Groups have
        one set from the start, so that masks which a user fixes early are aligned too.
        """
        assert self.setting is not None
        buckets = self.setting.buckets
        buckets.rank(names)
        masks = buckets.column(WeightBucket.masks)
        shared: dict[str, Tensor] = {}
        for group in self._groups:
            active = [layer.name for layer in group if layer.name in masks]
            late = [name for name in active if name in names]
            settled = [name for name in active if name not in names]
            for name in late:
                shared[name] = masks[(settled or late)[0]]
        buckets.set_masks(shared)

    def penalty(self, step: int, bucket: WeightBucket) -> list[float] | None:
        free = self.lambda_after(step)
        shared = self.lambda_after(step - self._align_steps)
        constrained = {layer.name for group in self._groups for layer in group}
        lambdas = [shared if x.name in constrained else free for x in bucket.layers]
        return lambdas if any(lambdas) else None

    def after_step(self, step: int) -> None:
        assert self.setting is not None
        if not self._is_aligned and step >= self._align_steps:
            self._share(self.setting.buckets.active)
            self._is_aligned = True

    def loss(self) -> Tensor | None:
        if self._is_aligned:
            return None
        assert self.setting is not None
        counts = self.setting.buckets.column(lambda bucket: bucket.k)
        losses = []
        for group in self._groups:
            layers = [layer for layer in group if counts.get(layer.name)]
            if len(layers) > 1:
                k = counts[layers[0].name]
                losses.append(alignment_loss([x.weight for x in layers], k))
        return self.weight * torch.stack(losses).sum() if losses else None

    def state_dict(self) -> dict[str, Any]:
        return {"aligned": self._is_aligned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state.get("aligned"), bool) or len(state) != 1:
            raise ValueError("the stage of assl in the pruner's state is damaged")
        self._is_aligned = state["aligned"]


def alignment_loss(weights: Sequence[Tensor], k: int) -> Tensor:
    """How far the rankings of layers differ: -(1 / L^2) * sum over i, j of <s_i, s_j>.

    s_l = sigmoid(|w_l| - tau_l), with tau_l the k-th smallest of |w_l|. The sum is that of the
    squares of s_1 + ... + s_L, so that L layers of n weights cost O(L n). The gradient goes through
    |w| and tau.

    Args:
        weights: L tensors of one shape; half precision is computed in float32.
        k: how many weights of each are unimportant, 1..n.

    Returns:
        A scalar, -n at the lowest.

    Source: docs/method.md, section 3.2.
    """
    total = None
    for weight in weights:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        magnitudes = weight.to(dtype).abs()
        scores = (magnitudes - _kth_smallest(magnitudes, k)).sigmoid()
        total = scores if total is None else total + scores.to(total.device)
    assert total is not None
    return -total.square().sum() / len(weights) ** 2


def _kth_smallest(magnitudes: Tensor, k: int) -> Tensor:
    """The k-th smallest magnitude, whose gradient goes to the first weight that has it."""
    flat = magnitudes.flatten()
    threshold = ops.magnitude_threshold([flat.detach()], [k])
    return flat[(flat.detach() == threshold).int().argmax()]
