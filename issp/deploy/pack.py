"""A sparse model on its fastest paths: every layer measured, dense where sparse is slower."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from issp import nn as sparse_nn
from issp.deploy import autotune, paths
from issp.deploy.report import Line, Report
from issp.nn import module_swap, selection
from issp.ops.keep import Keep
from issp.ops.validation.pruning import DTYPES

_ROWS = {"cpu": (1, 4), "cuda": (1, 4, 8, 16, 32)}
_CROWDED = 1.25  # rows that share positions may store this many times the weights that are not zero
_SIDE = 24  # of the part of an image, and a sixteenth of the tokens, on which results are compared
# Of the whole model, once with and once without its sparse layers.
_ROUNDS, _LEAST, _SECONDS = 7, 3, 5.0


def pack(
    model: nn.Module,
    example: Tensor | tuple,
    keep: Keep | Mapping[str, Keep] | None = None,
    cache: autotune.Cache | None = None,
) -> nn.Module:
    """A copy of a model whose layers with zeros sit on their fastest measured path.

    Every Conv2d and Linear whose weight has zeros is timed on the shapes that it meets in the
    example: dense, channels_last, and sparse in each form that its zeros allow. It stays dense
    where sparse is not faster beyond doubt; so does the whole model. Choices are remembered per
    machine and shape, see `issp.deploy.autotune`. Hooks on calls follow and are not called while a
    layer is timed alone; a layer with something that cannot follow (see `issp.nn.convert`) stays
    dense.

    Args:
        model: any module; it is left as it is. Threads, device and dtype are those of later use.
        example: its input, or a tuple of its arguments.
        keep: the N:M pattern of the zeros, for all layers or by name ("body.*", see
            `issp.attach`); a layer that does not fit stays dense and says why. Default: rows that
            share their zeros are found, N:M or not.
        cache: where choices are kept; default: the user's cache folder.

    Returns:
        The packed copy, in the model's mode (training or not), with `report()`: a text with a line
        per layer, and `report.lines`. Its outputs equal the dense ones within twice their error.

    Raises:
        TypeError, ValueError: no model, one on another device than CPU and CUDA, a pattern that
            matches no layer, or a model that has something called `report`.
        RuntimeError: a sparse layer's result is further from float64 than allowed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, not {type(model).__name__}")
    if hasattr(model, "report"):
        raise ValueError('the model has an attribute "report" already: rename it')
    args = example if isinstance(example, tuple) else (example,)
    if _device(model) not in _ROWS:
        raise ValueError(f"the model is on {_device(model)}: move it to the CPU or a CUDA device")
    root = nn.Sequential(copy.deepcopy(selection.unwrap(model)))
    modes = {module: module.training for module in root.modules()}
    root.eval()
    patterns = _patterns(root[0], keep)
    inputs = _inputs(root[0], args)
    cache = autotune.Cache() if cache is None else cache
    lines, replacements = [], {}
    for name, module in root[0].named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            with module_swap.bare(module):
                line, new = _packed(name, module, inputs.get(module, []), patterns.get(name), cache)
            lines.append(line)
            if new is not None:
                module_swap.carry(module, new)
                modes[new] = modes[module]
                replacements[module] = new
    report = Report(lines, autotune.machine(_device(root)))
    if replacements:
        report.whole = _swap_if_faster(root, replacements, args)
        if report.whole.name == "dense":
            for line in lines:
                line.stay_dense()
    for module in root.modules():
        module.training = modes[module]
    packed = root[0]
    packed.report = report
    return packed


def is_packed(model: nn.Module) -> bool:
    """Whether a model has layers that `unpack` would change."""
    return any(isinstance(module, (*_SPARSE, *_PATHS)) for module in model.modules())


def unpack(model: nn.Module) -> nn.Module:
    """A copy with torch's own layers, zeros where nothing is stored: what can be saved and loaded.

    Hooks on calls and attributes of sparse layers follow.

    Args:
        model: packed, or with layers of `issp.nn`; is left as it is.
    """
    root = nn.Sequential(copy.deepcopy(model))
    dense: dict[nn.Module, nn.Module] = {}
    for parent in list(root.modules()):
        for attribute, child in parent._modules.items():
            if isinstance(child, _SPARSE):
                if child not in dense:
                    dense[child] = child.to_dense()
                    module_swap.carry(child, dense[child])
                parent._modules[attribute] = dense[child]
            elif isinstance(child, _PATHS):
                paths.restore_(child)
    root[0].__dict__.pop("report", None)
    return root[0]


_SPARSE = (
    sparse_nn.SparseConv2d,
    sparse_nn.SparseLinear,
    sparse_nn.NMConv2d,
    sparse_nn.NMLinear,
)
_PATHS = (paths.ChannelsLastConv2d, paths.TwoFourLinear)


def _device(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


def _patterns(model: nn.Module, keep: Keep | Mapping[str, Keep] | None) -> dict[str, Keep]:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    if keep is None:
        return {}
    if isinstance(keep, Keep):
        return dict.fromkeys(names, keep)
    found: dict[str, Keep] = {}
    every = [n for n, _ in model.named_modules()]
    for pattern, value in keep.items():
        if not isinstance(value, Keep):
            raise TypeError(f'keep: "{pattern}" is {value!r}: it must be an issp.Keep')
        found |= dict.fromkeys(selection._matching(pattern, every, "keep") & set(names), value)
    return found


@torch.no_grad()
def _inputs(model: nn.Module, args: tuple) -> dict[nn.Module, list[tuple]]:
    """Distinct (shape, channels_last, dtype) of what each layer meets."""
    found: dict[nn.Module, list[tuple]] = {}

    def note(module: nn.Module, given: tuple, named: Mapping[str, Any]) -> None:
        x = given[0] if given else named["input"]
        last = x.dim() == 4 and not x.is_contiguous()
        last = last and x.is_contiguous(memory_format=torch.channels_last)
        seen = found.setdefault(module, [])
        if (tuple(x.shape), last, x.dtype) not in seen:
            seen.append((tuple(x.shape), last, x.dtype))

    hooks = [
        m.register_forward_pre_hook(note, with_kwargs=True)
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    try:
        model(*args)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _swap_if_faster(
    root: nn.Module, replacements: Mapping[nn.Module, nn.Module], args: tuple
) -> autotune.Choice:
    """Replaces the layers, unless the whole model is slower for it; the times of both."""
    places = [
        (parent, attribute, child)
        for parent in root.modules()
        for attribute, child in parent._modules.items()
        if child in replacements
    ]

    def swap(packed: bool) -> None:
        for parent, attribute, child in places:
            parent._modules[attribute] = replacements[child] if packed else child

    def call(packed: bool):
        @torch.no_grad()
        def run() -> None:
            swap(packed)
            root[0](*args)

        return run

    device = _device(root)
    # The burden of proof is on dense: layer by layer, sparse has already won.
    found = autotune.measured(
        {"packed": call(True)}, {"dense": call(False)}, device, _ROUNDS, _SECONDS, least=_LEAST
    )
    swap(found.name == "packed")
    return found


def _packed(
    name: str, module: nn.Module, inputs: Sequence[tuple], keep: Keep | None, cache: autotune.Cache
) -> tuple[Line, nn.Module | None]:
    """A layer's line of the report, and what replaces it, if anything does."""
    line = Line(name or "(model)", _shape(module, inputs), None)
    line.reason = _unfit(module, inputs)
    if line.reason:
        return line, None
    weight = module.weight.detach()
    zeros = int((weight == 0).sum())
    line.sparsity = zeros / weight.numel()
    if not zeros:
        line.reason = "no weight is zero (masks are made final by pruner.finalize())"
        return line, None
    sparse, problem = _sparse(name, module, keep)
    if problem:
        line.reason = problem
        return line, None
    dense = {"dense": module}
    if isinstance(module, nn.Conv2d):
        dense["dense channels_last"] = paths.channels_last(module)
    samples = [_random(*spec, weight.device) for spec in inputs]
    if isinstance(module, nn.Linear) and keep in (None, Keep(2, of=4)):
        two_four = paths.two_four(module, samples[0])
        sparse |= {} if two_four is None else {"torch 2:4": two_four}
    calls = ({n: _call(m, samples) for n, m in group.items()} for group in (dense, sparse))
    found = autotune.choose(_key(module, inputs, sparse), *calls, weight.device.type, cache)
    line.fill(found, list(sparse))
    if found.name == "dense":
        return line, None
    if found.name in sparse:
        _compare(name, module, sparse[found.name], samples[0])
    return line, {**dense, **sparse}[found.name]


def _unfit(module: nn.Module, inputs: Sequence[tuple]) -> str:
    """Why a layer cannot have a sparse product at all, or ""."""
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"it is a {type(module).__name__}, which may compute something else"
    if obstacle := module_swap.obstacle(module):
        return obstacle
    weight = module.weight
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}"
    if getattr(module, "groups", 1) > 1:
        return f"it has {module.groups} groups, sparse products have none"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"it pads by {module.padding_mode}, sparse products with zeros"
    if not inputs:
        return "the example does not reach it"
    if any(len(shape) == 3 and isinstance(module, nn.Conv2d) for shape, _, _ in inputs):
        return "its input has no batch: pass an example with one"
    if any(dtype != weight.dtype for _, _, dtype in inputs):
        return f"its input is not {weight.dtype} as its weight is"
    return ""


def _sparse(name: str, module: nn.Module, keep: Keep | None) -> tuple[dict[str, nn.Module], str]:
    """The sparse forms that the zeros of a layer allow; or why there are none."""
    conv = isinstance(module, nn.Conv2d)
    if keep is not None:
        kind = sparse_nn.NMConv2d if conv else sparse_nn.NMLinear
        try:
            return {keep.name: kind.from_dense(module, keep)}, ""
        except ValueError as error:
            return {}, f"{keep.name} does not fit {name}: {error}"
    kind = sparse_nn.SparseConv2d if conv else sparse_nn.SparseLinear
    kept = int((module.weight != 0).sum())
    found = {}
    for v in _ROWS[module.weight.device.type]:
        if module.weight.shape[0] % v == 0:
            new = kind.from_dense(module, v=v)
            if v == 1 or new.values.numel() <= _CROWDED * kept:
                found[f"rows v={v}" if v > 1 else "rows"] = new
    return found, ""


def _random(shape: tuple[int, ...], last: bool, dtype: torch.dtype, device) -> Tensor:
    x = torch.randn(shape, device=device).to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def _call(module: nn.Module, samples: Sequence[Tensor]):
    @torch.no_grad()
    def call() -> None:
        for x in samples:
            module(x)

    return call


def _shape(module: nn.Module, inputs: Sequence[tuple]) -> str:
    weight = "x".join(map(str, module.weight.shape))
    return weight + "".join(f" on {'x'.join(map(str, shape))}" for shape, _, _ in inputs)


def _key(module: nn.Module, inputs: Sequence[tuple], sparse: Mapping[str, Any]) -> str:
    """All that the times of a layer depend on, as text."""
    parts = [f"{type(module).__name__} {'x'.join(map(str, module.weight.shape))} forward"]
    if isinstance(module, nn.Conv2d):
        parts += [f"{name} {getattr(module, name)}" for name in ("stride", "padding", "dilation")]
    parts.append("bias" if module.bias is not None else "no bias")
    for shape, last, dtype in inputs:
        parts.append(f"x {'x'.join(map(str, shape))} {dtype}" + " channels_last" * last)
    device, numel = module.weight.device.type, module.weight.numel()
    if torch.is_autocast_enabled(device):
        parts.append(f"autocast {torch.get_autocast_dtype(device)}")
    for name, new in sparse.items():
        # Two digits: layers that differ in a handful of weights share a measurement.
        share = new.values.numel() / numel if hasattr(new, "values") else 0.5
        parts.append(f"{name} keeps {share:.2g}")
    return ", ".join(parts)


@torch.no_grad()
def _compare(name: str, dense: nn.Module, sparse: nn.Module, x: Tensor) -> None:
    """Raises RuntimeError where the sparse result is off by more than twice the dense one."""
    if isinstance(dense, nn.Conv2d):
        least = [d * (k - 1) + 1 for d, k in zip(dense.dilation, dense.kernel_size, strict=True)]
        x = x[:1, :, : max(_SIDE, least[0]), : max(_SIDE, least[1])].contiguous()
    else:
        x = x.reshape(-1, x.shape[-1])[: _SIDE * _SIDE].contiguous()
    exact = copy.deepcopy(dense).double()(x.double())
    ours, theirs = ((m(x).double() - exact).square().mean().sqrt() for m in (sparse, dense))
    rounding = torch.finfo(x.dtype).eps * exact.square().mean().sqrt()
    if not bool(ours <= 2 * theirs + rounding):
        raise RuntimeError(
            f"the sparse result of {name} is off by {ours:.3g} from float64, the dense one by "
            f"{theirs:.3g}: the model was not packed; please report this with `issp info`"
        )
