"""Reads torch and safetensors files: plain values and tensors, no code; damage is one sentence."""

from __future__ import annotations

import json
import os
import pickle
import re
from typing import Any

import torch
from torch import Tensor

from issp.sr import checksums, file_kinds
from issp.utils.errors import import_optional
from issp.utils.files import user_path

_METADATA_KEY = "issp"


def read_state(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a torch file of tensors and plain values onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, damaged, cut short, or wants to run code on loading.
    """
    path = user_path(path)
    check_kind(path)
    if file_kinds.is_safetensors(path):
        raise ValueError(f"{path} is a safetensors file, which holds a model and no training state")
    try:
        is_sealed = file_kinds.is_zip(path) and checksums.check_archive(path)
    except MemoryError:
        raise
    except Exception:  # damaged bytes surface as any kind of error in zipfile
        raise damaged(path) from None
    try:
        with open(path, "rb") as file:  # given a name, torch would go by its ending
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsupported = re.search(r"(?i)unsupported global:?(?: GLOBAL)? (\S+)", str(error))
        if unsupported:
            raise ValueError(
                f"{path} holds more than tensors and plain values ({unsupported[1]}), which could "
                "run code on loading: it is refused; save its weights alone, model.state_dict()"
            ) from None
        raise damaged(path) from None
    except Exception:  # damaged bytes surface as any kind of error in the unpickler
        if is_sealed:
            raise  # such as too little memory: the file is whole
        raise damaged(path) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file by name, and the metadata that `issp.save` wrote (or {}).

    Raises:
        FileNotFoundError, ValueError: as `read_state`.
    """
    safetensors_torch = import_optional("safetensors.torch", "safetensors", "model files")
    path = user_path(path)
    check_kind(path)
    try:
        content = path.read_bytes()  # safetensors itself opens no name that is not UTF-8
        tensors = safetensors_torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        texts = header.get("__metadata__", {})
        checksums.check_safetensors(content, texts)
        metadata = json.loads(texts.get(_METADATA_KEY, "{}"))
    except MemoryError:
        raise
    except Exception:  # damaged bytes surface as any kind of error in the reader
        raise damaged(path) from None
    if not isinstance(metadata, dict):
        raise damaged(path)
    return tensors, metadata


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    """The content of a file that `read_safetensors` reads."""
    safetensors_torch = import_optional("safetensors.torch", "safetensors", "model files")
    texts = {"format": "pt", _METADATA_KEY: json.dumps(metadata, separators=(",", ":"))}
    texts[checksums.METADATA_KEY] = checksums.UNSEALED
    return checksums.seal_safetensors(safetensors_torch.save(tensors, texts))


def check_kind(path: str | os.PathLike) -> None:
    """Refuses what is surely no file of tensors, and says what it is.

    Raises:
        FileNotFoundError, ValueError: as `read_state`.
    """
    reason = file_kinds.why_no_model(path)
    if reason:
        raise ValueError(f"{path} {reason}")


def is_plain(value: Tensor) -> bool:
    """Whether a tensor holds its numbers one after the other, not sparse, quantized or absent."""
    return value.layout is torch.strided and not value.is_quantized and not value.is_meta


def damaged(path: str | os.PathLike) -> ValueError:
    """The error for a file whose content cannot be read."""
    return ValueError(f"{path} is damaged or cut short: copy it again, or use another file")
