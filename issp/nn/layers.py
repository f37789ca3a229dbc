"""The sparse layers: each is made from two mixins, an op (linear or convolution) and a pattern."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from issp.nn import selection, ste
from issp.nn.leaf import Leaf
from issp.nn.padding import numeric_padding
from issp.nn.recording import is_recorded_for_torch
from issp.ops import num_pruned, reference, sparse, validation
from issp.ops.formats import (
    NMTensor,
    PackedWeight,
    SparseRows,
    Transposed,
    check_pattern,
    check_rows_per_block,
    pack_entries,
    transposed_once,
)
from issp.ops.keep import Keep

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self needs Python 3.11

MASKS = ("fixed", "ste", "sr-ste")
DECAY = 2e-4  # lambda_W of SR-STE, Zhou et al. 2021
_ACTIVATION_MODULES = {"relu": nn.ReLU, "gelu": nn.GELU}
_DENSE_INSTEAD = (
    "torch.jit and ONNX get sparse layers as dense ones, with zeros: torch.export keeps them sparse"
)
# Entries of the state of a layer with a fixed mask, and the names that older versions gave them.
STORED = ("values", "col_indices", "crow_indices")
_OLD_NAMES = {"columns": "col_indices", "starts": "crow_indices"}

Size2 = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Device = torch.device | str | int | None


class _Weight:
    """The attribute `weight` of a sparse layer, for code that reads torch's layers.

    Of a mask "ste" or "sr-ste" it is the parameter. Of a fixed mask it is a dense copy with its
    zeros, made in every access: gradients reach the stored values, but what is written to the copy
    does not.
    """

    def __get__(self, layer: SparseLayer | None, kind: type) -> Any:
        if layer is None:
            return self
        parameter = layer.__dict__.get("_parameters", {}).get("weight")
        if parameter is None and layer.__dict__.get("mask") != "fixed":
            raise AttributeError("the layer has no weight yet")
        return layer._dense_weight() if parameter is None else parameter


class SparseLayer(Leaf):
    """What all four layers share; a layer adds `LinearMixin` or `Conv2dMixin`, and a pattern.

    The mixins implement what is only declared here. A layer with a fixed mask is its own packed
    weight, see `issp.ops.formats.PackedWeight`.
    """

    # Of the op: torch's layer, and the attributes that are arguments of its constructor.
    dense: ClassVar[type[nn.Conv2d] | type[nn.Linear]]
    SIZES: ClassVar[tuple[str, ...]]
    _forward_op: Callable[..., Tensor]  # input, packed weight, residual, activation, further
    _dense_op: Callable[[Tensor, Tensor], Tensor]
    # Of the pattern.
    _kept: Callable[[Tensor], Tensor]  # dense weight -> bool [O / v, length of a row]
    _make_weight: Callable[[Tensor, Tensor, Tensor], SparseRows]  # checks the tensors
    _pattern_repr: Callable[[], str]
    # Attributes of an instance that the dense layer does not have.
    STATE: ClassVar[frozenset[str]] = frozenset(
        {"mask", "activation", "decay", "shape", "v", "_num_kept", "_transposed"}
    )
    mask: str
    activation: str
    decay: float
    shape: tuple[int, ...]
    v: int  # consecutive output rows that share their positions
    _num_kept: int  # positions, each for v rows
    weight = _Weight()
    values: nn.Parameter  # of a fixed mask, as the next two
    col_indices: Tensor
    crow_indices: Tensor
    bias: nn.Parameter | None
    _transposed: Transposed | None

    def _copy_dense(self, layer: nn.Module, mask: str, activation: str, decay: float) -> Tensor:
        """Copies everything but the pattern from a dense layer; returns the layer's weight."""
        name = type(self).__name__
        if not isinstance(layer, self.dense):
            raise TypeError(
                f"{name} is made from nn.{self.dense.__name__}, not {type(layer).__name__}"
            )
        reason = selection.unsupported_reason(layer)
        if reason:
            raise ValueError(f"{name}: {reason}; leave the layer dense")
        if mask not in MASKS:
            raise ValueError(f'mask is "{mask}": use one of {", ".join(MASKS)}')
        validation.check_activation(activation)
        weight, bias = layer.weight, layer.bias
        super().__init__()
        self.mask, self.activation, self.decay = mask, activation, decay
        self.shape = tuple(weight.shape)
        self._transposed = None
        self._copy_sizes(layer)
        self.train(layer.training)
        # Weight before bias, as in torch's layers: optimizer states go by the order.
        if mask == "fixed":
            self.register_parameter("values", None)
        else:
            self.weight = _parameter(weight, weight.requires_grad)
        copied = None if bias is None else _parameter(bias, bias.requires_grad)
        self.register_parameter("bias", copied)
        return weight

    def _copy_sizes(self, layer: nn.Module) -> None:
        for name in self.SIZES:
            setattr(self, name, getattr(layer, name))

    def _sizes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SIZES}

    def _store(self, p: SparseRows, requires_grad: bool) -> None:
        self.values = _parameter(p.values, requires_grad)
        self.register_buffer("col_indices", p.col_indices)
        self.register_buffer("crow_indices", p.crow_indices)

    def _prune(self, weight: Tensor) -> SparseRows:
        return self._make_weight(*pack_entries(weight, self._kept(weight), self._num_kept))

    def _geometry(self) -> dict[str, tuple[int, int]]:
        """Stride, padding and dilation of a convolution; nothing for a linear layer."""
        return {}

    @property
    def sparsity(self) -> float:
        """Share of the weight's positions that are not stored."""
        return 1.0 - self._num_kept * self.v / torch.Size(self.shape).numel()

    @property
    def transposed(self) -> list[Tensor]:
        """Lists of the transposed weight of a fixed mask, made when backward first needs them."""
        current = transposed_once(self, self.v, self._transposed)
        if current is not self._transposed:  # a module's attributes are slow to set
            self._transposed = current
        return current.lists

    def _dense_weight(self) -> Tensor:
        entries: tuple[Tensor, Tensor, Tensor]
        if self.mask == "fixed":
            entries = (self.values, self.col_indices, self.crow_indices)
        else:
            entries = pack_entries(self.weight, self._kept(self.weight), self._num_kept)
        return reference.to_dense(*entries, torch.Size(self.shape[1:]).numel()).view(self.shape)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        **further: Any,
    ) -> Tensor:
        """activation(W input + bias) + residual; fused where no gradient is wanted.

        Args:
            input: of a convolution [C, H, W] too, as for torch's.
            residual: of the result's shape.
            activation: "none", "relu" or "gelu"; default: the layer's.
            further: scale and shuffle of a convolution, see `issp.ops.sparse.conv2d`.
        """
        x = input  # torch's layers take it by this name
        activation = self.activation if activation is None else activation
        if is_recorded_for_torch():
            warnings.warn(_DENSE_INSTEAD, RuntimeWarning, stacklevel=2)
            weight = self._constant_weight()
            return sparse.apply_epilogue(self._dense_op(x, weight), residual, activation, **further)
        if self.mask == "fixed":
            return self._forward_op(x, self, residual, activation, **further)
        kept = self._kept(self.weight)
        entries = pack_entries(self.weight, kept, self._num_kept)
        rows = SparseRows.from_unchecked(*entries, self.shape)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return self._forward_op(x, rows, residual, activation, **further)
        y = self._forward_op(x, rows, None, "none")
        decayed = kept if self.mask == "sr-ste" else None
        y = ste.StraightThrough.apply(
            y, self.weight, x.detach(), decayed, self.decay, self._geometry()
        )
        return sparse.apply_epilogue(y, residual, activation, **further)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in the layer's place."""
        warnings.warn(_DENSE_INSTEAD, RuntimeWarning, stacklevel=3)
        return self.to_dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        """As torch's; positions stay integers where `nn.Module.type` would convert them too."""

        def keep_integers(t: Tensor) -> Tensor:
            applied = fn(t)
            kept = t.is_floating_point() or applied.dtype == t.dtype
            return applied if kept else t.to(applied.device)

        return super()._apply(keep_integers, *args, **kwargs)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises as torch's layer does, and prunes to as many weights as now."""
        own = self.values if self.mask == "fixed" else self.weight
        fresh = self.dense(**self._sizes(), bias=self.bias is not None).to(own)
        if self.mask == "fixed":
            entries = pack_entries(fresh.weight, self._kept(fresh.weight), self._num_kept)
            for name, new in zip(STORED, entries, strict=True):
                getattr(self, name).copy_(new)
        else:
            own.copy_(fresh.weight)
        if self.bias is not None:
            self.bias.copy_(fresh.get_parameter("bias"))

    def _constant_weight(self) -> Tensor:
        """The dense weight, without the ops that make it in what torch.jit records."""
        recorder = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return self._dense_weight().detach()
        finally:
            torch._C._set_tracing_state(recorder)  # type: ignore[attr-defined]

    def packed(self) -> SparseRows:
        """A copy of the packed weight, without its graph."""
        if self.mask == "fixed":
            values = self.values.detach().clone()
            return self._make_weight(values, self.col_indices.clone(), self.crow_indices.clone())
        return self._prune(self.weight)

    def to_dense(self) -> nn.Module:
        """torch's layer with zeros where nothing is kept; in nn.Sequential with the activation."""
        weight = self.packed().to_dense()
        layer = self.dense(**self._sizes(), bias=self.bias is not None, device="meta")
        trained = self.values if self.mask == "fixed" else self.weight
        layer.weight = _parameter(weight, trained.requires_grad)
        if self.bias is not None:
            layer.bias = _parameter(self.bias, self.bias.requires_grad)
        layer.train(self.training)
        if self.activation == "none":
            return layer
        activation = _ACTIVATION_MODULES[self.activation]()
        return nn.Sequential(layer, activation).train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.mask == "fixed":
            for old, new in _OLD_NAMES.items():
                if prefix + old in state_dict and prefix + new not in state_dict:
                    state_dict[prefix + new] = state_dict.pop(prefix + old)
            try:
                self._adopt_pattern(state_dict, prefix)
            except (TypeError, ValueError) as error:
                *_, error_msgs = args
                error_msgs.append(f"{prefix[:-1] or type(self).__name__}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _adopt_pattern(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Makes room for the positions that are being loaded; refuses wrong ones."""
        loaded = {name: state_dict[prefix + name] for name in STORED if prefix + name in state_dict}
        if len(loaded) < len(STORED):
            if not loaded and prefix + "weight" not in state_dict:
                return  # strict loading names them
            raise ValueError(
                f"the state holds no packed weight ({', '.join(STORED)}): load a dense weight "
                f"into torch's layer and use {type(self).__name__}.from_dense"
            )
        self._make_weight(*(loaded[name].cpu() for name in STORED))
        self._num_kept = len(loaded["col_indices"])
        for name, tensor in loaded.items():
            own = getattr(self, name)
            if own.shape != tensor.shape:
                own.data = own.data.new_zeros(tensor.shape)

    def extra_repr(self) -> str:
        parts = [
            str(size) if name.startswith(("in_", "out_")) else f"{name}={size}"
            for name, size in self._sizes().items()
        ]
        parts += [self._pattern_repr(), f'mask="{self.mask}"']
        if self.bias is None:
            parts.append("bias=False")
        if self.activation != "none":
            parts.append(f'activation="{self.activation}"')
        return ", ".join(parts)


class LinearMixin(SparseLayer):
    """The op and the sizes of nn.Linear."""

    dense = nn.Linear
    SIZES = ("in_features", "out_features")
    in_features: int
    out_features: int

    def _forward_op(
        self, x: Tensor, p: PackedWeight, residual: Tensor | None, activation: str
    ) -> Tensor:
        return sparse.matmul(x, p, self.bias, residual, activation)

    def _dense_op(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class Conv2dMixin(SparseLayer):
    """The op, the sizes and the geometry of nn.Conv2d."""

    dense = nn.Conv2d
    SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    groups, padding_mode = 1, "zeros"
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def _copy_sizes(self, layer: nn.Module) -> None:
        """Copies the sizes; the padding in numbers, where torch also takes "valid" and "same"."""
        super()._copy_sizes(layer)
        self.padding = numeric_padding(layer)

    def _geometry(self) -> dict[str, tuple[int, int]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def _forward_op(
        self, x: Tensor, p: PackedWeight, residual: Tensor | None, activation: str, **further: Any
    ) -> Tensor:
        if isinstance(x, Tensor) and x.dim() == 3:
            batch = None if residual is None else residual[None]
            return self._forward_op(x[None], p, batch, activation, **further)[0]
        return sparse.conv2d(
            x,
            p,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            residual=residual,
            activation=activation,
            **further,
        )

    def _dense_op(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


class NMMixin(SparseLayer):
    """The pattern N:M."""

    keep: Keep
    STATE = SparseLayer.STATE | {"keep"}

    def _init_from(
        self, layer: nn.Module, keep: Keep, mask: str, activation: str, decay: float, prune: bool
    ) -> None:
        """Copies a dense layer; `prune`: a fixed mask prunes, else the weight must be N:M."""
        weight = self._copy_dense(layer, mask, activation, decay)
        check_pattern(weight.shape, keep, f"{type(self).__name__}'s weight")
        self.keep, self.v = keep, keep.v
        self._num_kept = weight.numel() // keep.v // keep.of * keep.n
        if mask == "fixed":
            if not prune:
                _check_has_memory(weight)
            p = self._prune(weight) if prune else NMTensor.from_dense(weight, keep)
            self._store(p, weight.requires_grad)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        keep: Keep,
        mask: str = "fixed",
        activation: str = "none",
        decay: float = DECAY,
    ) -> Self:
        """The layer with an N:M weight; copies, the dense layer stays as it is.

        Args:
            layer: torch's layer. mask "fixed": its weight must be N:M already, which
                `issp.ops.nm_prune` makes it. Its hooks are not copied.
            keep: the pattern, of layout "channels".
            mask, activation, decay: see `issp.nn`.

        Raises:
            TypeError, ValueError: the layer cannot have this pattern.
        """
        self = cls.__new__(cls)
        self._init_from(layer, keep, mask, activation, decay, prune=False)
        return self

    def _kept(self, weight: Tensor) -> Tensor:
        return ste.kept_nm(weight, self.keep)

    def _make_weight(self, values: Tensor, col_indices: Tensor, crow_indices: Tensor) -> NMTensor:
        return NMTensor(values, col_indices, crow_indices, self.shape, self.keep)

    def _pattern_repr(self) -> str:
        c = f", c={self.keep.c}" if self.keep.c > 1 else ""
        return f"keep={self.keep.n}:{self.keep.of}, v={self.keep.v}{c}"


class RowsMixin(SparseLayer):
    """No pattern but that v rows share their positions."""

    def _init_from(
        self,
        layer: nn.Module,
        v: int,
        sparsity: float | None,
        mask: str,
        activation: str,
        decay: float,
    ) -> None:
        """Copies a dense layer; a fixed mask without a sparsity keeps what is not zero."""
        weight = self._copy_dense(layer, mask, activation, decay)
        check_rows_per_block(weight.shape[0], v, f"{type(self).__name__}'s weight")
        self.v = v
        positions = weight.numel() // v
        if sparsity is not None:
            self._num_kept = positions - num_pruned(positions, sparsity)
        if mask == "fixed":
            if sparsity is None:
                _check_has_memory(weight)
            p = SparseRows.from_dense(weight, v) if sparsity is None else self._prune(weight)
            self._num_kept = len(p.col_indices)
            self._store(p, weight.requires_grad)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        v: int = 1,
        mask: str = "fixed",
        sparsity: float | None = None,
        activation: str = "none",
        decay: float = DECAY,
    ) -> Self:
        """The layer with a sparse weight; copies, the dense layer stays as it is.

        Args:
            layer: torch's layer. mask "fixed": what is not zero in its weight is kept. Its hooks
                are not copied.
            v: consecutive output rows that share their positions.
            sparsity: share that a mask "ste" or "sr-ste" prunes, 0..1; None for "fixed".
            mask, activation, decay: see `issp.nn`.

        Raises:
            TypeError, ValueError: the layer cannot become one.
        """
        if (sparsity is None) != (mask == "fixed"):
            raise ValueError(
                f'mask "{mask}" with sparsity {sparsity}: "ste" and "sr-ste" need a sparsity, '
                '"fixed" keeps what is not zero'
            )
        self = cls.__new__(cls)
        self._init_from(layer, v, sparsity, mask, activation, decay)
        return self

    def _kept(self, weight: Tensor) -> Tensor:
        return ste.kept_magnitudes(weight, self._num_kept, self.v)

    def _make_weight(self, values: Tensor, col_indices: Tensor, crow_indices: Tensor) -> SparseRows:
        p = SparseRows(values, col_indices, crow_indices, self.shape)
        if p.v != self.v:
            raise ValueError(f"values have v = {p.v}, the layer has v = {self.v}")
        return p

    def _pattern_repr(self) -> str:
        return f"sparsity={self.sparsity:.4f}, v={self.v}"


class NMLinear(NMMixin, LinearMixin):
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
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        keep: Keep,
        mask: str = "fixed",
        activation: str = "none",
        decay: float = DECAY,
    ) -> None:
        layer = nn.Linear(in_features, out_features, bias, device, dtype)
        self._init_from(layer, keep, mask, activation, decay, prune=True)


class NMConv2d(NMMixin, Conv2dMixin):
    """nn.Conv2d that keeps `keep.n` of every `keep.of` input channels at each kernel position.

    The arguments are those of nn.Conv2d and of `NMLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Size2 | str = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        keep: Keep,
        mask: str = "fixed",
        activation: str = "none",
        decay: float = DECAY,
    ) -> None:
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation)
        layer = nn.Conv2d(*sizes, groups, bias, padding_mode, device, dtype)
        self._init_from(layer, keep, mask, activation, decay, prune=True)


class SparseLinear(RowsMixin, LinearMixin):
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
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float,
        v: int = 1,
        mask: str = "fixed",
        activation: str = "none",
        decay: float = DECAY,
    ) -> None:
        layer = nn.Linear(in_features, out_features, bias, device, dtype)
        self._init_from(layer, v, sparsity, mask, activation, decay)


class SparseConv2d(RowsMixin, Conv2dMixin):
    """nn.Conv2d that keeps the largest weights.

    The arguments are those of nn.Conv2d and of `SparseLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Size2 | str = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float,
        v: int = 1,
        mask: str = "fixed",
        activation: str = "none",
        decay: float = DECAY,
    ) -> None:
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation)
        layer = nn.Conv2d(*sizes, groups, bias, padding_mode, device, dtype)
        self._init_from(layer, v, sparsity, mask, activation, decay)


def _check_has_memory(weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError(
            "the layer is on the meta device, where no weight is zero: give it memory first"
        )


def _parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad)
