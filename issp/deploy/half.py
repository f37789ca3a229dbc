"""Keeps runs of sparse layers, and what lies between them, in float16."""

from __future__ import annotations

import torch
from torch import fx

from issp.deploy.fusion import Fusion, find_step, is_elementwise
from issp.deploy.half_layers import HalfConv2d, HalfLayer
from issp.deploy.tracing import Trace, dtype_of


def fuse_half(trace: Trace) -> Fusion:
    """Gives the float16 layers of a trace what they can compute, and one dtype in between."""
    fusion = Fusion(trace)
    inside: set[fx.Node] = set()
    for node, layer in fusion.called(HalfLayer):
        is_conv = isinstance(layer, HalfConv2d)
        step = find_step(trace.module, node, scales=is_conv, shuffles=is_conv)
        if step is None or dtype_of(step.x) not in (torch.float32, torch.bfloat16):
            continue
        inside.add(fusion.replace(step, node.target, (step.x,), **step.epilogue()))
        fusion.layers.append(layer)
    for node in fusion.graph.nodes:
        if is_elementwise(trace.module, node) and inside.intersection(node.all_input_nodes):
            inside.add(node)
    _convert(fusion.graph, inside)
    return fusion


def _convert(graph: fx.Graph, inside: set[fx.Node]) -> None:
    """Converts what nodes inside read from outside, and the reverse."""
    entered: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node in inside:
            for value in node.all_input_nodes:
                if value not in inside:
                    if value not in entered:
                        with graph.inserting_before(node):
                            entered[value] = graph.call_method("half", (value,))
                    node.replace_input_with(value, entered[value])
    for node in inside:
        others = [user for user in node.users if user not in inside]
        if others:
            with graph.inserting_after(node):
                left = graph.call_method("to", (node, dtype_of(node)))
            for user in others:
                user.replace_input_with(node, left)
