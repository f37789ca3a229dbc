"""One training run around its loop: what it logs, validates, saves and resumes from."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from issp.pruning.pruner import Pruner
from issp.pruning.recorder import Recorder
from issp.sr import builders, checkpoint, evaluate, logging, preflight, results
from issp.sr.config import Config
from issp.sr.data import EvalDataset, TrainLoader, write_image
from issp.sr.distributed import Ranks
from issp.sr.interrupt import Interrupted, StopRequest
from issp.sr.models import SuperResolver
from issp.sr.parallel import ShardedTrained, Trained
from issp.sr.random_state import torch_random_state
from issp.sr.resume import SavedState
from issp.sr.run_folder import RunFolder
from issp.utils.errors import (
    ConfigError,
    NonFiniteLossError,
    OutOfMemoryError,
    explain_out_of_memory,
    one_line,
)
from issp.utils.files import atomic_write

VALIDATION_COLUMNS = ("iteration", "stage", "set", "psnr", "ssim", "exact", "model")
LAYER_COLUMNS = ("iteration", "layer", "weights", "selected", "zeros", "flips", "threshold")


_UNREADABLE = 1 << 16  # in the place of a signal

CSV_LOGS = ("train.csv", "validation.csv", "layers.csv", "gradients.csv", "masks.csv")


@dataclass
class Best:
    """Highest PSNR on the first validation set, of models in their final form.

    Attributes:
        scored_on: `evaluate.fingerprint` of the set; "" in states of earlier versions.
    """

    psnr: float = float("-inf")
    iteration: int = 0
    scored_on: str = ""


@dataclass
class TrainingRun:
    """Everything around the loop: logging, validation, checkpoints and resuming.

    Args:
        config: of the run.
        model, ema, optimizer, pruner, batches, meter: what a training state consists of; ema and
            pruner may be None.
        validation: name -> images.
        progress: shows what happens.
        ranks: this process among those of the training. Rank 0 has the folder, the logs and the
            validation; the others only keep their part of what is trained.
        best: the best validation so far.

    Attributes:
        trained: what the iterations change, from `begin` on: the parts above, or shards of them.
    """

    config: Config
    model: SuperResolver
    ema: SuperResolver | None
    optimizer: torch.optim.Optimizer
    pruner: Pruner | None
    batches: TrainLoader
    meter: logging.AverageMeter
    validation: dict[str, EvalDataset]
    progress: logging.Progress
    ranks: Ranks = field(default_factory=Ranks)
    best: Best = field(default_factory=Best)

    def __post_init__(self) -> None:
        self.folder = RunFolder(self.config.folder)
        recorded = shlex.quote(str(self.config.folder / "config.yml"))
        self.resume_command = f"{self.ranks.command} train {recorded} --resume"
        self.tensorboard: logging.TensorBoardLog | None = None
        self.stop = StopRequest(from_launcher=self.ranks.world > 1)
        self.recorders: list[Recorder] = []
        self._saved = 0  # iteration of the latest state
        self._is_pending = False  # the iteration that a state ends with was not validated yet
        self._is_accelerated = self._trains_sparse = False
        self._is_complete = False  # there is nothing left to train

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

    def begin(self, saved: SavedState | None) -> int:
        """Checks what can be checked, then makes the folder, or restores a state.

        Args:
            saved: what to go on from; the model has its weights already.

        Returns:
            The last iteration done: 0 for a new run.

        Raises:
            ConfigError: the ranks have found different states, or something cannot be used.
        """
        if self.ranks.is_main and self.folder.path.is_dir():
            self.folder.claim()
        start = self._restore(saved) if saved else 0
        self._saved = start
        self._is_complete = start >= self.config.train.total_iter and not self._is_pending
        starts = self.ranks.gather(torch.tensor(start, dtype=torch.int64, device="cpu")).tolist()
        if len(set(starts)) > 1:
            raise ConfigError(
                f"the ranks resume from the iterations {', '.join(map(str, starts))}: give all "
                f"machines the same folder {self.folder.path}"
            )
        self._distribute(start)
        # If the run is complete, config.yml stays that of the run.
        if self.ranks.is_main and not self._is_complete:
            self._prepare(saved, start)
        self.ranks.agree(0)  # the others wait for the checks
        return start

    def _distribute(self, start: int) -> None:
        """Makes `trained` what this rank trains; only rank 0 keeps whole parts beside shards."""
        config, ranks = self.config, self.ranks
        trained = Trained(self.model, self.ema, self.optimizer, self.pruner)
        if ranks.world > 1 and config.train.parallel == "fsdp":
            trained = ShardedTrained(config, ranks, trained, start)
            if not ranks.is_main:
                self.model, self.ema = trained.model, trained.ema
                self.optimizer, self.pruner = trained.optimizer, trained.pruner
        else:
            trained.distribute(ranks, config.find_unused_parameters)
        self.trained = trained
        self.meter.timer.watch(trained.optimizer)  # after the pruner, whose hook runs first

    def _prepare(self, saved: SavedState | None, start: int) -> None:
        """Checks what can be checked, then makes or reopens the folder and opens the logs."""
        notes = [None if saved else preflight.lost_zeros(self.config, self.model)]
        device = next(self.model.parameters()).device
        notes += [preflight.idle_gpus(self.config, device, self.ranks.world)]
        notes += [preflight.idle_shards(self.config, self.ranks.world)]
        builders.check_recorded_layers(self.config, self.pruner or self.model)
        states = 1 + (self.ema is not None) + len(_moments(self.config))
        preflight.check_disk(self.config, self.model, states, start, notes.append)
        preflight.check_crop(self.batches.dataset, self.eval_model)
        say = self.progress.write_line
        preflight.check_images(self.batches, self.validation, self._score, say)
        if saved and self.folder.holds(saved.path):
            preflight.check_logs(self.folder, CSV_LOGS)
            self.folder.reopen(self.config)
            notes += [self._set_aside(path, why, saved) for path, why in saved.damaged.items()]
            old = self.folder.set_aside_after(start)
            notes += [f"{old[-1]} is kept as {old[-1].name}.old" if old else None]
            notes += [self._check_best()]
        else:
            archived = self.folder.create(self.config)
            notes += [f"the earlier run is in {archived}" if archived else None]
            self.best = Best()  # a state from elsewhere left its best model there
        if saved and self.config.path.pretrain_network_g:
            notes += [f"goes on from {saved.path}: path.pretrain_network_g is not read again"]
        if "val" in self.config.model_fields_set and not self.validation:
            notes += ["without validation: datasets has no entry val"]
        sets = {"training": self.batches.dataset, **self.validation}
        images = (f"{k} {len(d)} (LR {d.pairs.lr_source})" for k, d in sets.items())
        notes += [f"images: {', '.join(images)}"]
        unused = self.config.unused_keys()
        notes += [f"without effect here: {', '.join(unused)}" if unused else None]
        self._open_logs(start)
        for note in filter(None, notes):
            self.progress.write_line(note)

    def _restore(self, saved: SavedState) -> int:
        saved.load_model(self.model)  # again: the pruner may have drawn weights when attached
        names = ("ema", "optimizer", "pruner", "batches", "meter")
        parts = {name: getattr(self, name) for name in names}
        state = saved.load(parts, self.optimizer, self.config.train.ema_decay)
        self.best, self._is_pending = Best(**state["best"]), state["pending"]
        return state["iteration"]

    def _set_aside(self, damaged: Path, why: str, saved: SavedState) -> str:
        self.folder.set_aside_damaged(damaged)
        return f"{why}; it is kept as {damaged.name}.damaged, and {saved.path.name} is resumed"

    def _check_best(self) -> str | None:
        """Sets a best model aside that is damaged or not the state's, or of other images' score.

        The model of the best iteration takes its place, if it is there. Otherwise the next
        validation writes one, so that file and score belong together, and scores are compared with
        those of the same images.
        """
        path = self.folder.models / "net_g_best.safetensors"
        is_comparable = not self.validation or self.best.scored_on in ("", self._scored_on())
        is_best = self._is_best(path)
        if is_best and is_comparable:
            return None
        note = None
        if path.is_file():
            ending, reason = "old", "of another end of this run"
            if is_best:
                reason = "the best on other validation images, or by another crop border or channel"
            elif not _facts(path):
                ending, reason = "damaged", "damaged or cut short"
            path.replace(path.with_name(f"{path.name}.{ending}"))
            note = f"{path} is {reason}: it is kept as {path.name}.{ending}"
        copy = self.folder.models / f"net_g_{self.best.iteration}.safetensors"
        if is_comparable and self._is_best(copy):
            atomic_write(path, copy.read_bytes())
            return note and f"{note}, and {copy.name} takes its place"
        self.best = Best()
        return note

    def _is_best(self, path: Path) -> bool:
        """Whether a model file is whole and the one that `best` names."""
        facts = _facts(path)
        return (facts.get("psnr"), facts.get("iteration")) == (self.best.psnr, self.best.iteration)

    def _scored_on(self) -> str:
        """What the PSNR of the best model is of."""
        first = next(iter(self.validation.values()))
        return evaluate.fingerprint(first, builders.protocols(self.config)["psnr"])

    def _open_logs(self, start: int) -> None:
        """Opens the logs, cut back to the iteration `start`; the text log goes on."""
        log, total = self.folder.log, self.config.train.total_iter
        whole = start - self._is_pending
        self.csv = logging.CsvLog(log / "train.csv", logging.COLUMNS, upto=whole)
        self.scores = logging.CsvLog(log / "validation.csv", VALIDATION_COLUMNS, upto=whole)
        self.layers = logging.CsvLog(log / "layers.csv", LAYER_COLUMNS, upto=whole)
        self.recorders = builders.recorders(self.config, self.pruner or self.model, log, start)
        enabled = self.config.logger.use_tb_logger
        self.tensorboard = logging.TensorBoardLog(log / "tensorboard", whole + 1, enabled)
        self.progress.begin(total, start, log / "train.log")
        model = self.eval_model
        parameters = sum(p.numel() for p in model.parameters())
        self.progress.write_line(
            f"{self.folder.path}: {model.arch} x{model.scale}, {parameters:,} parameters, "
            f"iterations {start + 1} to {total}"
        )
        if self.tensorboard.unavailable_reason:
            self.progress.write_line(self.tensorboard.unavailable_reason)

    def draw(self, iteration: int) -> tuple[dict[str, Any], int]:
        """The next batch, and the signal that has come to any rank, or 0.

        Args:
            iteration: the last one done. Where a rank cannot read its images, rank 0 gets the
                values of its end while all are there.

        Raises:
            OSError, ValueError, OtherRankEnded: an image cannot be read, here or elsewhere.
        """
        batch, error = {}, None
        try:
            batch = next(self.batches)
        except (OSError, ValueError) as unreadable:
            error = unreadable
        agreed = self.ranks.agree(self.stop.signal if error is None else _UNREADABLE)
        if agreed == _UNREADABLE:
            self.meter.gather()
            self.trained.collect(iteration)
            if error is None:
                self.ranks.agree(0)  # until the other one has ended, which raises its error here
        if error is not None:
            raise error
        return batch, agreed

    @contextlib.contextmanager
    def saved_on_failure(self, iteration: int) -> Iterator[None]:
        """Saves the state when what is inside fails: a damaged image, a validation, a full disk.

        A resumed run repeats it, with the same batch and the same random numbers. Shards that have
        not been collected are not saved.

        Args:
            iteration: the last one done; the state is of its end.
        """
        batches, random = self.batches.state_dict(), torch_random_state()
        try:
            yield
        except NonFiniteLossError:
            raise  # such a state is of no use
        except Exception as error:  # not handled: it goes on once the work is safe
            is_here = self.trained.is_collected(iteration)
            if self.ranks.is_main and iteration > self._saved and is_here:
                with contextlib.suppress(OSError):
                    self.save_state(iteration, batches, random)
                    self.progress.record(f"{type(error).__name__}: {error}")
                    if not isinstance(error, Interrupted):
                        self.progress.write_line(
                            f"the state of iteration {iteration} is saved; "
                            f"continue with: {self.resume_command}"
                        )
            raise

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the images that the network gets: that of most of its layers."""
        return torch.contiguous_format if self._trains_sparse else torch.channels_last

    def accelerate(self, example: Tensor) -> None:
        """Trains the kept weights alone, once the masks are fixed and if the run is to do so.

        Args:
            example: a batch of LR images.
        """
        wanted = self.config.sparsity is not None and self.config.sparsity.accelerate
        if not wanted or self.pruner is None or self._is_accelerated or not self.pruner.frozen:
            return
        with self.meter.paused():
            self.pruner.freeze(accelerate=True if wanted is True else example)
        report, self._is_accelerated = self.pruner.acceleration, True
        assert report is not None
        self._trains_sparse = any(line.is_sparse for line in report.lines)
        self.progress.write_line(f"training: {report.summary()}")

    def catch_up(self, iteration: int) -> None:
        """Logs and validates the iteration that a state ends with, where that has not happened."""
        if self._is_pending:
            self.after(iteration, stopping=False)

    def record(self) -> None:
        """Records gradients and masks of the iteration that was just done."""
        self._is_pending = True
        for recorder in self.recorders:
            recorder.step()

    def _flush_recorders(self) -> None:
        for recorder in self.recorders:
            recorder.flush()

    def after(self, iteration: int, stopping: bool) -> None:
        """Logs, validates and saves what is due after an iteration.

        Raises:
            Interrupted: a signal came during the validation.
        """
        config, total = self.config, self.config.train.total_iter
        self._is_pending = True
        last, freezes = iteration == total, iteration == config.freeze_iter
        is_due = iteration % config.val.val_freq == 0 or last or freezes
        validates = bool(self.validation) and is_due
        logs = iteration % config.logger.print_freq == 0 or validates or last or freezes
        saves = iteration % config.logger.save_checkpoint_freq == 0 or last or stopping
        if logs or saves:
            self.meter.gather()
            self.trained.collect(iteration)
        if not self.ranks.is_main:
            self._follow(logs)
            return
        if logs:
            self.meter.check()
            scores: dict[str, float] = {}
            if validates:
                with self.meter.paused():
                    scores = self._validate_or_go_on(iteration)
            self._flush_recorders()
            row = {**self.row(iteration), **scores}
            self._is_pending = False
            self.csv.add(row)
            self.tensorboard.add(row)
            self.progress.show_row(row)
            if freezes:
                self.progress.write_line(
                    f"iteration {iteration}: the mask is frozen and {100 * row['zeros']:.1f} % of "
                    "the weights are zero; from here on PSNR is the sparse model's"
                )
        self._is_pending = False
        if saves:
            self.meter.check()  # or states of NaN would push the good ones out
            with self.meter.paused():
                self.save(iteration)

    def _follow(self, logs: bool) -> None:
        """What `after` does on the other ranks."""
        self._is_pending = False
        if logs:
            self.meter.take()

    def interrupted(self, iteration: int) -> Interrupted:
        """The end of a run that was asked to stop after this iteration."""
        return Interrupted(iteration, self.resume_command, 128 + self.stop.signal)

    def row(self, iteration: int) -> dict[str, Any]:
        """A row of the training log."""
        row: dict[str, Any] = {"iteration": iteration, "stage": self.stage(iteration)}
        row |= {"lr": self.trained.optimizer.param_groups[0]["lr"], **self.meter.take()}
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

    def _validate_or_go_on(self, iteration: int) -> dict[str, float]:
        """`validate`; where it fails the state is saved and the training goes on.

        Returns:
            The columns of `validate`. Where the soft model fails those of the masked one, which was
            scored before it and is in validation.csv.

        Raises:
            OSError, ValueError, OutOfMemoryError: it failed after the last iteration; a resumed run
                repeats it. Or the state cannot be saved.
        """
        columns: dict[str, float] = {}
        try:
            with explain_out_of_memory("use smaller validation images"):
                self.validate(iteration, columns)
        except (OSError, ValueError, OutOfMemoryError) as error:
            if iteration == self.config.train.total_iter:
                raise
            self.save_state(iteration)
            self.progress.write_line(
                f"the validation of iteration {iteration} failed, its state is saved and the "
                f"training goes on: {one_line(error)}"
            )
            return columns
        if self.is_final_form and columns["psnr"] > self.best.psnr:
            self._save_model("best", iteration, psnr=columns["psnr"])
            # After it: a run resumed here writes it again.
            self.best = Best(columns["psnr"], iteration, self._scored_on())
        return columns

    def validate(self, iteration: int, columns: dict[str, float]) -> None:
        """Scores every validation set; `columns` of the training log get those of the first set.

        While the network is pruned the masked model is scored, then the soft one. Best-model
        tracking starts when the mask is frozen; before that the pruned weights are not zero yet.
        """
        for model, endings in self._scored_models(iteration).items():
            is_masked = model == "masked"
            with self.pruner.masked(self.ema) if is_masked else contextlib.nullcontext():
                scores = [self._score(n, x, iteration, model) for n, x in self.validation.items()]
            for score in scores:
                values = {name: getattr(score, name) for name in ("psnr", "ssim", "exact")}
                row = {"iteration": iteration, "stage": self.stage(iteration), "set": score.name}
                self.scores.add({**row, **values, "model": model})
                named = {name + ending: x for name, x in values.items() for ending in endings}
                self.tensorboard.add({"iteration": iteration, **named}, prefix=f"{score.name}/")
            columns |= {f"psnr{ending}": scores[0].psnr for ending in endings}

    def _scored_models(self, iteration: int) -> dict[str, tuple[str, ...]]:
        """The models to score -> endings of their columns: "" as it is, "_masked" with the mask.

        One that has both is scored once.
        """
        if self.pruner is None or not self.pruner.method.prunes:
            return {"dense": ("",)}
        both = ("", "_masked")
        if self.pruner.frozen:
            return {"sparse": both if self.stage(iteration) == "pruning" else both[:1]}
        masks = self.pruner.masks()
        weights = {name: self.eval_model.get_submodule(name).weight for name in masks}
        if not any(bool(weights[name][~kept].any()) for name, kept in masks.items()):
            return {"masked": both}
        soft = {"soft": both[:1]} if self.config.val.soft else {}
        return {"masked": both[1:], **soft}

    def _score(
        self, name: str, dataset: EvalDataset, iteration: int | None = None, model: str = ""
    ) -> evaluate.Score:
        def on_image(image: str, sr: np.ndarray, _: evaluate.Score) -> None:
            if iteration is None:
                return
            if self.stop.signal:  # a validation may take longer than a scheduler waits
                raise self.interrupted(iteration)
            if self.config.val.save_img and model != "soft":
                write_image(self.folder.images / name / image / f"{image}_{iteration}.png", sr)

        scores = evaluate.evaluate(
            evaluate.of_model(self.eval_model),
            dataset,
            **builders.protocols(self.config),
            on_image=on_image,
        )
        return evaluate.mean(scores, name)

    def save(self, iteration: int) -> None:
        """Writes the model of this iteration and the state to resume from."""
        is_best = self.best.iteration == iteration
        score = {"psnr": self.best.psnr} if is_best else {}
        self._save_model(str(iteration), iteration, **score)
        if self.pruner is not None:
            for r in self.pruner.summary().rows:
                cells = (iteration, r.name, r.numel, r.selected, r.zeros, r.flips, r.threshold)
                self.layers.add(dict(zip(LAYER_COLUMNS, cells, strict=True)))
        self.save_state(iteration)
        if self.config.logger.keep_models is not None:
            self.folder.drop_models(iteration, self.config.logger.keep_models)

    def save_state(
        self,
        iteration: int,
        batches: dict[str, Any] | None = None,
        random: dict[str, Any] | None = None,
    ) -> None:
        """Writes the state to resume from, and before it all rows of its past.

        Args:
            iteration: the last one done.
            batches, random: the loader's state and parts of `checkpoint.random_state` at its end;
                None: they are as they were then.
        """
        self._flush_recorders()
        state: dict[str, Any] = {"iteration": iteration, "pending": self._is_pending}
        state["ema_decay"] = self.config.train.ema_decay
        for name in ("model", "ema", "pruner", "batches", "meter"):
            part = getattr(self, name)
            state[name] = None if part is None else part.state_dict()
        state["optimizer"] = self.trained.optimizer_state()
        state["batches"] = batches or state["batches"]
        state |= {"best": vars(self.best), "random": checkpoint.random_state() | (random or {})}
        self.folder.save_state(state, keep=self.config.logger.keep_training_states)
        self._saved = iteration

    def _save_model(self, label: str, iteration: int, **extra: Any) -> None:
        path = self.folder.models / f"net_g_{label}.safetensors"
        metadata = {"iteration": iteration, "stage": self.stage(iteration), **extra}
        metadata["training"] = results.training_facts(self.config)
        checkpoint.save(self.eval_model, path, **metadata)

    def finish(self) -> nn.Module:
        """Finalizes the pruner and writes net_g_latest, unless an earlier start has done so."""
        self.trained.finalize()
        if self.pruner is not None:
            self.pruner.finalize()
        if not self.ranks.is_main:
            return self.eval_model
        path = self.folder.models / "net_g_latest.safetensors"
        if self._is_complete and _facts(path).get("iteration") == self._saved:
            self.progress.write_line(f"{self.folder.path}: finished already, see {path}")
            return self.eval_model
        self._save_model("latest", self._saved)
        ratio = checkpoint.sparsity(self.eval_model)["ratio"]
        self.progress.write_line(f"done: {path} ({100 * ratio:.2f} % of the weights are zero)")
        if self.best.iteration:
            best = f"{self.best.psnr:.2f} dB at iteration {self.best.iteration}"
            self.progress.write_line(f"best: net_g_best.safetensors, {best}")
        return self.eval_model

    def close(self) -> None:
        """Closes logs and data workers and gives the folder free."""
        with contextlib.suppress(OSError):  # after an error, which goes on
            self._flush_recorders()
        self.batches.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        self.progress.close()
        self.folder.release()


def _facts(path: Path) -> dict[str, Any]:
    """What a model file says of itself; {} if it is absent or damaged."""
    try:
        return checkpoint.read_tensors(path)[1]
    except (FileNotFoundError, ValueError):
        return {}


def _moments(config: Config) -> tuple[str, ...]:
    """What the optimizer keeps for every weight."""
    options = config.train.optim_g.options
    if "betas" in options:
        return ("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * options["amsgrad"])
    return ("momentum_buffer",) * bool(options["momentum"])
