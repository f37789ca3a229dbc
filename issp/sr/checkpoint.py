"""Models and training states on disk: complete or absent, readable without unpickling code.

A model is a safetensors file whose metadata holds, as JSON, what rebuilds the network: its
configuration, scale and sparsity; weights are dense in it, or packed (`issp.deploy.packed_file`).
A training state is a torch file of tensors and plain values, read with weights_only=True. BasicSR's
.pth files (params, params_ema) are read the same way.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from typing import Any, BinaryIO, TypeVar, overload

import torch
from torch import Tensor, nn

from issp.deploy import pack, packed_file
from issp.nn import names
from issp.nn.layers import SparseLayer
from issp.nn.report import LayerReport
from issp.nn.sparse_training import dense_weight
from issp.ops.keep import Keep
from issp.pruning import summary
from issp.sr import checksums, file_kinds, models
from issp.sr.models.derived import derived_names, replace_derived
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
__all__ += ["saved_facts", "set_random_state", "sparsity", "write_state"]

# Entries of a .pth that hold weights. BasicSR's two, the first ones, stand for each other.
_WEIGHT_KEYS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net")
_OWN_METADATA = ("config", "arch", "scale", "sparsity", "packed", "derived")
_BLOCK_COUNTS = ("num_block", "depths", "depth")  # keys of the networks' configurations
_MOST_BEYOND_FILE = 2**28  # numbers: masks that a file may leave out
_UNEXPECTED = "is not in the model"
_MOST_NAMES = 20  # of tensors, in a sentence

_Model = TypeVar("_Model", bound=nn.Module)


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    packed: bool | None = None,
    dtype: torch.dtype | None = None,
    **extra: Any,
) -> None:
    """Writes a model as safetensors, with what `load` needs to rebuild it.

    Args:
        model: a network of `issp.models` (it has `.config` and `.scale`), or any module that
            `issp.pack` returned. Wrappers (DistributedDataParallel, torch.compile, AveragedModel,
            ...) are looked through.
        path: file to write.
        packed: store the values that are not zero and their positions, for every machine alike;
            False: dense weights with their zeros. None: what `issp.pack` returned becomes a packed
            file, any other model a dense one.
        dtype: of the stored weights of convolutions and linear layers; None: their own.
        **extra: more plain values for the metadata, such as iteration=1000.

    Raises:
        TypeError: the model has no configuration and is not packed, or an extra value is not plain.
        ValueError: a layer is parametrized, an extra value has the name of one of the file's, or a
            weight is too large for the dtype.
        OSError: the file cannot be written; an older file is left as it was.
    """
    if isinstance(model, nn.Module):
        model = names.unwrap(model)
    if packed is None:
        packed = isinstance(model, nn.Module) and _is_packed(model)
    metadata = _architecture(model)
    if not metadata and not packed:
        raise TypeError(
            f"cannot save {type(model).__name__} with its architecture: it has no .config; "
            "use torch.save(model.state_dict(), path), or issp.pack it first"
        )
    _check_extra(extra)
    keep = _patterns(model)
    if _is_packed(model):
        model = pack.unpack(model)
    _check_layers(model)
    # Copies: safetensors refuses tensors that share memory, and tied weights load back equal.
    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in names.named_tensors(model).items()
    }
    if dtype is not None:
        tensors |= _rounded(model, tensors, dtype)
    metadata |= {"sparsity": sparsity(model), **extra}
    if packed:
        derived = derived_names(model)
        stored = {name: value for name, value in tensors.items() if name not in derived}
        tensors, metadata["packed"] = packed_file.encode(stored, keep)
        if derived:
            metadata["derived"] = sorted({name.rpartition(".")[2] for name in derived})
    atomic_write(path, safetensors_bytes(tensors, metadata))


def _is_packed(model: nn.Module) -> bool:
    """Whether `issp.pack` returned it: also where it has left every layer dense."""
    return pack.is_packed(model) or isinstance(getattr(model, "report", None), LayerReport)


def _architecture(model: nn.Module) -> dict[str, Any]:
    """What rebuilds a network of `issp.models`; nothing of another module."""
    if not isinstance(getattr(model, "config", None), dict):
        return {}
    return {"config": model.config, "arch": model.arch, "scale": model.scale}


def _patterns(model: nn.Module) -> dict[str, Keep]:
    """Name of a weight -> the N:M pattern that its layer is packed with."""
    layers = {n: m for n, m in names.named_modules(model).items() if isinstance(m, SparseLayer)}
    patterns = {f"{name}.weight": getattr(layer, "keep", None) for name, layer in layers.items()}
    return {name: keep for name, keep in patterns.items() if keep is not None}


def _rounded(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers in a floating-point dtype."""
    if dtype not in packed_file.WEIGHT_DTYPES:
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in packed_file.WEIGHT_DTYPES)
        raise ValueError(f"weights cannot be saved as {dtype}: use one of {kinds}")
    rounded = {}
    for name, module in names.named_modules(model).items():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = tensors[f"{name}.weight" if name else "weight"]
            rounded[f"{name}.weight" if name else "weight"] = new = weight.to(dtype)
            if not torch.equal(new.isfinite(), weight.isfinite()):
                raise ValueError(f"a weight of {name} is too large for {dtype}: save bfloat16")
    return rounded


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


@overload
def load(
    path: str | os.PathLike, arch: str | None = None, scale: int | None = None
) -> models.SuperResolver: ...


@overload
def load(path: str | os.PathLike, *, model: _Model) -> _Model: ...


@overload
def load(
    path: str | os.PathLike,
    arch: str | None = None,
    scale: int | None = None,
    *,
    model: nn.Module | None = None,
    example: Tensor | tuple[Any, ...],
    dtype: torch.dtype | None = None,
) -> nn.Module: ...


def load(
    path: str | os.PathLike,
    arch: str | None = None,
    scale: int | None = None,
    *,
    model: nn.Module | None = None,
    example: Tensor | tuple[Any, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Rebuilds the model in a file.

    Args:
        path: a file of `save`, dense or packed, or BasicSR's .pth (params_ema is preferred to
            params), which may have entries config, or arch and scale, beside the weights.
        arch: name for `issp.models.build`; needed for files that do not know their architecture.
        scale: as above; None: the one that the shapes of the tensors fit.
        model: a module of your own, which gets the tensors of the file, in its own dtypes.
        example: its input, or a tuple of its arguments: the model is packed for it on its device,
            by `issp.pack`, with the N:M patterns that the file names.
        dtype: of `issp.pack`, for an example alone: parts of the model may compute in 16 bits.

    Returns:
        The model with dense weights and their zeros, in evaluation mode: on the CPU in float32,
        whatever torch's defaults are, or `model` as it was given; or, with `example`, packed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no model, damaged or cut short, or of another architecture.
    """
    if dtype is not None and example is None:
        raise ValueError(f"dtype {dtype} is for packing: give an example, or call model.to(dtype)")
    tensors, metadata = read_tensors(path)
    if model is None:
        model = _built(path, arch, scale, tensors, metadata)
    elif arch is not None or scale is not None:
        raise ValueError("the model is given: leave arch and scale out")
    elif pack.is_packed(model):
        raise ValueError("the model is packed: give issp.unpack(model), or its dense original")
    else:
        tensors = _own_derived(model, metadata) | tensors
    load_weights(model, tensors, path)
    model.eval()
    if example is None:
        return model
    first = next((x for x in (example, *example) if isinstance(x, Tensor)), None)
    keep = {n.rpartition(".")[0]: pattern for n, pattern in metadata.get("packed", {}).items()}
    model = model if first is None else model.to(first.device)
    return pack.pack(model, example, keep or None, dtype=dtype)


def _own_derived(model: nn.Module, metadata: dict[str, Any]) -> dict[str, Tensor]:
    """The buffers of a module that a packed file has left out, since they follow from sizes."""
    left_out = metadata.get("derived")
    if not isinstance(left_out, list):
        return {}
    own = names.named_tensors(model)
    return {name: value for name, value in own.items() if name.rpartition(".")[2] in left_out}


def _built(
    path: str | os.PathLike,
    arch: str | None,
    scale: int | None,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
) -> models.SuperResolver:
    """A network for the tensors of a file, with random weights."""
    with torch.device("cpu"):
        if arch is None and "config" in metadata:
            model = _rebuild(metadata, tensors, path)
        elif arch or metadata.get("arch") in models.names():
            arch = arch or metadata["arch"]
            scale = scale or metadata.get("scale") or _fitting_scale(arch, tensors)
            model = models.build(arch, scale)
        else:
            raise ValueError(f"{path} does not say its architecture: give its name and scale")
    return model.float()


def read_tensors(
    path: str | os.PathLike, key: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The dense tensors of a model file by name, and what it says of its architecture (or {}).

    Of a packed file this has the entry "packed": name of a weight -> its N:M pattern.

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
        names_are_its_own = "config" in metadata or "packed" in metadata
        if "packed" in metadata:
            tensors, metadata["packed"] = _unpacked(tensors, metadata["packed"], path)
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


def _unpacked(
    tensors: dict[str, Tensor], header: object, path: str | os.PathLike
) -> tuple[dict[str, Tensor], dict[str, Keep]]:
    try:
        return packed_file.decode(tensors, header)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def saved_facts(path: str | os.PathLike) -> dict[str, Any]:
    """What `save` was given beside the model: iteration, training, ... of a file (or {})."""
    return {n: value for n, value in read_tensors(path)[1].items() if n not in _OWN_METADATA}


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
