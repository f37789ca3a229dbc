"""Damages files: bytes that flip, go missing or appear, and values inside that are changed.

Every damage is a function of a `random.Random`, so that the number of a case repeats it.
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from typing import Any

import torch
from torch import Tensor


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """One of seven ways in which a disk, a download or an editor spoils a file."""
    data = bytearray(content)
    # Half of the cases hit the beginning, where headers are.
    place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(512, len(data)))
    length = rng.choice((1, 2, 8, 100, 1000))
    kind = rng.randrange(7)
    if kind <= 1:
        for _ in range(rng.choice((1, 1, 2, 16))):
            data[rng.randrange(len(data)) if kind else place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[place:]
    elif kind == 3:
        del data[place : place + length]
    elif kind == 4:
        data[place:place] = rng.randbytes(length)
    elif kind == 5:
        data[place : place + length] = bytes([rng.choice((0, 255))]) * length
    else:
        data[place : place + length] = data[: min(length, len(data) - place)]
    return bytes(data)


def damage_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of nested dicts, lists, tensors and plain values, of which one is spoilt."""
    tree = copy.deepcopy(tree)
    containers = [tree, *_containers(tree)]
    # The upper levels are few: chosen as often as all others together.
    parent = rng.choice(containers if rng.random() < 0.5 else containers[: 1 + len(tree)])
    if not parent:
        return tree
    key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice((7, "", f"{key}x", (1, "a"), -1))] = parent.pop(key)
    elif kind == 2:
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    else:
        parent[key] = _spoilt(parent[key], rng)
    return tree


def _containers(tree: Any) -> list[Any]:
    found = []
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, dict | list):
            found += [value, *_containers(value)]
    return found


def _spoilt(value: Any, rng: random.Random) -> Any:
    if isinstance(value, Tensor) and rng.random() < 0.7:
        return rng.choice(_TENSORS)(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice((value + 1, -value, value * 9, float(value), value / 3, str(value)))
    return copy.deepcopy(rng.choice(_VALUES))


_VALUES = [
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, math.nan, math.inf),
    *("", "abc", "1", "nan", b"abc", [], {}, [1], [None], {"a": 1}, {1: 2}, (1, 2), [[]] * 3),
    *(torch.tensor(1.0), torch.zeros(0), torch.zeros(3), torch.zeros(2, 3, 4), torch.ones(2).int()),
]
_TENSORS = [
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: t.flatten()[:-1],
    lambda t: torch.cat([t.flatten(), t.flatten()]),
    lambda t: t.reshape(-1, 1),
    lambda t: t.new_zeros(()),
    lambda t: t.new_zeros(0),
    lambda t: t.new_zeros(()).expand(t.shape),
    lambda t: t.to(torch.int64),
    lambda t: t.to(torch.bool),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.bfloat16),
    lambda t: t.to(torch.float64),
    lambda t: t.to_sparse() if t.dim() else t,
    lambda t: t.bool().to(t.dtype) * 2**30,
    lambda t: torch.full_like(t, -1),
    lambda t: torch.full_like(t, math.nan) if t.is_floating_point() else t,
    lambda t: torch.full_like(t, math.inf) if t.is_floating_point() else t,
]


def damage_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Changes a value of the header, or of issp's metadata in it; takes the check sum out."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]["checksum"]  # it would notice every change
    if rng.random() < 0.6:
        ours = damage_tree(json.loads(header["__metadata__"]["issp"]), rng)
        header["__metadata__"]["issp"] = json.dumps(plain(ours))
    else:
        header = damage_tree(header, rng)
    text = json.dumps(plain(header)).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def plain(tree: Any) -> Any:
    """What JSON and YAML can hold."""
    if isinstance(tree, dict):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, Tensor):
        return plain(tree.tolist())
    return tree.decode() if isinstance(tree, bytes) else tree


def damage_yaml(text: str, rng: random.Random) -> str:
    """Changes a value of a configuration."""
    import yaml

    return yaml.safe_dump(plain(damage_tree(yaml.safe_load(text), rng)))
