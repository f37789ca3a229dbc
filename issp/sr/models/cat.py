"""CAT: cross aggregation transformer (Chen et al. 2022), with the authors' parameter names."""

import math

import torch
from torch import Tensor, nn

from issp.sr.models import layers
from issp.sr.models.base import Integers, configured
from issp.sr.models.derived import DerivedBuffers
from issp.sr.models.layers import FULL, Size, conv3x3
from issp.sr.models.transformer import (
    ResidualGroup,
    WindowBlock,
    WindowTransformer,
    check_default_class,
    check_per_group,
    drop_path_rates,
)
from issp.utils.text import suggest

BLOCKS = ("CATB_regular", "CATB_axial")


class DynamicPositionBias(nn.Module):
    """Network of three layers of width dim / 4 that maps an offset (dy, dx) to a bias per head."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        width = dim // 4
        self.pos_proj = nn.Linear(2, width)
        self.pos1 = _norm_relu_linear(width, width)
        self.pos2 = _norm_relu_linear(width, width)
        self.pos3 = _norm_relu_linear(width, heads)

    def forward(self, offsets: Tensor) -> Tensor:
        """offsets [R, 2] -> bias table [R, heads]."""
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


def _norm_relu_linear(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), nn.ReLU(), nn.Linear(inputs, outputs))


class RectangleAttention(DerivedBuffers):
    """Attention in rectangular windows over half of the channels.

    Args:
        dim: channels of this half.
        window: (height, width); FULL stands for the image's own side.
        heads: number of heads of this half.
        scale: factor on q k^T, or None for head_dim ** -0.5.
        attn_drop: dropout on the attention weights.
    """

    def __init__(self, dim: int, window: Size, heads: int, scale: float | None, attn_drop: float):
        super().__init__()
        self.window = window
        self.heads = heads
        self.scale = scale or (dim // heads) ** -0.5
        self.attn_drop = attn_drop
        self.register_derived()
        self.pos = DynamicPositionBias(dim // 4, heads)

    def derive(self, device: str | None = "cpu") -> dict[str, Tensor]:
        if FULL in self.window:
            return {}
        return {
            "rpe_biases": layers.relative_offsets(self.window, device),
            "relative_position_index": layers.relative_position_index(self.window, device),
        }

    def forward(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within windows: qkv [B, H, W, 3, C], mask [nW, N, N] or None -> [B, H, W, C]."""
        b, height, width, _, c = qkv.shape
        window = layers.span(self.window, (height, width))
        windows = layers.partition(qkv.flatten(3), window)
        count, n = windows.shape[1:3]
        windows = windows.reshape(b, count, n, 3, self.heads, c // self.heads)
        q, k, v = windows.permute(3, 0, 1, 4, 2, 5).unbind(0)
        drop = self.attn_drop if self.training else 0.0
        bias = self._bias(window, qkv)
        out = layers.window_attention(q, k, v, bias, mask, self.scale, drop)
        return layers.merge(out, window, (height, width))

    def _bias(self, window: Size, like: Tensor) -> Tensor:
        if FULL in self.window:
            offsets = layers.relative_offsets(window, like.device)
            offsets = offsets.to(self.pos.pos_proj.weight.dtype)
            index = layers.relative_position_index(window, like.device)
        else:
            offsets, index = self.rpe_biases, self.relative_position_index
        return layers.position_bias(self.pos(offsets), index)


class CATBlock(WindowBlock):
    """Cross aggregation block: two kinds of rectangles on two halves, plus a depthwise conv of v.

    Args:
        dim: channels.
        resolution, windows, shifts: as in `WindowBlock`, a window and a shift for each half.
        heads: attention heads of both halves together.
        mlp_ratio, qkv_bias, qk_scale, drop, attn_drop, drop_path: as in `CAT`.
    """

    mask_names = ("attn_mask_0", "attn_mask_1")
    conv_radius = 1  # of the convolution of the values

    def __init__(
        self,
        dim: int,
        resolution: Size,
        heads: int,
        windows: tuple[Size, Size],
        shifts: tuple[Size, Size],
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ):
        super().__init__(resolution, windows, shifts)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm1 = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.attns = nn.ModuleList(
            RectangleAttention(dim // 2, window, heads // 2, qk_scale, attn_drop)
            for window in windows
        )
        self.drop_path = layers.DropPath(drop_path)
        self.mlp = layers.Mlp(dim, mlp_ratio, drop)
        self.norm2 = nn.LayerNorm(dim)
        self.get_v = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor, masks: list[Tensor] | None) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1))
        halves = qkv.chunk(2, dim=-1)
        out = [self._attend(i, half, masks[i] if masks else None) for i, half in enumerate(halves)]
        y = torch.cat(out, dim=-1) + layers.conv_tokens(self.get_v, qkv[..., 2, :])
        x = x + self.drop_path(self.proj(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, i: int, qkv: Tensor, mask: Tensor | None) -> Tensor:
        if not self.shifted:
            return self.attns[i](qkv, mask)
        vertical, horizontal = self.shifts[i]
        qkv = qkv.roll((-vertical, -horizontal), dims=(1, 2))
        return self.attns[i](qkv, mask).roll((vertical, horizontal), dims=(1, 2))


class CAT(WindowTransformer):
    """CAT, regular or axial (docs/method.md, section 5.3).

    Args:
        img_size: side for which the mask buffers are made; other sizes work too.
        embed_dim: channels of the body; even.
        depth, num_heads: blocks and attention heads (an even number) of each residual group.
        split_size_0, split_size_1: sides of the rectangles of each group. A regular block uses
            windows of split_size_0 x split_size_1 on one half of the channels and the transpose on
            the other; an axial one uses split_size_0 by the whole image and ignores split_size_1.
        act_layer, norm_layer: torch.nn.GELU and torch.nn.LayerNorm.
        use_chk: recompute blocks in the backward pass to save memory.
        upsampler: "pixelshuffle" or "" (restoration).
        block_name: "CATB_regular" or "CATB_axial".
        Others: as in `SwinIR`.

    Raises:
        ValueError: a value outside these, or lists of unequal length.
        TypeError: an unknown keyword.
    """

    pad_mode = "symmetric"

    @configured
    def __init__(
        self,
        img_size: int = 64,
        in_chans: int = 3,
        embed_dim: int = 180,
        depth: Integers = (2, 2, 2, 2),
        split_size_0: Integers = (0, 0, 0, 0),
        split_size_1: Integers = (0, 0, 0, 0),
        num_heads: Integers = (2, 2, 2, 2),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
        use_chk: bool = False,
        upscale: int = 2,
        img_range: float = 1.0,
        resi_connection: str = "1conv",
        upsampler: str | None = "",
        block_name: str = "CATB_axial",
    ):
        check_default_class("act_layer", act_layer, nn.GELU)
        check_default_class("norm_layer", norm_layer, nn.LayerNorm)
        if block_name not in BLOCKS:
            raise ValueError(f"unknown block_name {block_name!r}: {suggest(block_name, BLOCKS)}")
        check_per_group("CAT", depth=depth, split_size_0=split_size_0, num_heads=num_heads)
        if block_name == "CATB_axial":
            split_size_1 = [FULL] * len(depth)
        check_per_group("CAT", depth=depth, split_size_1=split_size_1)
        splits = list(zip(split_size_0, split_size_1, strict=True))
        _check_sizes(img_size, embed_dim, num_heads, splits, block_name)
        super().__init__(in_chans, upscale, img_range, upsampler)
        self.pad_multiple = math.lcm(*(side for sides in splits for side in sides if side))
        self.conv_first = conv3x3(in_chans, embed_dim)
        # The tokens' rearrangement is entry 0 in the published checkpoints.
        self.before_RG = nn.Sequential(nn.Identity(), nn.LayerNorm(embed_dim))

        def block(i: int, heads: int, sides: Size, drop_path: float) -> CATBlock:
            a, b = sides
            # A regular block's first half has a x b windows, an axial one's H x a.
            windows = ((a, b), (b, a)) if b else ((FULL, a), (a, FULL))
            shifts = tuple((h // 2 * (i % 2), w // 2 * (i % 2)) for h, w in windows)
            size = (img_size, img_size)
            options = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "qk_scale": qk_scale}
            options |= {"drop": drop_rate, "attn_drop": attn_drop_rate, "drop_path": drop_path}
            return CATBlock(embed_dim, size, heads, windows, shifts, **options)

        self.layers = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, depth)
        for heads, sides, group in zip(num_heads, splits, rates, strict=True):
            blocks = [block(i, heads, sides, rate) for i, rate in enumerate(group)]
            self.layers.append(ResidualGroup(blocks, embed_dim, resi_connection, use_chk))
        self._end_body(embed_dim, resi_connection, ["pixelshuffle", ""])

    def embed(self, tokens: Tensor) -> Tensor:
        return self.before_RG(tokens)


def _check_sizes(img_size, embed_dim, num_heads, splits: list[Size], block_name) -> None:
    axial = block_name == "CATB_axial"
    for a, b in splits:
        if a < 1 or (b < 1 and not axial):
            needed = "split_size_0" if axial else "split_size_0 and split_size_1"
            raise ValueError(f"{block_name} needs {needed} of at least 1, got {a} and {b}")
        if img_size % a or (b and img_size % b):
            raise ValueError(f"img_size {img_size} must be a multiple of split sizes {a} and {b}")
    for heads in num_heads:
        if heads < 1 or heads % 2 or embed_dim % heads:
            raise ValueError(
                f"num_heads must be even and divide embed_dim {embed_dim}, got {heads}"
            )
    if embed_dim < 32:
        raise ValueError(
            f"embed_dim must be at least 32, got {embed_dim}: the position bias network has "
            f"embed_dim / 32 channels"
        )
