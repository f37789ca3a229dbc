"""Models and training states on disk: complete or absent, readable without unpickling code.

A model is a safetensors file whose metadata holds, as JSON, what rebuilds the network: its
configuration, scale and sparsity. A training state is a torch file of tensors and plain values,
read with weights_only=True. BasicSR's .pth files (params, params_ema) are read the same way.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from issp.deploy import pack
from issp.nn import names
from issp.nn.sparse_training import dense_weight
from issp.pruning import summary
from issp.sr import checksums, file_kinds, models
from issp.sr.models.derived import replace_derived
from issp.sr.random_state import random_state, set_random_state
from issp.sr.tensor_files import (
    check_kind,
    is_plain,
    read_safetensors,
    read_state,
    safetensors_bytes,
)
from issp.utils.errors import first_line
from issp.utils.files import atomic_write, user_path

__all__ = ["load", "load_weights", "random_state", "read_state", "read_tensors", "save"]
__all__ += ["set_random_state", "sparsity", "write_state"]

# Entries of a .pth that hold weights. BasicSR's two, the first ones, stand for each other.
_WEIGHT_KEYS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net")
_OWN_METADATA = ("config", "arch", "scale", "sparsity")
_BLOCK_COUNTS = ("num_block", "depths", "depth")  # keys of the networks' configurations
_MOST_BEYOND_FILE = 2**28  # numbers: masks that a file may leave out
_UNEXPECTED = "is not in the model"
_MOST_NAMES = 20  # of tensors, in a sentence


def save(model: nn.Module, path: str | os.PathLike, **extra: Any) -> None:
    """Writes a model as safetensors, with what `load` needs to rebuild it.

    Args:
        model: a network of `issp.models` (it has `.config` and `.scale`), packed or not: the file
            holds dense weights with their zeros, so that every machine packs them anew. Wrappers
            (DistributedDataParallel, torch.compile, AveragedModel, ...) are looked through.
        path: file to write.
        **extra: more plain values for the metadata, such as iteration=1000.

    Raises:
        TypeError: the model has no configuration, or an extra value is not plain.
        ValueError: a layer is parametrized, or an extra value has the name of one of the file's.
        OSError: the file cannot be written; an older file is left as it was.
    """
    if isinstance(model, nn.Module):
        model = names.unwrap(model)
    if not isinstance(getattr(model, "config", None), dict):
        raise TypeError(
            f"cannot save {type(model).__name__} with its architecture: it has no .config; "
            "use torch.save(model.state_dict(), path)"
        )
    _check_extra(extra)
    if pack.is_packed(model):
        model = pack.unpack(model)
    _check_layers(model)
    # Copies: safetensors refuses tensors that share memory, and tied weights load back equal.
    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in names.named_tensors(model).items()
    }
    metadata: dict[str, Any] = {"config": model.config, "arch": model.arch, "scale": model.scale}
    metadata |= {"sparsity": sparsity(model), **extra}
    atomic_write(path, safetensors_bytes(tensors, metadata))


def _check_extra(extra: dict[str, Any]) -> None:
    for name, value in extra.items():
        if name in _OWN_METADATA:
            raise ValueError(f"the file says {name} itself: give the extra value another name")
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise TypeError(
                f"cannot save {name}, a {kind}, in the metadata: give numbers, text, lists or dicts"
            ) from None


def _check_layers(model: nn.Module) -> None:
    """Refuses layers whose weight is computed: `load` builds the network without that."""
    for name, module in names.named_modules(model).items():
        if isinstance(module, nn.Conv2d | nn.Linear) and "weight" not in module._parameters:
            raise ValueError(
                f"cannot save {name}: its weight is parametrized; call "
                "torch.nn.utils.parametrize.remove_parametrizations (or prune.remove) first"
            )


def load(
    path: str | os.PathLike, arch: str | None = None, scale: int | None = None
) -> models.SuperResolver:
    """Rebuilds the model in a file.

    Args:
        path: a file of `save`, or BasicSR's .pth (params_ema is preferred to params), which may
            have entries config, or arch and scale, beside the weights.
        arch: name for `issp.models.build`; needed for files that do not know their architecture.
        scale: as above; None: the one that the shapes of the tensors fit.

    Returns:
        The model on the CPU in float32, in evaluation mode, whatever torch's defaults are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no model, damaged or cut short, or of another architecture.
    """
    tensors, metadata = read_tensors(path)
    with torch.device("cpu"):
        if arch is None and "config" in metadata:
            model = _rebuild(metadata, tensors, path)
        elif arch or metadata.get("arch") in models.names():
            arch = arch or metadata["arch"]
            scale = scale or metadata.get("scale") or _fitting_scale(arch, tensors)
            model = models.build(arch, scale)
        else:
            raise ValueError(f"{path} does not say its architecture: give its name and scale")
    model.float()
    load_weights(model, tensors, path)
    return model.eval()


def read_tensors(
    path: str | os.PathLike, key: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a model file by name, and what it says of its architecture (or {}).

    What wrappers ("module.", "_orig_mod.", ...) put into the names is taken out; `save` has
    written none of it.

    Args:
        path: a safetensors file, or a .pth of weights.
        key: which entry of a .pth holds the weights; None: params_ema, params, ... or the file
            itself. For "params" and "params_ema" another entry is taken, with a warning, if the
            file has them not.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    path = user_path(path)
    check_kind(path)
    metadata: dict[str, Any] = {}
    named = path.suffix.lower() == ".safetensors" and not file_kinds.is_zip(path)
    if named or file_kinds.is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        names_are_its_own = "config" in metadata
    else:
        content = read_state(path)
        tensors = _weights_entry(content, path, key)
        metadata = {name: content[name] for name in ("config", "arch", "scale") if name in content}
        names_are_its_own = False
    _check_plain(tensors, path)
    plain = {names.plain_name(name): value for name, value in tensors.items()}
    if names_are_its_own or len(plain) < len(tensors):  # a layer of it may be called `module`
        return tensors, metadata
    plain.pop("n_averaged", None)  # the counter of torch's AveragedModel
    return plain, metadata


def load_weights(
    model: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike, strict: bool = True
) -> None:
    """`model.load_state_dict` for the content of a file: checks everything, then writes.

    Buffers that follow from the network's sizes may be absent, or be made for another image size.

    Args:
        model: a network, or one in wrappers.
        tensors: as `read_tensors` gives them.
        path: of the file, for messages.
        strict: False loads what fits and warns with the names of the rest.

    Raises:
        ValueError: names, shapes or dtypes do not fit the model (the first one is named), or,
            without `strict`, nothing fits.
    """
    _check_plain(tensors, path)
    model = names.unwrap(model)
    fits, problems, missing = _compared(model, tensors)
    if problems or missing:
        learned = fits.keys() - replace_derived(model, {})[0].keys()
        if strict or not learned:
            arch = getattr(model, "arch", type(model).__name__)
            raise ValueError(f"{path} does not fit {arch}: {_first(problems, missing)}")
        rest = [f"{name} {problem}" for name, problem in problems.items()]
        rest += [f"{name} is missing in the file" for name in missing]
        warnings.warn(
            f"{path}: {len(learned)} tensors are loaded, {len(rest)} are not: {_listed(rest)}",
            stacklevel=3,
        )
    model.load_state_dict(fits, strict=False)


def sparsity(model: nn.Module) -> dict[str, Any]:
    """Exact zeros among the weights of convolutions and linear layers.

    Returns:
        weights, zeros (numbers) and ratio (zeros / weights).
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = [dense_weight(layer) for layer in layers]
    total = sum(w.numel() for w in weights)
    zeros = sum(summary.zeros(weights))
    return {"weights": total, "zeros": zeros, "ratio": zeros / total if total else 0.0}


def write_state(state: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes a training state: tensors and plain values in dicts and lists."""

    def write(file: BinaryIO) -> None:
        torch.save(state, file)
        checksums.seal_archive(file)

    atomic_write(path, write)


def _rebuild(
    metadata: dict[str, Any], tensors: dict[str, Tensor], path: str | os.PathLike
) -> models.SuperResolver:
    """The network that the metadata describe, with random weights.

    First without memory: a damaged number must not ask for more than the file can fill.
    """
    config = metadata["config"]
    in_file = sum(value.numel() for value in tensors.values())
    try:
        if _num_blocks(config) > len(tensors):
            raise ValueError("its blocks are more than the tensors of the file")
        with torch.device("meta"):
            sketch = models.from_config(config).state_dict()
        if sum(value.numel() for value in sketch.values()) > in_file + _MOST_BEYOND_FILE:
            raise ValueError("its layers are larger than the file")
        model = models.from_config(config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path} describes no network: {first_line(error)}") from None
    model.arch = str(metadata.get("arch", model.arch))
    return model


def _fitting_scale(arch: str, tensors: dict[str, Tensor]) -> int:
    """The scale of a network whose tensors these are; 4 if they fit none."""
    for scale in models.SCALES:
        with torch.device("meta"):
            sketch = models.build(arch, scale)
        _, problems, missing = _compared(sketch, tensors)
        if not problems and not missing:
            return scale
    return 4


def _num_blocks(config: dict[str, Any]) -> int:
    counts = [config.get(key) for key in _BLOCK_COUNTS] if isinstance(config, dict) else []
    flat = [n for count in counts for n in (count if isinstance(count, list) else [count])]
    return sum(n for n in flat if isinstance(n, int))


def _weights_entry(
    content: dict[Any, Any], path: str | os.PathLike, key: str | None
) -> dict[str, Tensor]:
    """The entry of a .pth that holds the weights, or the whole of it."""
    if key is not None and _is_weights(content.get(key)):
        return content[key]
    there = [name for name in _WEIGHT_KEYS if _is_weights(content.get(name))]
    entries = _listed(map(str, content)) or "no entries"
    if key is not None and key not in _WEIGHT_KEYS[:2]:
        raise ValueError(f"{path} has no weights in the entry {key}: it has {entries}")
    if {"iteration", "random"} <= content.keys() or {"optimizers", "schedulers"} <= content.keys():
        raise ValueError(
            f"{path} is a training state: give a model, of the folder models beside it"
        )
    if there:
        if key is not None:
            warnings.warn(f"{path} has no {key}: its {there[0]} are loaded", stacklevel=4)
        return content[there[0]]
    if not _is_weights(content):
        wanted = ", ".join(_WEIGHT_KEYS)
        raise ValueError(f"{path} holds no weights: it has {entries}; looked for {wanted}")
    return content


def _is_weights(entry: object) -> bool:
    if not isinstance(entry, dict) or not entry:
        return False
    return all(isinstance(value, Tensor) for value in entry.values())


def _check_plain(tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{path} is damaged: {name!r} is not the name of a weight")
        if not isinstance(value, Tensor) or not is_plain(value):
            raise ValueError(f"{path} does not hold plain numbers for {name}: save dense floats")


def _compared(
    model: nn.Module, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """What of a file fits a model, what does not and why, and the names that it lacks."""
    expected = model.state_dict()
    tensors = _of_attribute(tensors, expected)
    if isinstance(model, models.SuperResolver):
        tensors = model.own_names(tensors)
    saved, conflicts = replace_derived(model, names.matched(tensors, expected.keys()))
    problems = {name: "belongs to other window sizes than the model's" for name in conflicts}
    problems |= _misfits(expected, saved)
    fits = {name: value for name, value in saved.items() if name not in problems}
    return fits, problems, [name for name in expected if name not in saved]


def _of_attribute(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network that was saved as an attribute of another module.

    Lightning modules and trainers save theirs as `model.conv_first.weight` or the like, with what
    belongs to losses beside it. A prefix is taken off if it is the only one that fits.
    """
    first = names.plain_name(next(iter(expected), ""))
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(f".{first}")]
    if first in tensors or len(prefixes) != 1:
        return tensors
    (prefix,) = prefixes
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _misfits(expected: dict[str, Tensor], saved: dict[str, Tensor]) -> dict[str, str]:
    """What is wrong with saved tensors, by name; those that the model lacks come last."""
    problems = {}
    for name, own in expected.items():
        value = saved.get(name, own)
        if value.shape != own.shape:
            shapes = tuple(value.shape), tuple(own.shape)
            problems[name] = f"is {shapes[0]} in the file and {shapes[1]} in the model"
        elif value.is_floating_point() != own.is_floating_point():
            problems[name] = f"is {value.dtype} in the file and {own.dtype} in the model"
    return problems | {name: _UNEXPECTED for name in saved if name not in expected}


def _first(problems: dict[str, str], missing: list[str]) -> str:
    """The first difference between a file and a model, with the number of all."""
    lacking = [name for name, problem in problems.items() if problem == _UNEXPECTED]
    name, problem = next(iter(problems.items()), (None, ""))
    if missing and (name is None or problem == _UNEXPECTED):
        name, problem = missing[0], "is missing in the file"
    counts = f"{len(missing)} missing, {len(lacking)} unexpected"
    return f"{name} {problem} ({counts}); check the model and its scale"


def _listed(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = len(texts) - _MOST_NAMES
    return ", ".join(texts[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
