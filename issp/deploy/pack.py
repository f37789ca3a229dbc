"""Packs a sparse model: measures every layer and leaves it dense where sparse is not faster."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from issp.deploy import derived, paths
from issp.deploy.derived import DerivedLayer
from issp.deploy.fused_forward import remove_
from issp.deploy.parts import DTYPES, in_16_bits
from issp.deploy.versions import DENSE, SPARSE, Version, Versions
from issp.nn import autotune, module_swap, selection
from issp.nn.convert import NO_ZEROS, from_dense
from issp.nn.layer_inputs import (
    DenseLayer,
    LayerInput,
    layer_inputs,
    measurement_key,
    shape_text,
    unsupported_reason,
)
from issp.nn.layers import SparseLayer
from issp.nn.names import unwrap
from issp.nn.report import LayerReport, Line
from issp.nn.sharding import check_whole
from issp.nn.sparse_training import SparseTrainingLayer, to_dense_
from issp.ops.keep import Keep
from issp.utils.errors import InaccurateLayerError

# Rows that may share positions, tried in this order, by device.
ROWS_PER_BLOCK = {"cpu": (1, 4), "cuda": (1, 4, 8, 16, 32)}
# Rows that share positions may store this many times the weights that are not zero.
MAX_FILL = 1.25
# Results are compared on an image of this height and width, or on the square of it as tokens.
CHECK_CROP = 24
# Timing of the whole model, once with and once without its sparse layers.
_ROUNDS, _MIN_ROUNDS, _SECONDS = 7, 3, 5.0


@torch.inference_mode(False)
def pack(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    keep: Keep | Mapping[str, Keep] | None = None,
    cache: autotune.Cache | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A copy of a model in which every layer with zeros takes its fastest measured path.

    Every Conv2d and Linear whose weight has zeros is timed on the shapes that it meets in the
    example: dense, channels_last, and sparse in each form that its zeros allow. It stays dense
    where sparse is not clearly faster. Choices are remembered per machine and shape, see
    `issp.nn.autotune`. At last the whole model is timed, packed and dense in turn: where packed
    measures slower, the model stays dense and the choices of its layers are forgotten.

    Hooks on calls are transferred and are not called while a layer is timed alone; a layer with
    something that cannot be transferred (see `issp.nn.convert`) stays dense. A packed model is
    unpacked first. Under torch.autocast the times are those of its dtype; under inference_mode the
    copy has ordinary parameters.

    Args:
        model: any module; it is left as it is. Threads, device and dtype are those of later use.
        example: its input, or a tuple of its arguments.
        keep: the N:M pattern of the zeros, for all layers or by name pattern ("body.*", see
            `issp.attach`); a layer that does not have it stays dense and the report says why.
            Default: rows that share their zeros are looked for, N:M or not.
        cache: where choices are kept; default: the user's cache folder.
        dtype: lets parts of the model compute in 16 bits on a CPU, from a part's first layer to its
            last, where that is fastest; what goes in and comes out keeps its dtype. torch.bfloat16:
            on matrix engines (AMX), in the layout of `issp.ops.tiles`, where zeros in units of 16
            or 32 rows x 2 channels count. torch.float16: any zeros. None: the model's own dtype.

    Returns:
        The packed copy, in the model's mode (training or not), with `report()`: a text with a line
        per layer, and `report.lines`. Its outputs equal the dense ones within twice their error.

    Raises:
        TypeError, ValueError: no model, one on another device than CPU and CUDA, a name
            pattern that matches no layer, or a model that has something called `report`.
        InaccurateLayerError: a sparse layer's result is further from float64 than allowed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, not {type(model).__name__}")
    check_whole(model)
    model = unwrap(model)
    trains_sparse = any(isinstance(module, SparseTrainingLayer) for module in model.modules())
    if trains_sparse or isinstance(getattr(model, "report", None), LayerReport):
        model = unpack(model)
    if hasattr(model, "report"):
        raise ValueError('the model has an attribute "report" already: rename it')
    args = example if isinstance(example, tuple) else (example,)
    _check_dtype(dtype, _device(model))
    if _device(model) not in ROWS_PER_BLOCK:
        raise ValueError(f"the model is on {_device(model)}: move it to the CPU or a CUDA device")
    cache = autotune.Cache() if cache is None else cache
    # The model is a child, so that it can itself be the layer that is replaced.
    root = nn.Sequential(copy.deepcopy(model))
    modes = {module: module.training for module in root.modules()}
    root.eval()
    lines, replacements = _pack_layers(root[0], args, keep, cache)
    for module in root.modules():
        if type(module) is nn.PixelShuffle:
            module.__class__ = paths.WholeRowsPixelShuffle
    versions = Versions(root, args)
    version = versions.make(replacements, SPARSE) if replacements else DENSE
    if dtype is not None:
        version = in_16_bits(versions, version, lines, dtype)
    for old, new in version.replacements.items():
        module_swap.transfer_hooks(old, new)
        modes[new] = modes[old]
    report = LayerReport(list(lines.values()), autotune.machine(_device(root)))
    if version.replacements:
        report.whole = keep_if_faster(versions, version)
        if report.whole.name == "dense":
            cache.forget(
                report.machine, [line.key for line in report.lines if line.choice != "dense"]
            )
            for line in report.lines:
                line.stay_dense()
    for module in root.modules():
        module.training = modes[module]
    packed = root[0]
    packed.report = report  # type: ignore[assignment]
    return packed


def _pack_layers(
    model: nn.Module,
    args: tuple[Any, ...],
    keep: Keep | Mapping[str, Keep] | None,
    cache: autotune.Cache,
) -> tuple[dict[nn.Module, Line], dict[nn.Module, nn.Module]]:
    """Layer -> its line of the report, and layer -> what replaces it."""
    patterns = _patterns(model, keep)
    with torch.no_grad():
        inputs = layer_inputs(model, args)
    lines: dict[nn.Module, Line] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            with module_swap.without_hooks(module):
                lines[module], new = pack_layer(
                    name, module, inputs.get(module, []), patterns.get(name), cache
                )
            if new is not None:
                replacements[module] = new
    return lines, replacements


def is_packed(model: nn.Module) -> bool:
    """Whether a model has layers that `unpack` would change."""
    return any(isinstance(module, (SparseLayer, *_IN_PLACE)) for module in model.modules())


@torch.inference_mode(False)
def unpack(model: nn.Module) -> nn.Module:
    """A copy with torch's own layers, zeros where nothing is stored: what can be saved and loaded.

    Hooks on calls and attributes of sparse layers are transferred.

    Args:
        model: packed, or with layers of `issp.nn`; is left as it is.
    """
    root = nn.Sequential(copy.deepcopy(model))
    dense: dict[nn.Module, nn.Module] = {}
    for parent in list(root.modules()):
        for attribute, child in parent._modules.items():
            if isinstance(child, SparseLayer):
                if child not in dense:
                    dense[child] = child.to_dense()
                    module_swap.transfer_hooks(child, dense[child])
                parent._modules[attribute] = dense[child]
    for module in root.modules():
        if isinstance(module, _PATHS):
            paths.restore_(module)
        elif isinstance(module, DerivedLayer):
            derived.restore_(module)
        elif isinstance(module, SparseTrainingLayer):
            to_dense_(module)
        remove_(module)
    root[0].__dict__.pop("report", None)
    return root[0]


_PATHS = (paths.ChannelsLastConv2d, paths.TwoFourLinear, paths.WholeRowsPixelShuffle)
_IN_PLACE = (*_PATHS, DerivedLayer, SparseTrainingLayer)


def _check_dtype(dtype: torch.dtype | None, device: str) -> None:
    if dtype not in (None, *DTYPES):
        known = " or ".join(map(str, DTYPES))
        raise ValueError(f"dtype is {dtype}: use {known}, or None for the model's own")
    if dtype is not None and device != "cpu":
        raise ValueError(f"dtype is for CPUs, and the model is on {device}: convert the model")


def _device(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


def _patterns(
    model: nn.Module, keep: Keep | Mapping[str, Keep] | None
) -> Mapping[str, Keep | None]:
    every = dict(model.named_modules())
    layers = {n for n, m in every.items() if isinstance(m, nn.Conv2d | nn.Linear)}
    if keep is None or isinstance(keep, Keep):
        return dict.fromkeys(layers, keep)
    patterns: dict[str, Keep | None] = {}
    for name_pattern, value in keep.items():
        if not isinstance(value, Keep):
            raise TypeError(f'keep: "{name_pattern}" is {value!r}: it must be an issp.Keep')
        matches = selection.match_names(name_pattern, every, "keep") & layers
        patterns |= dict.fromkeys(matches, value)
    return patterns


def keep_if_faster(versions: Versions, version: Version) -> autotune.Choice:
    """Uses a version unless the model is slower with it.

    Returns:
        The choice between "packed" and "dense", with the times of the whole model: the one with the
        smaller median.
    """
    choice = autotune.measure(
        {"packed": partial(versions.run, version)},
        {"dense": partial(versions.run, DENSE)},
        _device(versions.root),
        rounds=_ROUNDS,
        seconds=_SECONDS,
        min_rounds=_MIN_ROUNDS,
    )
    # Part by part, the version has won already: packed on a tie, and no margin for either.
    choice = replace(choice, name=min(("packed", "dense"), key=choice.microseconds.__getitem__))
    versions.use(version if choice.name == "packed" else DENSE)
    return choice


def pack_layer(
    name: str,
    module: DenseLayer,
    inputs: Sequence[LayerInput],
    keep: Keep | None,
    cache: autotune.Cache,
) -> tuple[Line, nn.Module | None]:
    """A layer's line of the report, and what replaces it; None: it stays as it is."""
    line = Line(name or "(model)", shape_text(module, inputs), None)
    line.reason = unsupported_reason(module, inputs)
    if line.reason:
        return line, None
    weight = module.weight.detach()
    zeros = int((weight == 0).sum())
    line.sparsity = zeros / weight.numel()
    if not zeros:
        line.reason = NO_ZEROS
        return line, None
    sparse, line.reason = _sparse_forms(name, module, keep)
    if line.reason:
        return line, None
    dense: dict[str, nn.Module] = {"dense": module}
    if isinstance(module, nn.Conv2d):
        dense["dense channels_last"] = paths.channels_last(module)
    samples = [x.random(weight.device) for x in inputs]
    if isinstance(module, nn.Linear) and keep in (None, Keep(2, of=4)):
        two_four = paths.two_four(module, samples[0])
        sparse |= {} if two_four is None else {"torch 2:4": two_four}
    shares = {
        form: m.values.numel() / weight.numel() if isinstance(m, SparseLayer) else 0.5
        for form, m in sparse.items()
    }
    line.key = measurement_key(module, inputs, shares)
    choice = autotune.choose(
        line.key,
        {form: partial(_run, m, samples) for form, m in dense.items()},
        {form: partial(_run, m, samples) for form, m in sparse.items()},
        weight.device.type,
        cache,
    )
    line.record(choice, list(sparse))
    if choice.name == "dense":
        return line, None
    if choice.name in sparse:
        _check_accuracy(name, module, sparse[choice.name], samples[0])
    return line, {**dense, **sparse}[choice.name]


def _sparse_forms(
    name: str, module: DenseLayer, keep: Keep | None
) -> tuple[dict[str, nn.Module], str]:
    """The sparse forms that the zeros of a layer allow; or why there are none."""
    if keep is not None:
        try:
            return {keep.name: from_dense(module, keep)}, ""
        except ValueError as error:
            return {}, f"{keep.name} does not fit {name}: {error}"
    kept = int(module.weight.ne(0).sum())
    forms: dict[str, nn.Module] = {}
    for v in ROWS_PER_BLOCK[module.weight.device.type]:
        if module.weight.shape[0] % v == 0:
            layer = from_dense(module, None, v)
            if v == 1 or layer.values.numel() <= MAX_FILL * kept:
                forms[f"rows v={v}" if v > 1 else "rows"] = layer
    return forms, ""


@torch.no_grad()
def _run(module: nn.Module, samples: Sequence[Tensor]) -> None:
    for x in samples:
        module(x)


@torch.no_grad()
def _check_accuracy(name: str, dense: DenseLayer, sparse: nn.Module, x: Tensor) -> None:
    """Raises InaccurateLayerError where the sparse error is more than twice the dense one."""
    if isinstance(dense, nn.Conv2d):
        height, width = (
            max(CHECK_CROP, d * (k - 1) + 1)
            for d, k in zip(dense.dilation, dense.kernel_size, strict=True)
        )
        x = x[..., :height, :width].contiguous()
        x = x[:1] if x.dim() == 4 else x
    else:
        x = x.reshape(-1, x.shape[-1])[: CHECK_CROP * CHECK_CROP].contiguous()
    exact = copy.deepcopy(dense).double()(x.double())
    y, dense_y = sparse(x), dense(x)
    sparse_error, dense_error = (
        (result.double() - exact).square().mean().sqrt() for result in (y, dense_y)
    )
    rounding = torch.finfo(y.dtype).eps * exact.square().mean().sqrt()
    if not bool(sparse_error <= 2 * dense_error + rounding):
        raise InaccurateLayerError(
            f"the sparse result of {name} is off by {sparse_error:.3g} from float64, the dense one "
            f"by {dense_error:.3g}: the model was not packed; please report this with `issp info`"
        )
