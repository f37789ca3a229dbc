"""The ways of torch and of issp, as `bench.deploy.worker` runs them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from torch import Tensor, nn

import issp
from issp.nn import autotune
from issp.utils import process
from issp.utils.errors import first_line

Network = Callable[[Tensor], Tensor]
Maker = Callable[[nn.Module, Tensor], tuple[Network, Tensor]]


def _as(dtype: torch.dtype, layout: torch.memory_format) -> Maker:
    def make(model: nn.Module, x: Tensor) -> tuple[Network, Tensor]:
        return model.to(dtype, memory_format=layout), x.to(dtype, memory_format=layout)

    return make


def _autocast(model: nn.Module, x: Tensor) -> tuple[Network, Tensor]:
    model = model.to(memory_format=torch.channels_last)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return call, x.to(memory_format=torch.channels_last)


def _compiled(dtype: torch.dtype, layout: torch.memory_format) -> Maker:
    def make(model: nn.Module, x: Tensor) -> tuple[Network, Tensor]:
        torch._inductor.config.freezing = True  # weights are laid out for the machine once
        model, x = _as(dtype, layout)(model, x)
        return torch.compile(model, fullgraph=True), x

    return make


def _packed(**options: Any) -> Maker:
    def make(model: nn.Module, x: Tensor) -> tuple[Network, Tensor]:
        with tempfile.TemporaryDirectory() as folder:  # measured anew
            cache = autotune.Cache(Path(folder) / "choices.json")
            return issp.pack(model, x, cache=cache, **options), x

    return make


OURS = {
    "issp.pack fp32": _packed(),
    "issp.pack bf16": _packed(dtype=torch.bfloat16),
    "issp.pack fp16": _packed(dtype=torch.float16),
}
DENSE = {
    "torch fp32": _as(torch.float32, torch.contiguous_format),
    "torch fp32 channels_last": _as(torch.float32, torch.channels_last),
    "torch.compile fp32": _compiled(torch.float32, torch.contiguous_format),
    "torch bf16 channels_last": _as(torch.bfloat16, torch.channels_last),
    "torch bf16 autocast": _autocast,
    "torch.compile bf16": _compiled(torch.bfloat16, torch.channels_last),
}


def prepare(way: str, folder: str, threads: int) -> tuple[Callable[[], Tensor] | None, dict]:
    """The call, and what is told of it; None and why, where a dense way fails.

    Args:
        way: a name of `OURS` or `DENSE`.
        folder: holds model.safetensors and input.npy.
        threads: that compute.
    """
    torch.set_num_threads(threads)
    model = issp.load(Path(folder) / "model.safetensors").eval()
    x = torch.from_numpy(np.load(Path(folder) / "input.npy"))
    makers = OURS | DENSE
    with torch.no_grad():
        try:
            network, x = makers[way](model, x)
            network(x)
        except Exception as error:  # any failure of a dense way is printed
            if way in OURS:
                raise
            return None, {"missing": first_line(error)}

    def call() -> Tensor:
        with torch.no_grad():
            return network(x).float()

    version = issp.__version__ if way in OURS else torch.__version__
    facts: dict[str, Any] = {"version": version, "file": _file_bytes(network, model)}
    with contextlib.suppress(AttributeError):  # of issp.pack alone
        facts["report"] = network.report.summary()  # type: ignore[attr-defined]
    del model
    process.return_freed_memory()
    return call, facts


def _file_bytes(network: Network, model: nn.Module) -> int:
    """Size of the file that holds what computes."""
    if hasattr(network, "report"):
        with tempfile.TemporaryDirectory() as folder:
            issp.save(network, Path(folder) / "packed.safetensors")
            return (Path(folder) / "packed.safetensors").stat().st_size
    return sum(tensor.nbytes for tensor in model.state_dict().values())
