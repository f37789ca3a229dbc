"""Replaces the layers of a model by sparse ones, and says which cannot be replaced and why."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from issp.nn import module_swap, selection, sharding
from issp.nn.layers import NMConv2d, NMLinear, SparseConv2d, SparseLayer, SparseLinear
from issp.nn.names import named_modules
from issp.ops.keep import Keep

NO_ZEROS = "no weight is zero (masks are made final by pruner.finalize())"


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
        keep: the pattern of all of them; None for unstructured weights.
        exclude: name patterns of layers that stay dense, see `issp.attach`.
        v: of unstructured weights, see `SparseConv2d.from_dense`.
        mask: "fixed" (weights must have their zeros already), "ste" or "sr-ste".
        sparsity: of unstructured weights with mask "ste" or "sr-ste".

    Returns:
        Name of every layer that stays dense -> why: see `dense_reason`; or a weight that several
        layers share, or one without zeros.

    Raises:
        ValueError: a name pattern matches nothing, or a layer cannot be converted; nothing has
            been replaced.
    """
    if keep is not None and (sparsity is not None or v != 1):
        raise ValueError("keep says what is kept: leave sparsity and v out")
    sharding.check_whole(model)
    sparse: dict[str, SparseLayer] = {}
    dense: dict[str, str] = {}
    for layer in selection.select(model, (nn.Conv2d, nn.Linear), exclude, {}, 0.0):
        reason = _layer_reason(layer, keep, mask)
        if reason:
            dense |= dict.fromkeys((layer.name, *layer.aliases), reason)
            continue
        try:
            sparse[layer.name] = from_dense(layer.module, keep, v, mask, sparsity)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{layer.name}: {error}") from None
    modules = named_modules(model)
    for name, module in sparse.items():
        module_swap.transfer_hooks(modules[name], module)
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, module)
    return dense


def dense_reason(module: nn.Module, keep: Keep | None = None) -> str:
    """Why a sparse layer cannot take a module's place, or "".

    The reasons are: a subclass of Conv2d or Linear; something that cannot follow (see
    `module_swap.replacement_blocker`); groups or another padding mode; a pattern with tail="dense"
    that does not divide the weight.
    """
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"it is a {type(module).__name__}, which may compute something else"
    reason = module_swap.replacement_blocker(module) or selection.unsupported_reason(module)
    if not reason and keep is not None and keep.tail == "dense":
        reason = selection.indivisible_reason(module.get_parameter("weight"), keep)
    return reason


def _layer_reason(layer: selection.Layer, keep: Keep | None, mask: str) -> str:
    if not layer.name:
        raise ValueError("the model is itself one layer: use from_dense")
    if layer.aliases:
        return f"its weight is shared by {', '.join((layer.name, *layer.aliases))}"
    reason = layer.dense.removeprefix("stays dense: ") or dense_reason(layer.module, keep)
    if reason:
        return reason
    if keep is None and mask == "fixed" and bool(layer.weight.detach().ne(0).all()):
        return NO_ZEROS
    return ""


def from_dense(
    module: nn.Module,
    keep: Keep | None,
    v: int = 1,
    mask: str = "fixed",
    sparsity: float | None = None,
) -> SparseLayer:
    """The sparse layer of a Conv2d or Linear, by the class's own `from_dense`."""
    is_conv = isinstance(module, nn.Conv2d)
    if keep is not None:
        return (NMConv2d if is_conv else NMLinear).from_dense(module, keep, mask)
    return (SparseConv2d if is_conv else SparseLinear).from_dense(module, v, mask, sparsity)
