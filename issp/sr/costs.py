"""What a network costs: parameters, kept weights, multiply-accumulates, stored bytes, time."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from issp.deploy.pack import pack
from issp.nn import autotune
from issp.nn.names import named_tensors
from issp.nn.report import LayerReport
from issp.sr.models import SuperResolver

OUTPUT = (720, 1280)  # height and width of the result for which papers count
_INDEX_BYTES = 4  # int32, of `SparseRows`
_ATTENTION = "attention"
# Products of two activations, as torch's counter names them.
_ATTENTION_OPS = ("bmm", "baddbmm", "scaled_dot_product")


@dataclass(frozen=True)
class LayerCost:
    """One convolution or linear layer, or the products of attention in one module.

    Attributes:
        name: of the module.
        kind: "conv", "linear", "attention", or the op of another product.
        shape: of the weight; () where there is none.
        parameters: weight and bias.
        weights, kept: numbers of the weight, and of those that are not 0.
        macs: multiply-accumulates of the dense layer; padding counts as pixels.
        macs_kept: those of kept weights alone.
        dense_bytes: of weight and bias in their dtype.
        sparse_bytes: the same with the weight as `SparseRows` (v = 1) where that is smaller.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    weights: int
    kept: int
    macs: int
    dense_bytes: int
    sparse_bytes: int

    @property
    def macs_kept(self) -> int:
        """Every weight is used equally often."""
        return self.macs // self.weights * self.kept if self.weights else self.macs


@dataclass(frozen=True)
class Costs:
    """A network on an image of one size.

    Attributes:
        size: height and width of the low-resolution image, as the network computes it.
        layers: in the order of the model.
        parameters: of the whole network.
        other_bytes: tensors of a saved file that belong to no layer of the list.
    """

    size: tuple[int, int]
    layers: list[LayerCost]
    parameters: int
    other_bytes: int

    def total(self, column: str, *kinds: str) -> int:
        """Sum of an attribute over the layers of some kinds; none given: of all."""
        return sum(getattr(r, column) for r in self.layers if not kinds or r.kind in kinds)

    @property
    def kept_parameters(self) -> int:
        """Parameters that are stored: all but the zeros of weights."""
        return self.parameters - self.total("weights") + self.total("kept")


@dataclass(frozen=True)
class Latency:
    """Time of the whole network, in milliseconds; report is that of `issp.pack`."""

    dense: float
    packed: float
    report: LayerReport


def default_size(model: SuperResolver) -> tuple[int, int]:
    """Height and width of the image whose result covers 1280 x 720 pixels."""
    return -(-OUTPUT[0] // model.scale), -(-OUTPUT[1] // model.scale)


def of_model(model: SuperResolver, size: tuple[int, int]) -> Costs:
    """Counts everything that needs no clock.

    Args:
        model: dense; on the meta device no weight counts as zero.
        size: height and width of the low-resolution image; what the network needs is added to it.
    """
    height, width = (-(-side // model.pad_multiple) * model.pad_multiple for side in size)
    macs = _macs(model, height, width)
    modules = dict(model.named_modules())
    layers = [_layer(name, modules[name], kind, count) for (name, kind), count in macs.items()]
    saved = sum(t.numel() * t.element_size() for t in named_tensors(model).values())
    return Costs(
        size=(height, width),
        layers=layers,
        parameters=sum(p.numel() for p in model.parameters()),
        other_bytes=saved - sum(layer.dense_bytes for layer in layers),
    )


@torch.no_grad()
def latency(model: SuperResolver, size: tuple[int, int]) -> Latency:
    """Measures the network dense and packed, on the device and threads of the model.

    Args:
        model: dense.
        size: as `Costs.size`.
    """
    weight = next(model.parameters())
    x = torch.full((1, model.channels, *size), 0.5, device=weight.device, dtype=weight.dtype)
    packed: Any = pack(model.eval(), x)
    times: Mapping[str, float]
    if packed.report.whole is None:  # hardly a zero: there is nothing to compare
        times = autotune.measure({"dense": lambda: model(x)}, {}, weight.device.type).microseconds
        times = {**times, "packed": times["dense"]}
    else:
        times = packed.report.whole.microseconds
    return Latency(times["dense"] / 1e3, times["packed"] / 1e3, packed.report)


def _macs(model: SuperResolver, height: int, width: int) -> dict[tuple[str, str], int]:
    """(module, kind) -> multiply-accumulates; every convolution and linear layer is in it."""
    sketch = copy.deepcopy(model).to("meta").eval()
    dtype = next(sketch.parameters()).dtype
    flops = _own_flops(
        sketch, torch.empty(1, model.channels, height, width, device="meta", dtype=dtype)
    )
    macs: dict[tuple[str, str], int] = {}
    for name, module in sketch.named_modules():
        kind = {nn.Conv2d: "conv", nn.Linear: "linear"}.get(type(module))
        if kind:
            macs[name, kind] = flops[name].total() // 2
            continue
        for op, count in flops[name].items():
            kind = _kind(op)
            macs[name, kind] = macs.get((name, kind), 0) + count // 2
    return macs


@torch.no_grad()
def _own_flops(model: nn.Module, x: Tensor) -> dict[str, Counter[str]]:
    """Module -> op -> FLOPs that torch counts in the module itself, without its children.

    The model gets hooks.
    """
    # It takes long to import where Triton is installed.
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    own: dict[str, Counter[str]] = defaultdict(Counter)
    calls: list[str] = []  # of the modules that are running, the innermost last
    before: Counter[str] = Counter()

    def attribute() -> None:
        nonlocal before
        now = Counter({str(op): n for op, n in counter.flop_counts["Global"].items()})
        if calls:
            own[calls[-1]] += now - before
        before = now

    def enter(name: str, *_: Any) -> None:
        attribute()
        calls.append(name)

    def leave(*_: Any) -> None:
        attribute()
        calls.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(enter, name))
        module.register_forward_hook(leave)
    with counter:
        model(x)
    return own


def _kind(op: str) -> str:
    """What torch's counter calls, for example, "aten.bmm"."""
    return _ATTENTION if any(name in op for name in _ATTENTION_OPS) else op.removeprefix("aten.")


def _layer(name: str, module: nn.Module, kind: str, macs: int) -> LayerCost:
    if not isinstance(module, nn.Conv2d | nn.Linear):
        return LayerCost(name, kind, (), 0, 0, 0, macs, 0, 0)
    weight, rows = module.weight, module.weight.shape[0]
    kept = weight.numel() if weight.is_meta else int(torch.count_nonzero(weight))
    bias = 0 if module.bias is None else module.bias.numel()
    dense = weight.numel() * weight.element_size()
    sparse = kept * (weight.element_size() + _INDEX_BYTES) + (rows + 1) * _INDEX_BYTES
    rest = bias * weight.element_size()
    return LayerCost(
        name=name,
        kind=kind,
        shape=tuple(weight.shape),
        parameters=weight.numel() + bias,
        weights=weight.numel(),
        kept=kept,
        macs=macs,
        dense_bytes=dense + rest,
        sparse_bytes=min(dense, sparse) + rest,
    )
