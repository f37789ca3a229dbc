"""The only input factory of the tests of sparse ops: named sparse weights, inputs, geometries."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from issp import Keep
from issp.ops.geometry import Geometry, Pair
from issp.ops.reference import sparse as reference_sparse


@dataclass(frozen=True)
class Weight:
    """A sparse weight [rows, inputs, *kernel] in blocks of v rows.

    `pattern` is a `Keep`, the share of kept positions, or a name: "empty rows" (every other block
    owns nothing), "first row" (only the first block owns something), "last position" (every block
    keeps its last position alone), "uneven" (from nothing to everything, block by block).
    """

    rows: int
    inputs: int
    kernel: Pair = (1, 1)
    pattern: Keep | float | str = 0.1
    v: int = 1

    @property
    def length(self) -> int:
        return self.inputs * self.kernel[0] * self.kernel[1]

    def kept(self, source: torch.Generator) -> Tensor:
        """Bool [blocks, length], True = kept."""
        blocks, taps = self.rows // self.v, self.kernel[0] * self.kernel[1]
        draw = torch.rand(blocks, self.length, generator=source)
        if isinstance(self.pattern, Keep):
            grouped = draw.view(blocks, -1, self.pattern.of, taps)
            rank = grouped.argsort(2).argsort(2)
            return (rank < self.pattern.n).view(blocks, self.length)
        if isinstance(self.pattern, float):
            return draw < self.pattern
        block = torch.arange(blocks)[:, None]
        if self.pattern == "empty rows":
            return (draw < 0.3) & (block % 2 == 1)
        if self.pattern == "first row":
            return (draw < 0.5) & (block == 0)
        if self.pattern == "uneven":
            return draw < block / max(1, blocks - 1)
        assert self.pattern == "last position", self.pattern
        return (torch.arange(self.length) == self.length - 1).expand(blocks, -1)

    def build(self, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """values float64 [E, v], columns, starts."""
        kept = self.kept(source)
        starts = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        columns = kept.nonzero()[:, 1].int().contiguous()
        return torch.randn(len(columns), self.v, generator=source).double(), columns, starts


@dataclass
class SparseCall:
    """The tensors of one call, of one dtype on one device.

    `weight` is dense, [O, I, kh, kw]; `transposed` what backward needs; `grad` a gradient of the
    result.
    """

    x: Tensor
    values: Tensor
    columns: Tensor
    starts: Tensor
    transposed: list[Tensor]
    bias: Tensor | None
    residual: Tensor | None
    weight: Tensor
    grad: Tensor
    tail: tuple = ()

    def args(self) -> tuple:
        """The arguments of `sparse_conv2d` or `sparse_matmul`, without the activation."""
        return (
            *(self.x, self.values, self.columns, self.starts, self.transposed),
            *(self.bias, self.residual, *self.tail),
        )


@dataclass(frozen=True)
class SparseCase:
    """One call; `build` makes fresh tensors, the same numbers rounded to the dtype asked for."""

    name: str
    weight: Weight
    bias: bool = True
    residual: bool = False
    activation: str = "none"

    def build(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> SparseCall:
        source = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        values, columns, starts = self.weight.build(source)
        w, blocks = self.weight, self.weight.rows // self.weight.v
        block = torch.repeat_interleave(torch.arange(blocks), starts.diff().long())
        dense = torch.zeros(blocks, w.v, w.length, dtype=torch.float64)
        dense[block, :, columns.long()] = values

        def number(*shape):
            return torch.randn(shape, generator=source).to(dtype).to(device)

        taps = w.kernel[0] * w.kernel[1]
        return SparseCall(
            x=number(*self.x_shape()),
            values=values.to(dtype).to(device),
            columns=columns.to(device),
            starts=starts.to(device),
            transposed=[
                t.to(device)
                for t in reference_sparse.transpose(columns, starts, w.v, w.inputs, taps)
            ],
            bias=number(w.rows) if self.bias else None,
            residual=number(*self.y_shape()) if self.residual else None,
            weight=dense.view(w.rows, w.inputs, *w.kernel).to(dtype).to(device),
            grad=number(*self.y_shape()),
            tail=self.tail(),
        )

    def x_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def y_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def tail(self) -> tuple:
        """The arguments behind the tensors: a convolution's geometry."""
        return ()

    def grad_tail(self) -> tuple:
        """The same of the op for the gradient of values."""
        return ()

    @property
    def work(self) -> int:
        """Multiplications of the dense product: slow back ends leave the large ones out."""
        return torch.Size(self.y_shape()).numel() * self.weight.length


@dataclass(frozen=True)
class ConvCase(SparseCase):
    """`sparse_conv2d`; size None: all outputs that the image and its padding hold."""

    image: Pair = (7, 9)
    batch: int = 1
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    upsample: Pair = (1, 1)
    size: Pair | None = field(default=None)

    def x_shape(self) -> tuple[int, ...]:
        return (self.batch, self.weight.inputs, *self.image)

    def y_shape(self) -> tuple[int, ...]:
        return (self.batch, self.weight.rows, *self.outputs())

    def outputs(self) -> Pair:
        if self.size is not None:
            return self.size
        extent = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.kernel, strict=True)]
        return tuple(
            ((self.image[i] - 1) * self.upsample[i] + 1 + 2 * self.padding[i] - extent[i])
            // self.stride[i]
            + 1
            for i in (0, 1)
        )

    def geometry(self) -> Geometry:
        return Geometry(
            *(self.weight.kernel, self.stride, self.padding, self.dilation, self.upsample),
            self.outputs(),
        )

    def tail(self) -> tuple:
        return (self.geometry().for_conv2d(),)

    def grad_tail(self) -> tuple:
        return (self.geometry().for_values_grad(),)


@dataclass(frozen=True)
class MatmulCase(SparseCase):
    """`sparse_matmul` on x [*lead, inputs]."""

    lead: tuple[int, ...] = (11,)

    def x_shape(self) -> tuple[int, ...]:
        return (*self.lead, self.weight.inputs)

    def y_shape(self) -> tuple[int, ...]:
        return (*self.lead, self.weight.rows)


PATTERNS = (
    *(1.0, 0.5, 0.1, 0.05, 0.01, 0.0),
    *("empty rows", "first row", "last position", "uneven"),
)
# (keep, inputs): every pattern of the issue, on a number of channels that it divides.
KEEPS = (
    *((Keep(2, of=4), 8), (Keep(1, of=4), 12), (Keep(2, of=8), 24), (Keep(1, of=10), 20)),
    *((Keep(1, of=16), 16), (Keep(1, of=20), 60), (Keep(2, of=32), 64), (Keep(1, of=90), 180)),
    *((Keep(3, of=3), 9), (Keep(1, of=1), 5), (Keep(5, of=7), 21)),
)
SHARED = (1, 4, 8, 16, 32)


def _same(kernel: Pair) -> Pair:
    return (kernel[0] // 2, kernel[1] // 2)


def _label(pattern) -> str:
    return f"{pattern.n}:{pattern.of}" if isinstance(pattern, Keep) else str(pattern)


def _conv_patterns() -> list[ConvCase]:
    cases = []
    for pattern in PATTERNS:
        for kernel in ((1, 1), (3, 3)):
            for v in (1, 4):
                weight = Weight(8, 10, kernel, pattern, v)
                name = f"{_label(pattern)} v={v} {kernel[0]}x{kernel[1]}"
                cases.append(ConvCase(name, weight, padding=_same(kernel)))
    for i, (keep, inputs) in enumerate(KEEPS):
        v = SHARED[i % len(SHARED)]
        keep = replace(keep, v=v)
        weight = Weight(2 * v, inputs, (3, 3), keep, v)
        cases.append(ConvCase(f"{_label(keep)} v={v} 3x3", weight, padding=(1, 1), image=(6, 5)))
    for v in SHARED:
        weight = Weight(96, 8, (3, 3), 0.3, v)
        cases.append(ConvCase(f"0.3 v={v} 3x3, 96 rows", weight, padding=(1, 1), image=(5, 6)))
    return cases


W33, W33_4 = Weight(8, 6, (3, 3), 0.4), Weight(8, 6, (3, 3), 0.4, 4)
W53, W17 = Weight(6, 5, (5, 3), 0.3), Weight(4, 5, (1, 7), 0.3, 2)

_GEOMETRIES = [
    ConvCase("5x3, same size", W53, padding=(2, 1)),
    ConvCase("1x7, same size", W17, padding=(0, 3)),
    ConvCase("no padding", W33),
    ConvCase("one pixel", W33, image=(1, 1), padding=(1, 1)),
    ConvCase("one pixel, 1x1", Weight(5, 7, pattern=0.5), image=(1, 1)),
    ConvCase("one output", W33, image=(3, 3)),
    ConvCase("one row", W33_4, image=(1, 37), padding=(1, 1)),
    ConvCase("one column", W33_4, image=(37, 1), padding=(1, 1)),
    ConvCase("padding more than the kernel", W33, image=(4, 5), padding=(5, 7)),
    ConvCase("padding more than the kernel, v=4", W33_4, image=(3, 3), padding=(4, 4)),
    ConvCase("padding of one side", W33, padding=(0, 2)),
    ConvCase("stride 2", W33, stride=(2, 2), padding=(1, 1)),
    ConvCase("stride 2, even", W33_4, image=(8, 10), stride=(2, 2), padding=(1, 1)),
    ConvCase("stride 3 x 1", W53, image=(11, 8), stride=(3, 1), padding=(1, 1)),
    ConvCase("stride more than the kernel", W33, image=(17, 13), stride=(5, 4)),
    ConvCase("stride 2, 1x1", Weight(8, 12, pattern=0.3), image=(9, 9), stride=(2, 2)),
    ConvCase("padding, 1x1", Weight(8, 12, pattern=0.3, v=4), image=(3, 4), padding=(2, 1)),
    ConvCase("dilation 2", W33, image=(9, 11), padding=(2, 2), dilation=(2, 2)),
    ConvCase("dilation 3 x 1", W33_4, image=(9, 6), padding=(1, 1), dilation=(3, 1)),
    ConvCase(
        *("stride, padding, dilation", W53),
        **{"image": (13, 12), "stride": (2, 3), "padding": (3, 2), "dilation": (2, 2)},
    ),
    ConvCase("batch of 2", W33, batch=2, padding=(1, 1)),
    ConvCase("batch of 3, v=4", W33_4, batch=3, padding=(1, 1)),
    ConvCase("batch of 3, stride 2", W33, batch=3, stride=(2, 2), padding=(1, 1)),
    ConvCase("rows around a vector", W33, image=(5, 33), padding=(1, 1)),
    ConvCase("one channel", Weight(4, 1, (3, 3), 0.5), padding=(1, 1)),
    ConvCase("one output row", Weight(1, 6, (3, 3), 0.5), padding=(1, 1)),
    ConvCase("odd rows", Weight(7, 11, (3, 3), 0.2), padding=(1, 1), batch=2),
    ConvCase("odd rows, v=3", Weight(9, 11, (3, 3), 0.2, 3), padding=(1, 1)),
    ConvCase("33 rows, 17 channels", Weight(33, 17, (3, 3), 0.1), image=(9, 17), padding=(1, 1)),
]

# What only gradients ask for: negative padding, an input spread by zeros, a given output size.
_INNER = [
    ConvCase("negative padding", W33, image=(9, 9), padding=(-1, -2)),
    ConvCase("upsample 2", W33, image=(4, 5), padding=(1, 1), upsample=(2, 2)),
    ConvCase("upsample 2, cut", W33_4, image=(4, 5), padding=(1, 1), upsample=(2, 2), size=(6, 8)),
    ConvCase(
        "upsample 2, beyond", W33, image=(4, 5), padding=(2, 2), upsample=(2, 3), size=(9, 16)
    ),
    ConvCase("upsample 3 x 1, 1x1", Weight(6, 8, pattern=0.3), upsample=(3, 1), image=(3, 5)),
    ConvCase(
        *("upsample, stride and dilation", W53),
        **{"upsample": (2, 3), "stride": (3, 2), "padding": (2, -1), "dilation": (2, 1)},
    ),
    ConvCase("fewer outputs", W33, image=(9, 9), padding=(1, 1), size=(4, 3)),
]

_EPILOGUES = [
    ConvCase(
        *(f"{activation}, {'bias' if bias else 'no bias'}{', residual' if residual else ''}", w),
        **{"bias": bias, "residual": residual, "activation": activation, "padding": (1, 1)},
    )
    for activation in ("none", "relu", "gelu")
    for bias, residual, w in ((False, False, W33), (True, True, W33_4), (False, True, W33))
]

_LARGER = [
    ConvCase("60 to 60", Weight(60, 60, (3, 3), 0.05), image=(20, 33), padding=(1, 1)),
    ConvCase("60 to 60, v=4", Weight(60, 60, (3, 3), 0.05, 4), image=(33, 20), padding=(1, 1)),
    ConvCase("64 to 64, 1x1", Weight(64, 64, pattern=0.1, v=4), image=(24, 31), batch=2),
    ConvCase("v=16, 2:32", Weight(64, 64, (3, 3), Keep(2, of=32, v=16), 16), padding=(1, 1)),
    ConvCase("v=32, 2:8", Weight(64, 64, (3, 3), Keep(2, of=8, v=32), 32), padding=(1, 1)),
    ConvCase(
        *("256 to 256, stride 2", Weight(256, 256, (3, 3), 0.02)),
        **{"image": (9, 11), "stride": (2, 2), "padding": (1, 1)},
    ),
]

CONVS = (*_conv_patterns(), *_GEOMETRIES, *_INNER, *_EPILOGUES, *_LARGER)


def _matmul_patterns() -> list[MatmulCase]:
    cases = [
        MatmulCase(f"{_label(pattern)} v={v}", Weight(16, 20, (1, 1), pattern, v))
        for pattern in PATTERNS
        for v in (1, 4)
    ]
    for i, (keep, inputs) in enumerate(KEEPS):
        v = SHARED[-1 - i % len(SHARED)]
        keep = replace(keep, v=v)
        cases.append(MatmulCase(f"{_label(keep)} v={v}", Weight(3 * v, inputs, (1, 1), keep, v)))
    return cases


_W = Weight(12, 18, pattern=0.3)

MATMULS = (
    *_matmul_patterns(),
    MatmulCase("one vector", _W, lead=()),
    MatmulCase("one row", _W, lead=(1,)),
    MatmulCase("two leading dimensions", _W, lead=(3, 5)),
    MatmulCase("three leading dimensions, v=4", Weight(12, 18, pattern=0.3, v=4), lead=(2, 3, 7)),
    MatmulCase("one input", Weight(5, 1, pattern=1.0)),
    MatmulCase("one output", Weight(1, 31, pattern=0.5)),
    MatmulCase("odd sizes", Weight(33, 17, pattern=0.2), lead=(67,)),
    MatmulCase("odd rows, v=3", Weight(9, 17, pattern=0.2, v=3), lead=(19,)),
    *(
        MatmulCase(
            f"{activation}, bias {bias}, residual {residual}",
            Weight(12, 18, pattern=0.3, v=v),
            **{"bias": bias, "residual": residual, "activation": activation},
        )
        for activation in ("none", "relu", "gelu")
        for bias, residual, v in ((False, False, 1), (True, True, 4), (False, True, 1))
    ),
    MatmulCase("180 to 60", Weight(180, 60, pattern=0.05), lead=(200,)),
    MatmulCase("256 to 256, v=4", Weight(256, 256, pattern=0.1, v=4), lead=(129,)),
    MatmulCase("v=32, 2:32", Weight(64, 64, (1, 1), Keep(2, of=32, v=32), 32), lead=(70,)),
)

# Enough for slow back ends and for other questions: one of each kind.
FEW_CONVS = tuple(
    case
    for case in CONVS
    if case.name
    in (
        *("0.1 v=1 3x3", "0.5 v=4 1x1", "0.0 v=1 3x3", "1.0 v=4 3x3", "empty rows v=1 3x3"),
        *("2:32 v=4 3x3", "5x3, same size", "stride 2", "stride, padding, dilation"),
        *("padding more than the kernel", "batch of 3, v=4", "one pixel", "v=16, 2:32"),
    )
)
FEW_MATMULS = tuple(
    case
    for case in MATMULS
    if case.name
    in (
        *("0.1 v=1", "0.5 v=4", "0.0 v=1", "1.0 v=4", "empty rows v=1", "one vector"),
        *("two leading dimensions", "odd rows, v=3", "v=32, 2:32"),
    )
)


def random_convs(count: int) -> tuple[ConvCase, ...]:
    """Random shapes, patterns and geometries, every one with at least one output."""
    draw, cases = random.Random(count), []
    while len(cases) < count:
        v = draw.choice([1, 1, 1, 2, 4, 4, 5, 8])
        kernel = (draw.choice([1, 1, 2, 3, 3, 5]), draw.choice([1, 1, 2, 3, 3, 7]))
        density = draw.choice([1.0, 0.5, 0.1, 0.05, 0.01])
        weight = Weight(v * draw.randint(1, 7), draw.randint(1, 30), kernel, density, v)
        case = ConvCase(
            *(f"random {len(cases)}", weight, draw.random() < 0.5, draw.random() < 0.3),
            **{
                "activation": draw.choice(["none", "none", "relu", "gelu"]),
                "image": (draw.randint(1, 13), draw.randint(1, 40)),
                "batch": draw.randint(1, 3),
                "stride": (draw.choice([1, 1, 1, 2, 3]), draw.choice([1, 1, 1, 2, 3])),
                "padding": (draw.randint(-1, 5), draw.randint(-1, 5)),
                "dilation": (draw.choice([1, 1, 2]), draw.choice([1, 1, 3])),
                "upsample": draw.choice([(1, 1), (1, 1), (1, 1), (2, 2), (1, 3)]),
            },
        )
        if min(case.outputs()) >= 1:
            cases.append(case)
    return tuple(cases)


def names(cases) -> list[str]:
    """Readable ids for pytest."""
    return [case.name for case in cases]
