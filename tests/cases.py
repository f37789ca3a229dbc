"""The only input factory of the kernel tests: named weights, counts and shrink factors."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

import issp

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Case:
    """Weights of one call; `build` makes fresh ones, so that no test sees another's changes."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    k: tuple[int, ...]
    fill: str = "normal"
    shrink: float = 0.95

    def build(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        source = torch.Generator().manual_seed(len(self.name) + 1000 * len(self.shapes))
        return [FILLS[self.fill](s, source).to(dtype).to(device) for s in self.shapes]

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def _normal(shape, source):
    return torch.randn(shape, generator=source) * 0.05


def _few_values(shape, source):
    return torch.randint(-2, 3, shape, generator=source) / 4


def _special(shape, source):
    """Every kind of float side by side: zeros of both signs, denormals, infinities, NaNs."""
    kinds = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1.1754942e-38, 1.1754944e-38, 1.2e-38, -1.25e-38]
        + [6e-8, -6e-8, 6.1e-5, -6.2e-5, 1e-3, -2.0, float("inf"), -float("inf"), float("nan")]
    )
    return kinds[torch.randint(len(kinds), shape, generator=source)]


def _magnitudes(shape, source):
    """From the denormals to the largest floats, evenly over the exponents."""
    sign = torch.randint(0, 2, shape, generator=source) * 2.0 - 1
    exponent = torch.rand(shape, generator=source, dtype=torch.float64) * 270 - 145
    return (sign * torch.exp2(exponent)).float()


FILLS = {
    "normal": _normal,
    "few": _few_values,
    "special": _special,
    "magnitudes": _magnitudes,
    "zero": lambda shape, source: torch.zeros(shape),
    "equal": lambda shape, source: torch.full(shape, -0.25),
    "rising": lambda shape, source: torch.linspace(1e-3, 1, torch.Size(shape).numel()).view(shape),
}

NAMED = (
    Case("all ties", ((300,),), (100,), "equal"),
    Case("all zero", ((70,), (513,)), (35, 512), "zero"),
    Case("few values, many ties", ((37, 20), (64,)), (400, 31), "few"),
    Case("one element, selected", ((1,),), (1,)),
    Case("one element, kept", ((1,),), (0,)),
    Case("below a tile", ((5,), (31,), (63,), (65,)), (3, 30, 32, 1)),
    Case("nothing selected", ((200,), (3, 3)), (0, 0)),
    Case("all selected", ((200,), (3, 3)), (200, 9)),
    Case("special values", ((600,),), (300,), "special"),
    Case("special values, all selected", ((600,),), (600,), "special"),
    Case("special values, hard", ((600,),), (560,), "special", 0.0),
    Case("threshold at infinity", ((600,),), (530,), "special"),
    Case("huge and tiny", ((900,),), (450,), "magnitudes"),
    Case("huge and tiny, hard", ((900,),), (899,), "magnitudes", 0.0),
    Case("hard", ((16, 60, 3, 3),), (8208,), "normal", 0.0),
    Case("no shrink", ((500,),), (250,), "magnitudes", 1.0),
    Case("already sorted", ((1000,),), (950,), "rising"),
    Case("a conv and two linears", ((60, 3, 3, 3), (180, 20), (20, 60)), (1539, 3420, 1140)),
)

LARGE = (
    Case("shared by threads", ((1024, 700), (40, 40)), (680_000, 800)),
    Case("shared by threads, ties", ((1 << 20,),), (700_001,), "few"),
    Case("shared by threads, special", ((700_001,),), (350_000,), "special"),
)


@cache
def random_shapes(count: int, largest: int, per_call: int = 10) -> tuple[Case, ...]:
    """`count` random shapes, several to a call, with random counts, fills and shrink factors."""
    draw = random.Random(count * largest)
    cases = []
    for call in range(count // per_call):
        shapes, k = [], []
        for _ in range(per_call):
            numel = int(largest ** draw.uniform(0, 1))
            rows = draw.choice([r for r in (1, 2, 3, 5, 8) if r <= numel])
            shapes.append((rows, numel // rows))
            k.append(draw.randint(0, rows * (numel // rows)))
        fill = draw.choice(["normal", "normal", "few", "magnitudes", "special"])
        shrink = draw.choice([0.95, 0.95, 0.99, 0.5, 0.0])
        cases.append(Case(f"random {call}", tuple(shapes), tuple(k), fill, shrink))
    return tuple(cases)


def training_updates(steps: int, seed: int = 0):
    """A life of two layers: (updates, k, shrink) per step, with jumps in learning rate and k.

    Updates are Adam-like, of unit scale times a rate that decays, jumps by 100 and falls back five
    times, so that thresholds wander, jump up and jump down; the ratio changes seven times.
    """
    source = torch.Generator().manual_seed(seed)
    shapes = ((24, 16, 3, 3), (130,))
    for step in range(steps):
        jump = step % (steps // 5) == steps // 5 - 1
        rate = 2e-4 * (100 if jump else 1) * 0.999**step
        ratio = (0.9, 0.95, 0.99)[7 * step // steps % 3]
        k = [issp.num_pruned(torch.Size(s).numel(), ratio) for s in shapes]
        yield [torch.randn(s, generator=source) * rate for s in shapes], k, 0.95


def training_start() -> list[Tensor]:
    source = torch.Generator().manual_seed(99)
    return [
        torch.randn((24, 16, 3, 3), generator=source) * 0.05,
        torch.randn(130, generator=source),
    ]


# Sizes around a mask word, a mask line, a tile of the small and one of the large kernels.
ODD = Case("odd sizes", ((1,), (31,), (33,), (511,), (513,), (37, 20), (4097,), (8193,)), (0,) * 8)


def random_masks(case: Case, kept: float = 0.3) -> list[Tensor]:
    """One bool mask per tensor, True = kept: the first keeps all, the second nothing."""
    source = torch.Generator().manual_seed(17)
    shares = [1.0, 0.0] + [kept] * len(case.shapes)
    return [
        torch.rand(shape, generator=source) < share
        for shape, share in zip(case.shapes, shares, strict=False)
    ]


def sibling(case: Case, **changes) -> Case:
    """The same shapes with other values: a weight's gradient, its moments."""
    return replace(case, name=f"{case.name}, sibling", **changes)


# One parameter group: weights that are only updated, behind those of a case.
REST = ((7,), (1,), (65,), (16, 20))
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0} | {
    "decoupled": False,
    "maximize": False,
}
SGD = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0} | {
    "nesterov": False,
    "maximize": False,
}
# Name -> what differs from the above; "scale" is a gradient scaler's, "lr_tensor" replaces lr.
ADAM_RULES = {
    "plain": {},
    "coupled decay": {"weight_decay": 0.03},
    "decoupled decay": {"weight_decay": 0.1, "decoupled": True},
    "maximize, scaled": {"maximize": True, "scale": 1024.0},
    "odd scale, decay": {"scale": 3.7, "weight_decay": 0.01},
    "lerp from the other end": {"beta1": 0.3, "beta2": 0.6},
    "no memory": {"beta1": 0.0, "beta2": 0.0},
    "lr as a tensor": {"lr": 0.0, "lr_tensor": 3e-4, "weight_decay": 0.1, "decoupled": True},
}
SGD_RULES = {
    "plain": {},
    "no momentum": {"momentum": 0.0, "weight_decay": 0.01},
    "nesterov": {"nesterov": True, "weight_decay": 0.01},
    "dampening": {"dampening": 0.3, "maximize": True},
    "nesterov, scaled": {"nesterov": True, "scale": 1024.0},
    "odd scale": {"scale": 3.7, "dampening": 0.9},
    "lr as a tensor": {"lr": 0.0, "lr_tensor": 3e-4, "momentum": 0.5},
}


def tensors_like(
    weights: list[Tensor], fill: str, seed: int, positive: bool = False
) -> list[Tensor]:
    """One float32 tensor like each weight: gradients, moments; second moments are positive."""
    source = torch.Generator().manual_seed(seed)
    made = [FILLS[fill](w.shape, source).to(w.device) for w in weights]
    return [x.abs() for x in made] if positive else made


@dataclass(frozen=True)
class GroupedCase(Case):
    """A call with N:M weights or units; `patterns` has None where a weight has neither."""

    patterns: tuple[issp.Keep | issp.Unit | None, ...] = ()


def without_units(case: GroupedCase) -> GroupedCase:
    """The case without its units, which the CUDA kernels do not select."""
    kept = [i for i, by in enumerate(case.patterns) if not isinstance(by, issp.Unit)]
    columns = {x: tuple(getattr(case, x)[i] for i in kept) for x in ("shapes", "k", "patterns")}
    return dataclasses.replace(case, **columns)


def grouped(name, *layers, fill="normal", shrink=0.95, selecting=True) -> GroupedCase:
    """A case of layers (shape, what): a pattern, k of single weights, or (unit, number of units).

    Args:
        selecting: False makes k zero everywhere: nothing is selected.
    """
    shapes = tuple(shape for shape, _ in layers)
    pairs = [_pattern_and_k(torch.Size(shape).numel(), what) for shape, what in layers]
    patterns, k = (tuple(column) for column in zip(*pairs, strict=True))
    return GroupedCase(name, shapes, k if selecting else (0,) * len(k), fill, shrink, patterns)


def _pattern_and_k(numel, what):
    if isinstance(what, issp.Keep):
        return what, what.pruned(numel)
    return (what[0], what[1] * what[0].size) if isinstance(what, tuple) else (None, what)


def _everywhere(keep: issp.Keep) -> GroupedCase:
    """A pattern on 3x3 and 1x1 convolutions and a linear layer, beside one of odd shape."""
    v, of = keep.v, keep.of
    kernels = [(2 * v, of, 3, 3), (v, 3 * of, 1, 1)]
    if keep.c > 1:
        kernels += [(3 * v, 5 * of), (v, of, 9, 9), (2 * v, 2 * of, 2, 5)]
    if v == 1:
        kernels += [(5, 2 * of), (3, of, 2, 5)]
    return grouped(keep.name, *((shape, keep) for shape in kernels))


_KEEPS = ((1, 1), (2, 4), (1, 4), (2, 8), (1, 10), (1, 16), (1, 20), (2, 32), (4, 4), (3, 7))
GROUPED = (
    *(_everywhere(issp.Keep(n, of=of)) for n, of in _KEEPS),
    *(_everywhere(issp.Keep(n, of=of, v=v)) for n, of in ((2, 4), (1, 10)) for v in (4, 16)),
    *(
        _everywhere(issp.Keep(n, of=of, v=v, c=c))
        for n, of, v, c in ((2, 32, 16, 2), (2, 8, 1, 2), (8, 24, 4, 4), (6, 6, 2, 3), (4, 4, 1, 4))
    ),
    *(_everywhere(issp.Keep(n, of=16)) for n in (4, 8, 15)),
    *(_everywhere(issp.Keep(n, of=26)) for n in (9, 12, 20)),  # searched bit by bit
    grouped(
        "flat",
        ((2, 45, 3, 3), issp.Keep(1, of=90, layout="flat")),
        ((7, 5, 3, 3), issp.Keep(2, of=9, layout="flat")),
        ((12,), issp.Keep(1, of=2, layout="flat")),
        ((1, 1100), issp.Keep(3, of=1100, layout="flat")),
    ),
    *(
        grouped(
            f"grouped, {fill}",
            ((4, 8, 3, 3), issp.Keep(2, of=8)),
            ((6, 30), issp.Keep(3, of=10)),
            ((8, 16, 3, 3), issp.Keep(2, of=16, v=4)),
            ((40,), 17),
            ((9, 24), issp.Keep(1, of=24, layout="flat")),
            ((8, 16, 3, 3), issp.Keep(4, of=16, v=4, c=2)),
            ((6, 30), issp.Keep(2, of=10, c=2)),
            ((8, 12, 3, 3), (issp.Unit(4, 2), 61)),
            ((6, 30), (issp.Unit(1, 2), 50)),
            fill=fill,
            shrink=shrink,
        )
        for fill, shrink in (("few", 0.95), ("equal", 0.95), ("zero", 0.5), ("special", 0.95))
        + (("special", 0.0), ("magnitudes", 0.95), ("magnitudes", 0.0), ("normal", 1.0))
    ),
    grouped("grouped, nothing selected", ((4, 8), issp.Keep(1, of=4)), ((33,), 5), selecting=False),
)
UNITS = (
    grouped(
        "units",
        ((32, 64, 3, 3), (issp.Unit(16, 2), 500)),
        ((32, 6, 5, 5), (issp.Unit(32, 3), 9)),
        ((7, 22), (issp.Unit(7, 1), 20)),
        ((5, 14, 9, 9), (issp.Unit(1, 2), 2000)),
        ((20, 33), (issp.Unit(4, 1), 100)),
        ((6, 130), (issp.Unit(3, 130), 1)),
        ((9, 64, 1, 1), (issp.Unit(9, 4), 16)),
    ),
    grouped(
        "units of one, all, none and single weights",
        ((4, 6, 3), (issp.Unit(1, 1), 41)),
        ((4, 6, 3), (issp.Unit(2, 2), 18)),
        ((4, 6, 3), (issp.Unit(2, 2), 0)),
        ((4, 6, 3), 41),
    ),
)
GROUPED_LARGE = (
    grouped(
        "grouped, shared by threads",
        ((512, 64, 3, 3), issp.Keep(2, of=32)),
        ((900, 360), issp.Keep(1, of=20)),
        ((300_000,), 200_000),
        ((180, 180, 3, 3), issp.Keep(1, of=10, v=4)),
        ((1000, 900), issp.Keep(1, of=90, layout="flat")),
        ((12, 36), issp.Keep(2, of=4)),
        ((128, 64, 3, 3), issp.Keep(4, of=64, v=16, c=2)),
        ((256, 128, 3, 3), (issp.Unit(16, 2), 8000)),
        ((600, 360), (issp.Unit(1, 2), 90_000)),
        ((720, 90), (issp.Unit(4, 1), 14_000)),
    ),
)
