"""EDSR: residual convolutional network (Lim et al. 2017), with BasicSR's parameter names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from issp.sr.models.base import DIV2K_MEAN, Numbers, SuperResolver, configured
from issp.sr.models.layers import Upsample, conv3x3


class ResidualBlock(nn.Module):
    """conv - ReLU - conv without normalisation, scaled and added to its input."""

    def __init__(self, num_feat: int, res_scale: float):
        super().__init__()
        self.res_scale = res_scale
        self.conv1 = conv3x3(num_feat, num_feat)
        self.conv2 = conv3x3(num_feat, num_feat)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(F.relu(self.conv1(x), inplace=True))
        # A factor of 1 would be one more pass over memory, some 8 % of a packed network's time.
        return x + (branch if self.res_scale == 1 else branch * self.res_scale)


class EDSR(SuperResolver):
    """EDSR with PyTorch's default initialisation (docs/method.md, section 5.2).

    Args:
        num_in_ch, num_out_ch: image channels; must be equal.
        num_feat: channels of the body.
        num_block: residual blocks.
        upscale: a power of two, or 3.
        res_scale: factor on each residual branch.
        img_range: the images in 0..1 are multiplied by it inside.
        rgb_mean: mean subtracted from the images, one value per channel, in 0..1.

    Raises:
        ValueError: unequal channels, a wrong number of means, an unsupported scale.
        TypeError: an unknown keyword.
    """

    @configured
    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_block: int = 16,
        upscale: int = 4,
        res_scale: float = 1,
        img_range: float = 255.0,
        rgb_mean: Numbers = DIV2K_MEAN,
    ):
        if num_in_ch != num_out_ch:
            raise ValueError(
                f"EDSR adds the input's mean to its output, so num_out_ch must equal num_in_ch: "
                f"got {num_in_ch} and {num_out_ch}"
            )
        super().__init__(num_in_ch, upscale, img_range, rgb_mean)
        self.conv_first = conv3x3(num_in_ch, num_feat)
        self.body = nn.Sequential(*(ResidualBlock(num_feat, res_scale) for _ in range(num_block)))
        self.conv_after_body = conv3x3(num_feat, num_feat)
        self.upsample = Upsample(upscale, num_feat)
        self.conv_last = conv3x3(num_feat, num_out_ch)

    @property
    def receptive_radius(self) -> int:
        return 2 + 2 * len(self.body) + self.upsample.receptive_radius

    @property
    def body_blocks(self) -> list[nn.Module]:
        return list(self.body)

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state_dict of the EDSR authors' PyTorch code under the names here, others unchanged.

        Its convolutions that subtract and add the mean are dropped if they do what is done here.
        """
        if "head.0.weight" not in state:
            return state
        last = len(self.body)
        names = {"head.0": "conv_first", f"body.{last}": "conv_after_body", "tail.1": "conv_last"}
        for i in range(last):
            names |= {f"body.{i}.body.0": f"body.{i}.conv1", f"body.{i}.body.2": f"body.{i}.conv2"}
        names |= {f"tail.0.{i}": f"upsample.{i}" for i in range(len(self.upsample))}
        own = {}
        for name, value in state.items():
            layer, _, kind = name.rpartition(".")
            if not self._is_mean_shift(layer, kind, value):
                own[f"{names.get(layer, layer)}.{kind}"] = value
        return own

    def _is_mean_shift(self, layer: str, kind: str, value: Tensor) -> bool:
        sign = {"sub_mean": -1.0, "add_mean": 1.0}.get(layer)
        if sign is None:
            return False
        device = value.device
        if kind == "weight":
            expected = torch.eye(self.channels, dtype=torch.float32, device=device)[..., None, None]
        else:
            mean = torch.tensor(self.mean, dtype=torch.float32, device=device)
            expected = sign * self.img_range * mean
        same_shape = value.shape == expected.shape
        return same_shape and torch.allclose(value.float(), expected, rtol=1e-3, atol=1e-3)

    def restore(self, x: Tensor) -> Tensor:
        x = self.conv_first(x)
        x = x + self.conv_after_body(self.body(x))
        return self.conv_last(self.upsample(x))
