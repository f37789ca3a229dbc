"""Optimizers around other optimizers: which of them updates the weights, and whose step is running.

Lookahead, SAM, Fabric's and many other wrappers call the step of an optimizer that they hold. The
pruner hooks that inner optimizer, since some wrappers run no hooks and some are never stepped
themselves (`first_step` and `second_step` of SAM). Its work is done once, at the end of the
outermost step that is running, since a wrapper may go on to change the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

# torch runs the hooks of every optimizer in this function, which it wraps around `step`.
_HOOKED_STEP = Optimizer.profile_hook_step(lambda self: None).__code__
# Functions of torch that take a step only to create the optimizer's state.
_DRY_RUNS = {
    ("torch.distributed.checkpoint.state_dict", "_init_optim_state"),
    ("torch.distributed.optim.named_optimizer", "init_state"),
}
_NAMES = {_HOOKED_STEP.co_name, "step", "second_step", *(function for _, function in _DRY_RUNS)}
# Wrappers that change no weight after the step of the inner optimizer, by class name.
_END_WITH_INNER_STEP = {"SAM", "GSAM", "LookSAM", "FriendlySAM", "OrthoGrad"}

_REFUSED = {
    "PostLocalSGDOptimizer": "averages the weights of all ranks after each rank has pruned its own "
    "selection: use DistributedDataParallel with its gradient averaging alone",
    "ZeroRedundancyOptimizer": "keeps the moments of each weight on one rank, where the others "
    "cannot mask them: give every rank the whole optimizer",
    # The base of DeepSpeed's optimizers.
    "DeepSpeedOptimizer": "updates flat copies of the weights that the pruner does not reach: use "
    "DistributedDataParallel or fully_shard",
}


def see_through(opt: Any) -> tuple[list[Optimizer], list[Any]]:
    """The optimizers that update the weights, and the wrappers around them with a state of theirs.

    Args:
        opt: one optimizer, several, or None; each may be a wrapper of others.

    Raises:
        TypeError: something that is no torch optimizer.
        ValueError: a wrapper that the pruner cannot follow.
    """
    optimizers: list[Optimizer] = []
    wrappers: list[Any] = []
    for one in [] if opt is None else list(opt) if isinstance(opt, list | tuple) else [opt]:
        _see_through(one, [], optimizers, wrappers)
    return optimizers, wrappers


def _see_through(
    opt: Any, outside: list[Any], optimizers: list[Optimizer], wrappers: list[Any]
) -> None:
    """Adds what is in `opt` to both lists; `outside` are those that it was found in."""
    _refuse(opt)
    outside = [*outside, opt]
    held = [one for one in held_optimizers(opt) if not _contains(outside, one)]
    inner: list[Optimizer] = []
    inner_wrappers: list[Any] = []
    for one in held:
        _see_through(one, outside, inner, inner_wrappers)
    if _is_split(opt, inner):
        optimizers += [one for one in inner if not _contains(optimizers, one)]
        around = [*inner_wrappers, opt]
    elif isinstance(opt, Optimizer):
        optimizers += [] if _contains(optimizers, opt) else [opt]
        around = held
    else:
        raise TypeError(f"opt must be a torch optimizer, not {type(opt).__name__}")
    for one in around:
        if has_own_state(one, [*optimizers, *wrappers]):
            if one is opt:
                _check_hooks(one)
            wrappers.append(one)


def _is_split(opt: Any, inner: Sequence[Optimizer]) -> bool:
    """Whether the inner optimizers have all parameters of a wrapper, each of them one.

    Where two have the same, as in a class that changes over from one to the other, the wrapper
    itself is the optimizer.
    """
    params = list(map(_params, inner))
    union = set().union(*params)
    return bool(inner) and _params(opt) <= union and len(union) == sum(map(len, params))


def has_own_state(opt: Any, others: Sequence[Any]) -> bool:
    """Whether an optimizer keeps tensors of its own, and does not just show the others' state."""
    state = getattr(opt, "state", None)
    return isinstance(state, dict) and not _contains([one.state for one in others], state)


def _refuse(opt: Any) -> None:
    for cls in type(opt).__mro__:
        if cls.__name__ in _REFUSED:
            raise ValueError(f"opt: {cls.__name__} {_REFUSED[cls.__name__]}")
        if cls.__name__.startswith("ScheduleFreeWrapper") and not runs_hooks(opt):
            raise ValueError(
                f"opt: {cls.__name__} swaps the weights while the inner optimizer steps and runs "
                "no hooks: use a schedule-free optimizer such as AdamWScheduleFree"
            )


def _check_hooks(wrapper: Any) -> None:
    """Makes a wrapper that keeps weights of its own run hooks, or refuses it."""
    if runs_hooks(wrapper):
        return
    if not {"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"} <= vars(wrapper).keys():
        raise ValueError(
            f"opt: {type(wrapper).__name__} keeps weights of its own and runs no hooks after its "
            "step: attach its inner optimizer with hook=False and call pruner.step() afterwards"
        )
    wrapper._patch_step_function()


def held_optimizers(opt: Any) -> list[Any]:
    """The optimizers that are attributes of another one, or in a list or dict that is."""
    held: list[Any] = []
    for value in getattr(opt, "__dict__", {}).values():
        values = [value]
        if isinstance(value, list | tuple):
            values = list(value)
        elif isinstance(value, dict):
            values = list(value.values())
        for one in values:
            is_optimizer = isinstance(one, Optimizer) or (
                callable(getattr(one, "step", None)) and hasattr(one, "param_groups")
            )
            if is_optimizer and one is not opt and not _contains(held, one):
                held.append(one)
    return held


def holds(opt: Any, optimizers: Sequence[Optimizer]) -> bool:
    """Whether an optimizer wraps one of the others, at any depth."""
    found = [opt]
    for one in found:  # which grows meanwhile
        found += [x for x in held_optimizers(one) if not _contains(found, x)]
    return any(_contains(optimizers, one) for one in found[1:])


def runs_hooks(optimizer: Any) -> bool:
    """Whether torch's post-step hooks are called after the optimizer's step."""
    return getattr(type(optimizer).step, "hooked", False) and hasattr(
        optimizer, "_optimizer_step_post_hooks"
    )


def running_steps() -> list[Optimizer] | None:
    """The optimizers whose `step` is running, the innermost first; None in a dry run of torch's.

    torch.compile replaces the code of a step: of a compiled one nothing is found.

    A dry run takes a step with a learning rate of 0, only to create the optimizer's state.

    Looked up in the stack, since a counter would be wrong after a step that has raised.

    Raises:
        ValueError: one of them, or a wrapper without hooks, cannot be followed.
    """
    steps: list[Optimizer] = []
    in_two_steps, frame = [], sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in _NAMES:
            if code is _HOOKED_STEP:
                steps.append(frame.f_locals["args"][0])
            elif code.co_name == "step":
                _check_running(frame.f_locals.get("self"))
            elif code.co_name == "second_step":
                in_two_steps.append(frame.f_locals.get("self"))
            elif _is_dry_run(frame):
                return None
        frame = frame.f_back  # type: ignore[assignment]
    for one in in_two_steps:
        _check_two_steps(one, steps)
    return steps


def _check_running(opt: Any) -> None:
    """Refuses a wrapper that cannot be followed; lets one that keeps weights run hooks."""
    _refuse(opt)
    if isinstance(opt, Optimizer) and not runs_hooks(opt):
        held = held_optimizers(opt)
        if held and has_own_state(opt, held):
            _check_hooks(opt)


def _check_two_steps(opt: Any, steps: Sequence[Optimizer]) -> None:
    is_changed = type(opt).__name__ == "WSAM" and getattr(opt, "decouple", True)
    if is_changed and not _contains(steps, opt):
        raise ValueError(
            "opt: second_step() of WSAM changes the weights after its base optimizer's step and "
            "runs no hooks: call step(closure), or pass decouple=False"
        )


def _is_dry_run(frame: Any) -> bool:
    return (frame.f_globals.get("__name__"), frame.f_code.co_name) in _DRY_RUNS


def changes_weights_afterwards(wrapper: Optimizer) -> bool:
    """Whether the step of a wrapper may change weights after the inner optimizer's."""
    return _END_WITH_INNER_STEP.isdisjoint(cls.__name__ for cls in type(wrapper).__mro__)


def _params(opt: Any) -> set[int]:
    return {id(p) for group in getattr(opt, "param_groups", ()) for p in group["params"]}


def _contains(objects: Sequence[Any], wanted: Any) -> bool:
    return any(x is wanted for x in objects)
