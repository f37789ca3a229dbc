"""SwinIR: shifted-window transformer (Liang et al. 2021), with BasicSR's parameter names."""

import torch
from torch import Tensor, nn

from issp.sr.models import layers
from issp.sr.models.base import Integers, Sides, configured
from issp.sr.models.derived import DerivedBuffers
from issp.sr.models.layers import Size, conv3x3
from issp.sr.models.transformer import (
    ResidualGroup,
    WindowBlock,
    WindowTransformer,
    check_default_class,
    check_per_group,
    drop_path_rates,
)


class WindowAttention(DerivedBuffers):
    """Multi-head attention in square windows with a learned relative position bias.

    Args:
        dim, heads: channels; number of heads, which divides them.
        window: side of the window.
        qkv_bias, scale: as qkv_bias and qk_scale of `SwinIR`.
        attn_drop, proj_drop: dropout on the attention weights and on the output.
    """

    def __init__(self, dim, window, heads, qkv_bias, scale, attn_drop, proj_drop):
        super().__init__()
        self.window = (window, window)
        self.heads = heads
        self.scale = scale or (dim // heads) ** -0.5
        self.attn_drop = attn_drop
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_derived()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def derive(self, device: str | None = "cpu") -> dict[str, Tensor]:
        return {"relative_position_index": layers.relative_position_index(self.window, device)}

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within windows: x [B, nW, N, C], mask [nW, N, N] or None -> [B, nW, N, C]."""
        b, windows, n, c = x.shape
        qkv = self.qkv(x).reshape(b, windows, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        bias = layers.position_bias(self.relative_position_bias_table, self.relative_position_index)
        drop = self.attn_drop if self.training else 0.0
        out = layers.window_attention(q, k, v, bias, mask, self.scale, drop)
        return self.proj_drop(self.proj(out))


class SwinBlock(WindowBlock):
    """norm - (shifted) window attention - residual; norm - MLP - residual."""

    mask_names = ("attn_mask",)

    def __init__(self, dim, resolution: Size, attn: WindowAttention, mlp, drop_path, window, shift):
        super().__init__(resolution, ((window, window),), ((shift, shift),))
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.drop_path = layers.DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp

    def forward(self, x: Tensor, masks: list[Tensor] | None) -> Tensor:
        (window,), ((shift, _),) = self.windows, self.shifts
        y = self.norm1(x)
        if self.shifted:
            y = y.roll((-shift, -shift), dims=(1, 2))
        y = self.attn(layers.partition(y, window), masks[0] if masks else None)
        y = layers.merge(y, window, (x.shape[1], x.shape[2]))
        if self.shifted:
            y = y.roll((shift, shift), dims=(1, 2))
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinIR(WindowTransformer):
    """SwinIR (docs/method.md, section 5.1).

    Args:
        img_size: side, or (height, width), for which the mask buffers are made; any other size that
            is a multiple of the window works too.
        patch_size: 1; the network is not defined for other values.
        in_chans: image channels.
        embed_dim: channels of the body.
        depths, num_heads: blocks and attention heads of each residual group.
        window_size: side of the attention windows.
        mlp_ratio: hidden channels of the MLP over embed_dim.
        qkv_bias, qk_scale: bias of the qkv projections; factor on q k^T (None: head_dim ** -0.5).
        drop_rate, attn_drop_rate, drop_path_rate: dropout, attention dropout, stochastic depth.
        norm_layer: torch.nn.LayerNorm.
        ape: add a learned absolute position embedding (ties the network to img_size).
        patch_norm: normalise the tokens before the first group.
        use_checkpoint: recompute blocks in the backward pass to save memory.
        upscale: output over input size; ignored (1) when upsampler is "".
        img_range: the images in 0..1 are multiplied by it inside.
        upsampler: "pixelshuffle", "pixelshuffledirect", "nearest+conv" or "" (restoration).
        resi_connection: "1conv" or "3conv".

    Raises:
        ValueError: a value outside these, or lists of unequal length.
        TypeError: an unknown keyword.
    """

    pad_mode = "reflect"

    @configured
    def __init__(
        self,
        img_size: Sides = 64,
        patch_size: int = 1,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Integers = (6, 6, 6, 6),
        num_heads: Integers = (6, 6, 6, 6),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer=nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        upscale: int = 2,
        img_range: float = 1.0,
        upsampler: str | None = "",
        resi_connection: str = "1conv",
    ):
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_default_class("norm_layer", norm_layer, nn.LayerNorm)
        check_per_group("SwinIR", depths=depths, num_heads=num_heads)
        # A window as large as the image needs no shift.
        window = min(window_size, *size)
        shift = window // 2 if min(size) > window_size else 0
        _check_sizes(size, patch_size, window, embed_dim, num_heads)

        super().__init__(in_chans, upscale, img_range, upsampler)
        self.pad_multiple = window
        self.img_size = size
        self.conv_first = conv3x3(in_chans, embed_dim)
        norm = {"norm": nn.LayerNorm(embed_dim)} if patch_norm else {}
        self.patch_embed = nn.ModuleDict(norm)
        if ape:
            tokens = torch.zeros(1, size[0] * size[1], embed_dim)
            self.absolute_pos_embed = nn.Parameter(nn.init.trunc_normal_(tokens, std=0.02))
        else:
            self.absolute_pos_embed = None
        self.pos_drop = nn.Dropout(drop_rate)

        def block(i: int, heads: int, drop_path: float) -> SwinBlock:
            rates = {"attn_drop": attn_drop_rate, "proj_drop": drop_rate}
            attn = WindowAttention(embed_dim, window, heads, qkv_bias, qk_scale, **rates)
            mlp = layers.Mlp(embed_dim, mlp_ratio, drop_rate)
            sides = {"window": window, "shift": shift if i % 2 else 0}
            return SwinBlock(embed_dim, size, attn, mlp, drop_path, **sides)

        self.layers = nn.ModuleList()
        for heads, rates in zip(num_heads, drop_path_rates(drop_path_rate, depths), strict=True):
            blocks = [block(i, heads, rate) for i, rate in enumerate(rates)]
            self.layers.append(
                ResidualGroup(blocks, embed_dim, resi_connection, use_checkpoint, nested=True)
            )
        upsamplers = ["pixelshuffle", "pixelshuffledirect", "nearest+conv", ""]
        self._end_body(embed_dim, resi_connection, upsamplers)

    def embed(self, tokens: Tensor) -> Tensor:
        if "norm" in self.patch_embed:
            tokens = self.patch_embed["norm"](tokens)
        if self.absolute_pos_embed is not None:
            if tuple(tokens.shape[1:3]) != self.img_size:
                raise ValueError(
                    f"SwinIR with ape=True works at its img_size {self.img_size} only, got "
                    f"{tuple(tokens.shape[1:3])}"
                )
            tokens = tokens + self.absolute_pos_embed.reshape(1, *self.img_size, -1)
        return self.pos_drop(tokens)


def _check_sizes(size, patch_size, window, embed_dim, num_heads) -> None:
    if patch_size != 1:
        raise ValueError(f"SwinIR is defined for patch_size 1 only, got {patch_size}")
    if size[0] % window or size[1] % window:
        raise ValueError(f"img_size {size} must be a multiple of window_size {window}")
    for heads in num_heads:
        if heads < 1 or embed_dim % heads:
            raise ValueError(f"embed_dim {embed_dim} must be divisible by num_heads {heads}")
