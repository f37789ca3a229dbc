"""From a configuration to its parts: network, data, optimizer, pruner, learning rate."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from issp import optim
from issp.sr import checkpoint, data, models
from issp.sr.config_keys import Config, EvalData, Keep, Scheduler, TrainData
from issp.utils.text import suggest

ARCHITECTURES = ("EDSR", "SwinIR", "CAT")
Pairs = data.PairedFolder | data.PairedArrays


def device(name: str) -> torch.device:
    """The device called "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:1") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: use auto, cpu or cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not here: torch sees {torch.cuda.device_count()} GPUs"
        )
    return chosen


def network(config: Config) -> nn.Module:
    """The network of `network_g`, on the CPU, with its pretrained weights if a path is given.

    `network_g.type` is a class (SwinIR, EDSR, CAT) or a name of `issp.models.names()`.
    """
    arguments = dict(config.network_g)
    kind = arguments["type"]
    if kind in models.names():
        arguments.pop("type")
        arguments.pop("upscale", None)
        model = models.build(kind, config.scale, **arguments)
    elif kind not in ARCHITECTURES:
        known = (*models.names(), *ARCHITECTURES)
        raise ValueError(f"unknown network {kind!r}: {suggest(kind, known)}")
    else:
        arguments.setdefault("upscale", config.scale)
        model = models.from_config(arguments)
    if model.scale != config.scale:
        raise ValueError(
            f"network_g.upscale is {model.scale} but scale is {config.scale}: make them equal"
        )
    path = config.path.pretrain_network_g
    if path:
        key = None if str(path).endswith(".safetensors") else config.path.param_key_g
        tensors, _ = checkpoint.read_tensors(path, key)
        checkpoint.load_weights(model, tensors, path, config.path.strict_load_g)
    return model


def pairs(entry: TrainData | EvalData, scale: int) -> Pairs:
    """The images of a `datasets` entry."""
    if entry.type == "SamplePhotographs":
        split = "train" if isinstance(entry, TrainData) else "test"
        return data.PairedArrays(data.sample_photographs(split), scale)
    return data.PairedFolder(entry.dataroot_gt, scale, entry.dataroot_lq, entry.filename_tmpl)


def loader(config: Config, pin_memory: bool) -> data.TrainLoader:
    """Training batches."""
    entry = config.train_data
    dataset = data.TrainDataset(
        pairs(entry, config.scale),
        entry.gt_size,
        hflip=entry.use_hflip,
        rot=entry.use_rot,
        seed=config.manual_seed,
        small=entry.small,
    )
    return data.TrainLoader(
        dataset,
        entry.batch_size_per_gpu,
        enlarge_ratio=entry.dataset_enlarge_ratio,
        num_workers=entry.num_worker_per_gpu,
        pin_memory=pin_memory,
    )


def validation_sets(config: Config) -> dict[str, data.EvalDataset]:
    """Name to images of every `datasets.val*`."""
    return {e.name: data.EvalDataset(pairs(e, config.scale), True) for e in config.val_data}


def optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """`train.optim_g` over all parameters that learn; it prunes within its step.

    Without a pruner, and for what the fused op does not take, it steps as torch's fused optimizers.
    """
    options = config.train.optim_g
    parameters = [p for p in model.parameters() if p.requires_grad]
    common: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.type == "SGD":
        return optim.SGD(parameters, momentum=options.betas[0], **common)
    kind = {"Adam": optim.Adam, "AdamW": optim.AdamW}[options.type]
    return kind(parameters, betas=tuple(options.betas), eps=options.eps, **common)


def pruner(
    config: Config, model: nn.Module, opt: torch.optim.Optimizer, ema: nn.Module | None
) -> Any:
    """`issp.attach` with the `sparsity` section; None for dense training."""
    from issp.pruning.pruner import attach

    section = config.sparsity
    if section is None:
        return None
    overrides = {name: _target(value) for name, value in section.overrides.items()}
    if section.keep:
        # First, so that the user's own patterns win over it.
        overrides = {"*": _keep(section.keep)} | overrides
    return attach(
        model,
        opt,
        method=section.method,
        sparsity=section.ratio,
        shrink=section.shrink,
        exclude=section.exclude,
        overrides=overrides,
        freeze_at=section.freeze_iter,
        ema=ema,
    )


def _target(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return float(value)
    try:
        return _keep(Keep(**value))
    except TypeError:
        raise ValueError(
            f"sparsity.overrides: {value} must have n, of and maybe v, layout, tail"
        ) from None


def _keep(entry: Keep) -> Any:
    from issp.ops.keep import Keep as Pattern

    return Pattern(entry.n, of=entry.of, v=entry.v, layout=entry.layout, tail=entry.tail)


def loss(config: Config) -> Any:
    """`train.pixel_opt` as a function of (output, target)."""
    option = config.train.pixel_opt
    kinds = {"L1Loss": F.l1_loss, "MSELoss": F.mse_loss, "CharbonnierLoss": charbonnier}
    function = kinds[option.type]
    return lambda output, target: option.loss_weight * function(output, target)


def charbonnier(output: Tensor, target: Tensor) -> Tensor:
    """mean sqrt(difference^2 + 1e-12)."""
    return torch.sqrt((output - target).square() + 1e-12).mean()


def learning_rate(config: Config, iteration: int) -> float:
    """Learning rate of an iteration (the first is 1), a function of nothing else.

    Constant in the pruning stage; then the scheduler, counted from the freeze. A milestone m is the
    last iteration with the old rate, as in BasicSR.

    Source: method notes, sections 1.3 and 2.5.
    """
    base = config.train.optim_g.lr
    if iteration <= config.train.warmup_iter:
        return base * iteration / config.train.warmup_iter
    steps = iteration - config.freeze_iter - 1
    if steps < 0:
        return base
    scheduler = config.train.scheduler
    if scheduler.type == "MultiStepLR":
        return base * scheduler.gamma ** bisect.bisect_right(sorted(scheduler.milestones), steps)
    return _cosine(base, scheduler, steps)


def _cosine(base: float, scheduler: Scheduler, steps: int) -> float:
    ends = list(accumulate(scheduler.periods))
    cycle = min(bisect.bisect_left(ends, steps), len(ends) - 1)
    begin = ends[cycle - 1] if cycle else 0
    weights = scheduler.restart_weights
    weight = weights[cycle] if len(weights) > 1 else weights[0]
    place = min((steps - begin) / scheduler.periods[cycle], 1.0)
    low = scheduler.eta_min
    return low + weight * 0.5 * (base - low) * (1 + math.cos(math.pi * place))


def seed_everything(seed: int) -> None:
    """Seeds every random generator of the process."""
    import random

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
