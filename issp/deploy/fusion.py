"""Finds what follows a layer in a trace and can be computed by the layer itself."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from issp.deploy.tracing import Trace, attribute, shape_of
from issp.nn.layers import SparseLayer

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADD = {operator.add, torch.add, "add", "__add__", "__radd__"}
_ADD_INPLACE = {operator.iadd, "add_", "__iadd__"}
_MULTIPLY = {operator.mul, torch.mul, torch.multiply, "mul", "multiply", "__mul__", "__rmul__"}


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
    """

    node: fx.Node
    x: fx.Node
    activation: str = "none"
    scale: float = 1.0
    residual: fx.Node | None = None
    shuffle: int = 1
    fused: list[fx.Node] = field(default_factory=list)

    @property
    def last(self) -> fx.Node:
        """The node whose result is the step's."""
        return self.fused[-1] if self.fused else self.node


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
    return step


def _extend(module: nn.Module, step: Step, user: fx.Node, scales: bool, shuffles: bool) -> bool:
    """Adds what a node computes to the step, if the layer can compute it as the next thing."""
    plain = step.scale == 1.0 and step.residual is None and step.shuffle == 1
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
    if isinstance(layer, nn.PixelShuffle):
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


def replace_step(graph: fx.Graph, step: Step, make: Callable[[], fx.Node]) -> fx.Node:
    """Puts a new node in the place of a step's nodes.

    Args:
        graph: of the step.
        step: to be replaced.
        make: makes the new node; everything that the step reads is computed before it.
    """
    last = step.last
    with graph.inserting_before(last):
        new = make()
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    for node in [*reversed(step.fused), step.node]:
        graph.erase_node(node)
    return new


def fuse(trace: Trace) -> fx.Graph | None:
    """The trace with activations and residual additions in its sparse layers; None: there are none.

    A factor before an addition is computed with it.
    """
    graph = copy.deepcopy(trace.graph)
    changed = False
    for node in list(graph.nodes):
        layer = attribute(trace.module, node)
        if isinstance(layer, SparseLayer) and layer.mask == "fixed" and layer.activation == "none":
            changed |= _fuse_layer(trace.module, graph, node)
    if changed:
        for node in list(graph.nodes):
            _add_scaled(graph, node)
    return graph if changed else None


def _fuse_layer(module: nn.Module, graph: fx.Graph, node: fx.Node) -> bool:
    step = find_step(module, node)
    if step is None or not step.fused:
        return False
    kwargs: dict[str, Any] = {"residual": step.residual, "activation": step.activation}
    replace_step(graph, step, lambda: graph.call_module(str(node.target), (step.x,), kwargs))
    return True


def _add_scaled(graph: fx.Graph, node: fx.Node) -> None:
    """Makes x + y * factor one pass over memory, where the node is the product."""
    factor = _factor(node)
    if factor is None or len(node.users) != 1:
        return
    scaled = next(x for x in node.args if isinstance(x, fx.Node))
    step = Step(node, scaled)
    user = next(iter(node.users))
    other = _residual(node, user)
    if other is not None and user.target not in _ADD_INPLACE:
        step.fused.append(user)
        args = (other, scaled)
        replace_step(graph, step, lambda: graph.call_function(torch.add, args, {"alpha": factor}))
