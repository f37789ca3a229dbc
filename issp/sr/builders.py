"""From a configuration to its parts: network, data, optimizer, pruner, learning rate."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from issp import optim
from issp.ops.keep import Keep, Unit
from issp.pruning import methods
from issp.pruning.attach import attach
from issp.pruning.pruner import Pruner
from issp.pruning.recorder import Recorder, choose_layers
from issp.sr import checkpoint, data, evaluate, models
from issp.sr.config import Config, EvalData, Scheduler, TrainData
from issp.sr.config import Keep as KeepSection
from issp.utils.errors import ConfigError, explain_out_of_memory, first_line
from issp.utils.text import suggest

ARCHITECTURES = ("EDSR", "SwinIR", "CAT")
Pairs = data.PairedFolder | data.PairedArrays


def device(name: str) -> torch.device:
    """The device called "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:1") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported: use auto, cpu or cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is absent: torch sees {torch.cuda.device_count()} GPUs")
    return chosen


def network(config: Config, pretrained: bool = True) -> models.SuperResolver:
    """The network of `network_g`, on the CPU.

    `network_g.type` is a class (SwinIR, EDSR, CAT) or a name of `issp.models.names()`.

    Args:
        config: of the run.
        pretrained: load the weights of `path.pretrain_network_g`, if that is given.

    Raises:
        ConfigError: an unknown type, or arguments that the network does not take.
        ValueError, OSError: the pretrained weights cannot be read or do not fit.
    """
    try:
        with explain_out_of_memory("make network_g smaller"):
            model = _untrained_network(config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        # Values of network_g that are of the wrong type or sign surface anywhere in torch.
        raise ConfigError(f"network_g: {first_line(error)}") from error
    if model.scale != config.scale:
        raise ConfigError(
            f"network_g.upscale is {model.scale} but scale is {config.scale}: make them equal"
        )
    path = config.path.pretrain_network_g
    if path and pretrained:
        key = None if str(path).endswith(".safetensors") else config.path.param_key_g
        tensors, _ = checkpoint.read_tensors(path, key)
        checkpoint.load_weights(model, tensors, path, config.path.strict_load_g)
    return model


def _untrained_network(config: Config) -> models.SuperResolver:
    arguments = dict(config.network_g)
    kind = arguments["type"]
    if kind in models.names():
        arguments.pop("type")
        scale = arguments.pop("upscale", config.scale)
        return models.build(kind, scale, **arguments)
    if kind not in ARCHITECTURES:
        known = (*models.names(), *ARCHITECTURES)
        raise ConfigError(f"unknown network {kind!r}: {suggest(kind, known)}")
    arguments.setdefault("upscale", config.scale)
    return models.from_config(arguments)


def pairs(entry: TrainData | EvalData, scale: int) -> Pairs:
    """The images of a `datasets` entry."""
    if entry.type == "SamplePhotographs":
        split = "train" if isinstance(entry, TrainData) else "test"
        return data.PairedArrays(data.sample_photographs(split), scale)
    return data.PairedFolder(
        entry.dataroot_gt,
        scale,
        entry.dataroot_lq,
        entry.filename_tmpl,
        meta_info_file=entry.meta_info_file,
    )


def loader(config: Config, pin_memory: bool, rank: int = 0, world: int = 1) -> data.TrainLoader:
    """Training batches, of this rank among `world`."""
    entry = config.train_data
    dataset = data.TrainDataset(
        pairs(entry, config.scale),
        entry.gt_size,
        hflip=entry.use_hflip,
        rot=entry.use_rot,
        seed=config.manual_seed,
        small=entry.small,
        channels=_channels(config),
    )
    return data.TrainLoader(
        dataset,
        entry.batch_size_per_gpu,
        enlarge_ratio=entry.dataset_enlarge_ratio,
        rank=rank,
        world=world,
        num_workers=entry.num_worker_per_gpu,
        pin_memory=pin_memory and entry.pin_memory,
        shuffle=entry.use_shuffle,
    )


def _channels(config: Config) -> int:
    """Image channels of the network, under BasicSR's names."""
    names = [name for name in ("num_in_ch", "in_chans") if name in config.network_g]
    return config.network_g[names[0]] if names else 3


def protocols(config: Config) -> dict[str, evaluate.Protocol | None]:
    """How `val.metrics` are taken, as arguments of `issp.sr.evaluate.evaluate`."""
    found = {
        metric.type.removeprefix("calculate_"): evaluate.Protocol(
            metric.crop_border, metric.test_y_channel
        )
        for metric in config.val.metrics.values()
    }
    return {"psnr": evaluate.Protocol(), "ssim": None, **found}


def validation_sets(config: Config) -> dict[str, data.EvalDataset]:
    """Name to images of every `datasets.val*`."""
    return {e.name: data.EvalDataset(pairs(e, config.scale), True) for e in config.val_data}


def optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """`train.optim_g` over all parameters that learn; it prunes within its step.

    Without a pruner, and for what the fused op does not take, it steps as torch's optimizers do.
    """
    section = config.train.optim_g
    kind = {"Adam": optim.Adam, "AdamW": optim.AdamW, "SGD": optim.SGD}[section.type]
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": section.lr, **section.options}
    try:
        return kind(parameters, **options)
    except ValueError as error:
        raise ConfigError(f"train.optim_g: {error}") from None


def pruner(
    config: Config,
    model: nn.Module,
    opt: torch.optim.Optimizer,
    ema: nn.Module | None,
    seed: int | None = None,
) -> Pruner | None:
    """`issp.attach` with the `sparsity` section; None for dense training.

    Args:
        config: of the run.
        model, opt, ema: what is trained.
        seed: for methods that draw, where the configuration names none; None: torch's.
    """
    section = config.sparsity
    if section is None:
        return None
    overrides = {name: pruning_target(value) for name, value in section.overrides.items()}
    if section.keep:
        # First, so that the user's own name patterns win over it.
        overrides = {"*": pruning_target(section.keep)} | overrides
    options = dict(section.options)
    if section.shrink is not None:
        options["shrink"] = section.shrink
    if seed is not None and "seed" in methods.create(section.method).options():
        options.setdefault("seed", seed)
    return attach(
        model,
        opt,
        method=methods.create(section.method, **options),
        sparsity=section.ratio,
        unit=None if section.unit is None else Unit(**dict(section.unit)),
        exclude=section.exclude,
        overrides=overrides,
        freeze_at=section.freeze_iter,
        ema=ema,
        from_zeros=section.from_zeros,
    )


def pruning_target(entry: float | KeepSection) -> float | Keep:
    """What `issp.attach` takes as a layer's target: a sparsity, or an N:M pattern."""
    if not isinstance(entry, KeepSection):
        return entry
    return Keep(**dict(entry))


def check_recorded_layers(config: Config, source: Pruner | nn.Module) -> None:
    """Refuses layers of `logger.*_stats_layers` that the network does not have.

    Args:
        config: of the run.
        source: its pruner; without one, its model.

    Raises:
        ConfigError: one of them.
    """
    for key in ("grad_stats_layers", "mask_stats_layers"):
        wanted = getattr(config.logger, key)
        try:
            if wanted:
                choose_layers(source, wanted, config.logger.layer_index_base)
        except ValueError as error:
            raise ConfigError(f"logger.{key}: {str(error).removeprefix('layers: ')}") from None


def recorders(
    config: Config, source: Pruner | nn.Module, folder: Path, start: int
) -> list[Recorder]:
    """What records layers, by the keys `*_stats_*` of `logger`; step it by hand.

    Args:
        config, source: see `check_recorded_layers`.
        folder: of the files.
        start: iterations done already.
    """
    logger = config.logger
    kinds = {
        "gradients": (logger.grad_stats_freq, logger.grad_stats_layers),
        "masks": (logger.mask_stats_freq, logger.mask_stats_layers),
    }
    options = {"index_base": logger.layer_index_base, "upto": start, "hook": False}
    return [
        Recorder(source, folder, layers or None, every, record=kind, **options)
        for kind, (every, layers) in kinds.items()
        if every
    ]


def loss(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """`train.pixel_opt` as a function of (output, target)."""
    option = config.train.pixel_opt
    functions = {"L1Loss": F.l1_loss, "MSELoss": F.mse_loss, "CharbonnierLoss": charbonnier}
    function = functions[option.type]
    return lambda output, target: option.loss_weight * function(output, target)


def charbonnier(output: Tensor, target: Tensor) -> Tensor:
    """mean sqrt(difference^2 + 1e-12)."""
    return torch.sqrt((output - target).square() + 1e-12).mean()


def learning_rate(config: Config, iteration: int) -> float:
    """Learning rate of an iteration (the first is 1), a function of nothing else.

    Constant in the pruning stage; then the scheduler, counted from the freeze. A milestone m is the
    last iteration with the old rate, as in BasicSR.

    Source: docs/method.md, sections 1.3 and 2.5.
    """
    base = config.train.optim_g.lr
    if iteration <= config.train.warmup_iter:
        return base * iteration / config.train.warmup_iter
    steps = iteration - config.freeze_iter - 1
    if steps < 0:
        return base
    scheduler = config.train.scheduler
    if scheduler.type == "MultiStepLR":
        return base * scheduler.gamma ** bisect.bisect_right(config.milestones, steps)
    return _cosine(base, scheduler, steps)


def _cosine(base: float, scheduler: Scheduler, steps: int) -> float:
    ends = list(accumulate(scheduler.periods))
    cycle = min(bisect.bisect_left(ends, steps), len(ends) - 1)
    begin = ends[cycle - 1] if cycle else 0
    weights = scheduler.restart_weights
    weight = weights[cycle] if len(weights) > 1 else weights[0]
    progress = min((steps - begin) / scheduler.periods[cycle], 1.0)
    low = scheduler.eta_min
    return low + weight * 0.5 * (base - low) * (1 + math.cos(math.pi * progress))


def seed_everything(seed: int) -> None:
    """Seeds every random generator of the process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
