"""Our products against float64, before any of them is timed.

The error (root mean square) may be twice that of the dense product of the same precision and the
same weight, plus one rounding of the result. The largest error, which is a matter of luck, may be
four times that of dense, plus two roundings: no single element may be wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness.registry import ParityError
from bench.products.calls import Data, product, set_precision, sparse_product
from bench.products.forms import Form, Sparse

WHOLE = 3e9  # operations of a dense product; a larger one is checked on a part of its input
_NAMES = ("y", "the gradient of x", "the gradient of the values")
# The unit of the last place, where the number of bits is not that of the tensors' dtype.
_ROUNDING = {"tf32": 2.0**-10}


def check(data: Data, sparse: Sparse, form: Form) -> None:
    """Compares forward and both gradients of one packed weight.

    Args:
        data: of the layer; its weight does not matter.
        sparse: the packed weight.
        form: what it is.

    Raises:
        ParityError: names the layer, the form, the tensor and both errors.
    """
    layer = data.layer.cut(WHOLE)
    if layer != data.layer:
        data = Data.of(layer, str(data.x.device))
    dtype = sparse.p.values.dtype
    x, grad, weight = data.x.to(dtype), data.grad.to(dtype), sparse.dense.to(dtype)
    dense = product(layer)
    set_precision(form.precision)
    ours = sparse_product(layer, sparse)
    what = f"{layer.name}, {form.name}, {sparse.label}"
    shape = tuple(ours(x).shape)
    if shape != layer.y:
        raise ParityError(f"{what}: y has shape {shape}, not {layer.y}: nothing was timed")
    mine = [*_with_gradients(ours, x, grad, sparse.p.values)]
    theirs = _with_gradients(lambda x, w=weight: dense(x, w), x, grad, weight)
    set_precision("fp32")
    wide = weight.double()
    exact = _with_gradients(lambda x: dense(x, wide), x.double(), grad.double(), wide)
    mine[2] = mine[2].flatten()
    theirs, exact = ([*t[:2], kept(t[2], sparse).flatten()] for t in (theirs, exact))
    for name, y, peer, truth in zip(_NAMES, mine, theirs, exact, strict=True):
        _compare(f"{what}: {name}", y, peer, truth, form)


def _with_gradients(call, x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    x, before = x.detach().requires_grad_(), weight.requires_grad
    weight.requires_grad_()
    y = call(x)
    result = (y.detach(), *torch.autograd.grad(y, (x, weight), grad))
    weight.requires_grad_(before)
    return result


def kept(weight: Tensor, sparse: Sparse) -> Tensor:
    """The entries of a dense tensor that the packed weight stores, as its values are: [E, v]."""
    v = sparse.p.values.shape[1]
    counts = sparse.p.crow_indices.diff().long()
    block = torch.repeat_interleave(torch.arange(len(counts), device=weight.device), counts)
    return weight.reshape(len(counts), v, -1)[block, :, sparse.p.col_indices.long()]


def _compare(what: str, y: Tensor, peer: Tensor, truth: Tensor, form: Form) -> None:
    if not y.numel():
        return
    step = _ROUNDING.get(form.precision, torch.finfo(y.dtype).eps)
    for kind, norm, factor in (("on average", _rms, 2), ("at most", _largest, 4)):
        ours, dense = (norm(t.double() - truth) for t in (y, peer))
        allowed = factor * dense + factor / 2 * step * norm(truth)
        if not ours <= allowed:
            raise ParityError(
                f"{what} is off by {ours:.3g} {kind} from float64, dense by {dense:.3g}; allowed "
                f"are {allowed:.3g}: nothing was timed"
            )


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
