"""Networks with an optimizer each, in the steady state of ISS-P, without forward and backward."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import issp
from issp import ops

_GRADIENT = 1e-3  # scale of the noise: of a gradient of a mean absolute error, roughly
_PIECE = 1 << 22
_SLACK = 1 << 16


@dataclass(frozen=True)
class Family:
    """An optimizer as torch and issp both have it.

    Attributes:
        name: of the class.
        options: of its constructor; the learning rates move a weight by about 2e-4 a step.
        moments: keys of its state that have a weight's shape.
    """

    name: str
    options: dict[str, Any]
    moments: tuple[str, ...]

    @property
    def adaptive(self) -> bool:
        """Adam's kind: with a second moment, a step count, and an option for CUDA graphs."""
        return len(self.moments) == 2

    @property
    def op(self) -> Callable[..., None]:
        """The fused op."""
        found = torch.ops.issp
        return found.adam_soft_shrink_ if self.adaptive else found.sgd_soft_shrink_

    def build(self, parameters, kind: str, device: str) -> torch.optim.Optimizer:
        """The optimizer; kind: "fused" or "foreach" for torch's, "issp" for ours."""
        options = dict(self.options)
        if device == "cuda" and self.adaptive:
            options["capturable"] = True
        if kind == "issp":
            return getattr(importlib.import_module("issp.optim"), self.name)(parameters, **options)
        return getattr(torch.optim, self.name)(parameters, **{kind: True}, **options)

    def traffic(self, numel: int, pruned: int = 0) -> float:
        """Bytes of one update that any implementation moves: w and moments both ways, the gradient.

        Args:
            numel: parameters, float32.
            pruned: how many of them have a bit of mask that is read.
        """
        return 4.0 * (3 + 2 * len(self.moments)) * numel + pruned / 8

    def head(self, weights, grads, moments: Sequence[list[Tensor]], steps) -> list:
        """The op's arguments up to those of the pruning."""
        o = self.options
        decay = o.get("weight_decay", 0.0)
        if self.adaptive:
            scalars = [o["lr"], *o["betas"], o.get("eps", 1e-8), decay, self.name == "AdamW", False]
            return [weights, grads, *moments, steps, *scalars, None, None]
        begun = [False] * len(weights)
        scalars = [o["lr"], o["momentum"], o.get("dampening", 0.0), decay, o.get("nesterov", False)]
        return [weights, grads, *moments, begun, *scalars, False, None, None]


_ADAM = {"lr": 2e-4, "betas": (0.9, 0.99)}
_MOMENTS = ("exp_avg", "exp_avg_sq")
FAMILIES = {
    "adam": Family("Adam", _ADAM, _MOMENTS),
    "adamw": Family("AdamW", {**_ADAM, "weight_decay": 1e-2}, _MOMENTS),
    "sgd": Family("SGD", {"lr": 0.1, "momentum": 0.9}, ("momentum_buffer",)),
}


def tail(state: ops.ShrinkState, shrink: float, frozen: bool, bracket: bool) -> list:
    """The op's arguments from k on."""
    buffers = [state.thresholds, state.packed, state.flips, state.scratch]
    return [state.k, shrink, *buffers, None, frozen, bracket]


class Gradients:
    """One set of gradients for all copies of a network, renewed before every step.

    Args:
        parameters: whose shapes the gradients have.
        seed: of the noise.
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int = 0) -> None:
        self.tensors = [torch.zeros_like(p) for p in parameters]
        self._pieces = [x for g in self.tensors for x in g.view(-1).split(_PIECE)]
        device = self.tensors[0].device
        size = max(x.numel() for x in self._pieces) + _SLACK
        random = torch.Generator(device).manual_seed(seed)
        self._pool = torch.randn(size, device=device, generator=random).mul_(_GRADIENT)
        self._places = torch.Generator().manual_seed(seed)

    def renew(self) -> None:
        """Other noise, in the same memory: a captured graph reads it too."""
        starts = torch.randint(_SLACK, (len(self._pieces),), generator=self._places).tolist()
        noise = [
            self._pool[start : start + x.numel()]
            for x, start in zip(self._pieces, starts, strict=True)
        ]
        torch._foreach_copy_(self._pieces, noise)


@dataclass
class Trainee:
    """A copy of a network with its own optimizer and, if pruned, its own pruner.

    Args:
        model: the copy.
        family, kind: see `Family.build`.
        pruned: a pruner is attached.
        sparsity, shrink: of the pruning.
    """

    model: nn.Module
    family: Family
    kind: str
    pruned: bool
    sparsity: float
    shrink: float
    optimizer: torch.optim.Optimizer = field(init=False)
    pruner: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        parameters = self.parameters()
        self.optimizer = self.family.build(parameters, self.kind, parameters[0].device.type)
        if self.pruned:
            self.pruner = issp.attach(self.model, self.optimizer, self.sparsity, self.shrink)

    @classmethod
    def of(cls, model: nn.Module, *args) -> Trainee:
        """A trainee of a copy of a model; the other arguments are the class's."""
        return cls(copy.deepcopy(model), *args)

    def parameters(self) -> list[nn.Parameter]:
        """In the model's order."""
        return list(self.model.parameters())

    def prunable(self) -> list[nn.Parameter]:
        """Weights that `attach` prunes by default."""
        kinds = (nn.Conv2d, nn.Linear)
        return [m.weight for m in self.model.modules() if isinstance(m, kinds)]

    def moments(self, parameters: Sequence[Tensor], key: str) -> list[Tensor]:
        """One tensor of the optimizer's state per parameter."""
        return [self.optimizer.state[p][key] for p in parameters]

    def use(self, gradients: Gradients) -> None:
        """Hands it the gradients, once: they change in place."""
        for p, g in zip(self.parameters(), gradients.tensors, strict=True):
            p.grad = g

    @torch.no_grad()
    def take(self, other: Trainee) -> None:
        """Goes on from another trainee's weights, moments and, if both are pruned, masks."""
        torch._foreach_copy_(self.parameters(), other.parameters())
        groups = self.optimizer.state_dict()["param_groups"]
        state = copy.deepcopy(other.optimizer.state_dict()["state"])  # torch would share it
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.pruned and other.pruned:
            self.pruner.load_state_dict(other.pruner.state_dict())

    def op(self, bracket: bool) -> Callable[[], object]:
        """A call of the fused op on this trainee's tensors, without optimizer and pruner."""
        chosen = self.prunable()
        ids = {id(p) for p in chosen}
        order = [*chosen, *(p for p in self.parameters() if id(p) not in ids)]
        k = [ops.num_pruned(w.numel(), self.sparsity) for w in chosen]
        weights = [p.detach() for p in order]
        state = ops.ShrinkState(weights[: len(chosen)], k)
        moments = [self.moments(order, key) for key in self.family.moments]
        steps = self.moments(order, "step") if self.family.adaptive else None
        head = self.family.head(weights, [p.grad for p in order], moments, steps)
        call = functools.partial(self.family.op, *head, *tail(state, self.shrink, False, bracket))
        call()  # leaves thresholds behind for the bracket
        return call

    def masked_apart(self, masks: Sequence[Tensor]) -> Callable[[], object]:
        """The optimizer's step, then separate multiplications of weights and moments by masks."""
        chosen = self.prunable()
        weights = [p.detach() for p in chosen]
        moments = [self.moments(chosen, key) for key in self.family.moments]

        def call() -> None:
            self.optimizer.step()
            for tensors in (weights, *moments):
                torch._foreach_mul_(tensors, masks)

        return call


def settled(
    model: nn.Module, family: Family, sparsity: float, shrink: float, steps: int
) -> tuple[Trainee, Gradients]:
    """A trainee in the steady state of ISS-P, by torch's fused optimizer and the step after it."""
    trainee = Trainee.of(model, family, "fused", True, sparsity, shrink)
    gradients = Gradients(trainee.parameters())
    trainee.use(gradients)
    for _ in range(steps):
        gradients.renew()
        trainee.optimizer.step()
    return trainee, gradients
