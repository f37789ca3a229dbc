"""Base class of SwinIR and CAT: shallow conv, groups of window blocks, reconstruction."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from issp.sr.models import layers
from issp.sr.models.base import DIV2K_MEAN, SuperResolver
from issp.sr.models.derived import DerivedBuffers, is_close
from issp.sr.models.layers import Size, conv3x3
from issp.utils.text import suggest

# Channels between the last features and the image, fixed in both published networks.
NUM_FEAT = 64


class WindowBlock(DerivedBuffers):
    """A transformer block over windows, which may be shifted; it begins with the mask buffers.

    `forward` takes tokens [B, H, W, C] and, if the windows are shifted, the masks [nW, N, N].

    Args:
        resolution: (H, W) for which the mask buffers are made.
        windows, shifts: (vertical, horizontal) in pixels, for each mask; a shift of 0 is none.

    Attributes:
        mask_names: of the buffers, as in the published checkpoints.
        shifted: the windows are shifted, so the block needs masks.
    """

    mask_names: tuple[str, ...]
    conv_radius = 0  # of a convolution beside the windows

    def __init__(self, resolution: Size, windows: tuple[Size, ...], shifts: tuple[Size, ...]):
        super().__init__()
        self.resolution, self.windows, self.shifts = resolution, windows, shifts
        self.shifted = any(side > 0 for shift in shifts for side in shift)
        self.register_derived()

    def needed(self, first: int, last: int, axis: int) -> tuple[int, int]:
        """First and last position along an axis that positions `first` to `last` depend on."""
        firsts, lasts = [first - self.conv_radius], [last + self.conv_radius]
        for window, shift in zip(self.windows, self.shifts, strict=True):
            side, offset = window[axis], shift[axis]
            firsts.append((first - offset) // side * side + offset)
            lasts.append((last - offset) // side * side + offset + side - 1)
        return min(firsts), max(lasts)

    def make_masks(self, size: Size, device=None, dtype=None) -> list[Tensor]:
        """Masks for an image size."""
        return [self._mask(i, size, device, dtype) for i in range(len(self.windows))]

    def _mask(self, which: int, size: Size, device=None, dtype=None) -> Tensor:
        window = layers.span(self.windows[which], size)
        return layers.shift_mask(size, window, self.shifts[which], device, dtype)

    def derive(self, device: str | None = "cpu") -> dict[str, Tensor]:
        """The masks of `resolution`; windows that are not shifted need none."""
        if not self.shifted:
            return {}
        return dict(zip(self.mask_names, self.make_masks(self.resolution, device), strict=True))

    def agrees(self, name: str, saved: Tensor, derived: Tensor) -> bool:
        """Whether a saved mask is that of the windows and shifts here, for any image size."""
        if is_close(saved, derived):
            return True
        which = self.mask_names.index(name)
        sizes = layers.sizes_of_masks(tuple(saved.shape), self.windows[which])
        return any(is_close(saved, self._mask(which, size, "cpu")) for size in sizes)


class ResidualGroup(nn.Module):
    """Window blocks, then a convolution, added to the input.

    Args:
        blocks: all shifted ones have the same windows.
        dim, resi_connection: see `layers.residual_conv`.
        use_checkpoint: recompute blocks in the backward pass to save memory.
        nested: the names of the blocks have the extra level of SwinIR's published checkpoints.
    """

    def __init__(
        self,
        blocks: list[WindowBlock],
        dim: int,
        resi_connection: str,
        use_checkpoint: bool,
        nested: bool = False,
    ):
        super().__init__()
        if nested:
            self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        else:
            self.blocks = nn.ModuleList(blocks)
        self.conv = layers.residual_conv(dim, resi_connection)
        self.use_checkpoint, self.nested = use_checkpoint, nested

    @property
    def window_blocks(self) -> nn.ModuleList:
        """The blocks in their order."""
        return self.residual_group["blocks"] if self.nested else self.blocks

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, H, W, C] to tokens.

        The masks of a size other than `resolution` are made once per group and call. They are not
        cached: making them takes about 1 % of the blocks' time, and a cache would need as much
        memory as the images.
        """
        size = (x.shape[1], x.shape[2])
        y, made = x, None
        for block in self.window_blocks:
            masks = None
            if block.shifted and size == block.resolution:
                masks = [getattr(block, name) for name in block.mask_names]
            elif block.shifted:
                masks = made = made or block.make_masks(size, x.device, x.dtype)
            if self.use_checkpoint and torch.is_grad_enabled():
                y = checkpoint(block, y, masks, use_reentrant=False)
            else:
                y = block(y, masks)
        return x + layers.conv_tokens(self.conv, y)


class WindowTransformer(SuperResolver):
    """Shallow conv -> groups of window blocks -> residual conv -> one of four reconstructions.

    A subclass makes `conv_first`, its embedding norm, `layers` and `norm`, in the order in which
    the published checkpoints name them, then calls `_end_body`.
    """

    def __init__(self, in_chans: int, upscale: int, img_range: float, upsampler: str | None):
        mean = DIV2K_MEAN if in_chans == 3 else (0.0,) * in_chans
        super().__init__(in_chans, upscale if upsampler else 1, img_range, mean)
        self.upsampler = upsampler or ""

    @property
    def body_blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def _end_body(self, embed_dim: int, resi_connection: str, upsamplers: list[str]) -> None:
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = layers.residual_conv(embed_dim, resi_connection)
        self._add_reconstruction(embed_dim, upsamplers)
        self.apply(layers.init_linear_and_norm)

    def _add_reconstruction(self, embed_dim: int, kinds: list[str]) -> None:
        kind, scale, channels = self.upsampler, self.scale, self.channels
        if kind not in kinds:
            raise ValueError(f"unknown upsampler {kind!r}: {suggest(kind, kinds)}")
        if kind == "pixelshuffledirect":
            conv = conv3x3(embed_dim, scale**2 * channels)
            self.upsample = nn.Sequential(conv, layers.PixelShuffle(scale))
            return
        if kind == "":
            self.conv_last = conv3x3(embed_dim, channels)
            return
        self.conv_before_upsample = nn.Sequential(
            conv3x3(embed_dim, NUM_FEAT), nn.LeakyReLU(inplace=True)
        )
        if kind == "pixelshuffle":
            self.upsample = layers.Upsample(scale, NUM_FEAT)
        else:
            if scale not in (2, 4):
                raise ValueError(
                    f"upsampler 'nearest+conv' exists for upscale 2 and 4, not {scale}"
                )
            self.conv_up1 = conv3x3(NUM_FEAT, NUM_FEAT)
            if scale == 4:
                self.conv_up2 = conv3x3(NUM_FEAT, NUM_FEAT)
            self.conv_hr = conv3x3(NUM_FEAT, NUM_FEAT)
        self.conv_last = conv3x3(NUM_FEAT, channels)

    @property
    def receptive_radius(self) -> int | None:
        # None: a window is as high or as wide as the image.
        if any(layers.FULL in window for b in self._blocks() for window in b.windows):
            return None
        # What a position depends on repeats along the image with the windows.
        places = [(axis, p) for axis in (0, 1) for p in range(self.pad_multiple)]
        return max(self._reach(axis, position) for axis, position in places)

    def _blocks(self) -> list[WindowBlock]:
        return [block for group in self.layers for block in group.window_blocks]

    def _reach(self, axis: int, position: int) -> int:
        """Input pixels to each side of a position along an axis that its result depends on."""
        after = self._reconstruction_radius() + _radius(self.conv_after_body)
        first, last = position - after, position + after
        for group in reversed(list(self.layers)):
            # The group's input is added to its result, and lies within.
            first, last = first - _radius(group.conv), last + _radius(group.conv)
            for block in reversed(group.window_blocks):
                first, last = block.needed(first, last, axis)
        return max(position - first, last - position) + _radius(self.conv_first)

    def _reconstruction_radius(self) -> int:
        """Input pixels around a position of the features that its results depend on."""
        if self.upsampler in ("", "pixelshuffledirect"):
            return 1
        if self.upsampler == "pixelshuffle":
            return 1 + self.upsample.receptive_radius
        resolutions = (2, 4, 4, 4) if self.scale == 4 else (2, 2, 2)
        return 1 + math.ceil(sum(1 / resolution for resolution in resolutions))

    def embed(self, tokens: Tensor) -> Tensor:
        """What is done to the tokens [B, H, W, C] before the first group."""
        raise NotImplementedError

    def restore(self, x: Tensor) -> Tensor:
        shallow = self.conv_first(x)
        tokens = self.embed(shallow.permute(0, 2, 3, 1))
        for layer in self.layers:
            tokens = layer(tokens)
        deep = layers.conv_tokens(self.conv_after_body, self.norm(tokens)).permute(0, 3, 1, 2)
        return self._reconstruct(x, deep + shallow)

    def _reconstruct(self, x: Tensor, features: Tensor) -> Tensor:
        if self.upsampler == "":
            return x + self.conv_last(features)
        if self.upsampler == "pixelshuffledirect":
            return self.upsample(features)
        features = self.conv_before_upsample(features)
        if self.upsampler == "pixelshuffle":
            return self.conv_last(self.upsample(features))
        for conv in (self.conv_up1, self.conv_up2) if self.scale == 4 else (self.conv_up1,):
            features = F.interpolate(features, scale_factor=2, mode="nearest")
            features = F.leaky_relu(conv(features), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(features), 0.2))


def _radius(convs: nn.Module) -> int:
    """Pixels to each side that convolutions in turn see."""
    return sum(m.kernel_size[0] // 2 for m in convs.modules() if isinstance(m, nn.Conv2d))


def drop_path_rates(rate: float, depths) -> list[list[float]]:
    """Stochastic depth growing linearly from 0 to `rate` over all blocks, split by group."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate is {rate}: it must be at least 0 and below 1")
    rates = torch.linspace(0, rate, sum(depths), dtype=torch.float32, device="cpu").tolist()
    return [rates[sum(depths[:i]) : sum(depths[: i + 1])] for i in range(len(depths))]


def check_per_group(kind: str, **lists) -> None:
    """Refuses lists of unequal length: each must have one entry per group."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise ValueError(f"{kind} needs one entry per group in each list: {counts}")


def check_default_class(name: str, layer_class: type, default: type) -> None:
    """Refuses a layer class that a saved configuration could not name."""
    if layer_class is not default:
        raise ValueError(
            f"{name} must be torch.nn.{default.__name__}: a model with another class could not be "
            f"rebuilt from its saved configuration"
        )
