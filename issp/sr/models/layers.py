"""Parts shared by EDSR, SwinIR and CAT.

Tokens are kept as images [B, H, W, C] throughout; windows are [B, nW, N, C] with N = h * w tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from issp.nn.pixel_shuffle import PixelShuffle
from issp.utils.text import suggest

Size = tuple[int, int]
FULL = 0  # a side of a window that spans the whole image (CAT's axial blocks)


class Upsample(nn.Sequential):
    """Sub-pixel upsampling: one conv and PixelShuffle(2) per factor of two, or one step of three.

    Args:
        scale: a power of two, or 3.
        num_feat: channels in and out.

    Raises:
        ValueError: any other scale.
    """

    def __init__(self, scale: int, num_feat: int):
        if scale == 3:
            factors = [3]
        elif scale >= 1 and scale & (scale - 1) == 0:
            factors = [2] * (scale.bit_length() - 1)
        else:
            raise ValueError(f"upscale must be a power of two or 3, got {scale}")
        steps = []
        for factor in factors:
            steps += [conv3x3(num_feat, factor**2 * num_feat), PixelShuffle(factor)]
        super().__init__(*steps)

    @property
    def receptive_radius(self) -> int:
        """Input pixels to each side that a 3x3 convolution of the result depends on."""
        # One pixel for each 3x3 convolution, at the resolution that it works at.
        radius, resolution = 0.0, 1
        for shuffle in list(self)[1::2]:
            radius += 1 / resolution
            resolution *= shuffle.upscale_factor
        return math.ceil(radius + 1 / resolution)


class Mlp(nn.Module):
    """Two linear layers with GELU between, over the last dimension.

    Args:
        dim: channels in and out.
        ratio: hidden channels over `dim`.
        drop: probability of dropout.
    """

    def __init__(self, dim: int, ratio: float, drop: float):
        super().__init__()
        hidden = int(dim * ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio is {ratio}: of {dim} channels it leaves none")
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the whole branch for a random part of the batch.

    Args:
        rate: probability of dropping, in [0, 1); kept samples are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = 1.0 - self.rate
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(kept)
        return x * (keep / kept)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """3x3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, 1, 1)


def residual_conv(dim: int, kind: str) -> nn.Module:
    """The convolution at the end of a residual group.

    Args:
        dim: channels in and out.
        kind: "1conv", or "3conv" (a bottleneck of dim / 4, which saves parameters).

    Raises:
        ValueError: any other kind.
    """
    if kind == "1conv":
        return conv3x3(dim, dim)
    if kind == "3conv":
        narrow = dim // 4
        return nn.Sequential(
            conv3x3(dim, narrow),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(narrow, narrow, 1),
            nn.LeakyReLU(0.2, inplace=True),
            conv3x3(narrow, dim),
        )
    raise ValueError(f"unknown resi_connection {kind!r}: {suggest(kind, ['1conv', '3conv'])}")


def conv_tokens(conv: nn.Module, tokens: Tensor) -> Tensor:
    """Apply a convolution to tokens [B, H, W, C]."""
    return conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def init_linear_and_norm(module: nn.Module) -> None:
    """Initialise as the Swin family: Linear trunc_normal(0.02), bias 0; convs stay PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def span(window: Size, size: Size) -> Size:
    """The window with FULL sides replaced by the image's."""
    return (window[0] or size[0], window[1] or size[1])


def partition(x: Tensor, window: Size) -> Tensor:
    """Cut an image [B, H, W, C] into windows [B, nW, N, C]."""
    b, height, width, c = x.shape
    h, w = window
    rows, columns = height // h, width // w
    x = x.reshape(b, rows, h, columns, w, c)
    return x.transpose(2, 3).reshape(b, rows * columns, h * w, c)


def merge(windows: Tensor, window: Size, size: Size) -> Tensor:
    """Put windows [B, nW, N, C] back into an image [B, H, W, C]."""
    b, c = windows.shape[0], windows.shape[-1]
    (h, w), (height, width) = window, size
    x = windows.reshape(b, height // h, width // w, h, w, c)
    return x.transpose(2, 3).reshape(b, height, width, c)


def shift_mask(size: Size, window: Size, shift: Size, device=None, dtype=None) -> Tensor:
    """Attention mask of cyclically shifted windows.

    After a roll by -shift the last window of each axis holds pixels of both borders of the image,
    which must not attend to each other.

    Args:
        size: image height and width.
        window, shift: (vertical, horizontal) in pixels.

    Returns:
        [nW, N, N], 0 where attention is allowed and -100 elsewhere.
    """
    rows = torch.arange(size[0], device=device) >= size[0] - shift[0]
    cols = torch.arange(size[1], device=device) >= size[1] - shift[1]
    region = 2 * rows[:, None].int() + cols[None, :].int()
    region = partition(region[None, :, :, None], window)[0, :, :, 0]
    mask = torch.zeros(*region.shape, region.shape[-1], device=device, dtype=dtype)
    return mask.masked_fill_(region[:, :, None] != region[:, None, :], -100.0)


def sizes_of_masks(shape: tuple[int, ...], window: Size) -> list[Size]:
    """The image sizes (height, width) whose masks have a shape [nW, N, N].

    Args:
        shape: of the masks.
        window: as in `span`; with a FULL side the image is square.
    """
    if len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
        return []
    count, tokens, _ = shape
    if FULL in window:
        side = math.isqrt(count * tokens)
        sizes = [(side, side)]
    else:
        rows = [n for n in range(1, math.isqrt(count) + 1) if count % n == 0]
        rows += [count // n for n in rows]
        sizes = [(n * window[0], count // n * window[1]) for n in sorted(set(rows))]
    return [size for size in sizes if math.prod(span(window, size)) == tokens]


def relative_offsets(window: Size, device=None) -> Tensor:
    """All offsets inside a window, [(2h - 1) * (2w - 1), 2] float, in the bias table's order."""
    h, w = window
    rows = torch.arange(1 - h, h, device=device)
    cols = torch.arange(1 - w, w, device=device)
    return torch.cartesian_prod(rows, cols).float()


def relative_position_index(window: Size, device=None) -> Tensor:
    """Row of the bias table for every pair of tokens of a window, [N, N] int64."""
    h, w = window
    rows = torch.arange(h, device=device)
    cols = torch.arange(w, device=device)
    dy = (rows[:, None] - rows[None, :] + h - 1).reshape(h, 1, h, 1)
    dx = (cols[:, None] - cols[None, :] + w - 1).reshape(1, w, 1, w)
    return (dy * (2 * w - 1) + dx).reshape(h * w, h * w)


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """Look up the bias of every pair of tokens: table [R, heads], index [N, N] -> [heads, N, N]."""
    n = index.shape[0]
    return table[index.reshape(-1)].reshape(n, n, -1).permute(2, 0, 1)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    scale: float,
    drop: float = 0.0,
) -> Tensor:
    """Multi-head attention inside each window.

    Args:
        q, k, v: [B, nW, heads, N, d].
        bias: [heads, N, N] position bias.
        mask: [nW, N, N] added to the scores, or None.
        scale: factor on q k^T.
        drop: dropout probability on the attention weights (0 outside training).

    Returns:
        [B, nW, N, heads * d].
    """
    b, windows, heads, n, d = q.shape
    if mask is not None:
        bias = bias + mask[:, None]
    if torch.is_grad_enabled():
        # scaled_dot_product_attention has no fused kernel for a bias that needs a gradient, and
        # torch's fall-back is slower than these three operations.
        scores = (q * scale) @ k.transpose(-2, -1) + bias
        out = F.dropout(scores.softmax(dim=-1), drop) @ v
    else:
        # The fused kernel takes four dimensions: windows join the batch if they share one bias, and
        # the heads if each window has its own.
        first = 0 if mask is None or b == 1 else 1
        bias = bias.reshape(-1, n, n)[None] if first else bias.reshape(-1, heads, n, n)
        q, k, v = (t.flatten(first, first + 1) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.to(q.dtype), dropout_p=drop, scale=scale
        )
    return out.reshape(b, windows, heads, n, d).transpose(2, 3).reshape(b, windows, n, heads * d)
