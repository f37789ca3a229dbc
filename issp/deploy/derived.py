"""Layers that compute by another form of their weight, which is made from it when needed."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from issp.nn.leaf import Leaf

_Layer = TypeVar("_Layer", bound="DerivedLayer")


class DerivedLayer(Leaf):
    """Mixed into nn.Conv2d or nn.Linear, for inference.

    The parameters stay the dense ones with their zeros, and so does what is saved. The form of the
    weight is made from them at the first call, and anew after they were moved or loaded.

    Attributes:
        v: consecutive rows of the weight that share what is stored of them.
    """

    v: int
    _form: tuple[Any, Tensor | None] | None

    def _make_form(self, weight: Tensor, bias: Tensor | None) -> tuple[Any, Tensor | None]:
        """Weight and bias as the op takes them."""
        raise NotImplementedError

    def _derived(self) -> tuple[Any, Tensor | None]:
        form = self.__dict__.get("_form")
        if form is None:
            with torch.no_grad():
                weight, bias = self._parameters["weight"], self._parameters["bias"]
                assert weight is not None
                form = self._form = self._make_form(weight, bias)
        return form

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._form = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._form = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        # It may belong to one kind of CPU: it is never saved.
        return {**self.__dict__, "_form": None}


def derive(module: nn.Module, kind: type[_Layer], v: int) -> _Layer:
    """The same layer, with the same parameters, as one of a derived kind."""
    layer = kind.__new__(kind)
    layer.__dict__.update(module.__dict__)
    layer._parameters = dict(module._parameters)
    layer.v = v
    return layer


def restore_(layer: DerivedLayer) -> None:
    """Makes a derived layer torch's own again, in place."""
    for name in ("v", "_form"):
        layer.__dict__.pop(name, None)
    kind = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    layer.__class__ = kind  # type: ignore[assignment]
