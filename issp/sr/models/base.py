"""Base of the networks: image range, mean, required padding and configuration."""

import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from issp.utils.text import suggest

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)

# Arguments that are classes, which JSON cannot hold.
_NOT_IN_CONFIG = ("norm_layer", "act_layer")

_MOST = 1_000_000  # of any number: layers, channels, pixels of a side, the image range

# Annotations of the networks' arguments.
Integers = Sequence[int]
Numbers = Sequence[float]
Sides = int | Sequence[int]


def unknown_argument(kind: str, arguments: Iterable[str], known: Sequence[str]) -> str | None:
    """The sentence that refuses the first argument which a network does not have, or None."""
    unknown = next((name for name in arguments if name not in known), None)
    return unknown and f"{kind} has no argument {unknown!r}: {suggest(unknown, known)}"


def wrong_value(kind: str, arguments: Mapping[str, object], init: Callable) -> str | None:
    """The sentence that refuses the first argument of another type than it is annotated with.

    In a file a value may be anything; torch would fail on it later, or compute nonsense.
    """
    annotations = inspect.get_annotations(init)
    for name, value in arguments.items():
        suits, wanted = _FORMS.get(annotations.get(name), (None, ""))
        if suits and not suits(value):
            return f"{kind}: {name} must be {wanted}, got {value!r}"
    return None


def _is_whole(value: object, least: int = 1) -> bool:
    is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_number and least <= value <= _MOST  # type: ignore[operator]


def _is_number(value: object) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and abs(value) <= _MOST  # type: ignore[arg-type]  # no NaN


def _all(value: object, suits: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(suits, value))


# Annotation -> what a value must fulfil, and that in words.
_FORMS: dict[object, tuple[Callable[[object], bool], str]] = {
    int: (_is_whole, f"a whole number from 1 to {_MOST}"),
    float: (_is_number, f"a number up to {_MOST}"),
    float | None: (lambda v: v is None or _is_number(v), f"a number up to {_MOST}"),
    bool: (lambda v: isinstance(v, bool), "true or false"),
    str: (lambda v: isinstance(v, str), "text"),
    str | None: (lambda v: v is None or isinstance(v, str), "text"),
    Integers: (lambda v: _all(v, lambda n: _is_whole(n, 0)), "a list of whole numbers"),
    Numbers: (lambda v: _all(v, _is_number), "a list of numbers"),
    Sides: (lambda v: _is_whole(v) or _all(v, _is_whole) and len(v) == 2, "one or two sides"),
}


def configured(init):
    """Decorator of a constructor: stores its arguments in `self.config`, names unknown keywords.

    `config` is a JSON-able dict in BasicSR's `network_g` form, `{"type": class, keyword: value}`.

    Raises:
        TypeError: a keyword is unknown; the nearest one is named.
    """
    signature = inspect.signature(init)
    known = [name for name in signature.parameters if name != "self"]

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        kind = type(self).__name__
        problem = unknown_argument(kind, kwargs, known)
        if problem:
            raise TypeError(problem)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        init(self, *args, **kwargs)
        arguments = {name: _jsonable(bound.arguments[name]) for name in known}
        for name in _NOT_IN_CONFIG:
            arguments.pop(name, None)
        self.config = {"type": kind, **arguments}

    return wrapper


def _jsonable(value):
    return [_jsonable(v) for v in value] if isinstance(value, (tuple, list)) else value


def check_image(x: Tensor, kind: str, channels: int, multiple: int) -> None:
    """Refuses what a network cannot super-resolve.

    Args:
        x: must be [N, channels, H, W], with H and W multiples of `multiple`.
        kind: the network's name.

    Raises:
        ValueError: it is not.
    """
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{kind} takes images [N, {channels}, H, W], got shape {tuple(x.shape)}")
    height, width = x.shape[-2:]
    if height % multiple or width % multiple:
        raise ValueError(
            f"{kind} needs height and width to be multiples of {multiple}, got "
            f"{height}x{width}: use issp.models.upscale, which pads and crops"
        )


# Traced as one operation: a traced image has no size yet.
fx.wrap("check_image")


class SuperResolver(nn.Module):
    """Base class: subtracts the mean and scales to the image range, then undoes both.

    Attributes:
        scale: output size over input size.
        config: JSON-able dict from which `issp.models.from_config` rebuilds the network.
        arch: the name passed to `issp.models.build`, or the class name.
        pad_multiple: divisor of height and width (`issp.models.upscale` pads to it).
        pad_mode: "reflect" (edge not repeated), "symmetric" (edge repeated) or None.
        receptive_radius: input pixels in each direction that a result depends on; None: more than
            neighbouring tiles of an image could share.
    """

    pad_multiple = 1
    pad_mode = None
    receptive_radius: int | None = None

    def __init__(self, channels: int, scale: int, img_range: float, mean):
        super().__init__()
        if not img_range > 0:
            raise ValueError(f"{type(self).__name__} needs an img_range above 0, got {img_range}")
        if len(mean) != channels:
            raise ValueError(
                f"{type(self).__name__} needs one mean per input channel: got {len(mean)} for "
                f"{channels} channels"
            )
        self.channels = channels
        self.scale = scale
        self.img_range = img_range
        self.mean = tuple(float(m) for m in mean)
        self.arch = type(self).__name__

    def forward(self, x: Tensor) -> Tensor:
        """Super-resolve a batch of images.

        Args:
            x: [N, C, H, W] float images in 0..1, H and W multiples of `pad_multiple`.

        Returns:
            [N, C, H * scale, W * scale], not clamped.

        Raises:
            ValueError: wrong number of dimensions, channels, or a size that needs padding.
        """
        check_image(x, type(self).__name__, self.channels, self.pad_multiple)
        # Filled on the device: a buffer would be an entry of the state_dict and would be lost by
        # to_empty(), and CUDA graphs refuse a copy from the host.
        planes = [x.new_full((1, 1, 1, 1), m) for m in self.mean]
        mean = torch.cat(planes, dim=1)
        y = self.restore((x - mean) * self.img_range)
        return y / self.img_range + mean

    @property
    def body_blocks(self) -> list[nn.Module]:
        """The repeated parts, from the input on: what `fully_shard` gathers one at a time."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does, on the CPU."""
        with torch.device("cpu"):
            fresh = type(self)(**{k: v for k, v in self.config.items() if k != "type"})
        for parameter, value in zip(self.parameters(), fresh.parameters(), strict=True):
            parameter.copy_(value)

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state_dict under the names of this class."""
        return state

    def restore(self, x: Tensor) -> Tensor:
        """The network between the subtraction of the mean and its addition."""
        raise NotImplementedError
