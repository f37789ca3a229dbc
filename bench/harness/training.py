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
from bench.harness.progress import counted
from issp import ops

_GRADIENT_SCALE = 1e-3  # about that of the gradient of a mean absolute error
_SEGMENT = 1 << 22
_SLACK = 1 << 16


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer that both torch and issp have.

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
        fused = torch.ops.issp
        return fused.adam_soft_shrink_ if self.adaptive else fused.sgd_soft_shrink_

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


_ADAM = {"lr": 2e-4, "betas": (0.9, 0.99)}
_MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZERS = {
    "adam": OptimizerSpec("Adam", _ADAM, _MOMENTS),
    "adamw": OptimizerSpec("AdamW", {**_ADAM, "weight_decay": 1e-2}, _MOMENTS),
    "sgd": OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9}, ("momentum_buffer",)),
}


@dataclass
class FusedUpdate:
    """The tensors of one call of the fused op; the first weights are pruned.

    Attributes:
        spec: of the optimizer.
        weights: float32.
        moments: one list of tensors per kind of moment.
        steps: 0-dimensional counts of Adam, one per weight; None for SGD.
        state: of the pruned weights.
        shrink: alpha.
    """

    spec: OptimizerSpec
    weights: list[Tensor]
    moments: list[list[Tensor]]
    steps: list[Tensor] | None
    state: ops.ShrinkState
    shrink: float

    @classmethod
    def create(
        cls,
        spec: OptimizerSpec,
        weights: Sequence[Tensor],
        pruned: int,
        sparsity: float,
        shrink: float,
        device: str,
    ) -> FusedUpdate:
        """The state before the first step, on copies of the weights.

        Args:
            spec, shrink: see the class.
            weights: are copied to `device`.
            pruned: how many of them, from the first on, are pruned.
            sparsity: of each of these.
        """
        copies = [w.to(device, copy=True) for w in weights]
        k = [ops.num_pruned(w.numel(), sparsity) for w in copies[:pruned]]
        moments = [[torch.zeros_like(w) for w in copies] for _ in spec.moments]
        steps = [torch.zeros((), device=device) for _ in copies]
        return cls(spec, copies, moments, steps, ops.ShrinkState(copies[:pruned], k), shrink)

    def args(self, grads: Sequence[Tensor], frozen: bool, bracket: bool) -> list[Any]:
        """The op's arguments, in the order of its schema."""
        o, state = self.spec.options, self.state
        decay = o.get("weight_decay", 0.0)
        if self.spec.adaptive:
            decoupled = self.spec.name == "AdamW"
            scalars = [o["lr"], *o["betas"], o.get("eps", 1e-8), decay, decoupled, False]
            update = [self.weights, grads, *self.moments, self.steps, *scalars, None, None]
        else:
            begun, damping = [False] * len(self.weights), o.get("dampening", 0.0)
            scalars = [o["lr"], o["momentum"], damping, decay, o.get("nesterov", False)]
            update = [self.weights, grads, *self.moments, begun, *scalars, False, None, None]
        buffers = [state.thresholds, state.packed, state.flips, state.scratch]
        return [*update, state.k, self.shrink, *buffers, None, frozen, bracket]

    def step(
        self, op: Callable[..., None], grads: Sequence[Tensor], frozen: bool, bracket: bool = True
    ) -> None:
        """One update, and pruning or masking; the gradients are copied to the weights' device."""
        there = [g.to(w.device, copy=True) for g, w in zip(grads, self.weights, strict=True)]
        op(*self.args(there, frozen, bracket))

    def results(self) -> dict[str, Tensor]:
        """All that a step writes, by name."""
        named = {"weights": self.weights, **dict(zip(self.spec.moments, self.moments, strict=True))}
        if self.spec.adaptive:
            named["steps"] = self.steps
        written = {f"{key}[{i}]": x for key, xs in named.items() for i, x in enumerate(xs)}
        state = self.state
        buffers = {"thresholds": state.thresholds, "packed": state.packed, "flips": state.flips}
        return {**written, **buffers}


class Gradients:
    """One set of gradients for all copies of a network, renewed before every step.

    Args:
        parameters: whose shapes the gradients have.
        seed: of the noise.
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int = 0) -> None:
        self.tensors = [torch.zeros_like(p) for p in parameters]
        self._segments = [x for g in self.tensors for x in g.view(-1).split(_SEGMENT)]
        device = self.tensors[0].device
        size = max(x.numel() for x in self._segments) + _SLACK
        random = torch.Generator(device).manual_seed(seed)
        self._pool = torch.randn(size, device=device, generator=random).mul_(_GRADIENT_SCALE)
        self._offsets = torch.Generator().manual_seed(seed)

    def renew(self) -> None:
        """Other noise, in the same memory: a captured graph reads it too."""
        starts = torch.randint(_SLACK, (len(self._segments),), generator=self._offsets).tolist()
        noise = [
            self._pool[start : start + x.numel()]
            for x, start in zip(self._segments, starts, strict=True)
        ]
        torch._foreach_copy_(self._segments, noise)


@dataclass
class TrainingReplica:
    """A copy of a network with its own optimizer and, if pruned, its own pruner.

    Args:
        model: the copy.
        spec, kind: see `OptimizerSpec.build`.
        pruned: a pruner is attached.
        sparsity, shrink: of the pruning.
    """

    model: nn.Module
    spec: OptimizerSpec
    kind: str
    pruned: bool
    sparsity: float
    shrink: float
    optimizer: torch.optim.Optimizer = field(init=False)
    pruner: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        parameters = self.parameters()
        self.optimizer = self.spec.build(parameters, self.kind, parameters[0].device.type)
        if self.pruned:
            self.pruner = issp.attach(self.model, self.optimizer, self.sparsity, self.shrink)

    @classmethod
    def copy_of(cls, model: nn.Module, *args: Any, **kwargs: Any) -> TrainingReplica:
        """A replica of a copy of a model; the other arguments are the class's."""
        return cls(copy.deepcopy(model), *args, **kwargs)

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

    def set_gradients(self, gradients: Gradients) -> None:
        """Sets the gradients, once: they change in place."""
        for p, g in zip(self.parameters(), gradients.tensors, strict=True):
            p.grad = g

    @torch.no_grad()
    def copy_state_from(self, other: TrainingReplica) -> None:
        """Copies the weights, moments and, if both are pruned, masks of another replica."""
        torch._foreach_copy_(self.parameters(), other.parameters())
        groups = self.optimizer.state_dict()["param_groups"]
        state = copy.deepcopy(other.optimizer.state_dict()["state"])  # torch would share it
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.pruned and other.pruned:
            self.pruner.load_state_dict(other.pruner.state_dict())

    def fused_call(self, bracket: bool) -> Callable[[], object]:
        """A call of the fused op on this replica's tensors, without optimizer and pruner."""
        chosen = self.prunable()
        ids = {id(p) for p in chosen}
        order = [*chosen, *(p for p in self.parameters() if id(p) not in ids)]
        k = [ops.num_pruned(w.numel(), self.sparsity) for w in chosen]
        weights = [p.detach() for p in order]
        update = FusedUpdate(
            self.spec,
            weights,
            moments=[self.moments(order, key) for key in self.spec.moments],
            steps=self.moments(order, "step") if self.spec.adaptive else None,
            state=ops.ShrinkState(weights[: len(chosen)], k),
            shrink=self.shrink,
        )
        call = functools.partial(
            self.spec.op, *update.args([p.grad for p in order], frozen=False, bracket=bracket)
        )
        call()  # leaves thresholds behind for the bracket
        return call

    def step_then_mask(self, masks: Sequence[Tensor]) -> Callable[[], object]:
        """The optimizer's step, then separate multiplications of weights and moments by masks."""
        chosen = self.prunable()
        weights = [p.detach() for p in chosen]
        moments = [self.moments(chosen, key) for key in self.spec.moments]

        def call() -> None:
            self.optimizer.step()
            for tensors in (weights, *moments):
                torch._foreach_mul_(tensors, masks)

        return call


def steady_replica(
    model: nn.Module, spec: OptimizerSpec, sparsity: float, shrink: float, steps: int
) -> tuple[TrainingReplica, Gradients]:
    """A replica in the steady state of ISS-P, by torch's fused optimizer and the step after it."""
    replica = TrainingReplica.copy_of(model, spec, "fused", True, sparsity, shrink)
    gradients = Gradients(replica.parameters())
    replica.set_gradients(gradients)
    for _ in counted(range(steps), "warm-up step"):
        gradients.renew()
        replica.optimizer.step()
    return replica, gradients
