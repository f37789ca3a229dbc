"""What several runs recorded of the same layers: reading it, and choosing the layers."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from issp.nn import names, selection
from issp.pruning.methods import METHODS
from issp.sr import builders, config
from issp.utils import csv_log
from issp.utils.errors import ConfigError
from issp.utils.files import user_path

MOST_LAYERS = 24  # in one picture

Series = dict[str, np.ndarray]  # "iteration" [n] int64, and the columns that were read [n] float64


@dataclass(frozen=True)
class Run:
    """A run of `issp train`, or a folder that `issp.Recorder` wrote.

    Attributes:
        label: its name in the picture.
        log: folder of its logs.
        settings: its configuration; None for a folder of logs alone.
    """

    label: str
    log: Path
    settings: config.Config | None

    @property
    def prunes(self) -> bool:
        """It has masks, as far as is known."""
        if self.settings is None:
            return True
        sparsity = self.settings.sparsity
        return sparsity is not None and METHODS[sparsity.method].prunes


@dataclass(frozen=True)
class Record:
    """What one run recorded.

    Attributes:
        label: name of the run in the picture.
        freeze: iteration that fixed the mask; None for dense training, and before it happened.
        layers: their values, in the order of the iterations.
    """

    label: str
    freeze: int | None
    layers: dict[str, Series]

    @property
    def last(self) -> int:
        """The last iteration that was recorded."""
        return max(int(series["iteration"][-1]) for series in self.layers.values())


@dataclass(frozen=True)
class Network:
    """The layers of a network.

    Attributes:
        order: names of the layers. An index counts these: every Conv2d and Linear that is not
            excluded from pruning, in the order of the modules (docs/method.md, section 2.1).
        modules: the layers by name; empty where only a log tells of them.
        names: of all modules, containers included.
    """

    order: list[str]
    modules: Mapping[str, nn.Conv2d | nn.Linear]
    names: set[str]

    def shape(self, layer: str) -> str:
        """Kind and shape of a layer's weight; "" where only a log tells of it."""
        if layer not in self.modules:
            return ""
        module = self.modules[layer]
        return f"{type(module).__name__} {'x'.join(map(str, module.weight.shape))}"


def read_run(label: str, folder: str | Path) -> Run:
    """Where a run's logs are, and its configuration.

    Raises:
        FileNotFoundError: the folder is not one of a run.
        ConfigError: its configuration cannot be read.
    """
    folder = user_path(folder)
    if (folder / "config.yml").is_file():
        tree = config.load_yaml(folder / "config.yml")
        try:
            return Run(label, folder / "log", config.parse(tree))
        except ConfigError as error:
            raise ConfigError(f"{folder / 'config.yml'}: {error}") from None
    if any((folder / name).is_file() for name in ("gradients.csv", "masks.csv")):
        return Run(label, folder, None)
    raise FileNotFoundError(f"{folder} is not a run of `issp train`: it has no config.yml")


def read_record(run: Run, file: str, columns: Sequence[str], key: str) -> Record:
    """The rows of a log of layers.

    Args:
        run: that recorded it.
        file: name of the log.
        columns: numbers that the picture needs; others are not kept.
        key: the option of `issp train --set` that makes the log, for messages.

    Raises:
        FileNotFoundError: the run did not record it.
        ValueError: no rows, a column is missing, or a cell is not a number.
    """
    path = run.log / file
    if not path.is_file():
        raise FileNotFoundError(f"{run.label} has no {path}: train it with --set {key}")
    layers, stages = read_layers(path, columns)
    if not layers:
        raise ValueError(f"{path} has no rows yet: let the run go on for a while")
    freeze = stages.get("pruning") if "fine-tuning" in stages else None
    if run.settings is not None:
        freeze = run.settings.freeze_iter if run.prunes else None
    if freeze and freeze > max(stages.values()):
        freeze = None
    return Record(run.label, freeze or None, layers)


def read_layers(
    path: Path, columns: Sequence[str]
) -> tuple[dict[str, Series], dict[str | None, int]]:
    """The values of each layer in a log, and the last iteration of each stage.

    The log is read row by row: that of a long run is larger than what is kept of it.

    Args:
        path: of the log.
        columns: that are kept, numbers.

    Raises:
        ValueError: a column is missing, or a cell is not a number.
    """
    cells: dict[str, dict[str, array]] = {}
    stages: dict[str | None, int] = {}
    for row in csv_log.iterate_csv(path, ("layer", "stage", *columns)):
        check_row(row, columns, path)
        layer = cells.setdefault(str(row["layer"]), {name: array("d") for name in columns})
        layer.setdefault("iteration", array("q")).append(row["iteration"])
        for column in columns:
            layer[column].append(row[column])
        stages[row.get("stage")] = row["iteration"]
    layers = {
        layer: {column: np.array(values) for column, values in found.items()}
        for layer, found in cells.items()
    }
    return layers, stages


def check_row(row: Mapping[str, Any], columns: Iterable[str], path: Path) -> None:
    """Refuses a row of a log of layers that has no layer, or no number in one of the columns."""
    for column in ("layer", *columns):
        if column not in row:
            raise ValueError(f"{path} has no column {column}: it is no log of layers")
    for column in columns:
        if not isinstance(row[column], int | float):
            raise ValueError(
                f"{path} is damaged: {column} of {row['layer']} at iteration {row['iteration']} is "
                f"{row[column]!r}, no number; remove that row"
            )


def read_network(run: Run, record: Record) -> Network:
    """The layers of a run's network, without weights; without a configuration, of its log."""
    if run.settings is None:
        order = list(record.layers)
        return Network(order, {}, {part for name in order for part in _with_containers(name)})
    with torch.device("meta"):
        modules = names.named_modules(builders.network(run.settings, pretrained=False))
    patterns = run.settings.sparsity.exclude if run.settings.sparsity else []
    excluded = set().union(*(selection.match_names(p, modules, "exclude") for p in patterns))
    layers = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in excluded
    }
    return Network(list(layers), layers, set(modules))


def _with_containers(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def choose_layers(words: Sequence[str], network: Network, base: int) -> list[str]:
    """The layers that names, name patterns and indices select, in their order, each once.

    Args:
        words: "conv_first", a name pattern as for `issp.attach`, or an index such as "36".
        network: whose layers are meant.
        base: index of the first layer, 1 or 0.

    Raises:
        ValueError: a word selects nothing, or there are more than `MOST_LAYERS`.
    """
    order, chosen = network.order, dict[str, None]()
    for word in words:
        if word.isdecimal() and word not in network.names:
            chosen[layer_at(int(word), order, base)] = None
            continue
        found = selection.match_names(word, network.names, "--layers") & set(order)
        if not found:
            raise ValueError(f'--layers: "{word}" is no convolution or linear layer')
        chosen |= dict.fromkeys(sorted(found, key=order.index))
    if len(chosen) > MOST_LAYERS:
        raise ValueError(
            f"--layers selects {len(chosen)} layers, and a picture has room for {MOST_LAYERS}: "
            "choose fewer"
        )
    return list(chosen)


def layer_at(index: int, order: Sequence[str], base: int) -> str:
    """The layer of an index that counts from `base`."""
    if not base <= index < base + len(order):
        raise ValueError(
            f"--layers: there is no layer {index}; the network has {len(order)}, which "
            f"--index-base {base} counts from {base} to {base + len(order) - 1}"
        )
    return order[index - base]


def common_layers(records: Sequence[Record], networks: Sequence[Network]) -> list[str]:
    """The layers that all runs recorded, of equal shape, in the order of the first network.

    Raises:
        ValueError: there is none.
    """
    common = [
        name
        for name in networks[0].order
        if all(name in record.layers for record in records)
        and len({network.shape(name) for network in networks} - {""}) <= 1
    ]
    if not common:
        labels = ", ".join(record.label for record in records)
        raise ValueError(f"{labels} have no recorded layer in common: draw runs of one network")
    return common


def check_layers(
    layers: Iterable[str], records: Sequence[Record], networks: Sequence[Network]
) -> None:
    """Refuses a layer that a run did not record, or that has another shape in it."""
    for layer in layers:
        for record, network in zip(records, networks, strict=True):
            if layer not in record.layers:
                some = ", ".join(list(record.layers)[:3])
                raise ValueError(
                    f"{record.label} did not record the layer {layer}; it recorded "
                    f"{len(record.layers)}: {some}{', ...' * (len(record.layers) > 3)}"
                )
            first, shape = networks[0].shape(layer), network.shape(layer)
            if first and shape and first != shape:
                raise ValueError(
                    f"the layer {layer} is {first} in {records[0].label} and {shape} in "
                    f"{record.label}: draw runs of one network"
                )


def describe(layer: str, network: Network, base: int) -> str:
    """A layer's name, place and shape, as the title of its panel."""
    place = ordinal(network.order.index(layer) + base)
    shape = network.shape(layer)
    return f"{layer}: {place} layer{f', {shape}' * bool(shape)}"


def ordinal(index: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, ..."""
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(index % 10, "th")
    return f"{index}{'th' if index % 100 in (11, 12, 13) else suffix}"
