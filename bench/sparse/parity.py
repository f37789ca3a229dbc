"""Our sparse ops against float64, before any of them is timed.

The error (root mean square) may be twice that of the dense op of the same precision and the
same weight, plus one rounding of the result. The largest error, which is a matter of luck, may be
four times that of dense, plus two roundings: no single element may be wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness.errors import ParityError
from bench.sparse.calls import LayerTensors, dense_op, set_precision, sparse_op
from bench.sparse.forms import Form, SparseWeight

WHOLE_FLOPS = 3e9  # of a dense op; a larger one is checked on a part of its input
_VALUES = "the gradient of the values"
# The unit of the last place, where the number of bits is not that of the tensors' dtype.
_ROUNDING = {"tf32": 2.0**-10}


def check(data: LayerTensors, sparse: SparseWeight, form: Form) -> None:
    """Compares forward and both gradients of one packed weight.

    Args:
        data: of the layer; its weight is not used.
        sparse: the packed weight.
        form: of the packed weight.

    Raises:
        ParityError: names the layer, the form, the tensor and both errors.
    """
    layer = data.layer.cut(WHOLE_FLOPS)
    if layer != data.layer:
        data = LayerTensors.of(layer, str(data.x.device))
    dtype = sparse.packed.values.dtype
    x, grad, weight = data.x.to(dtype), data.grad.to(dtype), sparse.dense.to(dtype)
    dense = dense_op(layer)
    set_precision(form.precision)
    call = sparse_op(layer, sparse)
    what = f"{layer.name}, {form.name}, {sparse.label}"
    shape = tuple(call(x).shape)
    if shape != layer.y:
        raise ParityError(f"{what}: y has shape {shape}, not {layer.y}: nothing was timed")
    actual = _with_gradients(call, x, grad, sparse.packed.values)
    same_precision = _with_gradients(lambda x, w=weight: dense(x, w), x, grad, weight)
    set_precision("fp32")
    wide = weight.double()
    exact = _with_gradients(lambda x: dense(x, wide), x.double(), grad.double(), wide)
    for dense_results in (same_precision, exact):
        dense_results[_VALUES] = kept(dense_results[_VALUES], sparse)
    for name, y in actual.items():
        errors = (t[name].flatten() for t in (same_precision, exact))
        _compare(f"{what}: {name}", y.flatten(), *errors, form)


def _with_gradients(call, x: Tensor, grad: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The result of a call and its gradients, by name."""
    x, before = x.detach().requires_grad_(), weight.requires_grad
    weight.requires_grad_()
    y = call(x)
    dx, dw = torch.autograd.grad(y, (x, weight), grad)
    weight.requires_grad_(before)
    return {"y": y.detach(), "the gradient of x": dx, _VALUES: dw}


def kept(weight: Tensor, sparse: SparseWeight) -> Tensor:
    """The entries of a dense tensor that the packed weight stores, as its values are: [E, v]."""
    v = sparse.packed.values.shape[1]
    counts = sparse.packed.crow_indices.diff().long()
    block = torch.repeat_interleave(torch.arange(len(counts), device=weight.device), counts)
    return weight.reshape(len(counts), v, -1)[block, :, sparse.packed.col_indices.long()]


def _compare(what: str, y: Tensor, dense: Tensor, exact: Tensor, form: Form) -> None:
    if not y.numel():
        return
    ulp = _ROUNDING.get(form.precision, torch.finfo(y.dtype).eps)
    for kind, norm, factor in (("on average", _rms, 2), ("at most", _largest, 4)):
        error, dense_error = (norm(t.double() - exact) for t in (y, dense))
        allowed = factor * dense_error + factor / 2 * ulp * norm(exact)
        if not error <= allowed:
            raise ParityError(
                f"{what} is off by {error:.3g} {kind} from float64, dense by {dense_error:.3g}; "
                f"allowed are {allowed:.3g}: nothing was timed"
            )


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
