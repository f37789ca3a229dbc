"""SLS: N of every M input channels, with N learned for each layer on a budget of computations.

The weights of a group of M consecutive input channels are ordered by magnitude, anew at the start
of every epoch; unit j of a layer are the weights of rank j in their groups. A layer keeps its first
unit and those whose priority is above 0.5 (priority_scores.py), so N is their number. The gradient
passes from these decisions to the priorities as if they were equal. The forward pass uses the
masked weights (masked_weight.py). The others have no gradient and keep their values, with which
they may come back in a later epoch.

The loss gets a term of the cost (mac_budget.py), which lowers the priorities. Once the cost is
within the budget the scores are fixed.

Source: docs/method.md, section 4 (Oh et al., "Attentive Fine-Grained Structured Sparsity for Image
Restoration", CVPR 2022).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from issp.nn.names import named_modules
from issp.nn.selection import Layer, undivided_reason
from issp.ops.keep import Keep
from issp.pruning.methods.base import Method, Setting
from issp.pruning.methods.mac_budget import MacBudget, leaves_a_unit
from issp.pruning.methods.masked_weight import MaskedWeight
from issp.pruning.methods.options import check_number, whole_number
from issp.pruning.methods.priority_scores import PriorityScores

# The authors' iterations per epoch and learning rate, taken over for a pruning stage of that many
# steps. A shorter stage has as many epochs, and the scores can go as far.
_EPOCH, _LR, _STAGE = 1000, 1e-4, 100_000
_MOST_LR = 0.05


@dataclass
class SLS(Method):
    """Learns N of every `of` for each layer, or keeps the N of the pattern that `attach` is given.

    With a sparsity s the budget is a share 1 - s of the MACs of the covered layers. With a pattern
    `Keep(n, of)` nothing is learned: N = n. Covered are layers whose input channels divide into
    groups, without the first and the last of the model; the others stay dense.

    At the freeze the mask is that of the latest epoch. If the budget is not reached by then, the
    units of the lowest priorities are dropped, and a warning says so.

    Under a GradScaler the scores' gradients have its scale, which Adam's steps hardly depend on.
    Several ranks use their mean gradient; their crops must be of one size.

    Args:
        of: M, weights in a group, 2..256; a pattern has its own.
        epoch: steps between two orderings. None: 1000, or a hundredth of `freeze_at`.
        lr: Adam's learning rate for the scores. None: 1e-4, or 10 / `freeze_at`, at most 0.05.
        weight: of the cost, which is in MACs per image.
        growth: factor of c.
        threshold: c grows after two epochs if dense / cost at the end of the second is not this
            much above that at the end of the first.

    Raises:
        ValueError: no number, or one outside its range.
    """

    name: ClassVar[str] = "sls"
    ranks: ClassVar[bool] = False
    default_sparsity: ClassVar[float] = 1 - 2 / 32
    skips_undivided: ClassVar[bool] = True
    takes_units: ClassVar[bool] = False

    of: int = 32
    epoch: int | None = None
    lr: float | None = None
    weight: float = 1e-10
    growth: float = 1.2
    threshold: float = 0.2

    # None: N is that of the patterns.
    _budget: MacBudget | None = field(default=None, init=False, repr=False, compare=False)
    _masked: dict[str, MaskedWeight] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    # By layer, bool [of] on the CPU.
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    # None: nothing is learned.
    _scores: PriorityScores | None = field(default=None, init=False, repr=False, compare=False)
    _learns: bool = field(default=False, init=False, repr=False, compare=False)
    # By layer, ranks and outputs for masked weights that `start` is still to make.
    _loaded: dict[str, tuple[Tensor, list[Any]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self.of = whole_number("of", self.of, 2, 256)
        if self.epoch is not None:
            self.epoch = whole_number("epoch", self.epoch, 1)
        if self.lr is not None:
            check_number("lr", self.lr, 0)
        check_number("weight", self.weight, 0)
        check_number("growth", self.growth, 1)
        check_number("threshold", self.threshold, 0)

    @property
    def has_loss(self) -> bool:
        return self._budget is not None

    # Which layers.

    def prepare(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        targets = {x.target for x in layers if isinstance(x.target, Keep) or x.target != 0}
        ratios = [x for x in targets if not isinstance(x, Keep)]
        if len(targets) > 1 and ratios:
            raise ValueError(
                "sls takes one sparsity, the budget of all layers, or N:M patterns, not several "
                "sparsities or both: exclude single layers to leave them dense"
            )
        for target in targets:
            self._check_target(target)
        types = tuple({type(layer.module) for layer in layers})
        names = [name for name, m in named_modules(model).items() if isinstance(m, types)]
        for layer in layers:
            layer.dense = layer.dense or self._dense_reason(layer, names[0], names[-1])
        if all(layer.dense for layer in layers):
            raise ValueError(
                f"sls covers no layer: {layers[len(layers) // 2].name}, as all others, "
                f"{layers[len(layers) // 2].dense}; choose another `of`"
            )
        if ratios:
            self._budget = MacBudget(1 - ratios[0], self.weight, self.growth, self.threshold)

    def _check_target(self, target: float | Keep) -> None:
        if isinstance(target, Keep):
            if target.v * target.c != 1 or target.layout != "channels" or not 2 <= target.of <= 256:
                raise ValueError(
                    f"sls groups up to 256 input channels of one output: {target} has no meaning"
                )
        elif not leaves_a_unit(target, self.of):
            raise ValueError(
                f"sparsity is {target}: sls keeps at least 1 of {self.of}, so that it must be at "
                f"most {1 - 1 / self.of:.6g}"
            )

    def _dense_reason(self, layer: Layer, first: str, last: str) -> str:
        names = {layer.name, *layer.aliases}
        if first in names or last in names:
            return f"stays dense: it is the network's {'first' if first in names else 'last'} layer"
        if layer.target == 0:
            return "stays dense: its sparsity is 0"
        keep = Keep(1, of=self._of(layer))
        reason = undivided_reason(layer, keep)
        return f"stays dense: {reason}" if reason else ""

    def _of(self, layer: Layer) -> int:
        return layer.target.of if isinstance(layer.target, Keep) else self.of

    # The run.

    def start(self, setting: Setting) -> None:
        super().start(setting)
        at = setting.freeze_at
        self._epoch = self.epoch or (_EPOCH if at is None else max(1, at * _EPOCH // _STAGE))
        self._lr = _LR if at is None else min(_MOST_LR, _LR * _STAGE / at)
        self._lr = self._lr if self.lr is None else self.lr
        if not self._kept:
            self._begin(setting.buckets.prunable)
        modules = named_modules(setting.model)
        for layer in setting.buckets.prunable:
            if layer.name in setting.buckets.active:
                self._mask(layer, [modules[name] for name in (layer.name, *layer.aliases)])
        self._show(setting.buckets.unranked())

    def _begin(self, layers: Sequence[Layer]) -> None:
        """All units at first, or those of the patterns."""
        for layer in layers:
            n = layer.target.n if isinstance(layer.target, Keep) else self.of
            place = torch.arange(self._of(layer), dtype=torch.int64, device="cpu")
            self._kept[layer.name] = place < n
        if self._budget is not None:
            device = layers[0].weight.device
            self._scores = PriorityScores(list(self._kept), self.of, self._lr, device)
            self._learns = True

    def _mask(self, layer: Layer, modules: list[nn.Module]) -> None:
        """Lets the modules of a layer use its masked weight, with the ranks that it has."""
        masked = self._masked.get(layer.name)
        if masked is None:
            masked = self._masked[layer.name] = MaskedWeight(layer, modules, self._of(layer))
        elif masked.modules != modules:  # of a copy
            masked.detach()
            masked.modules = modules
        if layer.name in self._loaded:
            masked.ranks, masked.outputs = self._loaded.pop(layer.name)
        learned = self._scores if self._learns else None
        masked.priorities = learned.priorities[layer.name] if learned else None
        masked.keep(self._kept[layer.name])
        masked.attach()

    def _show(self, names: Collection[str]) -> None:
        """Gives the pruner the masks of some layers."""
        assert self.setting is not None
        for name in names:
            self._masked[name].keep(self._kept[name])
        self.setting.buckets.set_masks({name: self._masked[name].kept for name in names})

    def after_step(self, step: int) -> None:
        assert self.setting is not None
        if step == 1:
            self._name_unmasked()
        changed = self._learn()
        if step % self._epoch == 0 and step != self.setting.freeze_at:
            for masked in self._masked.values():
                masked.rank()
            changed = list(self._masked)
            if self._budget is not None and self._learns:
                self._budget.anneal(self._masked, self._kept)
        if changed:
            self._show(changed)

    def _name_unmasked(self) -> None:
        """Warns of layers whose weights something else than their own call uses."""
        names = [name for name, masked in self._masked.items() if not any(masked.outputs)]
        if names:
            warnings.warn(
                f"sls masks a layer when it is called, and the first step has not called "
                f"{', '.join(names)}: if something else uses the weights, exclude them",
                stacklevel=2,
            )

    def _learn(self) -> list[str]:
        """Moves the scores; returns the layers whose units have changed."""
        if self._budget is None or self._scores is None or not self._learns:
            return []
        self._scores.step()
        kept = self._scores.kept()
        changed = [name for name in self._masked if not torch.equal(kept[name], self._kept[name])]
        self._kept = kept
        if changed and self._budget.is_met(self._masked, self._kept):
            self._fix_scores()
        return changed

    def _fix_scores(self) -> None:
        self._learns = False
        for masked in self._masked.values():
            masked.priorities = None

    def loss(self) -> Tensor | None:
        called = any(any(masked.outputs) for masked in self._masked.values())
        if self._budget is None or self._scores is None or not self._learns or not called:
            return None
        return self._budget.loss(self._masked, self._kept, self._scores.numbers())

    def before_freeze(self) -> None:
        if self._budget is None or self._scores is None:
            return
        if self._budget.enforce(self._masked, self._kept, self._scores.priorities):
            self._fix_scores()
            self._show(list(self._masked))

    def after_freeze(self) -> None:
        self.detach()
        self._masked = {}

    def detach(self) -> None:
        for masked in self._masked.values():
            masked.detach()

    def notes(self) -> dict[str, str]:
        """By layer "keeps 2 of 32"."""
        return {
            name: f"keeps {int(kept.sum())} of {len(kept)}" for name, kept in self._kept.items()
        }

    # State.

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"kept": {name: x.clone() for name, x in self._kept.items()}}
        if self._masked:  # not any more once the masks are fixed
            state["ranks"] = {n: m.ranks.contiguous().clone() for n, m in self._masked.items()}
            state["outputs"] = {n: list(m.outputs) for n, m in self._masked.items()}
            if self._budget is not None and self._scores is not None:
                state["scores"], state["learns"] = self._scores.state_dict(), self._learns
                state["coefficient"] = self._budget.coefficient
                state["gains"] = list(self._budget.gains)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self._is_sound(state):
            raise ValueError("the state of sls in the pruner's state is damaged or of other layers")
        self._kept = {name: state["kept"][name].cpu().clone() for name in self._kept}
        if "ranks" not in state:
            self.after_freeze()
            return
        self._loaded = {
            n: (x.clone(), list(state["outputs"][n])) for n, x in state["ranks"].items()
        }
        if self._budget is not None and self._scores is not None:
            self._scores.load_state_dict(state["scores"])
            self._learns = state["learns"]
            self._budget.coefficient = state["coefficient"]
            self._budget.gains = list(state["gains"])

    def _is_sound(self, state: Mapping[str, Any]) -> bool:
        """Whether a state has the form of those of this run."""
        form: dict[str, Any] = {"kept": self._kept}
        if "ranks" in state:
            assert self.setting is not None
            prunable = self.setting.buckets.prunable
            ranks = {x.name: torch.empty_like(x.weight, dtype=torch.uint8) for x in prunable}
            outputs = state.get("outputs")
            if not isinstance(state["ranks"], Mapping) or not isinstance(outputs, Mapping):
                return False
            form["ranks"] = {name: x for name, x in ranks.items() if name in state["ranks"]}
            form["outputs"] = {name: [] for name in form["ranks"]}
            modules = {x.name: 1 + len(x.aliases) for x in prunable}
            if not all(_are_outputs(x, modules.get(name)) for name, x in outputs.items()):
                return False
            if self._scores is not None:
                form |= {"scores": self._scores.state_dict(), "learns": True}
                form |= {"coefficient": 1.0, "gains": []}
        return _is_alike(state, form)


def _are_outputs(found: object, modules: int | None) -> bool:
    """Whether these are the outputs of so many modules."""
    return (
        isinstance(found, list)
        and len(found) == modules
        and all(x is None or (len(x) == 2 and min(x) > 0) for x in found)
    )


def _is_alike(actual: object, expected: object) -> bool:
    """Whether nested values have the same keys, types, and shapes and dtypes of tensors."""
    if isinstance(expected, Mapping):
        return (
            isinstance(actual, Mapping)
            and actual.keys() == expected.keys()
            and all(_is_alike(actual[key], expected[key]) for key in expected)
        )
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        return (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    return type(actual) is type(expected)
