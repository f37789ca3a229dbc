"""Layers directly before a residual addition, found in the graph of the model.

SRP and ASSL call them constrained: what they prune is added to one stream (docs/method.md, 3.2).

A residual addition adds a branch to a value that the branch is computed from. A layer stands
directly before it when nothing but these lies between: a factor or a summand that does not depend
on the input, dropout, batch normalization (in evaluation a factor per channel), reshaping, slicing,
moving and resampling of elements, casts, and further additions. The value that is added to (the
head of a stream, such as EDSR's conv_first) is not before the addition. In a projection shortcut,
f(x) + g(x), both sides end in layers, and both layers are before it. Biases, position tables,
attention masks and the mean of a network do not depend on the input and are no side of an addition.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import batchnorm, dropout, padding
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from issp.nn.names import named_modules, unwrap
from issp.utils.errors import first_line

# Names of functions and methods without underscores.
_SUMS = {"add", "sub", "subtract", "iadd", "isub", "radd", "rsub"}
_PRODUCTS = {"mul", "multiply", "imul", "rmul"}
_QUOTIENTS = {"div", "divide", "truediv", "itruediv"}
_NUMBERS = {"size", "dim", "ndimension", "numel", "stride", "element_size", "storage_offset"}
_PASSING_NAMES = """
    reshape reshape_as view view_as flatten unflatten ravel squeeze unsqueeze contiguous clone
    detach expand expand_as broadcast_to repeat tile as_strided unfold permute transpose t swapaxes
    swapdims movedim moveaxis roll flip pixel_shuffle pixel_unshuffle channel_shuffle pad
    interpolate upsample chunk split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split
    narrow select index_select getitem get to type type_as float double half bfloat16 cpu cuda
    identity neg negative positive batch_norm dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_alpha_dropout
"""
# They reshape, slice, move, resample or cast; "get" is an attribute such as x.T.
_PASSING = frozenset(_PASSING_NAMES.split())
_PASSING_MODULES: tuple[type, ...] = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.Upsample),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(dropout._DropoutNd, batchnorm._BatchNorm, padding._ConstantPadNd),
    *(padding._ReflectionPadNd, padding._ReplicationPadNd),
)
_TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH", "data"}


class Weighted(Protocol):
    """What has a weight: `issp.nn.selection.Layer`, torch's layers."""

    @property
    def weight(self) -> Any: ...


L = TypeVar("L", bound=Weighted)


def constrained_layers(
    model: nn.Module,
    types: type | tuple[type, ...] = (nn.Conv2d, nn.Linear),
    example: Tensor | tuple[Any, ...] | None = None,
) -> list[str]:
    """The layers of a model that stand directly before a residual addition, see above.

    The graph is torch.fx's symbolic trace, or where fx cannot trace, what a copy of the model does
    with the example. The model, its buffers, hooks and mode, and torch's random state stay as they
    are.

    Args:
        model: with or without wrappers.
        types: module classes that count as layers.
        example: an input, or the tuple of all inputs, for models that torch.fx cannot trace; the
            networks of `issp.models` need none.

    Returns:
        Names as in `issp.nn.names.named_modules`, in that order; of tied weights the first name.

    Raises:
        ValueError: torch.fx cannot trace the model, and there is no example.
    """
    network = _copy(unwrap(model))
    names = _layer_names(network, types)
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(sorted(d.index for d in devices)):
        try:
            graph = _trace(network, names)
        except Exception as error:  # a symbol can make anyone's forward raise anything
            graph, inputs = None, _inputs(network, example, error)
        additions = _read(graph, network, names) if graph else _run(network, names, inputs)
    return [name for name in dict.fromkeys(names.values()) if name in additions.before]


def shape_groups(layers: Iterable[L]) -> list[list[L]]:
    """The layers that can share indices: two or more whose weights have one shape.

    Args:
        layers: in module order, which is kept inside a group and among the groups.

    Returns:
        One group per shape. A layer alone in its shape is in none: it is free.
    """
    groups: dict[tuple[int, ...], list[L]] = {}
    for layer in layers:
        groups.setdefault(tuple(layer.weight.shape), []).append(layer)
    return [group for group in groups.values() if len(group) > 1]


@dataclass(frozen=True, eq=False)
class _Value:
    """A value that depends on the input; what passes a value on keeps it.

    Args:
        ancestors: set of bits, one for each value that this one is computed from, itself included.
        bit: its own.
        layer: name of the layer that has computed it, or "".
        terms: of a sum, the values that are no sums; itself otherwise, as ().
    """

    ancestors: int
    bit: int
    layer: str = ""
    terms: tuple[_Value, ...] = ()

    def is_from(self, other: _Value) -> bool:
        return self is not other and bool(self.ancestors & other.bit)


class _Additions:
    """What a graph computes, operation by operation.

    Attributes:
        before: names of the layers directly before a residual addition.
    """

    def __init__(self) -> None:
        self.before: set[str] = set()
        self._next_bit = 1

    def compute(
        self, operands: Iterable[_Value], layer: str = "", terms: tuple[_Value, ...] = ()
    ) -> _Value:
        bit, self._next_bit = self._next_bit, self._next_bit << 1
        ancestors = bit
        for operand in operands:
            ancestors |= operand.ancestors
        return _Value(ancestors, bit, layer, terms)

    def call(self, name: str, operands: Sequence[_Value | None]) -> _Value | None:
        """The result of a function or method.

        Args:
            name: `__name__` of the function.
            operands: its arguments; None for those that do not depend on the input.
        """
        values = [value for value in operands if value is not None]
        name = name.partition(".")[0].strip("_")
        if not values or name in _NUMBERS or name.startswith("new_") or name.endswith("_like"):
            return None
        if name in _SUMS and len(values) == 2:
            return self._add(*values)
        if name in _SUMS | _PRODUCTS and len(values) == 1:
            return values[0]
        if operands[0] is not None and (
            name in _PASSING or (name in _QUOTIENTS and len(values) == 1)
        ):
            return operands[0]
        return self.compute(values)

    def _add(self, a: _Value, b: _Value) -> _Value:
        a_terms, b_terms = a.terms or (a,), b.terms or (b,)
        is_residual = False
        for branch, stream in ((a_terms, b_terms), (b_terms, a_terms)):
            for term in branch:
                if any(term.is_from(other) for other in stream):
                    is_residual = True
                    self.before.add(term.layer)
        terms = dict.fromkeys(a_terms + b_terms)
        is_shortcut = a is not b and a.ancestors & b.ancestors and all(t.layer for t in terms)
        if is_shortcut and not is_residual:
            self.before.update(term.layer for term in terms)
        return self.compute((a, b), terms=tuple(terms))


_HOOKS = [
    key
    for key, value in vars(nn.Module()).items()
    if isinstance(value, dict) and ("_forward" in key or "_backward" in key)
]


def _copy(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode with the same parameters, without hooks and inner wrappers."""
    memo: dict[int, Any] = {id(p): p for p in network.parameters()}
    modules = list(network.modules())
    for module in modules:
        # Results that a module has stored cannot be copied.
        results = [x for x in vars(module).values() if isinstance(x, Tensor) and not x.is_leaf]
        memo |= {id(x): x for x in results}
        memo |= {id(vars(module)[key]): OrderedDict() for key in _HOOKS}
    for module in reversed(modules):
        if unwrap(module) is not module:
            memo[id(module)] = copy.deepcopy(unwrap(module), memo)
    return copy.deepcopy(network, memo).eval()


def _layer_names(network: nn.Module, types: type | tuple[type, ...]) -> dict[int, str]:
    """By id of each module that is a layer: its name, of tied weights the first."""
    first: dict[int, str] = {}
    names: dict[int, str] = {}
    for name, module in named_modules(network).items():
        if isinstance(module, types):
            weight = module._parameters.get("weight")
            owner = id(module if weight is None else weight)
            names.setdefault(id(module), first.setdefault(owner, name))
    return names


def _layer(module: nn.Module, names: dict[int, str]) -> str:
    """The name of the layer that has computed a module's result, or ""."""
    if isinstance(module, nn.MultiheadAttention):
        return names.get(id(module.out_proj), "")
    return names.get(id(module), "")


class _Tracer(fx.Tracer):
    """Takes layers and torch's own modules for one operation, but not torch's blocks of them."""

    def __init__(self, layers: Collection[int]) -> None:
        super().__init__()
        self._layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) in self._layers or isinstance(m, nn.MultiheadAttention):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not any(m.children())


def _trace(network: nn.Module, names: dict[int, str]) -> fx.Graph:
    """The graph of a call with the arguments alone that have no default."""
    parameters = inspect.signature(network.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return _Tracer(names).trace(network, defaults or None)


def _read(graph: fx.Graph, network: nn.Module, names: dict[int, str]) -> _Additions:
    """Follows the values through a traced graph."""
    additions = _Additions()
    values: dict[Any, _Value | None] = {}
    for node in graph.nodes:
        leaves = tree_leaves((node.args, node.kwargs))
        operands = [values.get(x) if isinstance(x, fx.Node) else None for x in leaves]
        module = network.get_submodule(node.target) if node.op == "call_module" else None
        if node.op == "placeholder":
            values[node] = additions.compute(())
        elif module is not None:
            values[node] = _call_module(additions, module, operands, names)
        elif node.target is getattr:
            values[node] = operands[0] if node.args[1] in _TENSOR_ATTRIBUTES else None
        elif node.op in ("call_function", "call_method"):
            values[node] = additions.call(_name(node.target), operands)
        if node.args and _is_inplace(node, module):
            values[node.args[0]] = values[node]
    return additions


def _call_module(
    additions: _Additions,
    module: nn.Module,
    operands: Sequence[_Value | None],
    names: dict[int, str],
) -> _Value | None:
    values = [value for value in operands if value is not None]
    if values and isinstance(module, _PASSING_MODULES):
        return values[0]
    return additions.compute(values, _layer(module, names)) if values else None


def _name(function: Any) -> str:
    return function if isinstance(function, str) else getattr(function, "__name__", "")


def _is_inplace(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node writes into its first argument, which later nodes may read."""
    if module is not None:
        return getattr(module, "inplace", False)
    name = _name(node.target)
    is_method = name.endswith("_") and not name.endswith("__")
    return (
        is_method
        or name.startswith("i")
        and name in _SUMS | _PRODUCTS | _QUOTIENTS
        or bool(node.kwargs.get("inplace"))
    )


def _inputs(
    network: nn.Module, example: Tensor | tuple[Any, ...] | None, error: Exception
) -> tuple[Any, ...]:
    """The inputs to run a network with; made here for the networks of issp.models."""
    if example is not None:
        return example if isinstance(example, tuple) else (example,)
    channels, side = getattr(network, "channels", None), getattr(network, "pad_multiple", None)
    if not isinstance(channels, int) or not isinstance(side, int):
        raise ValueError(
            f"torch.fx cannot trace the model ({first_line(error)}), so the layers before residual "
            "additions are unknown: give an input as example=, or name the layers by constrained="
        ) from error
    size: Any = (side, side)
    if getattr(network, "absolute_pos_embed", None) is not None:
        size = network.img_size  # the only one that it takes
    return (next(network.parameters()).new_zeros(1, channels, *size),)


class _Recorder(TorchFunctionMode):
    """Follows the values through a run: by functions, and by modules where those are hidden."""

    def __init__(self, network: nn.Module, names: dict[int, str]) -> None:
        super().__init__()
        self.additions = _Additions()
        self._names = names
        # With the tensors: while one lives, no other has its id.
        self._values: dict[int, tuple[Tensor, _Value]] = {}
        for module in network.modules():
            module.register_forward_hook(self._after_module, with_kwargs=True)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        value = self.additions.call(_name(func), self._operands((args, kwargs)))
        self._set(args[0] if func is Tensor.__setitem__ else result, value)
        return result

    def _after_module(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        values = [value for value in self._operands((args, kwargs)) if value is not None]
        layer = _layer(module, self._names)
        hidden = [x for x in _tensors(result) if layer or id(x) not in self._values]
        if values and hidden:
            self._set(hidden, self.additions.compute(values, layer))

    def set_inputs(self, inputs: tuple[Any, ...]) -> None:
        for x in _tensors(inputs):
            self._set(x, self.additions.compute(()))

    def _operands(self, arguments: Any) -> list[_Value | None]:
        return [self._values.get(id(x), (x, None))[1] for x in tree_leaves(arguments)]

    def _set(self, result: Any, value: _Value | None) -> None:
        if value is not None:
            self._values |= {id(x): (x, value) for x in _tensors(result)}


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _run(network: nn.Module, names: dict[int, str], inputs: tuple[Any, ...]) -> _Additions:
    """Follows the values through a call of the network, which gets hooks."""
    recorder = _Recorder(network, names)
    recorder.set_inputs(inputs)
    with recorder:
        network(*inputs)
    return recorder.additions
