"""What kinds of arguments `attach` takes, in one sentence for each that gets another kind."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from issp.ops.keep import Keep, Unit


def check_kinds(**arguments: Any) -> None:
    """Raises TypeError for the first argument of `attach` that is of a wrong kind.

    Whether a value lies in its range is checked where it is used.
    """
    for name, value in arguments.items():
        is_right, kind = _KINDS[name]
        if not is_right(value):
            raise TypeError(f"{name} must be {kind}, not {_shown(value)}")


def _is_number(value: object) -> bool:
    if isinstance(value, str | bool) or (isinstance(value, Tensor) and value.numel() != 1):
        return False
    return hasattr(value, "__float__")


def _is_target(value: object) -> bool:
    return isinstance(value, Keep) or _is_number(value)


def _is_unit(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) == 2 and all(type(x) is int for x in value)
    return isinstance(value, Unit)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and int(value) == value


def _is_schedule(value: object) -> bool:
    is_made = callable(value) and not isinstance(value, type)
    return is_made and hasattr(value, "final") and hasattr(value, "end")


def _are_patterns(value: object) -> bool:
    return isinstance(value, Iterable) and all(isinstance(one, str) for one in value)


def _are_classes(value: object) -> bool:
    return all(isinstance(one, type) for one in (value if isinstance(value, tuple) else [value]))


def _are_overrides(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and _is_target(target) for name, target in value.items()
    )


def _or_none(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, nn.Module), "a torch module"),
    "sparsity": (
        _or_none(_is_target),
        "a number in 0..1 or a Keep (overrides= names single layers)",
    ),
    "shrink": (_or_none(_is_number), "a number in 0..1"),
    "types": (_are_classes, "a module class or several"),
    "exclude": (_are_patterns, "a name pattern or several"),
    "pattern": (_or_none(lambda value: isinstance(value, Keep)), "an issp.Keep"),
    "unit": (_or_none(_is_unit), "a pair of whole numbers (v, c) or an issp.Unit"),
    "overrides": (_are_overrides, "a dict from name pattern to a number in 0..1 or an issp.Keep"),
    "schedule": (_or_none(_is_schedule), "an issp.Constant, issp.Linear or issp.Cubic"),
    "freeze_at": (_or_none(_is_whole), "a whole number of optimizer steps"),
}


def _shown(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, str | int | float | list | tuple | dict):
        return reprlib.repr(value)
    return type(value).__name__
