"""Which layers train faster by their kept weights alone: forward and backward, measured."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from issp.nn import autotune, module_swap
from issp.nn.layer_inputs import (
    DenseLayer,
    LayerInput,
    layer_inputs,
    measurement_key,
    shape_text,
    unsupported_reason,
)
from issp.nn.names import named_modules, unwrap
from issp.nn.report import LayerReport, Line
from issp.nn.sparse_training import KeptPositions, to_sparse_
from issp.pruning.masked_layer import MaskedLayer

# Timing of the whole model, once with and once without its sparse layers.
_ROUNDS, _MIN_ROUNDS, _SECONDS = 7, 3, 5.0
_PASSES = "forward and backward"


def choose(
    model: nn.Module, layers: Sequence[MaskedLayer], args: tuple[Any, ...], cache: autotune.Cache
) -> tuple[dict[str, int], LayerReport]:
    """Times every layer, and at last the whole model, as it is and with its sparse layers.

    The model is copied: no parameter, buffer or random generator changes.

    Args:
        model: as it trains, with or without wrappers.
        layers: those with fixed masks.
        args: of the model's call.
        cache: of choices.

    Returns:
        By name of the layers that are to train sparse, v of their positions; and the report.
    """
    device = next(model.parameters()).device
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.inference_mode(False):
        # The model is a child, so that it can itself be the layer that is replaced.
        root = nn.Sequential(copy.deepcopy(unwrap(model)))
        modules, inputs = named_modules(root[0]), layer_inputs(root[0], args)
        lines: list[Line] = []
        measured: dict[str, autotune.Choice] = {}
        sparse: dict[str, tuple[int, nn.Module]] = {}
        for layer in layers:
            module = modules[layer.name]
            with module_swap.without_hooks(module):
                line, chosen = _choose(layer, module, inputs.get(module, []), cache, measured)
            lines.append(line)
            if chosen is not None:
                sparse[layer.name] = chosen
        report = LayerReport(lines, autotune.machine(device.type))
        if sparse:
            replacements = {modules[name]: module for name, (_, module) in sparse.items()}
            report.whole = _measure_whole(root, replacements, args, device.type)
            if report.whole.name == "dense":
                cache.forget(report.machine, [line.key for line in lines if line.is_sparse])
                for line in lines:
                    line.stay_dense()
                sparse = {}
    return {name: v for name, (v, _) in sparse.items()}, report


def all_that_can(
    layers: Sequence[MaskedLayer], recorded: Mapping[str, int] | None = None
) -> tuple[dict[str, int], LayerReport]:
    """As `choose`, of every layer that can train sparse, or of recorded ones; nothing is timed."""
    rows: dict[str, int] = {}
    lines: list[Line] = []
    for layer in layers:
        module, mask = layer.layer.module, layer.mask
        line = Line(layer.name or "(model)", shape_text(module, []), None)
        line.reason = layer.dense or unsupported_reason(module)
        if not line.reason and recorded is not None:
            line.reason = "as before the break"
            if layer.name in recorded:
                rows[layer.name] = recorded[layer.name]
        elif not line.reason:
            line.reason = "not timed"
            *_, (_, rows[layer.name]) = _forms(layer)
        if layer.name in rows:
            line.sparsity = 1 - int(mask.sum()) / mask.numel()
            line.choice = _form_name(rows[layer.name])
        lines.append(line)
    device = layers[0].mask.device.type if layers else "cpu"
    return rows, LayerReport(lines, autotune.machine(device))


def _choose(
    layer: MaskedLayer,
    module: nn.Module,
    inputs: Sequence[LayerInput],
    cache: autotune.Cache,
    measured: dict[str, autotune.Choice],
) -> tuple[Line, tuple[int, nn.Module] | None]:
    """A layer's line of the report; v and the sparse layer where that is faster.

    Layers of one key are timed once, also where a busy machine keeps the cache from taking it: a
    network of both kinds in turn would convert its images between them.
    """
    line = Line(layer.name or "(model)", shape_text(module, inputs), None)
    # Of the layer itself: a copy has lost the hooks of its parameters.
    line.reason = layer.dense or unsupported_reason(layer.layer.module, inputs)
    if line.reason:
        return line, None
    assert isinstance(module, nn.Conv2d | nn.Linear)
    mask = layer.mask
    line.sparsity = 1 - int(mask.sum()) / mask.numel()
    forms = _sparse_forms(layer, module)
    samples = {False: _samples(module, inputs, False), True: _samples(module, inputs, True)}
    dense = {"dense": partial(_pass, _in_format(module, False), samples[False])}
    if isinstance(module, nn.Conv2d):
        dense["dense channels_last"] = partial(_pass, _in_format(module, True), samples[True])
    sparse = {name: partial(_pass, form, samples[False]) for name, (_, form) in forms.items()}
    share = int(mask.sum()) / mask.numel()
    line.key = measurement_key(module, inputs, dict.fromkeys(forms, share), _PASSES)
    choice = measured.get(line.key)
    if choice is None:
        choice = autotune.choose(line.key, dense, sparse, mask.device.type, cache)
        measured[line.key] = choice
    line.record(choice, list(sparse))
    return line, forms.get(choice.name)


def _sparse_forms(layer: MaskedLayer, module: DenseLayer) -> dict[str, tuple[int, nn.Module]]:
    """Name of each form -> v, and a layer of that form."""
    forms: dict[str, tuple[int, nn.Module]] = {}
    for name, v in _forms(layer):
        sparse = copy.deepcopy(module)
        to_sparse_(sparse, KeptPositions(layer.mask, v))
        forms[name] = (v, sparse)
    return forms


def _forms(layer: MaskedLayer) -> list[tuple[str, int]]:
    """Name and v of each form that a mask allows."""
    forms = [(_form_name(1), 1)]
    by = layer.layer.pattern
    if by is not None and by.v > 1:
        with contextlib.suppress(ValueError):  # a mask from elsewhere
            KeptPositions(layer.mask, by.v)
            forms.append((_form_name(by.v), by.v))
    return forms


def _form_name(v: int) -> str:
    return f"rows v={v}" if v > 1 else "rows"


def _in_format(module: DenseLayer, channels_last: bool) -> DenseLayer:
    """A copy whose weight is contiguous, or in channels_last."""
    copied = copy.deepcopy(module)
    if copied.weight.dim() == 4:
        kind = torch.channels_last if channels_last else torch.contiguous_format
        copied.weight.data = copied.weight.data.contiguous(memory_format=kind)
    return copied


def _samples(
    module: DenseLayer, inputs: Sequence[LayerInput], channels_last: bool
) -> list[tuple[Tensor, Tensor]]:
    """Random inputs of a layer, and gradients of its results."""
    samples = []
    for one in inputs:
        x = replace(one, channels_last=channels_last and len(one.shape) == 4)
        sample = x.random(module.weight.device).detach()
        with torch.no_grad():
            result = module(sample)
        kind = torch.channels_last if x.channels_last else torch.contiguous_format
        grad = torch.randn(result.shape, dtype=torch.float32, device=result.device)
        grad = grad.to(result.dtype).contiguous(memory_format=kind)
        samples.append((sample.requires_grad_(one.requires_grad), grad))
    return samples


def _pass(module: nn.Module, samples: Sequence[tuple[Tensor, Tensor]]) -> None:
    trained = [p for p in module.parameters() if p.requires_grad]
    for x, grad in samples:
        wanted = [*trained, *([x] if x.requires_grad else [])]
        if wanted:
            torch.autograd.grad(module(x), wanted, grad)


def _measure_whole(
    root: nn.Sequential,
    replacements: Mapping[nn.Module, nn.Module],
    args: tuple[Any, ...],
    device: str,
) -> autotune.Choice:
    """The choice between "sparse" and "dense" of the smaller median."""
    others = [m for m in root.modules() if type(m) is nn.Conv2d and m not in replacements]
    contiguous: dict[nn.Module, nn.Module] = {m: _in_format(m, False) for m in others}
    swap = module_swap.swapper(root, {**contiguous, **replacements})
    calls: dict[str, Callable[[], None]] = {}
    for name, own_args in (("sparse", tuple(map(_contiguous, args))), ("dense", args)):
        calls[name] = partial(_model_pass, root, partial(swap, name == "sparse"), own_args)
    choice = autotune.measure(
        {"dense": calls["dense"]},
        {"sparse": calls["sparse"]},
        device,
        rounds=_ROUNDS,
        seconds=_SECONDS,
        min_rounds=_MIN_ROUNDS,
    )
    # Layer by layer, sparse has won already: sparse on a tie.
    return replace(choice, name=min(("sparse", "dense"), key=choice.microseconds.__getitem__))


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) else x


def _model_pass(root: nn.Sequential, swap: Callable[[], None], args: tuple[Any, ...]) -> None:
    swap()
    results = [x for x in _tensors(root[0](*args)) if x.requires_grad]
    trained = [p for p in root.parameters() if p.requires_grad]
    grads = [torch.ones_like(x) for x in results]
    torch.autograd.grad(results, trained, grads, allow_unused=True)


def _tensors(tree: object) -> list[Tensor]:
    """The tensors in nested lists and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [x for one in tree for x in _tensors(one)] if isinstance(tree, list | tuple) else []
