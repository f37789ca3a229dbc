"""A callback for the `Trainer` of Hugging Face's Transformers."""

from __future__ import annotations

import base64
import io
import warnings
from typing import Any

import torch
from torch import nn

from issp.integrations.attachment import (
    attach_resumed,
    check_accelerate,
    check_arguments,
    metrics,
)
from issp.pruning.pruner import Pruner
from issp.utils.errors import MissingPackageError

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError:
    raise MissingPackageError("callbacks", "transformers", "transformers") from None


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the model of a `Trainer` from the start of `train` on; at its end the zeros are hard.

    The pruner's state is a part of `trainer_state.json`, and
    `train(resume_from_checkpoint=...)` goes on with it. A method with a loss (ASSL) needs
    `callback.pruner.loss()` in the trainer's `compute_loss`. Shares of zeros and of selected
    weights, and the mask bits that the latest step changed, stand in `state.log_history`.

    Args:
        arguments: of `issp.attach` other than model, opt and hook.

    Attributes:
        pruner: from the start of `train` on.

    Raises:
        TypeError: an argument that `issp.attach` does not have.
    """

    def __init__(self, **arguments: Any) -> None:
        check_arguments(arguments)
        self.pruner: Pruner | None = None
        self._arguments = arguments

    def state(self) -> dict[str, Any]:
        """The pruner's state, for `trainer_state.json`."""
        attributes = {}
        if self.pruner is not None:
            attributes["pruner"] = _as_text(self.pruner.state_dict())
        return {"args": {}, "attributes": attributes}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Attaches the pruner, after the trainer has loaded model and optimizer.

        Raises:
            ValueError: an engine that shards the weights, an argument of the trainer that would
                replace this callback, or as `issp.attach`.
        """
        assert model is not None
        check_accelerate(optimizer.accelerator_state)  # the trainer has prepared it
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint replaces the callback by one without its "
                "arguments: drop it, the pruner's state is restored without"
            )
        if self.pruner is not None:
            self.pruner.detach()  # of an earlier call of train, which was interrupted
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        text = saved["attributes"].get("pruner") if state.global_step else None
        if state.global_step and text is None:
            warnings.warn(
                f"training goes on at step {state.global_step} without a state of the pruner: "
                "pruning begins at its step 0",
                stacklevel=2,
            )
        loaded = None if text is None else _from_text(text)
        self.pruner = attach_resumed(model, [optimizer], loaded, self._arguments)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Adds what the pruner has done to the entry of a training step."""
        if self.pruner is not None and logs is not None and "loss" in logs:
            values = {f"pruning_{name}": value for name, value in metrics(self.pruner).items()}
            logs.update(values)
            state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Finalizes the pruner; a best model that was loaded gets the masks, too."""
        assert self.pruner is not None
        best = state.best_global_step
        is_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if is_loaded and best and self.pruner.stage_of(best) == "pruning":
            warnings.warn(
                f"the best model is that of step {best}, before the masks were fixed: its weights "
                "outside of the last masks become zero without training after it; set freeze_at to "
                "an earlier step, or load_best_model_at_end=False",
                stacklevel=2,
            )
        self.pruner.finalize()


def _as_text(state: dict[str, Any]) -> str:
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _from_text(text: str) -> dict[str, Any]:
    file = io.BytesIO(base64.b64decode(text))
    return torch.load(file, map_location="cpu", weights_only=True)
