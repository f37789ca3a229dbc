"""How long an iteration of a training takes, by trying some."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from typing import Any

import torch

from issp.sr import builders
from issp.sr.config import Config

_WARM_UP = 3  # iterations that are not timed


def seconds_per_iteration(
    config: Config,
    device: torch.device,
    batches: Iterable[dict[str, Any]] | None = None,
    probe: int = 12,
    enough: float = math.inf,
) -> float:
    """Seconds per iteration of a training, pruning included, from a few that are tried.

    Args:
        config: of the training.
        device: that trains.
        batches: an endless number of them; None: noise, which needs no images.
        probe: iterations to time, after some that warm up.
        enough: seconds after which nothing more is tried, once an iteration was timed.
    """
    model = builders.network(config, pretrained=False)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer, loss = builders.optimizer(config, model), builders.loss(config)
    pruner = builders.pruner(config, model, optimizer, None)
    times: list[float] = []
    begin = last = time.perf_counter()
    for batch in batches or _noise(config, model.channels):
        lq = batch["lq"].to(device).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        value = loss(model(lq), batch["gt"].to(device))
        if pruner is not None and pruner.method.has_loss:
            value = value + pruner.loss()
        value.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        times.append(now - last)
        last = now
        if len(times) == _WARM_UP + probe or (len(times) > 1 and now - begin > enough):
            break
    timed = times[min(_WARM_UP, len(times) - 1) :]
    return sum(timed) / len(timed)


def _noise(config: Config, channels: int) -> Iterable[dict[str, Any]]:
    entry = config.train_data
    size = (entry.batch_size_per_gpu, channels, entry.gt_size, entry.gt_size)
    gt = torch.rand(size, dtype=torch.float32, device="cpu")
    return itertools.repeat({"gt": gt, "lq": torch.nn.functional.avg_pool2d(gt, config.scale)})
