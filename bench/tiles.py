"""Sparse convolutions that stay in the tile layout (AMX bfloat16), beside every dense way.

One layer with bias and ReLU, the weight of each row a random mask of units (v rows x 2 channels).
Inputs and results lie in the layout of each way: conversions are rows of their own. Each timed call
follows an untimed one of the same row, so that inputs are as near as those that the layer before
has just written. Without AMX the tile rows are computed slowly; the title names the kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import options
from bench.harness.errors import ParityError
from bench.harness.machine import machine_line
from bench.harness.table import Column, Row, Table, ratio
from bench.harness.timing import CpuClock, Task, interleave
from issp import ops
from issp.utils.files import user_path

EXAMPLE = """examples:
  python -m bench tiles --threads 2
  python -m bench tiles --rounds 300 --out tiles.md"""
SPARSITIES = (0.75, 0.9, 0.95, 0.99)


class Layer(NamedTuple):
    """A convolution of a super-resolution network, and what v = 16 must reach over dense."""

    channels: int
    rows: int
    kernel: int
    size: int
    targets: dict[float, float]

    def __str__(self) -> str:
        return f"{self.kernel}x{self.kernel} {self.channels}->{self.rows}, {self.size}x{self.size}"


LAYERS = (
    Layer(256, 256, 3, 48, {0.9: 4.5, 0.95: 8.0, 0.99: 18.0}),
    Layer(64, 64, 3, 64, {0.9: 2.5, 0.95: 3.5, 0.99: 4.5}),
    Layer(256, 256, 1, 48, {}),
    Layer(256, 1024, 3, 48, {}),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--rounds", type=int, default=100, help="calls of each row, default 100")
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="the first ones alone")
    parser.add_argument("--out", type=user_path, help="also write the tables to this .md file")


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Prints a table for each layer.

    Raises:
        ValueError: an argument that cannot be.
        ParityError: a result is not that of torch.
    """
    for name in ("threads", "rounds", "layers"):
        options.at_least_one(args, name)
    options.folders_exist(args.out)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tables = [_measure(layer, args.rounds) for layer in LAYERS[: args.layers]]
    text = "\n".join(table.markdown() for table in tables)
    print(text)
    if args.out:
        args.out.write_text(text)


def _measure(layer: Layer, rounds: int) -> Table:
    torch.manual_seed(0)
    x = torch.randn(1, layer.channels, layer.size, layer.size)
    weight = torch.randn(layer.rows, layer.channels, layer.kernel, layer.kernel)
    weight *= (layer.channels * layer.kernel**2) ** -0.5
    bias = torch.randn(layer.rows)
    calls = {**_dense(x, weight, bias), **dict(_tiled(layer, x, weight, bias))}
    tasks = {name: Task(call, prepare=call) for name, call in calls.items()}
    interleave(list(tasks.values()), CpuClock(64), rounds, 1e9, CpuClock.modes[:1])
    seconds = {name: task.median("warm") for name, task in tasks.items()}
    fastest = min(s for name, s in seconds.items() if s and name.startswith("dense"))
    rows = [
        Row(
            {
                "way": name,
                "time": seconds[name],
                "best": task.best("warm"),
                "ratio": ratio(fastest, seconds[name]),
                "target": _target(layer, name),
            },
            task.samples,
        )
        for name, task in tasks.items()
    ]
    kernels = torch.ops.issp._tile_capability()
    return Table(
        f"tiles: {layer}, bias and ReLU, {torch.get_num_threads()} threads, {kernels} kernels",
        machine_line("cpu"),
        [
            Column("way"),
            Column("time", "median", "us"),
            Column("best", "shortest", "us"),
            Column("ratio", "times as fast as the fastest dense", format=lambda r: f"{r:.1f}"),
            Column("target", "target"),
        ],
        rows,
        [f"{rounds} calls of each row in turn, in another order each round"],
    )


def _target(layer: Layer, name: str) -> str:
    targets = {f"tiles v=16, {100 * s:g} %": f">= {r:g}" for s, r in layer.targets.items()}
    return targets.get(name, "")


def _dense(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every dense way; the last has its weight reordered once and ReLU in the kernel."""
    pad = weight.shape[2] // 2
    last = torch.channels_last

    def eager(*tensors: Tensor) -> Callable[[], Tensor]:
        image, kernel, offset = tensors
        return lambda: F.relu_(F.conv2d(image, kernel, offset, padding=pad))

    halves = [t.bfloat16() for t in (x, weight, bias)]
    image = halves[0].contiguous(memory_format=last)
    calls = {
        "dense float32": eager(x, weight, bias),
        "dense float32, channels_last": eager(
            x.contiguous(memory_format=last), weight.contiguous(memory_format=last), bias
        ),
        "dense bfloat16, channels_last": eager(
            image, halves[1].contiguous(memory_format=last), halves[2]
        ),
    }
    if torch.backends.mkldnn.is_available():
        window: tuple[Any, ...] = ([pad, pad], [1, 1], [1, 1], 1)
        reordered = torch._C._nn.mkldnn_reorder_conv2d_weight(
            halves[1].to_mkldnn(), *window, list(x.shape)
        )
        fused = torch.ops.mkldnn._convolution_pointwise
        calls["dense bfloat16, oneDNN, reordered, fused"] = lambda: fused(
            image, reordered, halves[2], *window, "relu", [], ""
        )
    return calls


def _tiled(
    layer: Layer, x: Tensor, weight: Tensor, bias: Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The convolutions into an image that exists, and the conversions; checked first."""
    t = ops.to_tiles(x)
    out = ops.to_tiles(torch.zeros(1, layer.rows, layer.size, layer.size))
    for v in (16, 32):
        for sparsity in SPARSITIES:
            w = ops.TiledWeight.from_weight(weight * unit_mask(weight, v, sparsity), v)
            y = ops.from_tiles(ops.tiled_conv2d(t, w, bias, activation="relu"))
            _check(y, x, w.to_dense(), bias)
            yield (
                f"tiles v={v}, {100 * sparsity:g} %",
                lambda w=w: ops.tiled_conv2d(t, w, bias, activation="relu", out=out),
            )
    yield "float32 to tiles", lambda: ops.to_tiles(x)
    yield "tiles to float32", lambda: ops.from_tiles(out)


def unit_mask(weight: Tensor, v: int, sparsity: float) -> Tensor:
    """Random units of v rows x 2 channels at one tap, a share of `sparsity` of them zero."""
    rows, channels, *taps = weight.shape
    order = torch.rand(-(-rows // v), -(-channels // 2), *taps)
    kept = order.flatten().argsort().argsort().view(order.shape)
    mask = kept < round(order.numel() * (1 - sparsity))
    return mask.repeat_interleave(v, 0).repeat_interleave(2, 1)[:rows, :channels]


def _check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    exact = F.relu(
        F.conv2d(
            x.bfloat16().double(), weight.double(), bias.double(), padding=weight.shape[2] // 2
        )
    )
    if not torch.allclose(y.double(), exact, rtol=2**-8, atol=1e-4):
        raise ParityError(f"tiles differ from torch by {float((y - exact).abs().max()):g}")
