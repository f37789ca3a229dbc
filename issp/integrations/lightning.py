"""A callback for Lightning's `Trainer` (Lightning 2, also as `pytorch_lightning`)."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from issp.integrations.attachment import (
    attach_resumed,
    check_arguments,
    check_engine,
    metrics,
)
from issp.pruning.pruner import Pruner
from issp.utils.errors import MissingPackageError

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError:
        raise MissingPackageError("Lightning callbacks", "lightning", "lightning") from None


class PruningCallback(Callback):
    """Prunes a `LightningModule` from the start of `fit` on; at its end the zeros are hard.

    The pruner's state is a part of the checkpoints, and `fit(ckpt_path=...)` goes on with it. In
    automatic optimization the loss of a method that has one (ASSL) is added; in manual optimization
    add `callback.pruner.loss()`. Every `log_every_n_steps` steps the loggers get the shares of
    zeros and of selected weights, and the mask bits that the step has changed.

    Args:
        module: name of the submodule to prune, such as "generator"; "" is the whole module. Names
            of layers are those in it. Of several optimizers only those of its weights count.
        arguments: of `issp.attach` other than model, opt and hook. The average of Lightning's
            `WeightAveraging` is the `ema` unless another one is given.

    Attributes:
        pruner: from the start of `fit` on.

    Raises:
        TypeError: an argument that `issp.attach` does not have.
    """

    def __init__(self, *, module: str = "", **arguments: Any) -> None:
        check_arguments(arguments)
        self.module = module
        self.pruner: Pruner | None = None
        self._arguments = arguments
        self._loaded: dict[str, Any] | None = None  # from a checkpoint, until fit begins
        self._logged_step = 0

    @property
    def state_key(self) -> str:
        """The key in checkpoints: one trainer may have a callback for each of two submodules."""
        return self._generate_state_key(module=self.module)

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, for a checkpoint."""
        return (self._loaded or {}) if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a state for the start of `fit`: there are no optimizers yet."""
        self._loaded = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what an earlier call of the trainer has loaded."""
        self._loaded = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches the pruner.

        Raises:
            ValueError: a strategy that shards the weights, or as `issp.attach`.
        """
        check_engine(type(trainer.strategy).__name__)
        if self.pruner is not None:
            self.pruner.detach()  # of an earlier fit, which was interrupted
        model = pl_module.get_submodule(self.module)
        own = set(map(id, model.parameters()))
        optimizers = [
            x
            for x in trainer.optimizers
            if own & {id(p) for g in x.param_groups for p in g["params"]}
        ]
        average = {} if "ema" in self._arguments else self._average(trainer)
        self.pruner = attach_resumed(model, optimizers, self._loaded, self._arguments | average)
        self._logged_step = self.pruner.step_count

    def _average(self, trainer: Trainer) -> dict[str, Any]:
        """The argument `ema` where a callback of Lightning's keeps an average."""
        for callback in trainer.callbacks:
            if any(cls.__name__ == "WeightAveraging" for cls in type(callback).__mro__):
                return {"ema": callback._average_model.module.get_submodule(self.module)}
            if any(cls.__name__ == "StochasticWeightAveraging" for cls in type(callback).__mro__):
                raise ValueError(
                    "StochasticWeightAveraging replaces the weights when training ends, without "
                    "their zeros: use the callback WeightAveraging"
                )
        return {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns where a training goes on without the pruner's state."""
        if trainer.global_step and self._loaded is None:
            warnings.warn(
                f"training goes on at step {trainer.global_step} without a state of the pruner: "
                "pruning begins at its step 0",
                stacklevel=2,
            )

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Adds the method's loss, scaled as Lightning has scaled the other."""
        assert self.pruner is not None
        if not (pl_module.automatic_optimization and self.pruner.method.has_loss):
            return
        added = self.pruner.loss() / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss.add_(added if scaler is None else scaler.scale(added))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Logs what the pruner has done."""
        assert self.pruner is not None
        every, step = trainer.log_every_n_steps, self.pruner.newest_step
        if not (trainer.loggers and every) or step % every or step == self._logged_step:
            return
        self._logged_step = step
        prefix = f"pruning/{self.module}/" if self.module else "pruning/"
        values = {prefix + name: value for name, value in metrics(self.pruner).items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalizes the pruner, before `ModelCheckpoint` writes a last checkpoint."""
        assert self.pruner is not None
        self.pruner.finalize()
