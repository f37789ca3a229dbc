"""Scores that order the pruning units of each layer, and the optimizer that learns them.

Source: docs/method.md, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CLIP = 1.03


class PriorityScores:
    """A row of scores a for each layer, with p_j = prod over i <= j of clip(a_i, 0, 1.03).

    Unit 0 of a layer is always kept, unit j where p_j > 0.5.

    Args:
        names: of the layers.
        of: units of a layer.
        lr: of Adam.
        device: of the scores.

    Attributes:
        priorities: by layer, p as float32 leaves [of - 1]. Backward passes add to their gradients,
            and `step` moves the scores by them.
    """

    def __init__(self, names: Sequence[str], of: int, lr: float, device: torch.device) -> None:
        self._scores = torch.ones(len(names), of - 1, dtype=torch.float32, device=device)
        self._scores.requires_grad_()
        self._adam = torch.optim.Adam([self._scores], lr=lr)
        rows = self.products().detach().clone()
        self.priorities = {
            name: row.clone().requires_grad_() for name, row in zip(names, rows, strict=True)
        }

    def products(self) -> Tensor:
        """p of all layers as a function of the scores, [layers, of - 1]."""
        return self._scores.clamp(0, _CLIP).cumprod(1)

    def kept(self) -> dict[str, Tensor]:
        """By layer which units are kept, bool [of] on the CPU; waits for the device."""
        kept = (self.products().detach() > 0.5).cpu()
        kept = torch.nn.functional.pad(kept, (1, 0), value=True)
        return dict(zip(self.priorities, kept.unbind(), strict=True))

    def numbers(self) -> Tensor:
        """N of each layer, float32 [layers]: 1 + sum of b, whose gradient goes to p."""
        p = torch.stack(list(self.priorities.values()))
        kept = (p.detach() > 0.5).to(p.dtype)
        return 1 + (kept + (p - p.detach())).sum(1)

    def take_gradient(self) -> Tensor:
        """That of the scores by those of the priorities, which are gone then; mean of the ranks."""
        leaves = list(self.priorities.values())
        grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in leaves])
        for p in leaves:
            p.grad = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(grads)
            grads /= dist.get_world_size()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.products(), self._scores, grads)
        return gradient

    def step(self) -> None:
        """One step of Adam; gradients that are not finite are dropped."""
        self._scores.grad = self.take_gradient()
        if bool(self._scores.grad.isfinite().all()):
            self._adam.step()
            self._update()

    def _update(self) -> None:
        with torch.no_grad():
            rows = self.products().unbind()
            torch._foreach_copy_(list(self.priorities.values()), list(rows))

    def state_dict(self) -> dict[str, Any]:
        """Scores and moments [layers, of - 1], steps taken, and the layers' names."""
        state = self._adam.state.get(self._scores, {})
        zeros = torch.zeros_like(self._scores.detach())
        return {
            "names": list(self.priorities),
            "scores": self._scores.detach().clone(),
            "exp_avg": state.get("exp_avg", zeros).clone(),
            "exp_avg_sq": state.get("exp_avg_sq", zeros).clone(),
            "steps": int(state.get("step", 0)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; its form has been checked."""
        like = self._scores.detach()
        with torch.no_grad():
            self._scores.copy_(state["scores"])
        self._adam.state.clear()
        if state["steps"]:
            self._adam.state[self._scores] = {
                "step": torch.tensor(float(state["steps"]), dtype=torch.float32, device="cpu"),
                **{key: state[key].to(like, copy=True) for key in ("exp_avg", "exp_avg_sq")},
            }
        self._update()
