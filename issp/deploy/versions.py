"""Several ways to compute one model, of which one is in use at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from issp.deploy.fused_forward import FusedProgram, remove_
from issp.deploy.fusion import Fusion, fuse
from issp.deploy.half import fuse_half
from issp.deploy.half_layers import HalfLayer
from issp.deploy.tiled_layers import TiledLayer
from issp.deploy.tiling import fuse_tiles
from issp.deploy.tracing import Trace, same_result, trace_parts
from issp.nn.layers import SparseLayer


@dataclass(frozen=True)
class Part:
    """A part of a model that computes by a program.

    Attributes:
        trace: of the module.
        program: what the module does instead.
        layers: that do more than before.
    """

    trace: Trace
    program: FusedProgram
    layers: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Version:
    """A way to compute a model.

    Attributes:
        replacements: layer of the dense model -> what replaces it.
        parts: that compute by programs.
    """

    replacements: Mapping[nn.Module, nn.Module] = field(default_factory=dict)
    parts: Sequence[Part] = ()


DENSE = Version()


@dataclass(frozen=True)
class Kind:
    """How layers of a kind compute what lies between them.

    Attributes:
        layer: their class.
        fuse: makes a program of a trace.
        tolerance: what rounding may change in a result, as a share of its root mean square; a
            program that computes something else is far off.
        has_gradient: whether gradients flow through the program.
    """

    layer: type[nn.Module]
    fuse: Callable[[Trace], Fusion]
    tolerance: float
    has_gradient: bool


SPARSE = Kind(SparseLayer, fuse, 1e-2, has_gradient=True)
TILED = Kind(TiledLayer, fuse_tiles, 0.1, has_gradient=False)
HALF = Kind(HalfLayer, fuse_half, 0.1, has_gradient=False)


class Versions:
    """Changes a model from one version to another, in place.

    Args:
        root: holds the dense model, in evaluation mode, as its only child.
        args: of the example.
    """

    def __init__(self, root: nn.Sequential, args: tuple[Any, ...]) -> None:
        self.root, self.args = root, args
        self._children = [
            (parent, attribute, child)
            for parent in root.modules()
            for attribute, child in parent._modules.items()
            if isinstance(child, nn.Conv2d | nn.Linear)
        ]
        self._current = DENSE

    def use(self, version: Version) -> None:
        """Puts the layers and programs of a version in their places."""
        for part in self._current.parts:
            remove_(part.trace.module)
        for parent, attribute, child in self._children:
            parent._modules[attribute] = version.replacements.get(child, child)
        for part in version.parts:
            part.program.install()
        self._current = version

    @torch.no_grad()
    def make(self, replacements: Mapping[nn.Module, nn.Module], kind: Kind) -> Version:
        """The version with other layers, and the programs that give the result of the dense model.

        Args:
            replacements: layer -> what replaces it.
            kind: of the layers that programs are made for.
        """
        self.use(Version(replacements))
        traces = trace_parts(self.root[0], self.args, lambda m: isinstance(m, kind.layer))
        made = [part for trace in traces if (part := _part(trace, kind)) is not None]
        parts = [part for part in made if self._is_right(part, kind, replacements)]
        return Version(replacements, parts)

    @torch.no_grad()
    def run(self, version: Version) -> None:
        """Computes the example by a version."""
        self.use(version)
        self.root[0](*self.args)

    @torch.no_grad()
    def run_part(self, version: Version, part: Part) -> None:
        """As `run`, but the module of a part alone."""
        self.use(version)
        part.trace.module(*part.trace.args, **part.trace.kwargs)

    def _is_right(
        self, part: Part, kind: Kind, replacements: Mapping[nn.Module, nn.Module]
    ) -> bool:
        trace = part.trace
        self.use(Version(replacements))
        result = part.program(*trace.args, **trace.kwargs)
        self.use(DENSE)
        return same_result(result, trace.module(*trace.args, **trace.kwargs), kind.tolerance)


def _part(trace: Trace, kind: Kind) -> Part | None:
    fusion = kind.fuse(trace)
    if not fusion.layers:
        return None
    program = FusedProgram(fusion.graph, trace.module, fusion.modules, kind.has_gradient)
    return Part(trace, program, tuple(fusion.layers))
