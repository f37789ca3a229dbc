"""Random calls of the raw ops: a valid argument list, and what is wrong with it.

`draw` takes any source with the methods of `random.Random`: a seed names a call, and hypothesis can
be the source as well. The same seed gives the same arguments, overlaps in memory included.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from issp.ops.reference import pack
from issp.ops.schemas import scratch_words
from tests.cases import DTYPES

OTHER_DTYPES = (torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64, *DTYPES)
INTEGERS = (0, 1, -1, 2, 3, 7, 64, 1 << 15, 1 << 18, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 32)
INTEGERS += (1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, -0.0, 1.0, 0.5, 0.61, -1.0, 2.0, 1e-45, 5e-324, 1e300, math.inf, -math.inf, math.nan)
SHRINKS = (0.95, 0.99, 0.7, 0.61, 0.6, 0.5, 0.25, 0.0, -0.0, 1.0, 1e-30, 5e-324)
# Sizes around mask words, mask lines and the blocks of the kernels; 5000 leaves the small buffers.
SIZES = (1, 2, 3, 31, 32, 33, 63, 64, 65, 100, 127, 257, 511, 512, 513, 1025, 4097, 5000)
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bits without the sign: zero, denormals, ordinary numbers, infinity, and NaNs up to the last one.
_KINDS = {
    torch.float32: (0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3D000000, 0x7F7FFFFF)
    + (0x7F800000, 0x7F800001, 0x7FC00000, 0x7FF00000, 0x7FFFFFFE, 0x7FFFFFFF),
    torch.float16: (0, 1, 0x3FF, 0x400, 0x3C00, 0x2800, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7FFF),
    torch.bfloat16: (0, 1, 0x7F, 0x80, 0x3F80, 0x3D00, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF),
    torch.float64: (0, 1, (1 << 52) - 1, 1 << 52, 0x3FF << 52, 0x3C0 << 52, (0x7FF << 52) - 1)
    + (0x7FF << 52, (0x7FF << 52) + 1, 0x7FF8 << 48, (1 << 63) - 2, (1 << 63) - 1),
}


def draw(op: str, source: random.Random) -> tuple[list[Any], int]:
    """The arguments of one call, and how many changes made them unusual, wrong in most cases."""
    arguments = _VALID[op](source)
    faults = source.choice((0, 0, 1, 1, 2, 3))
    for _ in range(faults):
        _spoil(arguments, source)
    return arguments, faults


def describe(value: Any) -> str:
    """An argument as a report prints it: of a tensor what matters for the checks."""
    if isinstance(value, Tensor):
        if memory_of(value) is None:
            kind = "zero tensor" if value._is_zerotensor() else f"{value.layout} on {value.device}"
            return f"{value.dtype} {tuple(value.shape)}, no memory, {kind}"
        held, needed = value.untyped_storage().nbytes(), value.nbytes
        some = value.flatten()[:6].tolist() if held >= needed else f"{held} of {needed} bytes"
        strides = "" if value.is_contiguous() else f" strides {value.stride()}"
        return f"{value.dtype} {tuple(value.shape)}{strides} {some}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(describe, value)) + "]"
    return repr(value)


def tensors_of(arguments: list[Any]) -> list[Tensor]:
    """All tensors of an argument list, in order."""
    found: list[Tensor] = []
    for argument in arguments:
        values = argument if isinstance(argument, (list, tuple)) else [argument]
        found += [x for x in values if isinstance(x, Tensor)]
    return found


def memory_of(x: Tensor) -> Tensor | None:
    """The bytes of a tensor's storage; None where it has none."""
    plain = x.layout == torch.strided and x.device.type == "cpu" and not x._is_zerotensor()
    if not plain or not x.untyped_storage().nbytes():
        return None
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def _readable(x: Tensor) -> bool:
    memory = memory_of(x)
    whole = memory is not None and memory.numel() >= (
        x.storage_offset() * x.element_size() + x.nbytes
    )
    return whole and not x.is_neg() and not x.is_conj()


# Values


def _values(source: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(source.getrandbits(30))
    kind = source.choice(("normal", "normal", "few", "bits", "any bits", "equal"))
    if kind in ("normal", "few"):
        x = torch.randn(shape, generator=generator)
        return ((x * 2).round() / 4 if kind == "few" else x * 0.05).to(dtype)
    if kind == "equal":
        return torch.full(shape, source.choice((0.25, -3e-5, 0.1)), dtype=dtype)
    integer = WORDS[torch.empty(0, dtype=dtype).element_size()]
    if kind == "bits":
        kinds = torch.tensor(_KINDS[dtype], dtype=torch.int64)
        drawn = kinds[torch.randint(len(kinds), shape, generator=generator)]
        sign = torch.randint(0, 2, shape, generator=generator)
        low = torch.iinfo(integer).min
        return torch.where(sign.bool(), drawn + low, drawn).to(integer).view(dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    drawn = torch.randint(0, 256, (math.prod(shape) * size,), generator=generator)
    return drawn.to(torch.uint8).view(dtype).view(shape)


def _shape(source: random.Random) -> tuple[int, ...]:
    if source.random() < 0.6:
        return (source.choice(SIZES),)
    return source.choice(((4, 8), (6, 10, 3, 3), (16, 20), (3, 1, 5), (), (2, 32, 1, 1), (40, 60)))


def _list(source: random.Random, shapes: list[tuple], dtype: torch.dtype) -> list[Tensor]:
    return [_values(source, shape, dtype) for shape in shapes]


def _shapes(source: random.Random) -> list[tuple[int, ...]]:
    return [_shape(source) for _ in range(source.choice((1, 1, 2, 3, 5)))]


def _words(source: random.Random, count: int) -> Tensor:
    if source.random() < 0.5:
        return torch.full((count,), -1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(source.getrandbits(30))
    return torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator).to(torch.int32)


def _masks(source: random.Random, numels: list[int]) -> Tensor:
    """Packed masks; the bits behind a tensor's last element are 0."""
    generator = torch.Generator().manual_seed(source.getrandbits(30))
    share = source.choice((1.0, 0.5, 0.0))
    packed = [pack(torch.rand(n, generator=generator) < share) for n in numels]
    return torch.cat(packed) if packed else torch.zeros(0, dtype=torch.int32)


def _pattern(source: random.Random, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """An N:M pattern that divides the shape."""
    if len(shape) >= 2 and source.random() < 0.5:
        m = source.choice([d for d in (1, 2, 4, 5, 10, 20) if shape[1] % d == 0])
        v = source.choice([d for d in (1, 1, 2, 4) if shape[0] % d == 0])
        c = source.choice([d for d in (1, 1, 2, 5) if m % d == 0])
        return c * source.randint(1, m // c), m, v, c
    numel = math.prod(shape)
    m = source.choice([d for d in (1, 2, 4, 9, 64, numel) if numel % d == 0])
    return source.randint(1, m), m, 0, 1


def _unit(source: random.Random, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A unit that divides the shape; zeros where there is none."""
    if len(shape) < 2:
        return 0, 0, 0, 0
    v = source.choice([d for d in (1, 1, 2, 4, shape[0]) if shape[0] % d == 0])
    return 0, 0, v, source.choice([d for d in (1, 2, 5, shape[1]) if shape[1] % d == 0])


def _counts(source: random.Random, shapes: list[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """k of every tensor and the patterns: none, or one each, zeros for single weights."""
    numels = list(map(math.prod, shapes))
    counts = [source.choice((0, n, n // 2, source.randint(0, n))) for n in numels]
    patterns: list[int] = []
    if source.random() < 0.4:
        for i, shape in enumerate(shapes):
            kind = source.choice((lambda *_: (0, 0, 0, 0), _unit, _pattern, _pattern))
            n, m, v, c = kind(source, shape)
            patterns += (n, m, v, c)
            if not m and v:
                counts[i] -= counts[i] % (v * c)
            if m:
                counts[i] = source.choice((0, numels[i] // m * (m - n)))
    return counts, patterns


def _pruning(
    source: random.Random, weights: list[Tensor], found_inf: bool = True
) -> tuple[Tensor, float, Tensor, Tensor, Tensor, Tensor, Tensor | None, bool, list[int]]:
    """k, shrink, thresholds, masks, flips, scratch, found_inf, bracket, patterns."""
    shapes = [tuple(w.shape) for w in weights]
    counts, patterns = _counts(source, shapes)
    numels = [w.numel() for w in weights]
    dtype = weights[0].dtype if weights else torch.float32
    thresholds = _values(source, (len(weights),), dtype)
    if source.random() < 0.5:
        thresholds.fill_(source.choice((math.nan, 0.03, 0.0)))
    scratch = torch.zeros(scratch_words(numels), dtype=torch.int32)
    if source.random() < 0.2:  # left by another back end, or by nobody
        scratch = _words(source, scratch.numel())
    return (
        torch.tensor(counts, dtype=torch.int64),
        source.choice(SHRINKS),
        thresholds,
        _masks(source, numels),
        torch.full((len(weights),), 7, dtype=torch.int64),
        scratch,
        source.choice((None, None, torch.zeros(1), torch.ones(1), torch.zeros(()))),
        source.random() < 0.8,
        patterns,
    )


# Argument lists that are right


def _soft_shrink(source: random.Random) -> list[Any]:
    weights = _list(source, _shapes(source), source.choice(DTYPES))
    return [weights, *_pruning(source, weights)]


def _magnitude_threshold(source: random.Random) -> list[Any]:
    weights = _list(source, _shapes(source), source.choice(DTYPES))
    return [weights, [source.randint(0, w.numel()) for w in weights]]


def _apply_masks(source: random.Random) -> list[Any]:
    shapes, sets = _shapes(source), source.choice((1, 2, 3))
    tensors = [x for _ in range(sets) for x in _list(source, shapes, source.choice(DTYPES))]
    return [tensors, _masks(source, list(map(math.prod, shapes))), sets]


def _regularize(source: random.Random) -> list[Any]:
    shapes, dtype = _shapes(source), source.choice(DTYPES)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    masks = _masks(source, list(map(math.prod, shapes)))
    factors = _values(source, (len(shapes),), wide)
    return [_list(source, shapes, dtype), _list(source, shapes, dtype), factors, masks]


def _one_list(source: random.Random) -> list[Any]:
    return [_list(source, _shapes(source), source.choice(DTYPES))]


def _nm_prune(source: random.Random) -> list[Any]:
    shape = _shape(source)
    n, m, v, c = _pattern(source, shape)
    weight = _values(source, shape, source.choice(DTYPES))
    return [weight, n, m, v or 1, "channels" if v else "flat", source.choice(SHRINKS), c]


def _optional_scalar(source: random.Random, dtypes: tuple[torch.dtype, ...]) -> Tensor | None:
    if source.random() < 0.7:
        return None
    return torch.full(source.choice(((), (1,))), 0.5, dtype=source.choice(dtypes))


def _group(source: random.Random) -> tuple[list[Tensor], list[Tensor], list[tuple[int, ...]]]:
    shapes = _shapes(source)
    dtypes = [source.choice((torch.float32, torch.bfloat16)) for _ in shapes]
    grads = [_values(source, s, d) for s, d in zip(shapes, dtypes, strict=True)]
    return _list(source, shapes, torch.float32), grads, shapes


def _behind_update(source: random.Random, weights: list[Tensor]) -> list[Any]:
    k, shrink, thresholds, masks, flips, scratch, found_inf, bracket, patterns = _pruning(
        source, weights[: source.randint(0, len(weights))]
    )
    frozen = source.random() < 0.2
    return [k, shrink, thresholds, masks, flips, scratch, found_inf, frozen, bracket, patterns]


def _adam(source: random.Random) -> list[Any]:
    weights, grads, shapes = _group(source)
    steps = [torch.full(source.choice(((), (1,))), source.choice((0.0, 0.0, 9.0, 1e6)))]
    steps += [steps[0].clone() for _ in shapes[1:]]
    moments = _list(source, shapes, torch.float32)
    squares = [x.abs() for x in _list(source, shapes, torch.float32)]
    beta1, beta2 = source.choice((0.9, 0.3, 0.0)), source.choice((0.999, 0.5, 0.0))
    rates = [source.choice((1e-3, 0.0, 3.0)), beta1, beta2, source.choice((1e-8, 0.0, 1.0))]
    choices = [source.choice((0.0, 0.03)), source.random() < 0.5, source.random() < 0.5]
    scalars = [_optional_scalar(source, DTYPES), _optional_scalar(source, (torch.float32,))]
    lists = [weights, grads, moments, squares, steps]
    return [*lists, *rates, *choices, *scalars, *_behind_update(source, weights)]


def _sgd(source: random.Random) -> list[Any]:
    weights, grads, shapes = _group(source)
    momentum = source.choice((0.9, 0.5, 0.0))
    buffers = _list(source, shapes, torch.float32) if momentum else []
    first = [source.random() < 0.3 for _ in buffers]
    rates = [source.choice((1e-2, 0.0)), momentum, source.choice((0.0, 0.3))]
    choices = [source.choice((0.0, 0.03)), bool(momentum) and source.random() < 0.5]
    scalars = [_optional_scalar(source, DTYPES), _optional_scalar(source, (torch.float32,))]
    maximize = source.random() < 0.5
    return [weights, grads, buffers, first, *rates, *choices, maximize, *scalars] + _behind_update(
        source, weights
    )


def _sparse_rows(source: random.Random, length: int) -> tuple[int, Tensor, Tensor]:
    """v, col_indices and crow_indices of a random pattern."""
    blocks = source.choice((1, 2, 3, 9))
    rows = [sorted(source.sample(range(length), source.randint(0, length))) for _ in range(blocks)]
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    columns = torch.tensor([c for row in rows for c in row], dtype=torch.int32)
    return source.choice((1, 2, 4, 5)), columns, torch.tensor(starts, dtype=torch.int32)


def _output(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return max(1, (size + 2 * padding - (kernel - 1) * dilation - 1) // stride + 1)


def _window(source: random.Random, size: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Kernel, stride, padding and dilation, and the size of the result."""
    kernel = [source.choice((1, 1, 2, 3)) for _ in range(2)]
    stride = [source.choice((1, 1, 2)) for _ in range(2)]
    padding = [source.choice((0, 1, -1, 2)) for _ in range(2)]
    dilation = [source.choice((1, 1, 2)) for _ in range(2)]
    out = [_output(size[i], kernel[i], stride[i], padding[i], dilation[i]) for i in range(2)]
    return [*kernel, *stride, *padding, *dilation], out


def _conv2d(source: random.Random, gradient: bool = False) -> list[Any]:
    dtype = source.choice(DTYPES)
    batch, channels = source.choice((1, 1, 2, 0)), source.choice((1, 3, 8, 0))
    size = (source.choice((1, 5, 20, 70)), source.choice((1, 6, 33, 128)))
    numbers, out = _window(source, size)
    v, columns, starts = _sparse_rows(source, channels * numbers[0] * numbers[1])
    rows = v * (starts.numel() - 1)
    x = _values(source, (batch, channels, *size), dtype)
    if gradient:
        grad = _values(source, (batch, rows, *out), dtype)
        return [x, grad, columns, starts, v, numbers]
    values = _values(source, (columns.numel(), v), dtype)
    upsample = [source.choice((1, 1, 2)), source.choice((1, 1, 2))]
    return [x, values, columns, starts, [], *_epilogue(source, dtype, rows, (batch, rows, *out))][
        :7
    ] + [[*numbers, *upsample, *out], source.choice(("none", "relu", "gelu"))]


def _epilogue(
    source: random.Random, dtype: torch.dtype, rows: int, shape: tuple[int, ...]
) -> list[Any]:
    bias = _values(source, (rows,), dtype) if source.random() < 0.5 else None
    return [bias, _values(source, shape, dtype) if source.random() < 0.3 else None]


def _conv2d_values_grad(source: random.Random) -> list[Any]:
    return _conv2d(source, gradient=True)


def _matmul(source: random.Random, gradient: bool = False) -> list[Any]:
    dtype, inputs = source.choice(DTYPES), source.choice((1, 7, 40, 0))
    v, columns, starts = _sparse_rows(source, inputs)
    rows = v * (starts.numel() - 1)
    tokens = source.choice(((), (1,), (5,), (2, 50), (0,), (3, 0)))
    x = _values(source, (*tokens, inputs), dtype)
    if gradient:
        return [x, _values(source, (*tokens, rows), dtype), columns, starts, v]
    values = _values(source, (columns.numel(), v), dtype)
    epilogue = _epilogue(source, dtype, rows, (*tokens, rows))
    activation = source.choice(("none", "relu", "gelu"))
    return [x, values, columns, starts, [], *epilogue, activation]


def _matmul_values_grad(source: random.Random) -> list[Any]:
    return _matmul(source, gradient=True)


def _transpose(source: random.Random) -> list[Any]:
    inputs, taps = source.choice((1, 3, 8)), source.choice((1, 4, 9))
    v, columns, starts = _sparse_rows(source, inputs * taps)
    return [columns, starts, v, inputs, taps]


_VALID: dict[str, Callable[[random.Random], list[Any]]] = {
    "soft_shrink_": _soft_shrink,
    "magnitude_threshold": _magnitude_threshold,
    "adam_soft_shrink_": _adam,
    "sgd_soft_shrink_": _sgd,
    "apply_masks_": _apply_masks,
    "regularize_": _regularize,
    "magnitude_statistics": _one_list,
    "count_zeros": _one_list,
    "nm_prune": _nm_prune,
    "sparse_conv2d": _conv2d,
    "sparse_conv2d_values_grad": _conv2d_values_grad,
    "sparse_matmul": _matmul,
    "sparse_matmul_values_grad": _matmul_values_grad,
    "_sparse_transpose": _transpose,
    "_cpu_capability": lambda source: [source.choice(("", "scalar", "avx2", "avx512"))],
}
OPS = tuple(_VALID)


# What can be wrong


def _spoil(arguments: list[Any], source: random.Random) -> None:
    """Changes one argument, or one entry of a list."""
    at = source.randrange(len(arguments))
    value = arguments[at]
    if isinstance(value, list):
        arguments[at] = _spoiled_list(value, source, arguments)
    else:
        arguments[at] = _spoiled(value, source, arguments)


def _spoiled_list(values: list[Any], source: random.Random, arguments: list[Any]) -> list[Any]:
    how = source.choice(("shorter", "longer", "empty", "entry", "entry", "entry", "entry"))
    if how == "empty":
        return []
    if how == "shorter":
        return values[:-1]
    if how == "longer" or not values:
        return [*values, *(values[-1:] or [source.choice(INTEGERS)])]
    changed = list(values)
    at = source.randrange(len(changed))
    changed[at] = _spoiled(changed[at], source, arguments)
    return changed


def _spoiled(value: Any, source: random.Random, arguments: list[Any]) -> Any:
    if isinstance(value, Tensor):
        return source.choice(_TENSOR_FAULTS)(value, source, arguments)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = (value - 1, value + 1, -value)
        return source.choice((*INTEGERS, *near))
    if isinstance(value, float):
        return source.choice(FLOATS)
    if isinstance(value, str):
        return source.choice(("", "flat", "channels", "relu", "swish", "\0"))
    return source.choice((None, torch.zeros(1), torch.zeros(3), torch.zeros(1).half()))


def _other_dtype(x: Tensor, source: random.Random, _: list[Any]) -> Tensor:
    return torch.zeros(x.shape, dtype=source.choice(OTHER_DTYPES))


def _other_size(x: Tensor, source: random.Random, _: list[Any]) -> Tensor:
    shape = source.choice(
        ((0,), (), (1,), (2, 0), (x.numel() + 1,), (x.numel(), 1), (1, x.numel()))
    )
    return torch.zeros(shape, dtype=x.dtype)


def _other_memory(x: Tensor, source: random.Random, _: list[Any]) -> Tensor:
    """The same shape, not contiguous: strided or one element for all."""
    if source.random() < 0.5:
        return torch.zeros(1, dtype=x.dtype).expand(x.numel()).view(x.shape)
    return torch.zeros((*x.shape, 2), dtype=x.dtype)[..., 0]


def _shifted(x: Tensor, source: random.Random, _: list[Any]) -> Tensor:
    """The same values, one element off the start of the memory."""
    moved = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return moved.copy_(x) if _readable(x) else moved


def _without_memory(x: Tensor, source: random.Random, _: list[Any]) -> Tensor:
    """As FSDP frees a parameter: the shape stays, the storage is empty or too short."""
    freed = torch.zeros(x.shape, dtype=x.dtype)
    nbytes = freed.untyped_storage().nbytes()
    freed.untyped_storage().resize_(0 if source.random() < 0.7 else nbytes // 2)
    return freed


def _without_data(x: Tensor, source: random.Random, _: list[Any]) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _another(x: Tensor, source: random.Random, arguments: list[Any]) -> Tensor:
    """A tensor of another argument, or a view of it of this one's dtype and size."""
    others = [t for t in tensors_of(arguments) if _readable(t) and t.is_contiguous()]
    if not others:
        return x
    other = source.choice(others)
    flat = other.detach().view(-1)
    element = torch.empty(0, dtype=x.dtype).element_size()
    start = source.choice((0, 0, 1)) * element
    view = flat.view(torch.uint8) if flat.element_size() > 1 else flat
    needed = x.numel() * element
    if view.numel() >= start + needed and not x.dtype.is_complex:
        try:
            return view[start : start + needed].view(x.dtype).view(x.shape)
        except RuntimeError:  # torch has no such view of this offset
            return other
    return other


def _other_layout(x: Tensor, source: random.Random, _: list[Any]) -> Tensor:
    made = torch.zeros(x.shape or (1,), dtype=x.dtype)
    return (
        made.to_sparse()
        if source.random() < 0.5
        else made.requires_grad_(x.dtype.is_floating_point)
    )


def _lazy_view(x: Tensor, source: random.Random, _: list[Any]) -> Tensor:
    """Views that torch computes when they are read."""
    if source.random() < 0.5 and x.dtype.is_floating_point and x.layout == torch.strided:
        return torch._neg_view(torch.ones(x.shape, dtype=x.dtype))
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


def _other_values(x: Tensor, source: random.Random, _: list[Any]) -> Tensor:
    if x.dtype in _KINDS:
        return _values(source, tuple(x.shape), x.dtype)
    limit = torch.iinfo(x.dtype) if not x.dtype.is_complex and x.dtype != torch.bool else None
    changed = torch.zeros(x.shape, dtype=x.dtype)
    if limit is None or not x.numel():
        return changed
    if _readable(x):
        changed.copy_(x)
    flat = changed.view(-1)
    value = source.choice(INTEGERS)
    flat[source.randrange(flat.numel())] = max(limit.min, min(limit.max, value))
    return changed


_TENSOR_FAULTS = (
    *(_other_dtype, _other_size, _other_memory, _shifted, _without_memory, _without_data),
    *(_another, _another, _other_layout, _lazy_view, _other_values, _other_values),
)


def clear_scratch(op: str, arguments: list[Any]) -> None:
    """Zeros, which the schemas ask for before the first use, in the scratch memory of a call."""
    place = {"soft_shrink_": 6, "adam_soft_shrink_": -5, "sgd_soft_shrink_": -5}.get(op)
    scratch = None if place is None else arguments[place]
    memory = memory_of(scratch) if isinstance(scratch, Tensor) else None
    if memory is not None:
        memory.zero_()
