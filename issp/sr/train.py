"""The training loop, on one page.

Two stages, as in the paper: up to iteration K_p (`sparsity.freeze_iter`) the pruner re-selects and
shrinks after every optimizer step, at a constant learning rate; then the mask is fixed and the
sparse network is fine-tuned with a decaying one. Without a `sparsity` section it is plain training.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from issp.pruning.pruner import Pruner
from issp.sr import builders, checkpoint, evaluate, gradients, logging
from issp.sr.config import Config
from issp.sr.data import EvalDataset, TrainLoader, write_image
from issp.sr.interrupt import Interrupted, StopRequest
from issp.sr.run_folder import RunFolder
from issp.utils import denormals

VALIDATION_COLUMNS = ("iteration", "stage", "set", "psnr", "ssim")
LAYER_COLUMNS = ("iteration", "layer", "weights", "selected", "zeros", "flips", "threshold")


@dataclass
class Best:
    """Highest PSNR on the first validation set, of models in their final form."""

    psnr: float = float("-inf")
    iteration: int = 0


def train(config: Config, resume: bool = False, quiet: bool = False) -> nn.Module:
    """Trains, prunes and fine-tunes what a configuration says.

    Args:
        config: see `issp.sr.config`.
        resume: continue from `path.resume_state`, or else from the latest state of the run's
            folder. On a CPU the result is bitwise that of a run without a break.
        quiet: print nothing.

    Returns:
        The final model (the averaged one with `train.ema_decay`), on its device. It is finalized:
        pruned weights are exact zeros and the hooks are removed.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; the state has been saved.
        NonFiniteLossError: the loss became NaN or infinite.
        ValueError, OSError: bad input, a full disk.
    """
    builders.check_one_process(config)
    # Before the first parallel operation, because worker threads inherit the mode.
    flushed = denormals.flush_denormals()
    builders.seed_everything(config.manual_seed)
    device = builders.device(config.device)
    model = builders.network(config).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model) if config.train.ema_decay > 0 else None
    batches = builders.loader(config, pin_memory=device.type == "cuda")
    validation = builders.validation_sets(config)
    loss_function = builders.loss(config)
    optimizer = builders.optimizer(config, model)
    meter = logging.AverageMeter(device)
    pruner = builders.pruner(config, model, optimizer, ema)
    meter.timer.watch(optimizer)

    parts = {"model": model, "ema": ema, "optimizer": optimizer, "pruner": pruner}
    run = TrainingRun(config, batches=batches, meter=meter, validation=validation, **parts)
    start = run.resume() if resume else run.start()
    progress = run.open_logs(start, quiet)
    if not flushed and device.type == "cpu":
        progress.write_line(
            "denormal numbers are not flushed to zero in all threads: steps may be slower"
        )

    total = config.train.total_iter
    meter.begin()
    with StopRequest() as stop:
        for iteration in range(start + 1, total + 1):
            for group in optimizer.param_groups:
                group["lr"] = builders.learning_rate(config, iteration)

            batch = next(batches)
            lq = batch["lq"].to(device, non_blocking=True, memory_format=torch.channels_last)
            gt = batch["gt"].to(device, non_blocking=True)
            loss = loss_function(model(lq), gt)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()  # the pruner acts here: shrink up to freeze_iter, mask afterwards
            update_ema(ema, model, config.train.ema_decay)
            meter.add(loss)
            progress.advance(iteration)

            # Read once, so that a signal during logging stops the next iteration.
            signal = stop.signal
            run.after(iteration, stopping=signal != 0)
            if signal and iteration < total:
                run.close()
                raise Interrupted(iteration, run.resume_command, 128 + signal)
    return run.finish()


@torch.no_grad()
def update_ema(ema: nn.Module | None, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, after the optimizer's step and its pruning.

    A weight pruned by the frozen mask is zero in both models and stays zero.
    """
    if ema is None:
        return
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for average, value in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(value)


@dataclass
class TrainingRun:
    """Everything around the loop: logging, validation, checkpoints and resuming.

    Args:
        config: of the run.
        model, ema, optimizer, pruner, batches, meter: what a training state consists of; ema and
            pruner may be None.
        validation: name -> images.
        best: the best validation so far.
    """

    config: Config
    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    pruner: Pruner | None
    batches: TrainLoader
    meter: logging.AverageMeter
    validation: dict[str, EvalDataset]
    best: Best = field(default_factory=Best)

    def __post_init__(self) -> None:
        self.folder = RunFolder(self.config.folder)
        self.resume_command = f"issp train {self.config.folder / 'config.yml'} --resume"
        self._archived: Path | None = None

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated and saved."""
        return self.model if self.ema is None else self.ema

    @property
    def is_final_form(self) -> bool:
        """The model is dense, or the mask is frozen and pruned weights are zero."""
        return self.pruner is None or self.pruner.frozen

    def stage(self, iteration: int) -> str:
        """Stage of an iteration; the one that freezes the mask belongs to the pruning stage."""
        if self.pruner is None:
            return "dense"
        return "pruning" if iteration <= self.config.freeze_iter else "fine-tuning"

    def start(self) -> int:
        """Begins a new run in an empty folder."""
        self._archived = self.folder.create(self.config)
        return 0

    def resume(self) -> int:
        """Restores the state to resume from; returns its iteration."""
        explicit = self.config.path.resume_state
        path = Path(explicit) if explicit else self.folder.latest_state()
        state = checkpoint.read_state(path)
        parts = {"optimizer": self.optimizer, "pruner": self.pruner, "batches": self.batches}
        try:
            checkpoint.load_weights(self.model, state["model"], path)
            if self.ema is not None:
                checkpoint.load_weights(self.ema, state["ema"], path)
            for name, part in parts.items():
                if (state[name] is None) != (part is None):
                    raise ValueError(f"it was saved with another `{name}` setting")
                if part is not None:
                    part.load_state_dict(state[name])
            self.meter.load_state_dict(state["meter"])
            self.best = Best(**state["best"])
            checkpoint.set_random_state(state["random"])
            iteration = int(state["iteration"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a training state of this version: {error}") from None
        except ValueError as error:
            raise ValueError(f"cannot resume from {path}: {error}") from None
        self.folder.reopen(self.config)
        return iteration

    def open_logs(self, start: int, quiet: bool) -> logging.Progress:
        """Opens the logs, cut back to the iteration `start`."""
        log, total = self.folder.log, self.config.train.total_iter
        self.csv = logging.CsvLog(log / "train.csv", logging.COLUMNS, upto=start)
        self.scores = logging.CsvLog(log / "validation.csv", VALIDATION_COLUMNS, upto=start)
        self.layers = logging.CsvLog(log / "layers.csv", LAYER_COLUMNS, upto=start)
        self.gradients = None
        if self.config.logger.grad_stats_freq:
            weights = gradients.weights_to_record(self.model, self.pruner)
            self.gradients = gradients.GradientLog(log / "gradients.csv", weights, upto=start)
        enabled = self.config.logger.use_tb_logger
        self.tensorboard = logging.TensorBoardLog(log / "tensorboard", start + 1, enabled)
        self.progress = logging.Progress(total, start, quiet)
        model = self.eval_model
        parameters = sum(p.numel() for p in model.parameters())
        todo = f"iterations {start + 1} to {total}" if start < total else "finished already"
        self.progress.write_line(
            f"{self.folder.path}: {model.arch} x{model.scale}, {parameters:,} parameters, {todo}"
        )
        unused = self.config.unused_keys()
        if unused:
            self.progress.write_line(f"without effect here: {', '.join(unused)}")
        if self._archived:
            self.progress.write_line(f"the earlier run is in {self._archived}")
        if self.tensorboard.unavailable_reason:
            self.progress.write_line(self.tensorboard.unavailable_reason)
        return self.progress

    def after(self, iteration: int, stopping: bool) -> None:
        """Logs, validates and saves what is due after an iteration."""
        config, total = self.config, self.config.train.total_iter
        if self.gradients and iteration % config.logger.grad_stats_freq == 0:
            self.gradients.add(iteration)
        last = iteration == total
        validates = bool(self.validation) and (iteration % config.val.val_freq == 0 or last)
        if iteration % config.logger.print_freq == 0 or validates or last:
            row = self.row(iteration)
            if validates:
                with self.meter.paused():
                    row["psnr"] = self.validate(iteration)
            self.csv.add(row)
            self.tensorboard.add(row)
            self.progress.show_row(row)
        if iteration % config.logger.save_checkpoint_freq == 0 or last or stopping:
            with self.meter.paused():
                self.save(iteration)

    def row(self, iteration: int) -> dict[str, Any]:
        """A row of the training log."""
        row: dict[str, Any] = {"iteration": iteration, "stage": self.stage(iteration)}
        row |= {"lr": self.optimizer.param_groups[0]["lr"], **self.meter.take()}
        if self.pruner is not None:
            summary = self.pruner.summary()
            thresholds = [r.threshold for r in summary.rows]
            row |= {
                # A frozen pruner keeps the flips of its last selection.
                "flips": sum(r.flips for r in summary.rows) if row["stage"] == "pruning" else 0,
                "threshold": sum(thresholds) / len(thresholds),
                "selected": summary.selected / summary.numel,
                "zeros": summary.zeros / summary.numel,
            }
        return row

    def validate(self, iteration: int) -> float:
        """Scores every validation set; returns the PSNR of the first.

        Best-model tracking starts when the mask is frozen; before that the pruned weights are not
        zero yet.
        """
        means = []
        for name, dataset in self.validation.items():
            result = self._score(name, dataset, iteration)
            means.append(result.psnr)
            row = {"iteration": iteration, "psnr": result.psnr, "ssim": result.ssim}
            self.scores.add({**row, "stage": self.stage(iteration), "set": name})
            self.tensorboard.add(row, prefix=f"{name}/")
        if self.is_final_form and means[0] > self.best.psnr:
            self.best = Best(means[0], iteration)
            self._save_model("best", iteration, psnr=means[0])
        return means[0]

    def _score(self, name: str, dataset: EvalDataset, iteration: int) -> evaluate.Score:
        metrics = self.config.val.metrics.values()
        psnr = next((m for m in metrics if m.type == "calculate_psnr"), None)

        def save_image(image: str, sr: np.ndarray, _: evaluate.Score) -> None:
            write_image(self.folder.images / name / image / f"{image}_{iteration}.png", sr)

        scores = evaluate.evaluate(
            evaluate.of_model(self.eval_model),
            dataset,
            crop_border=psnr.crop_border if psnr else None,
            y_channel=psnr.test_y_channel if psnr else True,
            with_ssim=any(m.type == "calculate_ssim" for m in metrics),
            on_image=save_image if self.config.val.save_img else None,
        )
        return evaluate.mean(scores, name)

    def save(self, iteration: int) -> None:
        """Writes the model of this iteration and the state to resume from."""
        self._save_model(str(iteration), iteration)
        if self.pruner is not None:
            for r in self.pruner.summary().rows:
                cells = (iteration, r.name, r.numel, r.selected, r.zeros, r.flips, r.threshold)
                self.layers.add(dict(zip(LAYER_COLUMNS, cells, strict=True)))
        state: dict[str, Any] = {"iteration": iteration}
        for name in ("model", "ema", "optimizer", "pruner", "batches", "meter"):
            part = getattr(self, name)
            state[name] = None if part is None else part.state_dict()
        state |= {"best": vars(self.best), "random": checkpoint.random_state()}
        self.folder.save_state(state, keep=self.config.logger.keep_training_states)

    def _save_model(self, label: str, iteration: int, **extra: Any) -> None:
        path = self.folder.models / f"net_g_{label}.safetensors"
        metadata = {"iteration": iteration, "stage": self.stage(iteration), **extra}
        checkpoint.save(self.eval_model, path, **metadata)

    def finish(self) -> nn.Module:
        """Finalizes the pruner, writes net_g_latest and closes the logs."""
        if self.pruner is not None:
            self.pruner.finalize()
        self._save_model("latest", self.config.train.total_iter)
        path = self.folder.models / "net_g_latest.safetensors"
        ratio = checkpoint.sparsity(self.eval_model)["ratio"]
        self.progress.write_line(f"done: {path} ({100 * ratio:.2f} % of the weights are zero)")
        if self.best.iteration:
            best = f"{self.best.psnr:.2f} dB at iteration {self.best.iteration}"
            self.progress.write_line(f"best: net_g_best.safetensors, {best}")
        self.close()
        return self.eval_model

    def close(self) -> None:
        """Closes logs and data workers."""
        self.batches.close()
        self.tensorboard.close()
        self.progress.close()
