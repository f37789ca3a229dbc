"""Parity of the fused optimizers: the op with its reference bit for bit, the classes with torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.harness.registry import ParityError
from bench.harness.training import FAMILIES, Family, Gradients, Trainee, tail
from issp import ops
from issp.ops import backends

_PRUNED = ((7, 9), (16, 16, 3, 3), (1, 4097))
_REST = ((3,), (130,))
_STEPS = 3
# torch's CUDA kernels round some scalars to float32 where its CPU kernels keep float64.
_ULPS = {"cpu": 2, "cuda": 4}


def check(names: Sequence[str], device: str, sparsity: float, shrink: float) -> None:
    """Compares a few steps on small tensors.

    Args:
        names: keys of `FAMILIES`.
        device: "cpu" or "cuda".
        sparsity, shrink: of the pruning.

    Raises:
        ParityError: names the first difference.
    """
    for name in names:
        family = FAMILIES[name]
        decay = dataclasses.replace(family, options={**family.options, "weight_decay": 0.05})
        for each in (family, decay):
            for frozen in (False, True):
                for bracket in (True, False):
                    _check_op(each, device, sparsity, shrink, frozen, bracket)
            _check_torch(each, device)


def _check_op(
    family: Family, device: str, sparsity: float, shrink: float, frozen: bool, bracket: bool
) -> None:
    random = torch.Generator().manual_seed(1)
    weights = [0.05 * torch.randn(shape, generator=random) for shape in _PRUNED + _REST]
    moments = [[torch.zeros_like(w) for w in weights] for _ in family.moments]
    steps = [torch.zeros(()) for _ in weights]
    theirs = [weights, *moments, steps]
    mine = [[x.to(device, copy=True) for x in tensors] for tensors in theirs]
    k = [ops.num_pruned(w.numel(), sparsity) for w in weights[: len(_PRUNED)]]
    states = [ops.ShrinkState(part[0][: len(_PRUNED)], k) for part in (mine, theirs)]
    if frozen:
        for state in states:
            kept = [torch.arange(n) % 3 == 0 for n in state.numels]
            state.set_masks([x.view(s) for x, s in zip(kept, state.shapes, strict=True)])
    reference = backends.implementations("reference")[family.op.__name__]
    for step in range(_STEPS):
        grads = [1e-3 * torch.randn(w.shape, generator=random) for w in weights]
        for part, state, op in zip((mine, theirs), states, (family.op, reference), strict=True):
            there = [g.to(part[0][0].device, copy=True) for g in grads]
            head = family.head(part[0], there, part[1:-1], part[-1])
            op(*head, *tail(state, shrink, frozen, bracket))
        _compare(family, device, mine, theirs, states, f"step {step}, frozen {frozen}")


def _compare(family, device, mine, theirs, states, when: str) -> None:
    names = ["weights", *family.moments, "steps"]
    pairs = [
        (f"{name}[{i}]", x, y)
        for name, xs, ys in zip(names, mine, theirs, strict=True)
        for i, (x, y) in enumerate(zip(xs, ys, strict=True))
    ]
    pairs += [
        (name, *(getattr(state, name) for state in states))
        for name in ("thresholds", "packed", "flips")
    ]
    for name, x, y in pairs:
        x = x.detach().cpu().reshape(-1)
        if not torch.equal(x.view(torch.uint8), y.reshape(-1).view(torch.uint8)):
            raise ParityError(
                f"the fused {family.name} op is not bitwise equal to the reference ({name}, "
                f"{when}, back end {backends.active(device)}): nothing was timed"
            )


def _check_torch(family: Family, device: str) -> None:
    torch.manual_seed(2)
    network = nn.ModuleList([nn.Conv2d(16, 16, 3), nn.Linear(17, 241), nn.LayerNorm(130)])
    network.to(device)
    # Nothing is selected: a last bit of difference must not decide between two weights.
    mine = Trainee.of(network, family, "issp", True, 0.0, 1.0)
    theirs = Trainee.of(network, family, "fused", True, 0.0, 1.0)
    gradients = Gradients(theirs.parameters())
    for trainee in (mine, theirs):
        trainee.use(gradients)
    for step in range(_STEPS):
        before = [[x.clone() for x in tensors] for tensors in _tensors(theirs)]
        gradients.renew()
        mine.optimizer.step()
        theirs.optimizer.step()
        for name, *parts in zip(
            ["weight", *family.moments], _tensors(mine), _tensors(theirs), before, strict=True
        ):
            for i, (x, y, old) in enumerate(zip(*parts, strict=True)):
                _check_close(f"{family.name}: {name} {i}, step {step}", x, y, old, device)
        mine.take(theirs)  # rounding differences of one step must not grow into the next


def _tensors(trainee: Trainee) -> list[list[Tensor]]:
    """Weights, then each kind of moment; zeros before the first step."""
    weights = [p.detach() for p in trainee.parameters()]
    states = [trainee.optimizer.state.get(p, {}) for p in trainee.parameters()]
    moments = [
        [s.get(key, torch.zeros_like(w)) for s, w in zip(states, weights, strict=True)]
        for key in trainee.family.moments
    ]
    return [weights, *moments]


def _check_close(what: str, mine: Tensor, torchs: Tensor, before: Tensor, device: str) -> None:
    # In units of the larger of the two terms that were added, as a sum may cancel.
    unit = torch.finfo(torch.float32).eps * (before.abs() + (torchs - before).abs())
    far = (mine - torchs).abs() > _ULPS[device] * unit
    if bool(far.any()):
        raise ParityError(
            f"issp.optim differs from torch by more than {_ULPS[device]} ulp ({what}, "
            f"{int(far.sum())} of {far.numel()} elements): nothing was timed"
        )
