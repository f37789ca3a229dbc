"""The training configuration: YAML text to checked dataclasses, before anything starts, and back.

`issp.sr.config_keys` is the list of keys. An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from issp.sr.config_keys import CHOICES, HARMLESS, Config, EvalData, TrainData
from issp.utils.text import suggest


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, read with safe_load.

    Raises:
        ValueError: unreadable, not YAML, or not a mapping; the line is named.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError('YAML files need PyYAML: pip install "issp[train]"') from None
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read configuration {path}: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path} is not valid YAML: {where}{what}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold keys and values, such as `name: my-run`")
    return tree


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Writes tree[a][b][c] for "a.b.c", making the sections on the way.

    Raises:
        ValueError: something on the way is not a section.
    """
    *sections, last = dotted.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ValueError(f"{dotted}: {section} is not a section")
    tree[last] = value


def parse(tree: dict[str, Any]) -> Config:
    """Checks a configuration of nested mappings (a YAML file's content).

    Args:
        tree: BasicSR's keys and the `sparsity` section.

    Returns:
        The configuration, with defaults filled in.

    Raises:
        ValueError: a key is unknown (the nearest is named), missing, or has an unusable value.
    """
    tree = dict(tree)
    datasets = _section(tree.pop("datasets", None) or {}, "datasets")
    _reject_unknown(tree, [*_names(Config), "datasets"], "", hidden=("train_data", "val_data"))
    config = _build(Config, tree, "")
    for key, value in datasets.items():
        where = f"datasets.{key}"
        backend = (_section(value, where).get("io_backend") or {}).get("type", "disk")
        if backend != "disk":
            raise ValueError(f"{where}.io_backend {backend!r}: only image files on disk are read")
        if key == "train":
            config.train_data = _build(TrainData, value, where)
        elif str(key).split("_")[0] in ("val", "test"):  # BasicSR's rule
            data = _build(EvalData, value, where)
            data.name = data.name or key
            config.val_data.append(data)
        else:
            raise ValueError(f"unknown key {where}: {suggest(key, ('train', 'val', 'test_1'))}")
    _check(config)
    return config


def to_tree(config: Config) -> dict[str, Any]:
    """The nested mapping that `parse` makes this configuration from."""
    tree = dataclasses.asdict(config)
    data = {"train": tree.pop("train_data")}
    for i, entry in enumerate(tree.pop("val_data")):
        data["val" if i == 0 else f"val_{i + 1}"] = entry
    tree["datasets"] = data
    return {key: value for key, value in tree.items() if value is not None}


def dump(config: Config) -> str:
    """The configuration as YAML text."""
    import yaml

    return yaml.safe_dump(to_tree(config), sort_keys=False)


def _names(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _lookup(table: dict[str, Any], where: str) -> Any:
    head, _, _ = where.rpartition(".")
    return table.get(where) or table.get(f"{head}.*", ())


def _reject_unknown(tree: dict, known: list[str], where: str, hidden: tuple = ()) -> None:
    harmless = _lookup(HARMLESS, where)
    known = [name for name in known if name not in hidden]
    for key in tree:
        if key not in known and key not in harmless:
            full = f"{where}.{key}" if where else str(key)
            raise ValueError(f"unknown key {full}: {suggest(key, [*known, *harmless])}")


def _section(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a section of keys and values, got {value!r}")
    return value


def _build(kind: type, tree: dict, where: str) -> Any:
    _reject_unknown(tree, _names(kind), where)
    hints = typing.get_type_hints(kind)
    values = {}
    for key in _names(kind):
        if tree.get(key) is not None:
            full = f"{where}.{key}" if where else key
            values[key] = _convert(hints[key], tree[key], full)
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type. YAML reads 2e-4 as text: numbers in text are accepted."""
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build(hint, _section(value, where), where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        entries = value if isinstance(value, list | tuple) else [value]
        return [_convert(args[0], entry, f"{where}[{i}]") for i, entry in enumerate(entries)]
    if origin is dict:
        entries = _section(value, where).items()
        return {key: _convert(args[1], entry, f"{where}.{key}") for key, entry in entries}
    if hint is Any:
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return _chosen(str(value), where)
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if hint is float or number == int(number):
                return number if hint is float else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ValueError(f"{where} must be {kinds[hint]}, got {value!r}")


def _chosen(value: str, where: str) -> str:
    head, _, key = where.rpartition(".")
    choices = CHOICES.get(where) or CHOICES.get(f"{head.rpartition('.')[0]}.*.{key}")
    if choices and value not in choices:
        raise ValueError(f"{where} {value!r} is not supported: {suggest(value, choices)}")
    return value


def _check(config: Config) -> None:
    """What no single key can tell; everything is checked before anything is written."""
    train, data, sparsity = config.train, config.train_data, config.sparsity
    ranges = [
        ("train.total_iter", train.total_iter, 1, None),
        ("datasets.train.batch_size_per_gpu", data.batch_size_per_gpu, 1, None),
        ("datasets.train.num_worker_per_gpu", data.num_worker_per_gpu, 0, None),
        ("datasets.train.dataset_enlarge_ratio", data.dataset_enlarge_ratio, 1, None),
        ("train.ema_decay", train.ema_decay, 0, 1),
        ("train.optim_g.lr", train.optim_g.lr, 0, None),
        ("val.val_freq", config.val.val_freq, 1, None),
        ("logger.print_freq", config.logger.print_freq, 1, None),
        ("logger.save_checkpoint_freq", config.logger.save_checkpoint_freq, 1, None),
        ("logger.keep_training_states", config.logger.keep_training_states, 1, None),
        ("logger.grad_stats_freq", config.logger.grad_stats_freq, 0, None),
    ]
    if sparsity:
        ranges += [
            ("sparsity.ratio", sparsity.ratio, 0, 1),
            ("sparsity.shrink", sparsity.shrink, 0, 1),
            ("sparsity.freeze_iter", sparsity.freeze_iter, 1, train.total_iter),
        ]
    for name, value, low, high in ranges:
        if not (value >= low and (high is None or value <= high)):
            limits = f"at least {low}" if high is None else f"in {low}..{high}"
            raise ValueError(f"{name} is {value}: it must be {limits}")
    _check_run(config)


def _check_run(config: Config) -> None:
    data = config.train_data
    if not config.name or Path(config.name).name != config.name or config.name in (".", ".."):
        raise ValueError(f"name must be a plain folder name, got {config.name!r}")
    if config.scale < 2:
        raise ValueError(f"scale must be at least 2, got {config.scale}")
    if not config.network_g.get("type"):
        raise ValueError("network_g.type is missing: name a network, such as `type: SwinIR`")
    if data.gt_size % config.scale:
        raise ValueError(f"datasets.train.gt_size {data.gt_size} is no multiple of {config.scale}")
    data.gt_size = data.gt_size or 64 * config.scale
    named = [("datasets.train", data), *((f"datasets.{d.name}", d) for d in config.val_data)]
    for where, entry in named:
        if entry.type == "PairedImageDataset" and not entry.dataroot_gt:
            raise ValueError(f"{where}.dataroot_gt is missing: the folder of original images")
    scheduler = config.train.scheduler
    if scheduler.type == "CosineAnnealingRestartLR" and (
        not scheduler.periods or len(scheduler.restart_weights) not in (1, len(scheduler.periods))
    ):
        raise ValueError("train.scheduler needs periods and one restart weight for each of them")
