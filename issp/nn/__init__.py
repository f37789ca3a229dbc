"""Layers with sparse weights, in place of torch's: NMLinear, NMConv2d, SparseLinear, SparseConv2d.

Their constructors take the arguments of torch's layer (a convolution with groups = 1 and
padding_mode "zeros" alone), initialise as it does and then prune by magnitude; `from_dense` takes
over a layer that exists. All of them take:
    mask        "fixed": the stored values are the parameter, their positions are buffers.
                "ste", "sr-ste": the dense weight is the parameter; each forward keeps its largest
                magnitudes and multiplies by those alone, and the gradient reaches all of it, see
                issp/moving.py.
    activation  "none", "relu" or "gelu" behind the product, fused outside training.
    decay       of "sr-ste": how strongly weights that are not kept are pulled to zero.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from issp.nn import module_swap, selection
from issp.nn.layers import DECAY, NM, ConvProduct, LinearProduct, Rows
from issp.ops.keep import Keep


class NMLinear(NM, LinearProduct):
    """nn.Linear of which every `keep.of` inputs have `keep.n` weights.

    Args:
        in_features, ..., dtype, mask, activation, decay: see `issp.nn`.
        keep: the pattern, of layout "channels"; it must divide the weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        keep: Keep,
        mask: str = "fixed",
        activation: str = "none",
        decay: float = DECAY,
    ) -> None:
        super().__init__()
        layer = nn.Linear(in_features, out_features, bias, device, dtype)
        self._begin(layer, keep, mask, activation, decay, prune=True)


class NMConv2d(NM, ConvProduct):
    """nn.Conv2d that keeps `keep.n` of every `keep.of` input channels at each kernel position.

    The arguments are those of nn.Conv2d and of `NMLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        keep: Keep,
        mask: str = "fixed",
        activation: str = "none",
        decay: float = DECAY,
    ) -> None:
        super().__init__()
        layer = nn.Conv2d(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            *(padding_mode, device, dtype),
        )
        self._begin(layer, keep, mask, activation, decay, prune=True)


class SparseLinear(Rows, LinearProduct):
    """nn.Linear that keeps the largest weights.

    Args:
        in_features, ..., dtype, mask, activation, decay: see `issp.nn`.
        sparsity: share of the weights that is pruned, see `issp.num_pruned`.
        v: consecutive output rows that share their positions.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        sparsity: float,
        v: int = 1,
        mask: str = "fixed",
        activation: str = "none",
        decay: float = DECAY,
    ) -> None:
        super().__init__()
        layer = nn.Linear(in_features, out_features, bias, device, dtype)
        self._begin(layer, sparsity, v, mask, activation, decay, prune=True)


class SparseConv2d(Rows, ConvProduct):
    """nn.Conv2d that keeps the largest weights.

    The arguments are those of nn.Conv2d and of `SparseLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        sparsity: float,
        v: int = 1,
        mask: str = "fixed",
        activation: str = "none",
        decay: float = DECAY,
    ) -> None:
        super().__init__()
        layer = nn.Conv2d(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            *(padding_mode, device, dtype),
        )
        self._begin(layer, sparsity, v, mask, activation, decay, prune=True)


def convert(
    model: nn.Module,
    keep: Keep | None = None,
    exclude: str | Iterable[str] = (),
    v: int = 1,
    mask: str = "fixed",
    sparsity: float | None = None,
) -> dict[str, str]:
    """Replaces the model's convolutions and linear layers by sparse ones, in place.

    Hooks on calls (forward and full backward, with their handles), attributes, the mode and
    requires_grad follow. Parameters are new: build the optimizer afterwards.

    Args:
        model: its Conv2d and Linear layers, not subclasses of them, are replaced.
        keep: the pattern of all of them; none for unstructured weights.
        exclude: globs or "re:" patterns of layers that stay dense, see `issp.attach`.
        v: of unstructured weights, see `SparseConv2d.from_dense`.
        mask: "fixed" (weights must have their zeros already), "ste" or "sr-ste".
        sparsity: of unstructured weights whose mask moves.

    Returns:
        Name of every layer that stays dense -> why: groups, another padding mode, a subclass, a
        shared weight, nothing to leave out, a pattern with tail="dense" that does not divide it,
        or something that cannot follow: more parameters (torch.nn.utils.prune), hooks on the
        weight or the state, a `forward` of its own.

    Raises:
        ValueError: a pattern matches nothing, or a layer does not suit; nothing has been replaced.
    """
    if keep is not None and (sparsity is not None or v != 1):
        raise ValueError("keep says what is kept: leave sparsity and v out")
    fresh, dense = {}, {}
    for layer in selection.select(model, (nn.Conv2d, nn.Linear), exclude, {}, 0.0):
        reason = _stays_dense(layer, keep, mask)
        if reason:
            dense |= dict.fromkeys((layer.name, *layer.aliases), reason)
            continue
        kinds = (
            (NMConv2d, SparseConv2d)
            if isinstance(layer.module, nn.Conv2d)
            else (NMLinear, SparseLinear)
        )
        try:
            if keep is not None:
                fresh[layer.name] = kinds[0].from_dense(layer.module, keep, mask)
            else:
                fresh[layer.name] = kinds[1].from_dense(layer.module, v, mask, sparsity)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{layer.name}: {error}") from None
    for name, module in fresh.items():
        module_swap.carry(model.get_submodule(name), module)
        model.set_submodule(name, module)
    return dense


def _stays_dense(layer: selection.Layer, keep: Keep | None, mask: str) -> str | None:
    module, weight = layer.module, layer.weight
    if not layer.name:
        raise ValueError("the model is itself one layer: use from_dense")
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"{type(module).__name__} is a kind of its own"
    if layer.aliases:
        return f"its weight is shared by {', '.join((layer.name, *layer.aliases))}"
    if obstacle := module_swap.obstacle(module):
        return obstacle
    if getattr(module, "groups", 1) != 1:
        return f"groups = {module.groups}"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f'padding_mode "{module.padding_mode}"'
    if keep is not None and keep.tail == "dense":
        rows, inputs = weight.shape[:2]
        if inputs % keep.of or rows % keep.v:
            return f"{keep} does not divide its weight {tuple(weight.shape)}"
    if keep is None and mask == "fixed" and bool(weight.detach().ne(0).all()):
        return "nothing in it is zero"
    return None
