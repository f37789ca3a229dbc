"""Parity of the fused optimizers: the op with its reference bit for bit, the classes with torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.harness.errors import ParityError
from bench.harness.training import (
    OPTIMIZERS,
    FusedUpdate,
    Gradients,
    OptimizerSpec,
    TrainingReplica,
)
from issp.ops import backends

_PRUNED = ((7, 9), (16, 16, 3, 3), (1, 4097))
_DENSE = ((3,), (130,))
_STEPS = 3
# torch's CUDA kernels round some scalars to float32 where its CPU kernels keep float64.
_ULPS = {"cpu": 2, "cuda": 4}


def check(names: Sequence[str], device: str, sparsity: float, shrink: float) -> None:
    """Compares a few steps on small tensors.

    Args:
        names: keys of `OPTIMIZERS`.
        device: "cpu" or "cuda".
        sparsity, shrink: of the pruning.

    Raises:
        ParityError: names the first difference.
    """
    for name in names:
        spec = OPTIMIZERS[name]
        decay = dataclasses.replace(spec, options={**spec.options, "weight_decay": 0.05})
        for each in (spec, decay):
            for frozen in (False, True):
                for bracket in (True, False):
                    sides = [_update(each, where, sparsity, shrink) for where in (device, "cpu")]
                    _check_op(*sides, frozen=frozen, bracket=bracket)
            _check_torch(each, device)


def _update(spec: OptimizerSpec, device: str, sparsity: float, shrink: float) -> FusedUpdate:
    random = torch.Generator().manual_seed(1)
    weights = [0.05 * torch.randn(shape, generator=random) for shape in _PRUNED + _DENSE]
    return FusedUpdate.create(spec, weights, len(_PRUNED), sparsity, shrink, device)


def _check_op(actual: FusedUpdate, expected: FusedUpdate, frozen: bool, bracket: bool) -> None:
    """Steps `actual` by the op and `expected` by the reference, and compares their tensors."""
    spec, device = actual.spec, actual.weights[0].device.type
    if frozen:
        for state in (actual.state, expected.state):
            kept = [torch.arange(n) % 3 == 0 for n in state.numels]
            state.set_masks([x.view(s) for x, s in zip(kept, state.shapes, strict=True)])
    reference = backends.implementations("reference")[spec.op.__name__]
    random = torch.Generator().manual_seed(2)
    for step in range(_STEPS):
        grads = [1e-3 * torch.randn(w.shape, generator=random) for w in expected.weights]
        actual.step(spec.op, grads, frozen, bracket)
        expected.step(reference, grads, frozen, bracket)
        written = actual.results()
        for name, y in expected.results().items():
            x = written[name].detach().cpu().reshape(-1)
            if not torch.equal(x.view(torch.uint8), y.reshape(-1).view(torch.uint8)):
                raise ParityError(
                    f"the fused {spec.name} op is not bitwise equal to the reference ({name}, "
                    f"step {step}, frozen {frozen}, back end {backends.active(device)}): "
                    "nothing was timed"
                )


def _check_torch(spec: OptimizerSpec, device: str) -> None:
    torch.manual_seed(2)
    network = nn.ModuleList([nn.Conv2d(16, 16, 3), nn.Linear(17, 241), nn.LayerNorm(130)])
    network.to(device)
    # Nothing is selected: a last bit of difference must not decide between two weights.
    actual = TrainingReplica.copy_of(network, spec, "issp", True, 0.0, 1.0)
    expected = TrainingReplica.copy_of(network, spec, "fused", True, 0.0, 1.0)
    gradients = Gradients(expected.parameters())
    for replica in (actual, expected):
        replica.set_gradients(gradients)
    for step in range(_STEPS):
        before = {name: x.clone() for name, x in _tensors(expected).items()}
        gradients.renew()
        actual.optimizer.step()
        expected.optimizer.step()
        ours, torchs = _tensors(actual), _tensors(expected)
        for name, old in before.items():
            what = f"{spec.name}: {name}, step {step}"
            _check_close(what, ours[name], torchs[name], old, _ULPS[device])
        # Rounding differences of one step must not grow into the next.
        actual.copy_state_from(expected)


def _tensors(replica: TrainingReplica) -> dict[str, Tensor]:
    """Weights and moments by name; zeros before the first step."""
    named = {}
    for i, p in enumerate(replica.parameters()):
        named[f"weight {i}"] = p.detach()
        for key in replica.spec.moments:
            state = replica.optimizer.state.get(p, {})
            named[f"{key} {i}"] = state.get(key, torch.zeros_like(p.detach()))
    return named


def _check_close(what: str, actual: Tensor, expected: Tensor, before: Tensor, ulps: int) -> None:
    # In units of the larger of the two terms that were added, as a sum may cancel.
    unit = torch.finfo(torch.float32).eps * (before.abs() + (expected - before).abs())
    far = (actual - expected).abs() > ulps * unit
    if bool(far.any()):
        raise ParityError(
            f"issp.optim differs from torch by more than {ulps} ulp ({what}, "
            f"{int(far.sum())} of {far.numel()} elements): nothing was timed"
        )
