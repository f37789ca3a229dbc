"""The folder of a study: what it holds of each run, and whether it is of this study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from issp.sr import config, results
from issp.sr.config import Config
from issp.sr.results import Result
from issp.sr.run_folder import RunFolder
from issp.sr.study.plan import RUNS, Run, Study
from issp.sr.study.scoring import missing_sets
from issp.utils.errors import ConfigError, import_optional
from issp.utils.files import atomic_write, check_folder

STUDY_FILE = "study.yml"
# Keys that may differ when a study goes on: they do not change what is learned.
_FREE = ("device", "num_gpu", "path.experiments_root", "logger.")
_FREE += ("datasets.train.num_worker_per_gpu", "datasets.train.pin_memory")


class StudyFolder:
    """The folder of a study: study.yml, results.csv, a report, and the run folders in `runs`."""

    def __init__(self, study: Study):
        self.study, self.path = study, study.out
        self._claimed = RunFolder(self.path)

    def check(self) -> None:
        """Refuses a folder that is not of this study.

        The grid may have grown since the study began.

        Raises:
            ConfigError: it holds something else, another run, or a run of other settings.
            OSError: see `check_folder`.
        """
        check_folder(self.path)
        begun = (self.path / STUDY_FILE).exists()
        if self.path.exists() and not begun and any(self.path.iterdir()):
            raise ConfigError(f"{self.path} holds other files: choose another --out")
        runs = {run.name: run for run in self.study.runs}
        for recorded in sorted((self.path / RUNS).glob("*/config.yml")):
            name = recorded.parent.name
            if name not in runs:
                raise ConfigError(
                    f"{self.path} is of another study, it has the run {name}: choose another "
                    "--out, or add it to the grid"
                )
            _check_same(config.parse(config.load_yaml(recorded)), runs[name].config, recorded)

    def begin(self) -> int | None:
        """Makes and locks the folder; returns the lock's descriptor, where there are locks."""
        self.check()
        (self.path / RUNS).mkdir(parents=True, exist_ok=True)
        self._claimed.claim()
        yaml = import_optional("yaml", "PyYAML", "YAML files")
        text = yaml.safe_dump(self.study.file.model_dump(exclude_none=True), sort_keys=False)
        atomic_write(self.path / STUDY_FILE, text.encode())
        return self._claimed.lock

    def end(self) -> None:
        """Unlocks the folder."""
        self._claimed.release()

    def run(self, run: Run) -> RunFolder:
        """The folder of a run."""
        return RunFolder(run.config.folder)

    def is_finished(self, run: Run) -> bool:
        """Whether a run is trained and scored on every set."""
        return not missing_sets(self.run(run).path, self.study.test)

    def iteration(self, run: Run) -> int:
        """The iteration that a run would go on from."""
        state = self.run(run).latest_state()
        return int(state.stem) if state else 0

    def results(self) -> list[Result]:
        """The scores of all runs so far, in the order of the grid."""
        runs = (*self.study.baselines, *self.study.runs)
        return [row for run in runs for row in self.results_of(run)]

    def results_of(self, run: Run) -> list[Result]:
        """The scores of a run so far, in the order of the test sets."""
        path, sets = self.run(run).path / results.FILE_NAME, list(self.study.test)
        rows = [row for row in results.read(path) if row.set in sets] if path.exists() else []
        return sorted(rows, key=lambda row: sets.index(row.set))

    def collect(self) -> list[Result]:
        """Writes results.csv from the runs' results; returns its rows."""
        rows = self.results()
        results.write(self.path / results.FILE_NAME, rows)
        return rows


def _check_same(recorded: Config, planned: Config, path: Path) -> None:
    before, now = (dict(_flat(config.to_tree(c))) for c in (recorded, planned))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(_FREE):
            raise ConfigError(
                f"{path} is of another study: {key} was {before.get(key)} and is {now.get(key)} "
                "now; restore it, or choose another --out"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
