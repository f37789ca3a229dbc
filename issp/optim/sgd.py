"""SGD that prunes within its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from issp import ops
from issp.ops.arguments import PruneArgs, SGDArgs
from issp.optim.loading import StateForm
from issp.optim.plan import FusedStepPlan
from issp.optim.step import FusedStep

_BUFFER = "momentum_buffer"


class SGD(FusedStep, torch.optim.SGD):
    """torch.optim.SGD that prunes within its step: the same arguments, defaults and state."""

    _torch = torch.optim.SGD
    _op = "sgd_soft_shrink_"
    _form = StateForm(
        options=("lr", "momentum", "dampening", "weight_decay"),
        moments=(_BUFFER,),
        required=(),
        sparse=True,
    )

    def _states_are_current(self, group: dict[str, Any], plan: FusedStepPlan) -> bool:
        if bool(group["momentum"]) != (_BUFFER in plan.state_tensors):
            return False
        try:
            return all([state[_BUFFER] is buffer for state, buffer in plan.known_states])
        except KeyError:  # no buffer yet, or not any more
            return False

    def _init_states(self, group: dict[str, Any], plan: FusedStepPlan) -> None:
        if not group["momentum"]:
            return
        for p in plan.trained:
            self.state[p]  # an entry each, in torch's order
        states = [self.state[p] for p in plan.weights]
        for t, state in enumerate(states):
            if state.get(_BUFFER) is not None:
                plan.match_layout_(state, _BUFFER, t)
        plan.bind_states(states, (_BUFFER,))

    def _launch(
        self, group: dict[str, Any], plan: FusedStepPlan, grads: list[Tensor], prune_args: PruneArgs
    ) -> None:
        buffers: list[Any] = plan.state_tensors.get(_BUFFER, [])
        is_empty = [False] * len(buffers)
        views = plan.state_views(_BUFFER) if buffers and not plan.has_empty_states else buffers
        if plan.has_empty_states:
            is_empty = [buffer is None for buffer in buffers]
            buffers = [
                torch.empty_like(weight) if buffer is None else buffer
                for buffer, weight in zip(buffers, plan.weights, strict=True)
            ]
            views = plan.contiguous_views(buffers)
        step_args = self._step_args(group, plan)
        args = SGDArgs(
            weights=plan.weight_views(),
            grads=grads,
            momentum_buffers=views,
            first=is_empty,
            lr=step_args.lr,
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=step_args.weight_decay,
            nesterov=group["nesterov"] and bool(group["momentum"]),
            maximize=step_args.maximize,
            lr_tensor=step_args.lr_tensor,
            grad_scale=step_args.grad_scale,
        )
        ops.sgd_soft_shrink_(*args, *prune_args)
        found_inf = prune_args.found_inf
        # A buffer counts as filled once a step was not skipped. Only a first step waits for that.
        if plan.has_empty_states and (found_inf is None or found_inf.item() == 0):
            for state, buffer in zip(plan.states, buffers, strict=True):
                state[_BUFFER] = buffer
            plan.bind_states(plan.states, (_BUFFER,))
