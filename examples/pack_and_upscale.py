"""Upscale a photograph with a packed model: every layer in its fastest form on this machine.

`python examples/pack_and_upscale.py --model model.safetensors --out cat.png` uses a model that
`issp.save` wrote, such as that of train_loop.py; without --model a pruned random one is timed.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import issp


def pruned_random_model() -> nn.Module:
    """edsr-baseline x2 with 95 % zeros; it has learned nothing, but its speed is real."""
    torch.manual_seed(0)
    model = issp.models.build("edsr-baseline", scale=2)
    return issp.attach(model, sparsity=0.95).finalize()


def main(argv: Sequence[str] | None = None) -> tuple[nn.Module, np.ndarray]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="file written by issp.save")
    parser.add_argument("--image", help="photograph (default: a cat from scikit-image)")
    parser.add_argument("--size", type=int, default=48, help="side of the part that is upscaled")
    parser.add_argument("--out", default="upscaled.png")
    args = parser.parse_args(argv)

    model = issp.load(args.model) if args.model else pruned_random_model().eval()
    if args.image:
        image = issp.data.read_image(args.image)
    else:
        image = issp.data.sample_photographs("test")["chelsea"]
    x = issp.data.to_tensor(image[: args.size, : args.size])[None]

    packed: Any = issp.pack(model, example=x)  # measures once per machine and shape, then remembers
    print(packed.report())
    upscaled = issp.data.to_image(issp.models.upscale(packed, x))
    issp.data.write_image(args.out, upscaled)
    print(f"{args.out}: {upscaled.shape[1]} x {upscaled.shape[0]} pixels")
    return packed, upscaled


if __name__ == "__main__":
    main()
