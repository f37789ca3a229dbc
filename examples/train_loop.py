"""A plain torch training loop for a network that is sparse from the first iteration.

`python examples/train_loop.py --steps 600` trains edsr-tiny x2 on the photographs inside
scikit-image, prunes for the first half, fine-tunes for the second, and writes model.safetensors.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import issp

SCALE, CROP, BATCH = 2, 32, 4


def random_batch(photographs: list[np.ndarray], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Low-resolution and original crops: [B, 3, CROP / SCALE, ...] and [B, 3, CROP, CROP]."""
    crops = []
    for index in rng.integers(len(photographs), size=BATCH):
        top, left = (rng.integers(side - CROP + 1) for side in photographs[index].shape[:2])
        crops.append(photographs[index][top : top + CROP, left : left + CROP])
    small = [issp.data.imresize(crop, 1 / SCALE) for crop in crops]
    lq, gt = ([issp.data.to_tensor(image) for image in images] for images in (small, crops))
    return torch.stack(lq), torch.stack(gt)


def main(argv: Sequence[str] | None = None) -> tuple[nn.Module, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--out", default="model.safetensors")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    photographs = list(issp.data.sample_photographs("train").values())
    model: nn.Module = issp.models.build("edsr-tiny", scale=SCALE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pruner = issp.attach(model, optimizer, sparsity=args.sparsity, shrink=0.95)
    losses: list[float] = []
    for step in range(1, args.steps + 1):
        lq, gt = random_batch(photographs, rng)
        loss = F.l1_loss(model(lq), gt)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()  # the pruner shrinks here
        if step == args.steps // 2:
            pruner.freeze()  # from here on weights and moments are masked
        if step % max(1, args.steps // 10) == 0:
            print(f"step {step}: loss {losses[-1]:.4f}, flips {sum(pruner.flips().values())}")
    model = pruner.finalize()  # hard zeros, hooks removed
    print(pruner.summary())
    issp.save(model, args.out)
    return model, losses


if __name__ == "__main__":
    main()
