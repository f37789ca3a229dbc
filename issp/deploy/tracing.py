"""Traces of the parts of a model that compute the same whatever their input is, by torch.fx."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from issp.nn.leaf import Leaf
from issp.nn.module_swap import CALLS

_SHAPE, _DTYPE = "issp_shape", "issp_dtype"

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Trace:
    """What one module computes.

    Attributes:
        module: its parameters and children serve the graph.
        graph: `shape_of` tells the shapes of the example.
        args, kwargs: those of the module in the example.
        containers: modules whose `forward` the graph has taken up.
    """

    module: nn.Module
    graph: fx.Graph
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    containers: tuple[nn.Module, ...]


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its `forward`."""
    return any(getattr(module, name) for name in CALLS)


def trace_parts(
    model: nn.Module, args: tuple[Any, ...], wanted: Callable[[nn.Module], bool]
) -> list[Trace]:
    """Traces of the largest modules that can be traced and hold a wanted module.

    Control flow that depends on the input ends a trace: then the children are traced, each by
    itself. So do hooks on calls, which a trace would not run.

    Args:
        model: in evaluation mode.
        args: of an example.
        wanted: tells the modules for whose sake a part is traced.
    """
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        calls.setdefault(module, (args, kwargs))

    # The inner module is then a part of its own, and the hooks of the outer one still run.
    hooked = {module for module in model.modules() if has_hooks(module)}
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        model(*args)
    return list(_Parts(calls, wanted, hooked).of(model))


class _Parts:
    """The state of `trace_parts`.

    Args:
        calls: module -> its arguments in the example.
        wanted: see `trace_parts`.
        single: modules that a trace takes for one operation; those that cannot be traced join them.
    """

    def __init__(
        self,
        calls: Mapping[nn.Module, Call],
        wanted: Callable[[nn.Module], bool],
        single: set[nn.Module],
    ) -> None:
        self.calls, self.wanted, self.single = calls, wanted, single
        self.seen: set[nn.Module] = set()

    def of(self, module: nn.Module) -> Iterator[Trace]:
        """The parts of a module, which joins `single` unless it is one part."""
        if module in self.seen or not any(map(self.wanted, module.modules())):
            return
        self.seen.add(module)
        if isinstance(module, nn.ModuleList | nn.ModuleDict):  # which are never called
            for child in module.children():
                yield from self.of(child)
            return
        if _is_leaf(module):
            return
        whole = self._trace(module)
        if whole is None:
            parts = [part for child in module.children() for part in self.of(child)]
            # Once more, with the children that cannot be traced as single operations.
            whole = self._trace(module)
            if whole is None:
                self.single.add(module)
                yield from parts
                return
            yield from (part for part in parts if part.module not in whole.containers)
        yield whole
        for child in module.modules():
            if child in self.single and child is not module:
                yield from self.of(child)

    def _trace(self, module: nn.Module) -> Trace | None:
        # A `forward` that its user has set is not to be replaced.
        if module not in self.calls or "forward" in vars(module):
            return None
        return _trace(module, *self.calls[module], self.single)


def _is_leaf(module: nn.Module) -> bool:
    torchs = module.__module__.startswith(("torch.nn", "torch.ao.nn"))
    return isinstance(module, Leaf) or (torchs and not isinstance(module, nn.Sequential))


class _Tracer(fx.Tracer):
    """Takes torch's layers, sparse layers and those of `single` for one operation each."""

    def __init__(self, single: set[nn.Module]) -> None:
        super().__init__()
        self.single = single
        self.containers: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _is_leaf(m) or m in self.single or "forward" in vars(m):
            return True
        self.containers.append(m)
        return False


def _trace(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], single: set[nn.Module]
) -> Trace | None:
    tracer = _Tracer(single)
    try:
        graph = tracer.trace(module)
        named = [node for node in graph.nodes if node.op == "placeholder"]
        values = list(args) + [
            kwargs[str(node.target)] for node in named[len(args) :] if str(node.target) in kwargs
        ]
        with torch.no_grad():
            _Shapes(fx.GraphModule(tracer.root, graph)).run(*values)
    except Exception:  # the model's own code runs on values that stand for tensors
        return None
    return Trace(module, graph, args, kwargs, tuple(tracer.containers))


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape and dtype of every tensor in `node.meta`."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta[_SHAPE], n.meta[_DTYPE] = tuple(result.shape), result.dtype
        return result


def shape_of(node: object) -> tuple[int, ...] | None:
    """The shape that a node's result has in the example; None where it is no tensor."""
    return node.meta.get(_SHAPE) if isinstance(node, fx.Node) else None


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype that a node's result has in the example; None where it is no tensor."""
    return node.meta.get(_DTYPE)


def attribute(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node calls."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def same_result(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two results of a module agree within a share of their root mean square.

    Args:
        one, other: tensors, or tuples, lists and dicts of them.
        tolerance: share.
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.is_floating_point():
            return torch.equal(one, other)
        size = other.double().square().mean().sqrt()
        error = (one.double() - other.double()).square().mean().sqrt()
        return bool(error <= tolerance * size) or torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(
            same_result(one[k], other[k], tolerance) for k in one
        )
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        pairs = zip(one, other, strict=True) if len(one) == len(other) else [(0, 1)]
        return all(same_result(a, b, tolerance) for a, b in pairs)
    return bool(one == other)
