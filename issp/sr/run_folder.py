"""experiments/<name>: the layout of a run's folder, its latest state, its environment."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from issp.ops.info import info
from issp.sr import checkpoint
from issp.sr.config import Config, dump
from issp.utils.environment import git_revision
from issp.utils.files import atomic_write


class RunFolder:
    """The folder of one run, experiments/<name>, laid out as BasicSR does."""

    def __init__(self, path: Path):
        self.path = path
        self.models = path / "models"
        self.states = path / "training_states"
        self.images = path / "visualization"
        self.log = path / "log"

    def create(self, config: Config) -> Path | None:
        """Makes the folders and writes configuration and environment.

        Returns:
            Where an earlier run of this name was moved to, or None: nothing is ever overwritten.
        """
        archived = None
        if self.path.exists() and any(self.path.iterdir()):
            stamp = time.strftime("%Y%m%d_%H%M%S")
            archived = self.path.with_name(f"{self.path.name}_archived_{stamp}")
            while archived.exists():
                archived = archived.with_name(f"{archived.name}_")
            self.path.rename(archived)
        self.reopen(config)
        return archived

    def reopen(self, config: Config) -> None:
        """Makes missing folders; writes the configuration and environment of this start."""
        for folder in (self.models, self.states, self.images, self.log):
            folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path / "config.yml", dump(config).encode())
        # What `issp info` prints, the command line, and the git revision of the checkout.
        facts = {"command": sys.argv, "git": git_revision(Path(__file__).parent), **info()}
        atomic_write(self.log / "environment.json", f"{json.dumps(facts, indent=2)}\n".encode())

    def latest_state(self) -> Path:
        """The training state of the highest iteration.

        Raises:
            FileNotFoundError: there is none.
        """
        states = self._states()
        if not states:
            raise FileNotFoundError(
                f"there is no training state in {self.states}: start without --resume"
            )
        return states[-1]

    def save_state(self, state: dict[str, Any], keep: int) -> Path:
        """Writes <iteration>.state, then removes all but the latest `keep` up to it."""
        path = self.states / f"{state['iteration']}.state"
        checkpoint.write_state(state, path)
        for old in self._states()[:-keep]:
            if old != path:
                old.unlink(missing_ok=True)
        return path

    def _states(self) -> list[Path]:
        files = self.states.glob("*.state") if self.states.is_dir() else []
        return sorted((f for f in files if f.stem.isdigit()), key=lambda f: int(f.stem))
