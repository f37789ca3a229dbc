"""The training state that a run begins from: which one, and the checks when it is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from issp.sr import checkpoint, config, training_state
from issp.sr.config import Config
from issp.sr.run_folder import RunFolder

# Part of a state that may be absent -> the setting that decides it.
_OPTIONAL = {"ema": "train.ema_decay", "pruner": "sparsity"}
_OPTIONS = sorted({key for own in config.Optimizer.TYPE_OPTIONS.values() for key in own})


class SavedState:
    """A training state on disk.

    Args:
        path: of the file.

    Attributes:
        damaged: later states that `find` could not read -> why.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is damaged.
    """

    def __init__(self, path: Path):
        self.path, self._content = path, checkpoint.read_state(path)
        self.damaged: dict[Path, str] = {}
        with self._explained():
            training_state.check(self._content)

    @classmethod
    def find(cls, config: Config, folder: RunFolder, resume: bool) -> SavedState | None:
        """The state to begin from, or None for a new run.

        Args:
            config: its `path.resume_state` is begun from, unless `resume` finds a later one.
            folder: of the run.
            resume: continue from the latest state of the folder, or, where that is damaged, from
                the latest one before it that is not.

        Raises:
            FileNotFoundError: there is no state to resume from.
            ValueError: the state is damaged, and so are all before it.
        """
        explicit = config.path.resume_state
        path = folder.latest_state() if resume else None
        path = path or (Path(explicit) if explicit else None)
        if resume and path is None:
            raise FileNotFoundError(
                f"there is no training state in {folder.states}: start without --resume"
            )
        if path is None:
            return None
        return cls._latest_whole(path, folder) if resume and folder.holds(path) else cls(path)

    @classmethod
    def _latest_whole(cls, latest: Path, folder: RunFolder) -> SavedState:
        damaged: dict[Path, str] = {}
        path: Path | None = latest
        while path is not None:
            try:
                saved = cls(path)
            except ValueError as error:
                damaged[path] = str(error)
                path = folder.state_before(path)
            else:
                saved.damaged = damaged
                return saved
        others = f"; the states before it are damaged too ({len(damaged) - 1})"
        raise ValueError(damaged[latest] + others * (len(damaged) > 1))

    def load_model(self, model: nn.Module) -> None:
        """Restores the weights: before a pruner is attached, which may ask for their zeros.

        Raises:
            ValueError: the state is of another network.
        """
        with self._explained():
            checkpoint.load_weights(model, self._content["model"], self.path)

    def load(self, parts: dict[str, Any], optimizer: Optimizer, ema_decay: float) -> dict[str, Any]:
        """Checks the settings, then restores what is not the model.

        Args:
            parts: name in the state -> what has a load_state_dict, or None where the run has none.
            optimizer: one of the parts.
            ema_decay: of the run.

        Returns:
            `iteration`, `best` and `pending` of the state.

        Raises:
            ValueError: the state is of another run, or of other settings.
        """
        state, self._content = self._content, {}  # its memory is free after this
        with self._explained():
            for name, key in _OPTIONAL.items():
                if (state[name] is None) != (parts[name] is None):
                    raise ValueError(f"it was saved with another `{key}` setting")
            if state.get("ema_decay", ema_decay) != ema_decay:
                raise ValueError(_differs("train.ema_decay", state["ema_decay"], ema_decay))
            _check_options(state["optimizer"]["param_groups"], optimizer.param_groups)
            for name, part in parts.items():
                if isinstance(part, nn.Module):
                    checkpoint.load_weights(part, state[name], self.path)
                elif part is not None:
                    part.load_state_dict(state[name])
            checkpoint.set_random_state(state["random"])
            pending = bool(state.get("pending", False))
            iteration, best = int(state["iteration"]), dict(state["best"])
            return {"iteration": iteration, "best": best, "pending": pending}

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(
                f"{self.path} is not a training state of this version: {error}"
            ) from None
        except ValueError as error:
            raise ValueError(f"cannot resume from {self.path}: {error}") from None


def _check_options(saved: list[dict[str, Any]], present: list[dict[str, Any]]) -> None:
    """Refuses options that loading would set back in silence; the learning rate may differ."""
    for before, now in zip(saved, present, strict=False):
        kind = "decoupled_weight_decay"  # that of AdamW
        if any((key in before) != (key in now) for key in _OPTIONS) or (
            before.get(kind) != now.get(kind)
        ):
            raise ValueError("it was saved with another `train.optim_g.type` setting")
        for key in sorted((before.keys() & now.keys()) - {"params", "lr"}):
            if _plain(before[key]) != _plain(now[key]):
                raise ValueError(_differs(f"train.optim_g.{key}", before[key], now[key]))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _differs(key: str, saved: Any, now: Any) -> str:
    return f"{key} was {_plain(saved)} when it was saved and is {_plain(now)} now; restore it"
