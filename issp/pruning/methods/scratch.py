"""Scratch: the masks of L1, then every weight is drawn anew.

It tells what the positions are worth without the values. In the authors' code the second draw never
happens, so that their scratch is their L1 (docs/method.md, section 2.11, B2).

Source: docs/method.md, section 2.4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist

from issp.nn.names import unwrap
from issp.pruning.methods.base import Method, Setting


@dataclass
class Scratch(Method):
    """Fixes the masks at once, by magnitude, and then initialises the network again.

    Where the model has a method `reset_parameters` it draws all parameters, as the networks of
    `issp.models` do; otherwise the `reset_parameters` of every layer to prune draws that layer.
    torch's random state goes on behind the draw. With several ranks all take the draw of rank 0.
    """

    name: ClassVar[str] = "scratch"
    fixes_masks: ClassVar[bool] = True

    def start(self, setting: Setting) -> None:
        for name, reset in self._resets(setting).items():
            if reset is None:
                raise ValueError(
                    f"scratch: {name} has no reset_parameters to initialise it again: exclude it, "
                    "or give the model a method reset_parameters"
                )
        super().start(setting)

    @torch.no_grad()
    def after_freeze(self) -> None:
        assert self.setting is not None
        for reset in self._resets(self.setting).values():
            if reset is not None:
                reset()
        _share_draw(self.setting)
        self.setting.buckets.apply_masks(self.setting.buckets)

    @staticmethod
    def _resets(setting: Setting) -> dict[str, Callable[[], None] | None]:
        whole = getattr(unwrap(setting.model), "reset_parameters", None)
        if whole is not None:
            return {"the model": whole}
        layers = setting.buckets.prunable
        return {x.name: getattr(x.module, "reset_parameters", None) for x in layers}


def _share_draw(setting: Setting) -> None:
    """Gives all ranks the parameters of rank 0: their random generators need not agree."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for p in unwrap(setting.model).parameters():
            dist.broadcast(p.data, src=0)
