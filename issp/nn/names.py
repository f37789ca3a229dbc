"""Names of modules and parameters, whatever wrappers stand around a model or inside it.

A wrapper is not a part of the network: DistributedDataParallel, torch.compile, Fabric, averaged
models and others put their own attribute ("module.", "_orig_mod.", "_forward_module.") into every
name behind it, in the order in which they were applied.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")

# Attributes that only wrappers have, and the classes whose attribute "module" is the network: any
# network may have a layer of that name. By class name, since some are of other packages.
_ATTRIBUTES = (
    "_orig_mod",
    "_forward_module",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
)
_CLASSES = {
    "DistributedDataParallel",
    "DataParallel",
    "AveragedModel",
    "DeepSpeedEngine",
    "ModelEmaV2",
    "ModelEmaV3",
}
_SEGMENTS = {"module", *_ATTRIBUTES}
_IN_PATTERNS = re.compile(rf"(?:(?<=^)|(?<=re:)|(?<=\.))(?:{'|'.join(sorted(_SEGMENTS))})(?:\\?\.)")


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside all wrappers that stand around it."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """As `model.named_modules(remove_duplicate=False)`, without the wrappers around and inside."""
    return dict(_walk(unwrap(model), ""))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """As `model.state_dict()`, under names without the wrappers around and inside.

    A layer of the network's own that is called `module` keeps its name.
    """
    network = unwrap(model)
    return {_own_name(network, name): value for name, value in network.state_dict().items()}


def plain_name(name: str) -> str:
    """A name without every part that may be a wrapper's: to compare, not to look up."""
    return ".".join(part for part in name.split(".") if part not in _SEGMENTS)


def plain_pattern(name_pattern: str) -> str:
    """A glob or regular expression for names without every part that may be a wrapper's."""
    return _IN_PATTERNS.sub("", name_pattern)


def matched(entries: Mapping[str, T], expected: Collection[str]) -> dict[str, T]:
    """The entries under the expected names that they stand for, wrapped or not on either side.

    Args:
        entries: name -> value, as a state_dict or a moving average has them.
        expected: names that are looked for.

    Returns:
        All entries; one that stands for none or several of the expected names keeps its own.
    """
    by_plain: dict[str, list[str]] = {}
    for name in expected:
        by_plain.setdefault(plain_name(name), []).append(name)
    result: dict[str, T] = {}
    for name, value in entries.items():
        names = by_plain.get(plain_name(name), [])
        if name not in expected and len(names) == 1 and names[0] not in entries:
            result.setdefault(names[0], value)
        else:
            result[name] = value
    return result


def _inner(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None if it is none."""
    children = module._modules
    for name in _ATTRIBUTES:
        if children.get(name) is not None:
            return children[name]
    if _CLASSES.isdisjoint(cls.__name__ for cls in type(module).__mro__):
        return None
    return children.get("module")


def _own_name(network: nn.Module, name: str) -> str:
    """A name in the network's state_dict without the wrappers that it leads through."""
    kept: list[str] = []
    module: nn.Module | None = network
    for part in name.split("."):
        inner = None if module is None else _inner(module)
        if module is not None and inner is not None and module._modules.get(part) is inner:
            module = inner
            continue
        kept.append(part)
        # Some wrappers leave themselves out of the names of their state_dict.
        module = None if module is None else unwrap(module)._modules.get(part)
    return ".".join(kept)


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    for child, inner in module._modules.items():
        if inner is not None:
            yield from _walk(unwrap(inner), f"{name}.{child}" if name else child)
