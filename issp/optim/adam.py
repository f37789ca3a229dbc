"""Adam and AdamW that prune within their step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from issp import ops
from issp.ops.arguments import AdamArgs, PruneArgs
from issp.optim.loading import StateForm
from issp.optim.plan import FusedStepPlan, UnsupportedByFusedOp
from issp.optim.step import FusedStep

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE_NAMES = ("step", *_MOMENTS)
# torch's refusal to be captured in a graph unless `capturable`; the second is its older name.
_CAPTURE_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")


class _AdamStep(FusedStep):
    _op = "adam_soft_shrink_"
    _form = StateForm(
        options=("lr", "betas", "eps", "weight_decay"),
        moments=(*_MOMENTS, "max_exp_avg_sq"),
        required=_STATE_NAMES,
    )

    def _check_graph_capture(self) -> None:
        for name in _CAPTURE_CHECKS:
            if hasattr(self, name):
                getattr(self, name)()
                break

    def _fallback_reason(self, group: dict[str, Any]) -> str:
        if group["amsgrad"]:
            return "amsgrad"
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "betas are tensors"
        if group["capturable"] and not group["fused"] and _any_on_cpu(group["params"]):
            return "capturable on a CPU"  # an error of torch's default step
        return super()._fallback_reason(group)

    def _states_are_current(self, group: dict[str, Any], plan: FusedStepPlan) -> bool:
        # The fastest form: every step runs this loop over every weight.
        try:
            for state, step, exp_avg, exp_avg_sq in plan.known_states:
                if (
                    state["step"] is not step
                    or state["exp_avg"] is not exp_avg
                    or state["exp_avg_sq"] is not exp_avg_sq
                ):
                    return False
        except KeyError:
            return False
        return True

    def _init_states(self, group: dict[str, Any], plan: FusedStepPlan) -> None:
        for p in plan.trained:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for name in _MOMENTS:
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        states = [self.state[p] for p in plan.weights]
        for t, (p, state) in enumerate(zip(plan.weights, states, strict=True)):
            # Others may keep entries of their own there, as wrapping optimizers do.
            if not state.keys() >= set(_STATE_NAMES):
                raise UnsupportedByFusedOp(f"the state holds only {', '.join(state)}")
            for name in _MOMENTS:
                plan.match_layout_(state, name, t)
            step = state["step"]
            if not isinstance(step, Tensor) or step.numel() != 1:
                raise UnsupportedByFusedOp("the state's step is no number in a tensor")
            # torch's default step counts on the CPU, and in torch's default dtype.
            state["step"] = step.to(p.device, torch.float32)
        plan.bind_states(states, _STATE_NAMES)

    def _launch(
        self, group: dict[str, Any], plan: FusedStepPlan, grads: list[Tensor], prune_args: PruneArgs
    ) -> None:
        step_args = self._step_args(group, plan)
        beta1, beta2 = group["betas"]
        args = AdamArgs(
            weights=plan.weight_views(),
            grads=grads,
            exp_avgs=plan.state_views("exp_avg"),
            exp_avg_sqs=plan.state_views("exp_avg_sq"),
            steps=plan.state_tensors["step"],
            lr=step_args.lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=step_args.weight_decay,
            decoupled=group["decoupled_weight_decay"],
            maximize=step_args.maximize,
            lr_tensor=step_args.lr_tensor,
            grad_scale=step_args.grad_scale,
        )
        ops.adam_soft_shrink_(*args, *prune_args)


def _any_on_cpu(params: list[Tensor]) -> bool:
    return any(p.device.type == "cpu" for p in params)


class Adam(_AdamStep, torch.optim.Adam):
    """torch.optim.Adam that prunes within its step: the same arguments, defaults and state."""

    _torch = torch.optim.Adam


class AdamW(_AdamStep, torch.optim.AdamW):
    """torch.optim.AdamW that prunes within its step: the same arguments, defaults and state."""

    _torch = torch.optim.AdamW
