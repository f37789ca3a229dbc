"""Models and training states on disk: complete or absent, readable without unpickling code.

A model is a safetensors file whose metadata holds, as JSON, what rebuilds the network: its
configuration, scale and sparsity. A training state is a torch file of tensors and plain values,
read with weights_only=True. BasicSR's .pth files (params, params_ema) are read the same way.
"""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from issp.deploy import pack
from issp.pruning import summary
from issp.sr import models
from issp.utils.errors import import_optional
from issp.utils.files import atomic_write, user_path

_METADATA_KEY = "issp"


def save(model: nn.Module, path: str | os.PathLike, **extra: Any) -> None:
    """Writes a model as safetensors, with what `load` needs to rebuild it.

    Args:
        model: a network of `issp.models` (it has `.config` and `.scale`), packed or not: the file
            holds dense weights with their zeros, so that every machine packs them anew.
        path: file to write.
        **extra: more plain values for the metadata, such as iteration=1000.

    Raises:
        TypeError: the model has no configuration.
        OSError: the file cannot be written; an older file is left as it was.
    """
    safetensors_torch = import_optional("safetensors.torch", "safetensors", "model files")
    if not isinstance(getattr(model, "config", None), dict):
        raise TypeError(
            f"cannot save {type(model).__name__} with its architecture: it has no .config; "
            "use torch.save(model.state_dict(), path)"
        )
    if pack.is_packed(model):
        model = pack.unpack(model)
    # Copies: safetensors refuses tensors that share memory, and tied weights load back equal.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    metadata: dict[str, Any] = {"config": model.config, "arch": model.arch, "scale": model.scale}
    metadata |= {"sparsity": sparsity(model), **extra}
    data = safetensors_torch.save(tensors, {"format": "pt", _METADATA_KEY: json.dumps(metadata)})
    atomic_write(path, data)


def load(
    path: str | os.PathLike, arch: str | None = None, scale: int | None = None
) -> models.SuperResolver:
    """Rebuilds the model in a file.

    Args:
        path: a file of `save`, or BasicSR's .pth (params_ema is preferred to params).
        arch: name for `issp.models.build`; needed for files that do not know their architecture.
        scale: as above.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or cut short, or of another architecture.
    """
    tensors, metadata = read_tensors(path)
    if arch is not None:
        model = models.build(arch, scale or metadata.get("scale") or 4)
    elif "config" in metadata:
        try:
            model = models.from_config(metadata["config"])
        except TypeError as error:
            raise ValueError(f"{path} describes no network: {error}") from None
        model.arch = metadata.get("arch", model.arch)
    else:
        raise ValueError(f"{path} does not say its architecture: give its name and scale")
    load_weights(model, tensors, path)
    return model.eval()


def read_tensors(
    path: str | os.PathLike, key: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a model file by name, and the metadata that `save` wrote (or {}).

    Args:
        path: a safetensors file, or a .pth of weights.
        key: which entry of a .pth holds the weights; None: params_ema, params, or the file itself.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    path = user_path(path)
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    content = read_state(path)
    keys = (key,) if key else ("params_ema", "params", "state_dict")
    entry = next((k for k in keys if isinstance(content.get(k), dict)), None)
    tensors = content[entry] if entry else content
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds no weights: looked for {', '.join(keys)}")
    # DataParallel's prefix belongs to a wrapper, not to the network.
    return {name.removeprefix("module."): value for name, value in tensors.items()}, {}


def load_weights(
    model: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike, strict: bool = True
) -> None:
    """`model.load_state_dict` whose error is one sentence.

    Raises:
        ValueError: names or shapes do not fit the model; the first one is named.
    """
    problem = _misfit(model.state_dict(), tensors, strict)
    if problem:
        arch = getattr(model, "arch", type(model).__name__)
        raise ValueError(f"{path} does not fit {arch}: {problem}; check the model and its scale")
    model.load_state_dict(tensors, strict=strict)


def _misfit(expected: dict[str, Tensor], actual: dict[str, Tensor], strict: bool) -> str | None:
    """The first difference in shapes or, with `strict`, in names; None if there is none."""
    for name, tensor in expected.items():
        if name in actual and actual[name].shape != tensor.shape:
            shapes = tuple(actual[name].shape), tuple(tensor.shape)
            return f"{name} is {shapes[0]} in the file and {shapes[1]} in the model"
    missing_keys = [name for name in expected if name not in actual]
    unexpected_keys = [name for name in actual if name not in expected]
    if not strict or not (missing_keys or unexpected_keys):
        return None
    counts = f"{len(missing_keys)} missing, {len(unexpected_keys)} unexpected"
    if missing_keys:
        return f"{missing_keys[0]} is missing in the file ({counts})"
    return f"{unexpected_keys[0]} is not in the model ({counts})"


def sparsity(model: nn.Module) -> dict[str, Any]:
    """Exact zeros among the weights of convolutions and linear layers.

    Returns:
        weights, zeros (numbers) and ratio (zeros / weights).
    """
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    total = sum(w.numel() for w in weights)
    zeros = sum(summary.zeros(weights))
    return {"weights": total, "zeros": zeros, "ratio": zeros / total if total else 0.0}


def write_state(state: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes a training state: tensors and plain values in dicts and lists."""
    atomic_write(path, lambda file: torch.save(state, file))


def read_state(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a torch file of tensors and plain values onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, cut short, or wants to run code on loading.
    """
    path = user_path(path)
    _check_exists(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower():
            raise ValueError(
                f"{path} holds more than tensors and plain values, which could run code on "
                "loading: it is refused; save its weights as safetensors"
            ) from None
        raise _damaged(path) from None
    except Exception:  # damaged bytes surface as any kind of error in the unpickler
        raise _damaged(path) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def random_state() -> dict[str, Any]:
    """The state of every random generator of the process."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": list(random.getstate()[1]),
        "gauss": random.getstate()[2],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` gave; generators of absent devices are skipped."""
    torch.set_rng_state(state["torch"])
    random.setstate((3, tuple(state["python"]), state["gauss"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def _check_exists(path: str | os.PathLike) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")


def _damaged(path: str | os.PathLike) -> ValueError:
    return ValueError(
        f"checkpoint {path} is damaged or cut short; remove it and use an older one of its folder"
    )


def _read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    safetensors = import_optional("safetensors", "safetensors", "model files")
    _check_exists(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, metadata
    except (safetensors.SafetensorError, OSError, ValueError):
        raise _damaged(path) from None
