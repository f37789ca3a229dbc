"""What a pruning method is: which weights are unimportant, and what happens to them.

The pruner counts the steps, ranks the weights, keeps the masks, and at the freeze writes zeros
(buckets.py, pruner.py). A method decides the rest by what it overrides here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from issp.nn.selection import Layer
from issp.nn.sharding import is_sharded

if TYPE_CHECKING:  # buckets.py and the methods would import each other
    from issp.pruning.buckets import WeightBucket, WeightBuckets


@dataclass(frozen=True)
class Setting:
    """Where a method works.

    Attributes:
        model: as it was given to `attach`.
        buckets: the weights to prune, with their masks.
        freeze_at: optimizer step after which the masks are fixed; None: unknown.
    """

    model: nn.Module
    buckets: WeightBuckets
    freeze_at: int | None


@dataclass
class Method:
    """Base class; by itself it trains densely and prunes at the freeze.

    The fields of a subclass are its options. What it learns in a run is not a field.

    Attributes:
        name: as `attach` and the command line take it.
        prunes: any weight is pruned.
        fixes_masks: the masks are fixed as soon as the pruner is attached.
        ranks: weights are ranked in the steps that `ranks_after` names; otherwise the index sets
            come from `start`, and a schedule of the sparsity has no meaning.
        penalizes: `penalty` has values.
        takes_patterns: the method has a meaning within N:M patterns.
        takes_units: the method has a meaning where units of several weights are pruned.
        takes_shards: the method has a meaning where each rank has rows of a weight (fully_shard).
        skips_undivided: a layer that a pattern does not divide stays dense, with every `tail`.
        default_sparsity: where the user names none.
    """

    name: ClassVar[str] = ""
    prunes: ClassVar[bool] = True
    fixes_masks: ClassVar[bool] = False
    ranks: ClassVar[bool] = True
    penalizes: ClassVar[bool] = False
    takes_patterns: ClassVar[bool] = True
    takes_units: ClassVar[bool] = True
    takes_shards: ClassVar[bool] = False
    skips_undivided: ClassVar[bool] = False
    default_sparsity: ClassVar[float] = 0.95
    # Where the method works, once it does.
    setting: Setting | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def has_loss(self) -> bool:
        """Whether `loss` has values."""
        return False

    @property
    def factor(self) -> float:
        """What the unimportant weights are multiplied by after every step."""
        return 1.0

    def prepare(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Called by `attach` with the layers and their targets; may leave some dense.

        Raises:
            ValueError: targets that have no meaning here, or no layer is left.
        """

    def start(self, setting: Setting) -> None:
        """Called when the pruner is attached, reattached or has found further layers to prune.

        Raises:
            ValueError: the method does not suit the model.
        """
        self.setting = setting

    def before_freeze(self) -> None:
        """Called before the masks are fixed, for the last time that they may change."""

    def after_freeze(self) -> None:
        """Called once the masks are fixed and the weights are masked."""

    def ranks_after(self, step: int) -> bool:
        """Whether the weights are ranked anew after a step of the pruning stage (from 1)."""
        return self.ranks

    def penalty(self, step: int, bucket: WeightBucket) -> list[float] | list[Tensor] | None:
        """The L2 penalty of a bucket's weights in a step; None: no weight has one.

        Returns:
            For each weight lambda of its unimportant ones, or a tensor of one lambda per weight.
        """
        return None

    def after_step(self, step: int) -> None:
        """Called after a step of the pruning stage, when the masks are those of this step."""

    def loss(self) -> Tensor | None:
        """What is added to the training loss now: a scalar with a gradient; None: nothing."""
        return None

    def detach(self) -> None:
        """Takes back what the method has changed in the modules."""

    def notes(self) -> dict[str, str]:
        """What the summary says of a layer, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the method has learned, besides masks: numbers, text and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: it is damaged or belongs to other layers; nothing has been changed.
        """
        if state:
            raise ValueError(f"the pruner's state holds {sorted(state)}, which {self.name} has not")

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}


def check_shards(method: Method, layers: Iterable[Layer]) -> None:
    """Refuses sharded layers for a method that needs whole weights."""
    for layer in layers:
        if not (layer.dense or method.takes_shards) and is_sharded(layer.weight):
            raise ValueError(
                f"{method.name} needs whole weights, and {layer.name} is sharded: use iss-p, iht "
                "or l1 with fully_shard, or DistributedDataParallel"
            )
