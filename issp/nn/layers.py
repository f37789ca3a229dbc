"""What the layers of issp/nn.py are put together from: a product and a pattern."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from issp.nn import ste
from issp.ops import num_pruned, sparse
from issp.ops.formats import NMTensor, SparseRows, check_pattern, taken, transpose
from issp.ops.keep import Keep
from issp.ops.reference.sparse import ACTIVATIONS

MASKS = ("fixed", "ste", "sr-ste")
DECAY = 2e-4  # lambda_W of SR-STE, Zhou et al. 2021
_BEHIND = {"relu": nn.ReLU, "gelu": nn.GELU}


class SparseLayer(nn.Module):
    """What all four share; `LinearProduct` and `ConvProduct`, `NM` and `Rows` are its halves.

    A layer with a fixed mask is its own packed weight: values, columns, starts, shape, transposed.
    """

    dense: type[nn.Module]
    # Attributes of an instance that the dense layer does not have.
    STATE = frozenset({"mask", "activation", "decay", "shape", "_transposed"})

    def _build(self, layer: nn.Module, mask: str, activation: str, decay: float) -> None:
        """Takes everything over from a dense layer; the pattern has been set before."""
        if mask not in MASKS:
            raise ValueError(f'mask is "{mask}": use one of {", ".join(MASKS)}')
        if activation not in ACTIVATIONS:
            raise ValueError(f'activation is "{activation}": use one of {", ".join(ACTIVATIONS)}')
        if layer.weight.device.type == "meta":
            raise ValueError("the layer is on the meta device: give it memory first")
        self.mask, self.activation, self.decay = mask, activation, decay
        self.shape = tuple(layer.weight.shape)
        self._transposed: list[Tensor] | None = None
        self._geometry(layer)
        self.train(layer.training)
        # Weight before bias, as in torch's layers: optimizer states go by the order.
        if mask == "fixed":
            self.register_parameter("values", None)
        else:
            self.weight = _parameter(layer.weight, layer.weight.requires_grad)
        bias = layer.bias
        fresh = None if bias is None else _parameter(bias, bias.requires_grad)
        self.register_parameter("bias", fresh)

    def _store(self, p: SparseRows, requires_grad: bool) -> None:
        self.values = _parameter(p.values, requires_grad)
        self.register_buffer("columns", p.columns)
        self.register_buffer("starts", p.starts)

    @classmethod
    def _suits(cls, layer: nn.Module) -> None:
        """Whether a dense layer can become this one; says why not."""
        name = cls.__name__
        if not isinstance(layer, cls.dense):
            raise TypeError(
                f"{name} is made from nn.{cls.dense.__name__}, not {type(layer).__name__}"
            )
        if getattr(layer, "groups", 1) != 1:
            raise ValueError(f"{name} has groups = 1 only, not {layer.groups}: leave it dense")
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise ValueError(
                f'{name} pads by zeros only, not by "{layer.padding_mode}": leave it dense'
            )

    @property
    def v(self) -> int:
        """Consecutive output rows that share their positions."""
        raise NotImplementedError

    @property
    def sparsity(self) -> float:
        """Share of the weight's positions that are not stored."""
        return 1.0 - self._entries() * self.v / torch.Size(self.shape).numel()

    @property
    def transposed(self) -> list[Tensor]:
        """Lists of the transposed weight of a fixed mask, made when backward first needs them."""
        if self._transposed is None:
            self._transposed = transpose(self.columns, self.starts, self.v, self.shape)
        return self._transposed

    def _apply(self, *args, **kwargs):
        self._transposed = None
        return super()._apply(*args, **kwargs)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(W x + bias) + residual; fused where no gradient is wanted."""
        if self.mask == "fixed":
            return self._product(x, self, residual, self.activation)
        kept = self._kept()
        rows = SparseRows.trusted(*taken(self.weight, kept, self._entries()), self.shape)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return self._product(x, rows, residual, self.activation)
        y = self._product(x, rows, None, "none")
        decayed = kept if self.mask == "sr-ste" else None
        y = ste.StraightThrough.apply(
            y, self.weight, x.detach(), decayed, self.decay, self._convolved()
        )
        return sparse.composed(y, residual, self.activation)

    def packed(self) -> SparseRows:
        """A copy of the weight as products read it, without its graph."""
        if self.mask == "fixed":
            stored = (self.values.detach().clone(), self.columns.clone(), self.starts.clone())
        else:
            stored = taken(self.weight, self._kept(), self._entries())
        return self._typed(*stored)

    def to_dense(self) -> nn.Module:
        """torch's layer with zeros where nothing is kept; in nn.Sequential with the activation."""
        weight = self.packed().to_dense()
        layer = self._dense_layer()
        trained = self.values if self.mask == "fixed" else self.weight
        layer.weight = _parameter(weight, trained.requires_grad)
        if self.bias is not None:
            layer.bias = _parameter(self.bias, self.bias.requires_grad)
        layer.train(self.training)
        if self.activation == "none":
            return layer
        return nn.Sequential(layer, _BEHIND[self.activation]()).train(self.training)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest) -> None:
        if self.mask == "fixed":
            problem = self._new_pattern(state_dict, prefix)
            if problem is not None:
                errors = rest[-1]
                errors.append(f"{prefix[:-1] or type(self).__name__}: {problem}")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        self._transposed = None

    def _new_pattern(self, state_dict, prefix: str) -> str | None:
        """Makes room for the positions that are being loaded; returns what is wrong with them."""
        stored = [state_dict.get(prefix + name) for name in ("values", "columns", "starts")]
        if any(tensor is None for tensor in stored):
            if all(tensor is None for tensor in stored) and prefix + "weight" not in state_dict:
                return None  # strict loading names them
            return (
                "the state holds no packed weight (values, columns, starts): load a dense weight "
                f"into torch's layer and use {type(self).__name__}.from_dense"
            )
        try:
            self._typed(*(tensor.cpu() for tensor in stored))
        except (TypeError, ValueError) as error:
            return str(error)
        for mine, theirs in zip((self.values, self.columns, self.starts), stored, strict=True):
            if mine.shape != theirs.shape:
                mine.data = mine.data.new_zeros(theirs.shape)
        return None

    def extra_repr(self) -> str:
        about = [self._numbers(), self._pattern(), f'mask="{self.mask}"']
        if self.bias is None:
            about.append("bias=False")
        if self.activation != "none":
            about.append(f'activation="{self.activation}"')
        return ", ".join(about)


class LinearProduct(SparseLayer):
    dense = nn.Linear

    def _geometry(self, layer: nn.Linear) -> None:
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def _product(self, x, p, residual, activation) -> Tensor:
        return sparse.matmul(x, p, self.bias, residual, activation)

    def _convolved(self) -> tuple:
        return ()

    def _dense_layer(self) -> nn.Linear:
        return nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )

    def _numbers(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class ConvProduct(SparseLayer):
    dense = nn.Conv2d
    groups, padding_mode = 1, "zeros"

    def _geometry(self, layer: nn.Conv2d) -> None:
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation = _padding(layer, type(self).__name__), layer.dilation

    def _product(self, x, p, residual, activation) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation)
        return sparse.conv2d(x, p, self.bias, *geometry, residual, activation)

    def _convolved(self) -> tuple:
        return (self.stride, self.padding, self.dilation)

    def _dense_layer(self) -> nn.Conv2d:
        return nn.Conv2d(
            *(self.in_channels, self.out_channels, self.kernel_size, self.stride),
            *(self.padding, self.dilation),
            bias=self.bias is not None,
            device="meta",
        )

    def _numbers(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        )


class NM(SparseLayer):
    keep: Keep
    STATE = SparseLayer.STATE | {"keep"}

    def _begin(self, layer, keep, mask, activation, decay, prune: bool) -> None:
        self._suits(layer)
        check_pattern(layer.weight.shape, keep, f"{type(self).__name__}'s weight")
        self.keep = keep
        self._build(layer, mask, activation, decay)
        if mask == "fixed" and prune:
            self._store(self._typed(*taken(layer.weight, ste.kept_nm(layer.weight, keep))), True)
        elif mask == "fixed":
            p = NMTensor.from_dense(layer.weight, keep)
            self._store(p, layer.weight.requires_grad)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        keep: Keep,
        mask: str = "fixed",
        activation: str = "none",
        decay: float = DECAY,
    ) -> NM:
        """The layer with an N:M weight; copies, the dense layer stays as it is.

        Args:
            layer: torch's layer. mask "fixed": its weight must be N:M already, which
                `issp.ops.nm_prune` makes it. Its hooks are not taken over.
            keep: the pattern, of layout "channels".
            mask, activation, decay: see `issp.nn`.

        Raises:
            TypeError, ValueError: the layer cannot have this pattern; why.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._begin(layer, keep, mask, activation, decay, prune=False)
        return self

    @property
    def v(self) -> int:
        return self.keep.v

    def _entries(self) -> int:
        keep = self.keep
        return torch.Size(self.shape).numel() // keep.v // keep.of * keep.n

    def _kept(self) -> Tensor:
        return ste.kept_nm(self.weight, self.keep)

    def _typed(self, values, columns, starts) -> NMTensor:
        return NMTensor(values, columns, starts, self.shape, self.keep)

    def _pattern(self) -> str:
        return f"keep={self.keep.n}:{self.keep.of}, v={self.keep.v}"


class Rows(SparseLayer):
    STATE = SparseLayer.STATE | {"_v", "_chosen"}

    def _begin(self, layer, sparsity, v, mask, activation, decay, prune: bool) -> None:
        self._suits(layer)
        rows = layer.weight.shape[0]
        if v < 1 or rows % v:
            raise ValueError(
                f"{type(self).__name__}: v = {v} does not divide the {rows} rows of the weight"
            )
        self._v = v
        self._build(layer, mask, activation, decay)
        positions = layer.weight.numel() // v
        if sparsity is not None:
            self._chosen = positions - num_pruned(positions, sparsity)
        if mask == "fixed" and prune:
            kept = ste.kept_magnitudes(layer.weight, self._chosen, v)
            self._store(self._typed(*taken(layer.weight, kept)), True)
        elif mask == "fixed":
            self._store(SparseRows.from_dense(layer.weight, v), layer.weight.requires_grad)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        v: int = 1,
        mask: str = "fixed",
        sparsity: float | None = None,
        activation: str = "none",
        decay: float = DECAY,
    ) -> Rows:
        """The layer with a sparse weight; copies, the dense layer stays as it is.

        Args:
            layer: torch's layer. mask "fixed": what is not zero in its weight is kept. Its hooks
                are not taken over.
            v: consecutive output rows that share their positions.
            sparsity: share that a moving mask prunes, 0..1; none for "fixed".
            mask, activation, decay: see `issp.nn`.

        Raises:
            TypeError, ValueError: the layer cannot become one; why.
        """
        if (sparsity is None) != (mask == "fixed"):
            raise ValueError(
                f'mask "{mask}" with sparsity {sparsity}: a moving mask needs one, a fixed one '
                "keeps what is not zero"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._begin(layer, sparsity, v, mask, activation, decay, prune=False)
        return self

    @property
    def v(self) -> int:
        return self._v

    def _entries(self) -> int:
        return self.columns.shape[0] if self.mask == "fixed" else self._chosen

    def _kept(self) -> Tensor:
        return ste.kept_magnitudes(self.weight, self._chosen, self._v)

    def _typed(self, values, columns, starts) -> SparseRows:
        p = SparseRows(values, columns, starts, self.shape)
        if p.v != self.v:
            raise ValueError(f"values have v = {p.v}, the layer has v = {self.v}")
        return p

    def _pattern(self) -> str:
        return f"sparsity={self.sparsity:.4f}, v={self.v}"


def _parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad)


def _padding(layer: nn.Conv2d, name: str) -> tuple[int, int]:
    """The padding in numbers; torch also takes "valid" and "same"."""
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding != "same":
        return layer.padding
    around = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(total % 2 for total in around):
        raise ValueError(
            f'{name}: padding "same" of the kernel {layer.kernel_size} is not the same on both '
            "sides: leave the layer dense"
        )
    return (around[0] // 2, around[1] // 2)
