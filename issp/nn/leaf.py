"""Modules that torch.fx takes for one operation, as it does torch's own layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn


class Leaf(nn.Module):
    """A module that stays a module in a traced model, whose hooks run when that model does.

    Tracers look for the name of torch's package; what is theirs to decide is decided before.
    """

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not args or not isinstance(args[0], Tensor):
            for value in (*args, *kwargs.values()):
                if isinstance(value, fx.Proxy):
                    tracer = value.tracer
                    name = tracer.path_of_module(self)  # type: ignore[attr-defined]
                    return tracer.create_proxy("call_module", name, args, kwargs)
        return super()._call_impl(*args, **kwargs)
