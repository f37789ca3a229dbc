"""Buffers that follow from a network's sizes, such as attention masks: never read from a file.

A published file may lack them, or hold those of the image size that it was trained with. Loading
compares what is there with what the sizes of the network give, and takes the latter.
"""

from typing import Any

import torch
from torch import Tensor, nn


class DerivedBuffers(nn.Module):
    """A module with such buffers."""

    def derive(self, device: str | None = "cpu") -> dict[str, Tensor]:
        """The buffers by name, made from the sizes of the module; None: torch's default device."""
        raise NotImplementedError

    def register_derived(self) -> None:
        """Adds the buffers; called once, by the constructor."""
        for name, buffer in self.derive(None).items():
            self.register_buffer(name, buffer)

    def agrees(self, name: str, saved: Tensor, derived: Tensor) -> bool:
        """Whether a saved buffer follows from the sizes here, as `derived` does."""
        return is_close(saved, derived)

    def replace_derived_(self, state: dict[str, Any], prefix: str) -> list[str]:
        """Writes the module's buffers over those of a state_dict; returns the keys that disagree.

        Made anew, because the module may come from the meta device, without values.
        """
        conflicts = []
        for name, derived in self.derive().items():
            key, own = prefix + name, self.get_buffer(name)
            saved = state.get(key)
            device = own.device
            if isinstance(saved, Tensor):
                device = saved.device
                if not saved.is_meta and not self.agrees(name, saved, derived):
                    conflicts.append(key)
            elif own.is_meta:
                device = derived.device
            state[key] = derived.to(device, own.dtype)
        return conflicts

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in self.replace_derived_(state_dict, prefix):
            args[-1].append(f"{key} belongs to other window sizes than the model's")
        super()._load_from_state_dict(state_dict, prefix, *args)


def replace_derived(
    model: nn.Module, state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """A copy of `state` with the derived buffers of the model, and the keys that disagree."""
    state, conflicts = dict(state), []
    for prefix, module in model.named_modules():
        if isinstance(module, DerivedBuffers):
            conflicts += module.replace_derived_(state, f"{prefix}." if prefix else "")
    return state, conflicts


def derived_names(model: nn.Module) -> set[str]:
    """The names of the derived buffers of a model in its state_dict."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, DerivedBuffers)
        for name in module.derive("meta")
    }


def is_close(saved: Tensor, derived: Tensor) -> bool:
    """Whether two buffers of whole numbers agree, whatever rounding the saved one went through."""
    if saved.shape != derived.shape or saved.is_complex():
        return False
    return torch.allclose(saved.float().cpu(), derived.float(), rtol=0, atol=0.25)
