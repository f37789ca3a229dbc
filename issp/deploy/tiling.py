"""Keeps runs of layers in the tile layout: images are converted where a run begins and ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from issp.deploy.fusion import Fusion, Step, find_step
from issp.deploy.tiled_layers import (
    PictureConv2d,
    TapConv2d,
    TiledConv2d,
    TiledLayer,
    TiledLinear,
    compute_chain,
    picture_to_tiles,
    tokens_from_tiles,
    tokens_to_tiles,
)
from issp.deploy.tracing import Trace, attribute, dtype_of, shape_of
from issp.ops.schemas.tiles import TILED_ACTIVATIONS
from issp.ops.tiles import TiledImage, from_tiles, to_tiles


def fuse_tiles(trace: Trace) -> Fusion:
    """Gives the tiled layers of a trace all that they can compute, in one layout."""
    fusion = Fusion(trace)
    tiled: dict[fx.Node, bool] = {}  # call -> whether its layer is linear
    plain: set[fx.Node] = set()  # calls that give no tiles
    pictures: set[fx.Node] = set()  # calls that read another layout of their input
    for node, layer in fusion.called(TiledLayer):
        is_linear = isinstance(layer, TiledLinear)
        step = find_step(trace.module, node, scales=True, shuffles=not is_linear)
        if step is None or dtype_of(step.x) not in _CONVERTED:
            continue
        fusion.layers.append(layer)
        if isinstance(layer, TapConv2d):
            step = Step(node, step.x)
            call = fusion.replace(step, node.target, (step.x,), dtype=dtype_of(node))
            tiled[call] = False
            plain.add(call)
            continue
        epilogue: dict[str, Any] = {"residual": step.residual, "activation": step.activation}
        epilogue["scale"] = step.scale
        if isinstance(layer, TiledConv2d):
            epilogue["shuffle"] = step.shuffle
        call = fusion.replace(step, node.target, (step.x,), **epilogue)
        tiled[call] = is_linear
        if isinstance(layer, PictureConv2d):
            pictures.add(call)
    conversions = _Conversions(fusion.graph, tiled, plain, pictures)
    conversions.insert()
    calls = tiled.keys() - plain
    # A picture in tiles has more channels than its shape says: no result may lie there.
    made = conversions.converted.items()
    converted = [node for (_, convert), node in made if convert is not picture_to_tiles]
    _reuse_memory(fusion.graph, {*calls, *converted}, calls)
    for run in _runs(fusion.graph, calls):
        _chain(fusion, run)
    # What hooks of a layer in the run would see are tiles.
    fusion.modules += fusion.layers
    return fusion


_CONVERTED = (torch.float32, torch.float16, torch.bfloat16)


class _Conversions:
    """Converts what calls read and give where the neighbour is not in the same layout.

    Args:
        graph: of the calls.
        calls: call of a tiled layer -> whether the layer is linear.
        plain: those whose results are in no layout.
        pictures: those whose inputs `picture_to_tiles` makes.
    """

    def __init__(
        self,
        graph: fx.Graph,
        calls: dict[fx.Node, bool],
        plain: Collection[fx.Node],
        pictures: Collection[fx.Node],
    ) -> None:
        self.graph, self.calls, self.plain, self.pictures = graph, calls, plain, pictures
        self.converted: dict[tuple[fx.Node, Callable[..., TiledImage]], fx.Node] = {}
        self.tokens: dict[fx.Node, fx.Node] = {}  # call of a linear layer -> tokens of its shape

    def insert(self) -> None:
        """Inserts all conversions."""
        for call, is_linear in self.calls.items():
            tensors = [call.args[0], call.kwargs.get("residual")]
            for value in tensors:
                if isinstance(value, fx.Node):
                    source = self._tiles(value, is_linear, call)
                    call.replace_input_with(value, source)
            if is_linear:
                first = tensors[0]
                assert isinstance(first, fx.Node)
                self.tokens[call] = self.tokens.get(first, first)
        # Linear layers first: the tokens whose shape they take may be a convolution's result.
        for call, is_linear in sorted(self.calls.items(), key=lambda item: not item[1]):
            if call not in self.plain:
                self._leave(call, is_linear)

    def _tiles(self, value: fx.Node, is_linear: bool, call: fx.Node) -> fx.Node:
        convert = tokens_to_tiles if is_linear else to_tiles
        if value is call.args[0] and call in self.pictures:
            convert = picture_to_tiles
        elif self.calls.get(value) == is_linear and value not in self.plain:
            return value
        key = (value, convert)
        if key not in self.converted:
            with self.graph.inserting_before(call):
                converted = self.graph.call_function(convert, (value,))
            converted.meta = dict(value.meta)
            self.converted[key] = converted
        return self.converted[key]

    def _leave(self, call: fx.Node, is_linear: bool) -> None:
        conversions = set(self.converted.values())
        others = [
            user for user in call.users if user in conversions or self.calls.get(user) != is_linear
        ]
        if not others:
            return
        with self.graph.inserting_after(call):
            dtype = dtype_of(call)
            if is_linear:
                args = (call, self.tokens[call], dtype)
                left = self.graph.call_function(tokens_from_tiles, args)
            else:
                left = self.graph.call_function(from_tiles, (call, dtype))
        for user in others:
            user.replace_input_with(call, left)


def _reuse_memory(graph: fx.Graph, images: Collection[fx.Node], calls: Collection[fx.Node]) -> None:
    """Lets layers write where an image lies that nobody reads any more: new memory is slow.

    Args:
        graph: whose values in tiles are used by nobody outside of it.
        images: all nodes that give an image in tiles.
        calls: those of layers.
    """
    at = {node: i for i, node in enumerate(graph.nodes)}
    last_use = {image: max(at[user] for user in image.users) for image in images}
    free: list[fx.Node] = []  # images that lie in different places
    for node in [node for node in graph.nodes if node in last_use]:
        if node in calls:
            residual, x = node.kwargs["residual"], node.args[0]
            for image in free:
                is_dead = last_use[image] < at[node]
                is_dead |= image is residual and image is not x and last_use[image] == at[node]
                if is_dead and shape_of(image) == shape_of(node):
                    node.update_kwarg("out", image)
                    free.remove(image)
                    break
        free.append(node)


def _runs(graph: fx.Graph, calls: Collection[fx.Node]) -> list[list[fx.Node]]:
    """Calls that follow each other immediately, of which nobody else reads all but the last."""
    runs = []
    for is_call, nodes in itertools.groupby(graph.nodes, lambda node: node in calls):
        rest = list(nodes) if is_call else []
        while rest:
            run = next(r for n in range(len(rest), 0, -1) if not _read_outside(r := rest[:n]))
            runs.append(run)
            rest = rest[len(run) :]
    return [run for run in runs if len(run) > 1]


def _read_outside(run: list[fx.Node]) -> bool:
    """Whether others need what another call than the last gives, for more than its memory."""
    others = [user for call in run[:-1] for user in call.users if user not in run]
    return any(call in _read_by(user) for user in others for call in run[:-1])


def _read_by(user: fx.Node) -> list[Any]:
    return [*user.args, *(x for name, x in user.kwargs.items() if name != "out")]


def _chain(fusion: Fusion, run: list[fx.Node]) -> None:
    """Makes one call of `compute_chain` of a run of calls of layers."""
    graph = fusion.graph
    given = dict.fromkeys(x for call in run for x in call.all_input_nodes if x not in run)
    plan = _plan(fusion, run, {image: i for i, image in enumerate(given)})
    with graph.inserting_before(run[-1].next):
        layers = tuple(graph.get_attr(str(call.target)) for call in run)
        scales = tuple(call.kwargs["scale"] for call in run)
        args: Any = (tuple(given), layers, plan, scales)
        run[-1].replace_all_uses_with(graph.call_function(compute_chain, args))
    for call in reversed(run):
        for user in list(call.users):  # they would write where it lies, which is free now
            user.kwargs = {name: x for name, x in user.kwargs.items() if name != "out"}
        graph.erase_node(call)


def _plan(fusion: Fusion, run: list[fx.Node], slots: dict[fx.Node, int]) -> tuple[int, ...]:
    """The plan of `issp.ops.tiles.tiled_chain`; slots: of the images that are given."""
    plan: list[int] = []
    count = len(slots)
    for call in run:
        kwargs: Any = call.kwargs
        x: Any = call.args[0]
        layer = attribute(fusion.module, call)
        assert isinstance(layer, TiledLayer)
        shape = layer.get_parameter("weight").shape
        residual, out = kwargs["residual"], kwargs.get("out")
        target = count if out is None else slots[out]
        plan += [slots[x], -1 if residual is None else slots[residual], target]
        plan += [shape[0], shape[2] if len(shape) == 4 else 1, kwargs.get("shuffle", 1)]
        plan.append(TILED_ACTIVATIONS.index(kwargs["activation"]))
        count += out is None
        slots[call] = target
    return tuple(plan)
