"""Modules that compute by another program, in which layers do what lies between them too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _format_import_block
from torch.nn.modules.module import _has_any_global_hook
from torch.package import sys_importer

from issp.deploy.tracing import has_hooks


class FusedProgram:
    """A program that computes what a module's `forward` computes.

    Args:
        graph: the program; its modules are children of `module`.
        module: whose `forward` it can take the place of, see `install`.
        passed: modules that the program does not call, though `forward` does.
        has_gradient: otherwise it is not used where a gradient may be wanted.
    """

    def __init__(
        self,
        graph: fx.Graph,
        module: nn.Module,
        passed: Iterable[nn.Module],
        has_gradient: bool = True,
    ) -> None:
        self.module, self.passed, self.has_gradient = module, tuple(passed), has_gradient
        code = graph.python_code("self")
        # As text, which can be copied and pickled: the names are modules and functions.
        self._source = f"{_format_import_block(code.globals, sys_importer)}\n{code.src}"
        self._compiled: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            names: dict[str, Any] = {}
            exec(self._source, names)  # torch.fx wrote it, as for its own GraphModule
            self._compiled = names["forward"]
        return self._compiled(self.module, *args, **kwargs)

    def is_valid(self, args: Iterable[Any]) -> bool:
        """Whether it computes the same as the module's own `forward` now.

        Not in training mode, under torch.autocast, where torch records or compiles the model,
        where an argument wants a gradient (which activation checkpointing computes from another
        forward pass), nor while somebody has hooks on a module that it passes by, or on all
        modules, or has set a `forward` of its own.
        """
        if self.module.training or torch.compiler.is_compiling():
            return False
        if torch._C._get_tracing_state() is not None:
            return False
        if not self.has_gradient and torch.is_grad_enabled():
            return False
        for x in args:
            if isinstance(x, fx.Proxy):
                return False
            if isinstance(x, Tensor) and (
                x.requires_grad or torch.is_autocast_enabled(x.device.type)
            ):
                return False
        if _has_any_global_hook():
            return False
        return not any(
            module.training or has_hooks(module) or "forward" in vars(module)
            for module in self.passed
        )

    def install(self) -> None:
        """Lets the module compute by this program where that is valid."""
        remove_(self.module)
        own: Any = type(self.module)
        self.module.__class__ = _fused_class(own)
        self.module._fused_program = self  # type: ignore[assignment]


class FusedForward:
    """Mixed into the class of a module that has a `FusedProgram`."""

    _own_class: Any
    _fused_program: FusedProgram

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class is made here and has no name to be found by.
        return _blank, (self._own_class,), self.__dict__


@functools.cache
def _fused_class(own: Any) -> Any:
    """The class of a module of class `own` while it has a program; it has the same name."""

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        program = self._fused_program
        if program.is_valid((*args, *kwargs.values())):
            return program(*args, **kwargs)
        return own.forward(self, *args, **kwargs)

    names = {"forward": forward, "_own_class": own, "__module__": own.__module__}
    return type(own.__name__, (FusedForward, own), names)


def _blank(own: Any) -> nn.Module:
    return object.__new__(_fused_class(own))


def remove_(module: Any) -> None:
    """Gives a module its own class back."""
    if isinstance(module, FusedForward):
        module.__class__ = module._own_class
        del module._fused_program
