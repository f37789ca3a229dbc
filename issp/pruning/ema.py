"""The weights of the pruned layers in an exponential moving average of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from issp.nn import sharding
from issp.nn.names import matched, named_modules
from issp.nn.selection import Layer


class EMAWeights:
    """Looks the averaged weights up by name, anew each time: updates may replace the tensors.

    Args:
        source: a module with the model's names, or a dict from parameter name to tensor; wrappers
            of the average, or of the model that it was made from, may stand in the names.
        layers: the pruned layers; the average must have all of them.

    Raises:
        TypeError: another kind of source.
        ValueError: a layer is missing or has another shape.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor], layers: Sequence[Layer]) -> None:
        if not isinstance(source, nn.Module | Mapping):
            raise TypeError(
                "ema must be a module, torch's AveragedModel or a dict from parameter name to "
                f"tensor, not {type(source).__name__}"
            )
        self._source = source
        self.tensors(layers)

    def module(self, layer: Layer) -> nn.Module:
        """The layer of the average.

        Raises:
            ValueError: the average is a dict, or its layer is of another class.
        """
        if not isinstance(self._source, nn.Module):
            raise ValueError(
                "freeze(accelerate=...) makes the layers of the average sparse as well: pass a "
                "module to attach as ema, such as torch's AveragedModel, not a dict"
            )
        module = matched(named_modules(self._source), [layer.name]).get(layer.name)
        if type(module) is not type(layer.module):
            raise ValueError(
                f"freeze(accelerate=...): the average has a {type(module).__name__} for "
                f"{layer.name}, which is a {type(layer.module).__name__}"
            )
        return module

    def tensors(self, layers: Sequence[Layer]) -> list[Tensor]:
        """The averaged weight of every layer, in their order."""
        source = self._source
        if isinstance(source, nn.Module):
            sharding.reshard(sharding.fsdp_modules(source))
            source = dict(source.named_parameters(remove_duplicate=False))
        names = [f"{layer.name}.weight" if layer.name else "weight" for layer in layers]
        by_name, averages = matched(source, names), []
        for layer, name in zip(layers, names, strict=True):
            tensor = by_name.get(name)
            if tensor is None or tensor.shape != layer.weight.shape:
                raise ValueError(
                    f"ema has no {name} of shape {tuple(layer.weight.shape)}: it must average the "
                    "model given to attach"
                )
            averages.append(tensor.data)
        return averages
