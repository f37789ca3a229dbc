"""Finds what follows a layer in a trace and can be computed by the layer itself."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from issp.deploy.tracing import Trace, attribute, has_hooks, shape_of
from issp.nn.layers import Conv2dMixin, SparseLayer

Layer = TypeVar("Layer", bound=nn.Module)

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADD = {operator.add, torch.add, "add", "__add__", "__radd__"}
_ADD_INPLACE = {operator.iadd, "add_", "__iadd__"}
_IN_PLACE = {*_ADD_INPLACE, F.relu_, torch.relu_, "relu_"}
_MULTIPLY = {operator.mul, torch.mul, torch.multiply, "mul", "multiply", "__mul__", "__rmul__"}
# Of torch and of issp: another subclass of PixelShuffle may do something else.
_SHUFFLES = ("torch.", "issp.")


@dataclass
class Step:
    """A layer and what is computed with it: activation(layer(x)) * scale + residual, shuffled.

    Attributes:
        node: the call of the layer.
        x: its input.
        activation: "none", "relu" or "gelu".
        scale: a factor.
        residual: what is added.
        shuffle: the factor of a PixelShuffle.
        fused: the nodes that the step replaces, beside that of the layer.
        modules: those that the fused nodes call.
    """

    node: fx.Node
    x: fx.Node
    activation: str = "none"
    scale: float = 1.0
    residual: fx.Node | None = None
    shuffle: int = 1
    fused: list[fx.Node] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    @property
    def last(self) -> fx.Node:
        """The node whose result is the step's."""
        return self.fused[-1] if self.fused else self.node

    def epilogue(self) -> dict[str, Any]:
        """What a sparse layer's call takes beside its input."""
        epilogue: dict[str, Any] = {"residual": self.residual, "activation": self.activation}
        if self.scale != 1.0 or self.shuffle != 1:
            epilogue |= {"scale": self.scale, "shuffle": self.shuffle}
        return epilogue


def find_step(
    module: nn.Module, node: fx.Node, *, scales: bool = False, shuffles: bool = False
) -> Step | None:
    """The step that begins with a node's layer; None: the layer is not called in the usual way.

    Args:
        module: that of the trace.
        node: calls a layer.
        scales, shuffles: whether the layer can multiply by a factor, and shuffle pixels.
    """
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    step = Step(node, node.args[0])
    while len(step.last.users) == 1:
        user = next(iter(step.last.users))
        if not _extend(module, step, user, scales, shuffles):
            break
        step.fused.append(user)
        called = attribute(module, user)
        step.modules += [] if called is None else [called]
    return step


def _extend(module: nn.Module, step: Step, user: fx.Node, scales: bool, shuffles: bool) -> bool:
    """Adds what a node computes to the step, if the layer can compute it as the next thing."""
    plain = step.scale == 1.0 and step.residual is None and step.shuffle == 1
    called = attribute(module, user)
    if called is not None and has_hooks(called):
        return False
    if isinstance(called, nn.Dropout):  # nothing in evaluation mode
        return True
    activation = _activation(module, user)
    if activation and plain and step.activation == "none":
        step.activation = activation
        return True
    factor = _factor(user)
    if factor is not None and scales and plain:
        step.scale = factor
        return True
    shuffle = _shuffle(module, user)
    if shuffle and shuffles and plain:
        step.shuffle = shuffle
        return True
    residual = _residual(step.last, user)
    if residual is not None and step.residual is None and step.shuffle == 1:
        step.residual = residual
        return True
    return False


def _activation(module: nn.Module, node: fx.Node) -> str:
    layer = attribute(module, node)
    if type(layer) is nn.ReLU or (node.op != "call_module" and node.target in _RELU):
        return "relu"
    if type(layer) is nn.GELU:
        return "gelu" if layer.approximate == "none" else ""
    if node.op == "call_function" and node.target is F.gelu:
        return "gelu" if node.kwargs.get("approximate", "none") == "none" else ""
    return ""


def _shuffle(module: nn.Module, node: fx.Node) -> int:
    layer = attribute(module, node)
    if isinstance(layer, nn.PixelShuffle) and type(layer).__module__.startswith(_SHUFFLES):
        return layer.upscale_factor
    if node.op == "call_function" and node.target is F.pixel_shuffle and len(node.args) == 2:
        factor = node.args[1]
        return factor if isinstance(factor, int) else 0
    return 0


def _factor(node: fx.Node) -> float | None:
    if node.op not in ("call_function", "call_method") or node.target not in _MULTIPLY:
        return None
    numbers = [x for x in node.args if isinstance(x, int | float) and not isinstance(x, bool)]
    return float(numbers[0]) if len(node.args) == 2 and len(numbers) == 1 else None


def _residual(last: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other operand of an addition without broadcasting."""
    if node.op not in ("call_function", "call_method") or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    # A sum that is written to the other operand would be missing there.
    if not (node.target in _ADD or node.target in _ADD_INPLACE and first is last):
        return None
    other: Any = second if first is last else first
    shape = shape_of(last)
    if other is last or shape is None or shape_of(other) != shape:
        return None
    return other


def is_elementwise(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node adds two results, scales, activates, shuffles or, elsewhere, drops pixels."""
    known = bool(_activation(module, node) or _shuffle(module, node))
    called = attribute(module, node)
    if called is not None:
        known = (known or isinstance(called, nn.Dropout)) and not has_hooks(called)
        in_place = getattr(called, "inplace", False)
    elif node.op in ("call_function", "call_method"):
        known = known or node.target in _ADD or node.target in _ADD_INPLACE
        known = known or _factor(node) is not None
        in_place = node.target in _IN_PLACE or node.kwargs.get("inplace", False)
    else:
        return False
    # What is written in place has been read by others before, in another dtype.
    first = node.all_input_nodes[:1]
    return known and not (in_place and any(len(x.users) > 1 for x in first))


class Fusion:
    """A trace in which layers compute what lies between them too.

    Args:
        trace: is left as it is.

    Attributes:
        graph: the program.
        modules: that the program does not call, though the model does: nobody may have hooks on
            them, and all must be in evaluation mode.
        layers: that have more to compute than before.
    """

    def __init__(self, trace: Trace) -> None:
        self.module = trace.module
        self.graph = copy.deepcopy(trace.graph)
        self.modules = list(trace.containers)
        self.layers: list[nn.Module] = []

    def called(self, kind: type[Layer]) -> list[tuple[fx.Node, Layer]]:
        """The nodes that call a layer of a kind, and the layers."""
        pairs = [(node, attribute(self.module, node)) for node in self.graph.nodes]
        return [(node, layer) for node, layer in pairs if isinstance(layer, kind)]

    def replace(self, step: Step, target: Any, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
        """Puts a call in the place of a step's nodes, where all that the step reads is computed.

        Args:
            step: of this graph.
            target: a function, or the name of a layer.
            args, kwargs: of the call.
        """
        last = step.last
        make = self.graph.call_module if isinstance(target, str) else self.graph.call_function
        with self.graph.inserting_before(last):
            new = make(target, args, kwargs)
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        for node in [*reversed(step.fused), step.node]:
            self.graph.erase_node(node)
        self.modules += step.modules
        return new


def fuse(trace: Trace) -> Fusion:
    """Gives activations and residual additions to the sparse layers of a trace.

    Convolutions also get factors and PixelShuffles. What is left of factors before an addition is
    computed with it.
    """
    fusion = Fusion(trace)
    for node, layer in fusion.called(SparseLayer):
        is_conv = isinstance(layer, Conv2dMixin)
        step = find_step(trace.module, node, scales=is_conv, shuffles=is_conv)
        if step and step.fused and layer.mask == "fixed" and layer.activation == "none":
            fusion.replace(step, node.target, (step.x,), **step.epilogue())
            fusion.layers.append(layer)
    if fusion.layers:
        for node in list(fusion.graph.nodes):
            _add_scaled(fusion, node)
    return fusion


def _add_scaled(fusion: Fusion, node: fx.Node) -> None:
    """Makes x + y * factor one pass over memory, where the node is the product."""
    factor = _factor(node)
    if factor is None or len(node.users) != 1:
        return
    scaled = next(x for x in node.args if isinstance(x, fx.Node))
    user = next(iter(node.users))
    other = _residual(node, user)
    if other is not None and user.target not in _ADD_INPLACE:
        step = Step(node, scaled, fused=[user])
        fusion.replace(step, torch.add, (other, scaled), alpha=factor)
