"""The calls that are timed: our ops, dense ones of every precision and layout, torch's sparse.

A step is forward, the gradient of the input and that of the weight (its kept values, if sparse).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.sparse.forms import SparseWeight
from bench.sparse.layers import Layer
from issp import ops
from issp.ops import semi_structured
from issp.ops.keep import Keep

PASSES = ("forward", "step")
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
MOST_UNFOLDED = (
    512 << 20
)  # bytes of the unfolded input beyond which a convolution by CSR is left out


@dataclass(frozen=True)
class DenseVariant:
    """One way in which torch computes the dense op.

    Attributes:
        precision: see `Form`.
        channels_last: layout of the activations and the weight of a convolution.
        matmul: a 1x1 convolution as a matrix product over the flattened image.
        search: cudnn.benchmark, on a GPU.
        label: of the precision, such as "bf16 AMX".
    """

    precision: str = "fp32"
    channels_last: bool = False
    matmul: bool = False
    search: bool = True
    label: str = ""

    @property
    def name(self) -> str:
        """As printed, behind "dense"."""
        layout = " channels_last" * self.channels_last + " as matmul" * self.matmul
        return (self.label or self.precision) + layout + (" unsearched" * (not self.search))


@dataclass
class LayerTensors:
    """Input, output gradient and dense weight of a layer, float32."""

    layer: Layer
    x: Tensor
    weight: Tensor
    grad: Tensor

    @classmethod
    def of(cls, layer: Layer, device: str, seed: int = 0) -> LayerTensors:
        """Normal numbers; the weight's are scaled like an initialisation."""
        random = torch.Generator().manual_seed(seed)
        shapes = (layer.x, layer.weight, layer.y)
        x, weight, grad = (torch.randn(s, generator=random).to(device) for s in shapes)
        return cls(layer, x, weight / weight[0].numel() ** 0.5, grad)


def dense_variants(layer: Layer, device: str) -> list[DenseVariant]:
    """Every precision and layout of the dense op that this machine offers."""
    labels = {"fp32": "", **({"tf32": "", "bf16": "", "fp16": ""} if device == "cuda" else {})}
    if device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        labels["bf16"] = "bf16 AMX" if torch.cpu._is_amx_tile_supported() else "bf16"
    layouts = (False, True) if layer.conv else (False,)
    variants = [
        DenseVariant(precision, last, label=label)
        for precision, label in labels.items()
        for last in layouts
    ]
    if layer.conv and layer.weight[2:] == (1, 1):
        variants += [DenseVariant(p, matmul=True, label=label) for p, label in labels.items()]
    if layer.conv and device == "cuda":
        variants += [DenseVariant(precision, search=False) for precision in ("fp32", "tf32")]
    return variants


def set_precision(precision: str, search: bool = True) -> None:
    """Sets torch's switches for what is called next: TF32, cudnn.benchmark."""
    allowed = "tf32" if precision == "tf32" else "ieee"
    _switch(allowed, allowed, search)


@contextlib.contextmanager
def keep_switches() -> Iterator[None]:
    """Leaves torch's switches as they were."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        _switch(*before)


def _switch(matmul: str, conv: str, search: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = matmul
    torch.backends.cudnn.conv.fp32_precision = conv
    torch.backends.cudnn.rnn.fp32_precision = conv  # torch.export refuses flags that differ
    torch.backends.cudnn.benchmark = search


def dense_op(layer: Layer, matmul: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """The dense op of one layer, from x and weight."""
    if not layer.conv:
        return F.linear
    if matmul:
        return lambda x, w: (w.flatten(1) @ x.flatten(2)).view(layer.y)
    padding = layer.padding
    return lambda x, w: F.conv2d(x, w, padding=padding)


def dense_call(data: LayerTensors, variant: DenseVariant, name: str) -> Callable[[], object]:
    """What is timed of a dense variant; `name` is one of `PASSES`."""
    dtype = DTYPES[variant.precision]
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    x, weight, grad = (
        t.to(dtype, memory_format=layout, copy=True) if data.layer.conv else t.to(dtype, copy=True)
        for t in (data.x, data.weight, data.grad)
    )
    call = dense_op(data.layer, variant.matmul)
    return _timed(lambda: call(x, weight), (x, weight), grad, name)


def sparse_op(layer: Layer, sparse: SparseWeight) -> Callable[[Tensor], Tensor]:
    """Our op of one layer, from x."""
    nm = hasattr(sparse.packed, "keep")
    if not layer.conv:
        call = ops.nm_matmul if nm else ops.sparse_matmul
        return lambda x: call(x, sparse.packed)
    call, padding = (ops.nm_conv2d if nm else ops.sparse_conv2d), layer.padding
    return lambda x: call(x, sparse.packed, padding=padding)


def sparse_call(data: LayerTensors, sparse: SparseWeight, name: str) -> Callable[[], object]:
    """What is timed of ours; the tensors have the dtype of the packed values."""
    dtype = sparse.packed.values.dtype
    x, grad = (t.to(dtype, copy=True) for t in (data.x, data.grad))
    call = sparse_op(data.layer, sparse)
    return _timed(lambda: call(x), (x, sparse.packed.values), grad, name)


def _timed(
    call: Callable[[], Tensor], leaves: tuple[Tensor, Tensor], grad: Tensor, name: str
) -> Callable[[], object]:
    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), leaves, grad)

    if name == "forward":
        return forward
    for leaf in leaves:
        leaf.requires_grad_()
    return step


def csr_call(data: LayerTensors, sparse: SparseWeight) -> Callable[[], object]:
    """torch's sparse CSR product, forward; a convolution goes through the unfolded input.

    Raises:
        ValueError: the unfolded input would be too large.
    """
    layer = data.layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CSR is in beta state
        weight = sparse.dense.flatten(1).to_sparse_csr()
    if not layer.conv:
        x = data.x.flatten(0, -2)
        return torch.no_grad()(lambda: torch.mm(weight, x.t()).t())
    nbytes = 4 * layer.applications * weight.shape[1]
    if nbytes > MOST_UNFOLDED:
        raise ValueError(f"the unfolded input takes {nbytes / 1e9:.2g} GB")
    x, kernel, padding = data.x, layer.weight[2:], layer.padding
    if x.shape[0] != 1:
        raise ValueError("only one image at a time")

    @torch.no_grad()
    def conv() -> Tensor:
        columns = x[0].flatten(1) if kernel == (1, 1) else F.unfold(x, kernel, padding=padding)[0]
        return torch.mm(weight, columns).view(layer.y)

    return conv


def two_four_call(data: LayerTensors, dtype: torch.dtype) -> Callable[[], object]:
    """torch's semi-structured 2:4 product of a linear layer, forward, on a GPU.

    Raises:
        ValueError: torch cannot, and why.
    """
    x = data.x.to(dtype)
    reason = semi_structured.unsupported_reason(x, data.layer.weight, dtype)
    if reason:
        raise ValueError(reason)
    packed = semi_structured.pack(ops.nm_prune(data.weight.to(dtype), Keep(2, of=4)))
    return lambda: semi_structured.linear(x, packed)
