"""The step that the optimizers here share: the fused op where it fits, torch's own elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from issp.ops import backends
from issp.ops.arguments import PruneArgs
from issp.ops.validation.pruning import DTYPES
from issp.optim.arguments import StepArgs
from issp.optim.loading import StateForm, check_state
from issp.optim.plan import FusedStepPlan, UnsupportedByFusedOp
from issp.pruning.buckets import WeightBucket
from issp.pruning.memory_order import same_objects
from issp.pruning.prune_step import BeginStep, PruneStep
from issp.pruning.untraced import untraced

T = TypeVar("T")

_NO_PRUNER = "no pruner is attached: issp.attach(model, optimizer)"
# What GradScaler sets as attributes of an optimizer whose step unscales gradients.
_SCALING = ("grad_scale", "found_inf")
# Numbers that torch also takes as tensors, and the op does not.
_NUMBERS = ("weight_decay", "momentum", "dampening", "eps")
_SHRUNK_AFTERWARDS = "a pruned weight has no gradient: shrunk after the update"


@dataclass(frozen=True)
class GroupStepInfo:
    """How a parameter group is stepped.

    Args:
        group: its number.
        fused: by the op of issp; otherwise by torch.
        pruned: weights that the op shrinks (or masks) in the same pass.
        others: further weights that it updates.
        fallback_reason: why not all is done in one pass; "" when it is.
    """

    group: int
    fused: bool
    pruned: int = 0
    others: int = 0
    fallback_reason: str = ""

    def __str__(self) -> str:
        reason = self.fallback_reason
        if not self.fused:
            return f"group {self.group}: torch's own step: {reason}"
        after = f" ({reason})" if reason else ""
        return f"group {self.group}: fused, {self.pruned} pruned and {self.others} other{after}"


class FusedStep(Optimizer):
    """Mixed into one of torch's optimizers: `step` does the pruner's work in the same pass.

    The constructor is torch's. The step follows GradScaler's protocol for fused optimizers
    (`grad_scale`, `found_inf`); unlike torch's kernels the op does not unscale gradients in place.
    """

    _torch: ClassVar[type[Optimizer]]
    """The optimizer of torch whose step is done where the op does not fit."""
    _op: ClassVar[str]
    """Name of the op."""
    _form: ClassVar[StateForm]
    """What a saved state must have."""

    _begin_step: BeginStep | None = None
    _remaining: tuple[WeightBucket, ...] | None = None
    _prune_step: PruneStep | None = None  # of the running or the latest step
    _is_exact = False  # whether the pruner has compared all memory for it

    # Set by torch's constructor through `add_param_group`.
    _plans: dict[int, FusedStepPlan]
    _fallback_reasons: dict[int, str]
    _state_dicts: list[dict[str, Any]]
    _step_and_prune: Callable[[], None]  # set by `attach_pruner`

    def _forget_plans(self) -> None:
        self._plans, self._fallback_reasons, self._state_dicts = {}, {}, []

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's SGD takes the absence of `fused` in an old state for False.
        for group in state["param_groups"]:
            group.setdefault("fused", None)
        super().__setstate__(state)
        self._forget_plans()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, with a check of everything before anything is changed.

        Raises:
            ValueError: the state belongs to another optimizer or model, or is damaged.
        """

        def check(_: Optimizer, saved: object) -> None:
            check_state(saved, self.param_groups, self._form)

        if not isinstance(state_dict, dict):
            check(self, state_dict)
        # The last one: hooks of users may translate the state.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self._forget_plans()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler leaves unscaling and overflow to the step only if the op does all of it.
        return self._begin_step is not None and not any(
            map(self._fallback_reason, self.param_groups)
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructor sets it; the pruner and the parameter groups decide."""

    def attach_pruner(self, begin_step: BeginStep) -> bool:
        """See `issp.pruning.prune_step.PruningOptimizer`."""
        if self._begin_step is not None:
            return False
        self._begin_step, self._remaining = begin_step, None
        self._step_and_prune = untraced(self._fused_step)
        return True

    def detach_pruner(self) -> None:
        """Ends `attach_pruner`."""
        self._begin_step = self._prune_step = None

    def take_remaining(self) -> tuple[WeightBucket, ...] | None:
        """See `issp.pruning.prune_step.PruningOptimizer`."""
        remaining, self._remaining = self._remaining, None
        return remaining

    def grad_scale_of(self, param_group: int | None) -> Tensor | None:
        """See `issp.pruning.prune_step.PruningOptimizer`."""
        # Torch's own step has unscaled the gradients of the groups without a plan.
        return getattr(self, "grad_scale", None) if param_group in self._plans else None

    @property
    def report(self) -> tuple[GroupStepInfo, ...]:
        """How the latest step went, per parameter group; before it, what is known already."""
        return tuple(self._info(number, group) for number, group in enumerate(self.param_groups))

    def _info(self, number: int, group: dict[str, Any]) -> GroupStepInfo:
        if self._begin_step is None:
            reason = _NO_PRUNER
        else:
            reason = self._fallback_reason(group) or self._fallback_reasons.get(number, "")
        plan = self._plans.get(number)
        if reason or plan is None:
            return GroupStepInfo(number, fused=False, fallback_reason=reason or "no step yet")
        others = len(plan.weights) - plan.num_pruned
        reason = self._prune_step.deferred if self._prune_step else ""
        if plan.bucket is not None and not plan.prunes_all:
            reason = _SHRUNK_AFTERWARDS
        return GroupStepInfo(number, True, plan.num_pruned, others, fallback_reason=reason)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], T]) -> T: ...

    def step(self, closure: Callable[[], T] | None = None) -> T | None:
        """One optimization step, and the pruner's if one is attached.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returns.
        """
        self._check_graph_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._remaining = None
        if self._begin_step is None:
            self._torch_step(self.param_groups)
        else:
            self._step_and_prune()
        return loss

    def _fused_step(self) -> None:
        """The step of an optimizer that a pruner is attached to."""
        self._begin(exact=len(self._plans) < len(self.param_groups))
        self._remaining = self._update()

    def _begin(self, exact: bool) -> None:
        """Asks the pruner what is to be done; see `BeginStep`. New plans need an exact answer."""
        assert self._begin_step is not None
        self._prune_step = self._begin_step(getattr(self, "found_inf", None), exact)
        self._is_exact = exact

    def _check_graph_capture(self) -> None:
        """Torch's refusal to be captured in a graph; SGD has none."""

    def _torch_step(self, groups: list[dict[str, Any]]) -> None:
        """torch's step, without the hooks that surround ours, on some of the groups.

        What GradScaler has left to the step is done before it: torch's default step cannot do it.
        """
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item() != 0:
            return
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            _unscale_(groups, scale)
        step: Any = self._torch.step
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        scaling = {x: self.__dict__.pop(x) for x in _SCALING if x in self.__dict__}
        all_groups = self.param_groups
        self.param_groups = groups
        try:
            step(self)
        finally:
            self.param_groups = all_groups
            self.__dict__.update(scaling)

    def _update(self) -> tuple[WeightBucket, ...]:
        """Steps every parameter group; returns the buckets that are still to be shrunk."""
        dicts = self._state_dicts
        if len(dicts) != len(self.state) or not same_objects(dicts, self.state.values()):
            self._forget_plans()  # somebody has replaced a part of the state
        completed = []
        for number, group in enumerate(self.param_groups):
            with torch.no_grad():
                plan = self._update_fused(number, group)
            if plan is None:
                self._torch_step([group])
            elif plan.bucket is not None and plan.prunes_all:
                completed.append(plan.bucket)
        if len(self._state_dicts) != len(self.state):
            self._state_dicts = list(self.state.values())
        assert self._prune_step is not None
        return self._prune_step.remaining(completed)

    def _update_fused(self, number: int, group: dict[str, Any]) -> FusedStepPlan | None:
        """Steps one group by the op; returns its plan, or None if torch must step the group."""
        reason = self._fallback_reason(group)
        if not reason:
            try:
                return self._run_plan(number, group)
            except UnsupportedByFusedOp as error:
                reason = str(error)
        self._plans.pop(number, None)
        self._fallback_reasons[number] = reason
        return None

    def _run_plan(self, number: int, group: dict[str, Any]) -> FusedStepPlan:
        """Steps one group by its plan, which is made anew if something has changed."""
        assert self._prune_step is not None
        bucket, plan = self._prune_step.bucket_of(number), self._plans.get(number)
        if plan is not None:
            grads = plan.grads()
            is_current = plan.is_current(group["params"], grads, bucket)
            if is_current and self._states_are_current(group, plan):
                try:
                    self._run(group, plan, grads, self._prune_step)
                    return plan
                except (TypeError, ValueError):
                    pass  # refused before anything was modified: what the op checks has changed
        if not self._is_exact:
            self._begin(exact=True)
        plan = self._new_plan(number, group, self._prune_step.bucket_of(number))
        grads = plan.grads()
        try:
            self._run(group, plan, grads, self._prune_step)
        except ValueError:
            plan.check_grads_apart(grads)  # looked for only where the op has refused something
            raise
        return plan

    def _new_plan(
        self, number: int, group: dict[str, Any], bucket: WeightBucket | None
    ) -> FusedStepPlan:
        plan = FusedStepPlan(group["params"], bucket)
        device = plan.weights[0].device.type if plan.weights else "cpu"
        if self._op in backends.by_reference(device):
            raise UnsupportedByFusedOp(f"the slow reference would serve {self._op} on {device}")
        self._init_states(group, plan)
        self._plans[number] = plan
        self._fallback_reasons.pop(number, None)
        return plan

    def _run(
        self, group: dict[str, Any], plan: FusedStepPlan, grads: list[Tensor], prune_step: PruneStep
    ) -> None:
        if not plan.weights:
            return
        grads = plan.grad_views(grads)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            found_inf = found_inf.to(plan.weights[0].device, torch.float32, non_blocking=True)
        prune_args = PruneArgs(
            **plan.prune_state,
            shrink=prune_step.factor,
            found_inf=found_inf,
            frozen=prune_step.frozen,
            bracket=True,
        )
        self._launch(group, plan, grads, prune_args)
        torch.autograd.graph.increment_version(plan.weights)

    def _step_args(self, group: dict[str, Any], plan: FusedStepPlan) -> StepArgs:
        device, lr = plan.weights[0].device, group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device == device and lr.dtype in DTYPES
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            scale = scale.to(device, torch.float32, non_blocking=True)
        return StepArgs(
            lr=0.0 if on_device else float(lr),
            lr_tensor=lr if on_device else None,
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            grad_scale=scale,
        )

    def _fallback_reason(self, group: dict[str, Any]) -> str:
        """Why the op does not take the options of a group; "" if it does."""
        for name in ("fused", "foreach"):
            # Whoever sets one of them, but not fused to True, asks for a certain step of torch's.
            if not group["fused"] and group[name] is not None:
                return f"{name} is {group[name]}"
        if group["differentiable"]:
            return "differentiable"
        for name in _NUMBERS:
            if isinstance(group.get(name), Tensor):
                return f"{name} is a tensor"
        if isinstance(group["lr"], Tensor) and group["lr"].requires_grad:
            return "lr requires a gradient"
        return ""

    def _states_are_current(self, group: dict[str, Any], plan: FusedStepPlan) -> bool:
        """Whether the state holds the tensors of the plan; its dicts are known to be the same."""
        raise NotImplementedError

    def _init_states(self, group: dict[str, Any], plan: FusedStepPlan) -> None:
        """Creates missing entries of the state, checks all and binds them to the plan.

        Raises:
            UnsupportedByFusedOp: the op does not take the state.
        """
        raise NotImplementedError

    def _launch(
        self, group: dict[str, Any], plan: FusedStepPlan, grads: list[Tensor], prune_args: PruneArgs
    ) -> None:
        """Calls the op."""
        raise NotImplementedError


@torch.no_grad()
def _unscale_(groups: list[dict[str, Any]], scale: Tensor) -> None:
    """Divides the gradients by GradScaler's scale, in place and as it does so itself."""
    inverse = scale.double().reciprocal().float()
    for group in groups:
        for p in group["params"]:
            if p.grad is not None:
                values = p.grad._values() if p.grad.is_sparse else p.grad
                flag = torch.zeros(1, dtype=torch.float32, device=values.device)
                factor = inverse.to(values.device)
                torch._amp_foreach_non_finite_check_and_unscale_([values], flag, factor)
