"""The training loop, on one page.

Two stages, as in the paper: up to iteration K_p (`sparsity.freeze_iter`) the pruner re-selects and
shrinks after every optimizer step, at a constant learning rate; then the mask is fixed and the
sparse network is fine-tuned with a decaying one. Without a `sparsity` section it is plain training.
Processes that torchrun started train together, each on its share of every batch.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from issp.nn.sharding import local
from issp.pruning.rank_check import RankCheck
from issp.sr import builders, distributed, logging
from issp.sr.config import Config
from issp.sr.distributed import OtherRankEnded, Ranks
from issp.sr.resume import SavedState
from issp.sr.run_folder import RunFolder
from issp.sr.training_run import TrainingRun
from issp.utils import denormals


def train(
    config: Config,
    resume: bool = False,
    quiet: bool = False,
    progress: logging.Progress | None = None,
) -> nn.Module:
    """Trains, prunes and fine-tunes what a configuration says.

    Args:
        config: see `issp.sr.config`.
        resume: continue from the latest state of the run's folder. On a CPU the result is bitwise
            that of a run without a break. Without it a run starts anew, or from
            `path.resume_state` if the configuration names one.
        quiet: print nothing.
        progress: shows what happens, in place of the display of `issp train`.

    Returns:
        The final model (the averaged one with `train.ema_decay`), on its device. It is finalized:
        pruned weights are exact zeros and the hooks are removed. With `train.parallel: fsdp` that
        of rank 0 is whole, and the others have their shards of it.

    Raises:
        Interrupted: Ctrl-C, SIGTERM or SIGHUP came; the state has been saved.
        NonFiniteLossError: the loss became NaN or infinite.
        ValueError, OSError: bad input, a full disk; from the second iteration on the state has been
            saved, if it could be.
        OtherRankEnded: of several processes another one has raised the error.
    """
    with distributed.joined() as ranks:
        return _train(config, resume, progress or logging.Progress(quiet), ranks)


def _train(config: Config, resume: bool, progress: logging.Progress, ranks: Ranks) -> nn.Module:
    ranks.check(config)
    # Before the first parallel operation, because worker threads inherit the mode.
    flushed = denormals.flush_denormals()
    builders.seed_everything(config.manual_seed)
    device = ranks.device(config.device)
    saved = SavedState.find(config, RunFolder(config.folder), resume)
    run = _build(config, saved, device, progress, ranks)
    try:
        start = run.begin(saved)
        if not flushed and device.type == "cpu":
            run.progress.write_line(
                "denormal numbers are not flushed to zero in all threads: steps may be slower"
            )
        if run.trained.pruner is not None:
            RankCheck(run.trained.pruner)
        _iterate(run, device, start)
        return run.finish()
    finally:
        run.close()


def _build(
    config: Config,
    saved: SavedState | None,
    device: torch.device,
    progress: logging.Progress,
    ranks: Ranks,
) -> TrainingRun:
    """The run before its first iteration, or with the weights alone of a state."""
    model = builders.network(config, pretrained=saved is None)
    if saved:
        saved.load_model(model)
    model = model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model) if config.train.ema_decay > 0 else None
    optimizer = builders.optimizer(config, model)
    seed = config.manual_seed if ranks.world > 1 else None
    pruner = builders.pruner(config, model, optimizer, ema, seed)
    update_ema(ema, model, 0.0)  # the pruner may have drawn weights anew
    pinned = device.type == "cuda"
    return TrainingRun(
        config,
        model=model,
        ema=ema,
        optimizer=optimizer,
        pruner=pruner,
        batches=builders.loader(config, pinned, ranks.rank, ranks.world),
        meter=logging.AverageMeter(device, ranks.rank, ranks.gather if ranks.world > 1 else None),
        validation=builders.validation_sets(config),
        progress=progress if ranks.is_main else logging.Progress(quiet=True),
        ranks=ranks,
    )


def _iterate(run: TrainingRun, device: torch.device, start: int) -> None:
    config, ranks, trained = run.config, run.ranks, run.trained
    optimizer, pruner = trained.optimizer, trained.pruner
    total, loss_function = config.train.total_iter, builders.loss(config)
    run.meter.begin()
    with run.stop as stop:
        run.catch_up(start)
        for iteration in range(start + 1, total + 1):
            for group in optimizer.param_groups:
                group["lr"] = builders.learning_rate(config, iteration)

            ranks.seed(config.manual_seed, iteration)
            with run.saved_on_failure(iteration - 1), ranks.attended():
                batch, agreed = run.draw(iteration - 1)
                lq = batch["lq"].to(device, non_blocking=True, memory_format=run.memory_format)
                run.accelerate(lq)  # where a resumed run is frozen already
                gt = batch["gt"].to(device, non_blocking=True)
                loss = loss_function(trained.forward(lq), gt)
                if pruner is not None and pruner.method.has_loss:
                    loss = loss + pruner.loss()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            with ranks.attended():
                optimizer.step()  # the pruner acts here: shrink up to freeze_iter, mask afterwards
            update_ema(trained.ema, trained.model, config.train.ema_decay)
            run.accelerate(lq)
            run.meter.add(loss)
            run.progress.advance(iteration)

            # Read once, so that a signal during logging stops the next iteration.
            stopping = (stop.signal if ranks.world == 1 else agreed) != 0
            with run.saved_on_failure(iteration):
                run.record()
                run.after(iteration, stopping)
            if stopping and iteration < total:
                stop.signal = ranks.agree(agreed) or stop.signal  # rank 0 has saved by now
                end = run.interrupted(iteration)
                if not ranks.is_main:
                    raise OtherRankEnded(str(end), end.status)
                run.progress.record(f"{type(end).__name__}: {end}")
                raise end


@torch.no_grad()
def update_ema(ema: nn.Module | None, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, after the optimizer's step and its pruning.

    A weight pruned by the frozen mask is zero in both models and stays zero.
    """
    if ema is None:
        return
    averages, values = (list(map(local, x.parameters())) for x in (ema, model))
    torch._foreach_lerp_(averages, values, 1 - decay)
    for average, value in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(value)
