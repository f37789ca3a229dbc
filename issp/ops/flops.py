"""FLOPs of the sparse ops, for torch.utils.flop_counter: two for a stored weight and a pixel.

That module takes as long to import as the rest of this package where Triton is installed, so that
the formulas are registered when somebody imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


def register() -> None:
    """Registers the formulas now, or as soon as torch's counter is imported."""
    if _COUNTER in sys.modules:
        _register_formulas(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register_formulas(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register_formulas(counter: ModuleType) -> None:
    op = torch.ops.issp
    counter.register_flop_formula(op.sparse_conv2d)(_conv2d)
    counter.register_flop_formula(op.sparse_conv2d_fused)(_conv2d_fused)
    counter.register_flop_formula(op.sparse_matmul)(_matmul)
    counter.register_flop_formula(op.sparse_conv2d_values_grad)(_conv2d_values_grad)
    counter.register_flop_formula(op.sparse_matmul_values_grad)(_matmul_values_grad)


def _conv2d(x: torch.Size, values: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    return 2 * values.numel() * out_shape[0] * out_shape[2:].numel()


def _conv2d_fused(x: torch.Size, values: torch.Size, *args: Any, **others: Any) -> int:
    return _conv2d(x, values, *args, **others) // args[-1] ** 2


def _conv2d_values_grad(
    x: torch.Size, grad: torch.Size, *_: Any, out_shape: torch.Size, **__: Any
) -> int:
    return 2 * out_shape.numel() * grad[0] * grad[2:].numel()


def _matmul(x: torch.Size, values: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * values.numel() * x[:-1].numel()


def _matmul_values_grad(
    x: torch.Size, grad: torch.Size, *_: Any, out_shape: torch.Size, **__: Any
) -> int:
    return 2 * out_shape.numel() * x[:-1].numel()
