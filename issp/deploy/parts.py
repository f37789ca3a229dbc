"""Lets parts of a model compute in 16 bits where that is measured to be fastest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn

from issp.deploy import tiled_layers
from issp.deploy.derived import DerivedLayer
from issp.deploy.half_layers import half_layer
from issp.deploy.tiled_layers import tiled_layer
from issp.deploy.versions import DENSE, HALF, TILED, Kind, Part, Version, Versions
from issp.nn import autotune
from issp.nn.convert import NO_ZEROS, dense_reason
from issp.nn.report import Line
from issp.ops.tiles import TiledWeight, tiles_supported

DTYPES = (torch.bfloat16, torch.float16)
NO_ENGINE = "this CPU has no matrix engine for bfloat16 (AMX): the layers compute in float32"
# Units of 32 rows take this share of the time of twice as many of 16.
_WIDE_UNITS = 0.85


def in_16_bits(
    versions: Versions, packed: Version, lines: Mapping[nn.Module, Line], dtype: torch.dtype
) -> Version:
    """The version in which every part computes in the way that is fastest.

    Args:
        versions: of the model.
        packed: the version in the model's own dtype.
        lines: layer of the dense model -> its line of the report, which is written.
        dtype: one of `DTYPES`.
    """
    if dtype == torch.float16:
        return _choose(versions, packed, lines, _half_layers(lines), HALF, "float16")
    if tiles_supported():
        return _choose(versions, packed, lines, _tiled_layers(lines), TILED, "tiles")
    for line in lines.values():
        line.reason += f"; {NO_ENGINE}"
    return packed


def _tiled_layers(lines: Mapping[nn.Module, Line]) -> dict[nn.Module, DerivedLayer]:
    """Those with and without zeros: a run must not end where a layer has none."""
    layers: dict[nn.Module, DerivedLayer] = {}
    for module, line in lines.items():
        reason = _unsupported(module) or tiled_layers.unsupported_reason(module)
        if not reason:
            weight = module.get_parameter("weight")
            layers[module] = tiled_layer(module, rows_per_unit(weight))
        elif line.reason in ("", NO_ZEROS):
            line.reason = reason
    return layers


def _half_layers(lines: Mapping[nn.Module, Line]) -> dict[nn.Module, DerivedLayer]:
    return {
        module: half_layer(module, module.get_parameter("weight"))
        for module, line in lines.items()
        if line.sparsity and not _unsupported(module)
    }


def dtype_note(lines: Iterable[Line], dtype: torch.dtype) -> str:
    """How many layers of a report compute in 16 bits, or why none can."""
    if dtype == torch.bfloat16 and not tiles_supported():
        return NO_ENGINE
    reduced = sum(line.choice.startswith(("tiles", "float16")) for line in lines)
    return f"{reduced} layers compute in {str(dtype).removeprefix('torch.')}"


def rows_per_unit(weight: torch.Tensor) -> int:
    """16 or 32, whichever makes the smaller tiled weight."""
    narrow, wide = (TiledWeight.from_weight(weight, v).values.numel() for v in (16, 32))
    return 32 if _WIDE_UNITS * wide < narrow else 16


def _unsupported(module: nn.Module) -> str:
    reason = dense_reason(module)
    if reason:
        return reason
    dtype = module.get_parameter("weight").dtype
    return "" if dtype in (torch.float32, *DTYPES) else f"its weight is {dtype}"


def _choose(
    versions: Versions,
    packed: Version,
    lines: Mapping[nn.Module, Line],
    layers: Mapping[nn.Module, DerivedLayer],
    kind: Kind,
    name: str,
) -> Version:
    """Every part as in `packed`, or by the layers of the kind that is called `name`."""
    reduced = versions.make(layers, kind)
    dense: dict[nn.Module, nn.Module] = {new: old for old, new in layers.items()}
    chosen: list[Part] = []
    for part in reduced.parts:
        choice = autotune.measure(
            {"dense": partial(versions.run_part, DENSE, part)},
            {
                "packed": partial(versions.run_part, packed, part),
                name: partial(versions.run_part, reduced, part),
            },
        )
        if choice.name == name:
            chosen.append(part)
            for new in part.layers:
                assert isinstance(new, DerivedLayer)
                _record(lines[dense[new]], new, len(part.layers), choice)
    modules = {part.trace.module for part in chosen}
    kept = [part for part in packed.parts if part.trace.module not in modules]
    others = {dense[new]: new for part in chosen for new in part.layers}
    return Version({**packed.replacements, **others}, [*kept, *chosen])


def _record(line: Line, layer: DerivedLayer, layers: int, choice: autotune.Choice) -> None:
    times = choice.microseconds
    time = times[choice.name]
    line.choice = line.form = f"{choice.name} v={layer.v}"
    line.sparse = line.dense = None
    line.reason = (
        f"in a run of {layers} layers that is {times['dense'] / time:.2f} times as fast as dense "
        f"and {times['packed'] / time:.2f} times as fast as in its own dtype"
    )
