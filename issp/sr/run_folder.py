"""experiments/<name>: the layout of a run's folder, its states, its environment, its lock."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from issp.ops.info import info
from issp.sr import checkpoint
from issp.sr.config import Config, dump
from issp.utils.environment import git_revision
from issp.utils.errors import ConfigError
from issp.utils.files import atomic_write

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]


class RunFolder:
    """The folder of one run, experiments/<name>, laid out as BasicSR does."""

    def __init__(self, path: Path):
        self.path = path
        self.models = path / "models"
        self.states = path / "training_states"
        self.images = path / "visualization"
        self.log = path / "log"
        self._lock: int | None = None

    @property
    def lock(self) -> int | None:
        """Descriptor that holds the lock of `claim`: a process that inherits it shares the lock."""
        return self._lock

    def claim(self) -> None:
        """Locks the folder until `release`, or until the process ends.

        Raises:
            ConfigError: another training holds it; two would overwrite each other's files.
        """
        if fcntl is None or self._lock is not None:
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigError(
                f"another training runs in {self.path}: wait for it or choose another name"
            ) from None
        except OSError:  # a file system without locks
            self.release()

    def release(self) -> None:
        """Ends `claim`."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def create(self, config: Config) -> Path | None:
        """Makes and claims the folder and writes configuration and environment.

        Returns:
            Where an earlier run of this name was moved to, or None: nothing is ever overwritten.
        """
        archived = None
        if self.path.exists() and any(self.path.iterdir()):
            self.claim()
            stamp = time.strftime("%Y%m%d_%H%M%S")
            archived = self.path.with_name(f"{self.path.name}_archived_{stamp}")
            while archived.exists():
                archived = archived.with_name(f"{archived.name}_")
            self.path.rename(archived)
            self.release()
        self.reopen(config)
        return archived

    def reopen(self, config: Config) -> None:
        """Makes missing folders; writes the configuration and environment of this start."""
        for folder in (self.models, self.states, self.images, self.log):
            folder.mkdir(parents=True, exist_ok=True)
        self.claim()
        # A run that goes on resumes from its own latest state, not once more from this one.
        paths = config.path.model_copy(update={"resume_state": None})
        recorded = config.model_copy(update={"path": paths})
        atomic_write(self.path / "config.yml", dump(recorded).encode())
        # What `issp info` prints, the command line, and the git revision of the checkout.
        facts = {"command": sys.argv, "git": git_revision(Path(__file__).parent), **info()}
        atomic_write(self.log / "environment.json", f"{json.dumps(facts, indent=2)}\n".encode())

    def holds(self, state: Path) -> bool:
        """Whether a training state is one of this folder."""
        return self.states.is_dir() and state.resolve().parent == self.states.resolve()

    def latest_state(self) -> Path | None:
        """The training state of the highest iteration, or None."""
        states = self._states()
        return states[-1] if states else None

    def state_before(self, path: Path) -> Path | None:
        """The training state of the highest iteration before another one, or None."""
        earlier = [state for state in self._states() if int(state.stem) < int(path.stem)]
        return earlier[-1] if earlier else None

    def save_state(self, state: dict[str, Any], keep: int) -> Path:
        """Writes <iteration>.state, then removes all but the latest `keep` up to it."""
        path = self.states / f"{state['iteration']}.state"
        checkpoint.write_state(state, path)
        for old in self._states()[:-keep]:
            if old != path:
                old.unlink(missing_ok=True)
        return path

    def drop_models(self, iteration: int, keep: int) -> None:
        """Removes the models of iterations up to this one, but for the latest `keep` of them."""
        files = self.models.glob("net_g_*.safetensors")
        found = {int(n): f for f in files if (n := f.stem.removeprefix("net_g_")).isdigit()}
        for old in sorted(n for n in found if n <= iteration)[:-keep]:
            found[old].unlink(missing_ok=True)

    def set_aside_after(self, iteration: int) -> list[Path]:
        """Renames states of later iterations to <iteration>.state.old; returns their paths before.

        A run that goes back to an earlier state would otherwise resume from the abandoned ones.
        """
        later = [path for path in self._states() if int(path.stem) > iteration]
        for path in later:
            path.replace(path.with_name(f"{path.name}.old"))
        return later

    def set_aside_damaged(self, path: Path) -> None:
        """Renames a state to <iteration>.state.damaged, so that no start reads it again."""
        path.replace(path.with_name(f"{path.name}.damaged"))

    def _states(self) -> list[Path]:
        files = self.states.glob("*.state") if self.states.is_dir() else []
        return sorted((f for f in files if f.stem.isdigit()), key=lambda f: int(f.stem))
