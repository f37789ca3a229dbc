"""Adam and AdamW that prune within their step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from issp import ops
from issp.optim.plan import Plan, Unsuited
from issp.optim.step import FusedStep, like

_MOMENTS = ("exp_avg", "exp_avg_sq")
# torch's refusal to be captured in a graph unless `capturable`; the second is its older name.
_HEALTH_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")


class _AdamStep(FusedStep):
    _op = "adam_soft_shrink_"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torch's; with a pruner attached, update and shrink in one pass."""
        for name in _HEALTH_CHECKS:
            if hasattr(self, name):
                getattr(self, name)()
                break
        return super().step(closure)

    def _refusal(self, group: dict[str, Any]) -> str:
        if group["amsgrad"]:
            return "amsgrad"
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "betas are tensors"
        return super()._refusal(group)

    def _fill(self, group: dict[str, Any], plan: Plan) -> None:
        for p in plan.trained:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for key in _MOMENTS:
                    state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        plan.states = [self.state[p] for p in plan.weights]
        for t, (p, state) in enumerate(zip(plan.weights, plan.states, strict=True)):
            if state.keys() != {"step", *_MOMENTS}:
                raise Unsuited(f"the state holds {', '.join(state)}")
            for key in _MOMENTS:
                plan.settle(state, key, t)
            step = state["step"]
            if not isinstance(step, Tensor) or (step.dtype, step.numel(), step.device) != (
                torch.float32,
                1,
                p.device,
            ):
                raise Unsuited("the state's step is no float32 number on the weight's device")

    def _launch(self, group, plan, grads, rate, rest) -> None:
        beta1, beta2 = group["betas"]
        ops.adam_soft_shrink_(
            plan.folded(),
            grads,
            *(plan.views([state[key] for state in plan.states]) for key in _MOMENTS),
            [state["step"] for state in plan.states],
            rate[0],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
            *rest,
        )


@like(torch.optim.Adam)
class Adam(_AdamStep, torch.optim.Adam):
    """torch.optim.Adam that prunes within its step."""


@like(torch.optim.AdamW)
class AdamW(_AdamStep, torch.optim.AdamW):
    """torch.optim.AdamW that prunes within its step."""
