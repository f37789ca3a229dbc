"""The step that the optimizers here share: the fused op where it fits, torch's own elsewhere."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from issp.ops import backends
from issp.optim.plan import DEVICES, Plan, Unsuited, no_state, same
from issp.pruning.buckets import Turn


@dataclass(frozen=True)
class Way:
    """How a parameter group is stepped.

    Args:
        group: its number.
        fused: by the op of issp; otherwise by torch.
        pruned: weights that the op shrinks (or masks) in the same pass.
        others: further weights that it updates.
        why: why not all in one pass; "" when it is.
    """

    group: int
    fused: bool
    pruned: int = 0
    others: int = 0
    why: str = ""

    def __str__(self) -> str:
        if not self.fused:
            return f"group {self.group}: torch's own step: {self.why}"
        after = f" ({self.why})" if self.why else ""
        return f"group {self.group}: fused, {self.pruned} pruned and {self.others} other{after}"


class FusedStep:
    """Mixed into one of torch's optimizers: `step` does the pruner's work in the same pass.

    GradScaler's contract for fused optimizers holds (`grad_scale`, `found_inf`); unlike torch's
    kernels the op does not unscale the gradients in place.
    """

    _torch: type[Optimizer]  # whose step it is otherwise
    _op: str
    _needs = "no pruner is attached: issp.attach(model, optimizer)"

    def __init__(self, params, *args, **kwargs) -> None:
        if not isinstance(params, Tensor):
            params = list(params)
        super().__init__(params, *args, **kwargs)
        self._forget()

    def _forget(self) -> None:
        self._pruning: Callable[[Tensor | None], Turn] | None = None
        self._plans: dict[int, Plan | str] = {}
        self._dicts: list[dict] = []
        self._nothing: dict[torch.device, tuple] = {}
        self._support_scaling()

    def _support_scaling(self) -> None:
        # GradScaler leaves unscaling and overflow to the step only if all of it can do that.
        self._step_supports_amp_scaling = all(group["fused"] for group in self.param_groups)

    def __setstate__(self, state: dict) -> None:
        pruning = self.__dict__.get("_pruning")  # loading a state keeps it, unpickling has none
        super().__setstate__(state)
        for group in self.param_groups:
            self._choose_fused(group)
            if group["fused"]:
                self._move_counters(group)
        self._forget()
        self._pruning = pruning

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group that leaves `fused` open gets torch's fused kernels if they fit."""
        super().add_param_group(param_group)
        self._choose_fused(self.param_groups[-1])
        self._support_scaling()

    @staticmethod
    def _choose_fused(group: dict[str, Any]) -> None:
        if group["fused"] is not None or group["foreach"] or group["differentiable"]:
            return
        params = group["params"]
        suited = all(p.is_floating_point() and p.device.type in DEVICES for p in params)
        # On a CPU, capturable is an error of torch's, which its fused step would hide.
        on_cpu = any(p.device.type == "cpu" for p in params)
        if suited and not (group.get("capturable") and on_cpu):
            group["fused"] = True

    def _move_counters(self, group: dict[str, Any]) -> None:
        """A state saved by a step that was not fused has its counters on the CPU."""
        for p in group["params"]:
            step = self.state.get(p, {}).get("step")
            if isinstance(step, Tensor):
                self.state[p]["step"] = step.to(p.device, torch.float32)

    def follow_pruner(self, prepare: Callable[[Tensor | None], Turn]) -> bool:
        """Lets a pruner's work be done within the step; one pruner at a time.

        Args:
            prepare: called at the start of a step with AMP's overflow flag.

        Returns:
            False if another pruner has been here first: it works in its hook then.
        """
        if self._pruning is not None:
            return False
        self._pruning = prepare
        return True

    def leave_pruner(self) -> None:
        """Ends `follow_pruner`."""
        self._pruning = None

    @property
    def report(self) -> tuple[Way, ...]:
        """How the latest step went, one `Way` per parameter group; before it, what is known."""
        ways = []
        for number, group in enumerate(self.param_groups):
            why = self._needs if self._pruning is None else self._refusal(group)
            plan = why or self._plans.get(number, "no step yet")
            if isinstance(plan, str):
                ways.append(Way(number, False, why=plan))
                continue
            after = (
                ""
                if plan.whole or plan.pruned is None
                else ("a pruned weight has no gradient: shrunk after the update")
            )
            ways.append(Way(number, True, plan.count, len(plan.weights) - plan.count, after))
        return tuple(ways)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step, and the pruner's if one is attached.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._pruning is None or torch.compiler.is_compiling():
            self._torch_step(self.param_groups)
            return loss
        turn = self._pruning(getattr(self, "found_inf", None))
        if len(self._dicts) != len(self.state) or not same(self._dicts, self.state.values()):
            self._plans.clear()  # somebody has replaced a part of the state
        for number, group in enumerate(self.param_groups):
            with torch.no_grad():
                fused = self._fused(number, group, turn)
            if not fused:
                self._torch_step([group])
        self._dicts = list(self.state.values())
        return loss

    def _torch_step(self, groups: list[dict[str, Any]]) -> None:
        """torch's step, without the hooks that surround ours, on some of the groups."""
        step = self._torch.step
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        kept = self.param_groups
        self.param_groups = groups
        try:
            step(self)
        finally:
            self.param_groups = kept

    def _fused(self, number: int, group: dict[str, Any], turn: Turn) -> bool:
        """Steps one group by the op; False: torch must."""
        why = self._refusal(group)
        if why:
            self._plans[number] = why
            return False
        params = group["params"]
        grads = [p.grad for p in params]
        missing = list(map(operator.is_, grads, repeat(None)))
        pruned = turn.within(number)
        plan = self._plans.get(number)
        known = isinstance(plan, Plan) and plan.holds(params, missing, pruned)
        if known:
            try:
                self._run(group, plan, grads, turn)
                return True
            except (KeyError, RuntimeError, TypeError, ValueError):
                pass  # nothing has been modified: a tensor has changed, look at all of them anew
        try:
            plan = Plan(params, grads, pruned)
            self._check_kernel(plan)
            self._fill(group, plan)
        except Unsuited as why:
            self._plans[number] = str(why)
            return False
        self._plans[number] = plan
        self._run(group, plan, grads, turn)
        return True

    def _run(
        self, group: dict[str, Any], plan: Plan, grads: list[Tensor | None], turn: Turn
    ) -> None:
        if not plan.weights:
            return
        device = plan.weights[0].device
        patterns: list[int] = []
        if plan.whole:
            state = plan.pruned.state
            tensors = (state.k, state.thresholds, state.packed, state.flips, state.scratch)
            patterns = state.patterns
        else:
            if device not in self._nothing:
                self._nothing[device] = no_state(device)
            tensors = self._nothing[device]
        lr = group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device == device
        rate = (0.0, lr) if on_device else (float(lr), None)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            scale = scale.to(device, torch.float32, non_blocking=True)
        if found_inf is not None:
            found_inf = found_inf.to(device, torch.float32, non_blocking=True)
        k, *rest = tensors
        tail = (found_inf, turn.frozen, True, patterns)
        self._launch(
            group,
            plan,
            plan.grads(grads),
            rate,
            (group["maximize"], rate[1], scale, k, turn.factor, *rest, *tail),
        )
        torch.autograd.graph.increment_version(plan.weights)
        if plan.whole:
            turn.done.append(plan.pruned)

    def _refusal(self, group: dict[str, Any]) -> str:
        """Why the options of a group are not the op's; "" if they are."""
        if not group["fused"]:
            return f"fused is {group['fused']}"
        if group["differentiable"]:
            return "differentiable"
        if isinstance(group["weight_decay"], Tensor):
            return "weight_decay is a tensor"
        if isinstance(group["lr"], Tensor) and group["lr"].requires_grad:
            return "lr requires a gradient"
        return ""

    def _check_kernel(self, plan: Plan) -> None:
        device = plan.weights[0].device.type if plan.weights else "cpu"
        if self._op in backends.by_reference(device):
            raise Unsuited(f"the slow reference would serve {self._op} on {device}")

    def _fill(self, group: dict[str, Any], plan: Plan) -> None:
        raise NotImplementedError

    def _launch(self, group, plan, grads, rate, rest) -> None:
        raise NotImplementedError


def like(torchs: type[Optimizer]) -> Callable[[type], type]:
    """Gives a class the signature and documentation of torch's."""

    def decorate(cls: type) -> type:
        cls._torch = torchs
        cls.__signature__ = inspect.signature(torchs)
        cls.__doc__ = f"{cls.__doc__}\n\n{inspect.getdoc(torchs)}"
        return cls

    return decorate
