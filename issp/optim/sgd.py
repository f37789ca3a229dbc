"""SGD that prunes within its step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from issp import ops
from issp.optim.plan import Plan
from issp.optim.step import FusedStep, like


@like(torch.optim.SGD)
class SGD(FusedStep, torch.optim.SGD):
    """torch.optim.SGD that prunes within its step."""

    _op = "sgd_soft_shrink_"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torch's; with a pruner attached, update and shrink in one pass."""
        return super().step(closure)

    def _fill(self, group: dict[str, Any], plan: Plan) -> None:
        if not group["momentum"]:
            return
        for p in plan.trained:
            self.state[p]  # an entry each, in torch's order
        plan.states = [self.state[p] for p in plan.weights]
        for t, state in enumerate(plan.states):
            if state.get("momentum_buffer") is not None:
                plan.settle(state, "momentum_buffer", t)

    def _launch(self, group, plan, grads, rate, rest) -> None:
        momentum = group["momentum"]
        buffers: list[Tensor | None] = []
        first: list[bool] = []
        if momentum:
            if not plan.states:  # momentum was 0 when the plan was made
                self._fill(group, plan)
            buffers = [state.get("momentum_buffer") for state in plan.states]
            first = [buffer is None for buffer in buffers]
        new = any(first)
        if new:
            buffers = [
                torch.empty_like(w) if b is None else b
                for b, w in zip(buffers, plan.weights, strict=True)
            ]
        ops.sgd_soft_shrink_(
            plan.folded(),
            grads,
            plan.views(buffers),
            first,
            rate[0],
            momentum,
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            *rest,
        )
        found_inf = rest[-4]
        # A buffer counts as filled once a step was not skipped; only a first step waits to know.
        if new and (found_inf is None or found_inf.item() == 0):
            for state, buffer in zip(plan.states, buffers, strict=True):
                state["momentum_buffer"] = buffer
