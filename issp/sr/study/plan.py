"""A study file: a configuration of `issp train`, and a grid of what differs between the runs.

All runs have the budget of the base: the same iterations before and after the masks are fixed, the
same data, batches and learning rates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator

from issp.pruning.methods import METHODS
from issp.sr import config, models
from issp.sr.config import Config, EvalData, FilePath, Integer, Number, Section
from issp.utils.errors import ConfigError
from issp.utils.files import user_path
from issp.utils.text import suggest

# Keys of `sparsity` that belong to a method, and those that the base decides for all.
_OF_METHOD = ("method", "shrink", "options")
_OF_STUDY = ("freeze_iter", "from_zeros")
RUNS = "runs"  # folder of the runs in that of a study
BASELINE = "bicubic"  # in the place of a method: scored once for each scale


def _folder_of_images(value: Any) -> Any:
    return {"dataroot_gt": value} if isinstance(value, str) else value


def _without_twins(values: list[Any]) -> list[Any]:
    twin = next((v for v in values if values.count(v) > 1), None)
    if twin is not None:
        raise ValueError(f"has {twin} twice: drop one")
    return values


T = TypeVar("T")
Values = Annotated[list[T], BeforeValidator(config.listed), AfterValidator(_without_twins)]


class Point(Section):
    """Values of the axes of a grid; an axis that is left out is empty."""

    method: Values[str] = []
    ratio: Values[Number] = []
    scale: Values[Integer] = []
    seed: Values[Integer] = []
    network: Values[str] = []

    def holds(self, place: dict[str, Any]) -> bool:
        """Whether every axis that is given has the value of a place in the grid."""
        return all(not values or place[axis] in values for axis, values in self)


class StudyFile(Section):
    """The keys of a study file; see docs/usage.md."""

    out: FilePath | None = None
    base: dict[str, Any] | str = {}
    set: dict[str, Any] = {}
    grid: Point = Point()
    exclude: list[Point] = []
    methods: dict[str, dict[str, Any]] = {}
    test: dict[str, Annotated[EvalData, BeforeValidator(_folder_of_images)]] = {}


@dataclass(frozen=True)
class Run:
    """One training of a study, or bicubic interpolation.

    Attributes:
        method, scale, seed, network: its place in the grid.
        sparsity: the ratio of its place, also where the method has another of its own; 0 for dense
            training.
        config: what `issp.sr.train.train` gets; its name is that of the run.
    """

    method: str
    sparsity: float | None
    scale: int
    seed: int | None
    network: str
    config: Config

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return self.config.name


@dataclass(frozen=True)
class Study:
    """A study with all its runs.

    Attributes:
        source: the study file.
        file: its content, the base included.
        out: folder of the study.
        runs: in the order of the grid. The methods are innermost, so that one comparison is
            complete before the next begins.
        test: the sets on which every run is scored.
    """

    source: Path
    file: StudyFile
    out: Path
    runs: list[Run]

    @property
    def baselines(self) -> list[Run]:
        """Bicubic interpolation at every scale."""
        found = []
        for scale, settings in {run.scale: run.config for run in self.runs}.items():
            root = settings.path.model_copy(
                update={"experiments_root": str(self.out / "baselines")}
            )
            update = {"name": f"{BASELINE}_x{scale}", "path": root}
            found.append(Run(BASELINE, None, scale, None, "", settings.model_copy(update=update)))
        return found

    @property
    def test(self) -> dict[str, EvalData]:
        return self.file.test


def load(path: str | Path, out: str | None = None) -> Study:
    """Reads a study file and plans its runs.

    Args:
        path: the file. A `base` that is a path is relative to its folder; study.yml in the folder
            of a study continues that study.
        out: folder of the study, in place of the file's.

    Raises:
        ConfigError: unreadable, an unknown key, or a run that `issp train` would refuse.
    """
    path = user_path(path)
    file = config.validated(StudyFile, config.load_yaml(path))
    if isinstance(file.base, str):
        file.base = config.load_yaml(path.parent / user_path(file.base))
    for key, value in file.set.items():
        config.set_key(file.base, key, value)
    if not file.test:
        raise ConfigError("test names no set: write such as `test: {Set5: benchmarks/Set5}`")
    begun = path.parent if path.name == "study.yml" and (path.parent / RUNS).is_dir() else None
    folder = user_path(out or begun or file.out or Path("studies", path.stem))
    return Study(path, file, folder, _runs(file, folder / RUNS))


def _runs(file: StudyFile, root: Path) -> list[Run]:
    base = _checked_base(file.base)
    _check_names(file)
    runs: dict[str, Run] = {}
    for place in _places(file.grid, base):
        if any(excluded.holds(place) for excluded in file.exclude):
            continue
        run = _run(base, root, place, file.methods.get(place["method"], {}))
        runs.setdefault(run.name, run)  # one dense training for all ratios
    if not runs:
        raise ConfigError("exclude leaves no run of the grid: drop an entry")
    return list(runs.values())


def _checked_base(tree: dict[str, Any]) -> Config:
    sparsity = tree.get("sparsity")
    if not isinstance(sparsity, dict) or not sparsity.get("freeze_iter"):
        raise ConfigError(
            "base has no sparsity.freeze_iter: give the iterations of the pruning stage, the same "
            "for all runs"
        )
    try:
        base = config.parse({**tree, "name": "base"})
    except ConfigError as error:
        raise ConfigError(f"base: {error}") from None
    if base.path.resume_state:
        raise ConfigError("base has path.resume_state: drop it, the runs of a study begin anew")
    return base


def _check_names(file: StudyFile) -> None:
    """Refuses unknown methods and networks, and settings that would make budgets differ."""
    for name, settings in file.methods.items():
        _check_known(settings.get("method", name), METHODS, f"methods.{name}")
        fixed = next((key for key in _OF_STUDY if key in settings), None)
        if fixed:
            raise ConfigError(f"methods.{name} has {fixed}: it is the same for all, drop it")
    known = {**METHODS, **file.methods}
    for point in (file.grid, *file.exclude):
        for method in point.method:
            _check_known(method, known, "method")
        for network in point.network:
            _check_known(network, models.names(), "network")


def _check_known(name: Any, known: Any, place: str) -> None:
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{place}: {name!r} is unknown: {suggest(name, known)}")


def _places(grid: Point, base: Config) -> Iterator[dict[str, Any]]:
    """All combinations; an empty axis has the value of the base."""
    assert base.sparsity
    own = {
        "network": None,
        "scale": base.scale,
        "ratio": base.sparsity.ratio,
        "seed": base.manual_seed,
        "method": base.sparsity.method,
    }
    axes = [getattr(grid, axis) or [value] for axis, value in own.items()]
    for values in itertools.product(*axes):
        yield dict(zip(own, values, strict=True))


def _run(base: Config, root: Path, place: dict[str, Any], settings: dict[str, Any]) -> Run:
    """The run at a place of the grid.

    Args:
        base: the configuration that all runs begin from.
        root: folder of the runs.
        place: its values on the axes.
        settings: of its method, as keys of `sparsity`.
    """
    tree = config.to_tree(base)
    tree["sparsity"] = _sparsity(tree["sparsity"], place, settings)
    _set_scale(tree, base, place["scale"])
    if place["network"]:
        tree["network_g"] = {"type": place["network"]}
    network, seed = tree["network_g"]["type"], place["seed"]
    share = _share(tree["sparsity"], place["ratio"])
    level = f"_{share:g}" if share else ""
    tree["name"] = f"{network}_x{place['scale']}_{place['method']}{level}_seed{seed}"
    tree["manual_seed"] = seed
    tree["path"]["experiments_root"] = str(root)
    # The report is of the latest models: those of every checkpoint would fill the disk.
    tree["logger"].setdefault("keep_models", 1)
    try:
        settings = config.parse(tree)
    except ConfigError as error:
        raise ConfigError(f"{tree['name']}: {error}") from None
    return Run(place["method"], share, place["scale"], seed, network, settings)


def _sparsity(base: dict[str, Any], place: dict[str, Any], settings: dict[str, Any]) -> Any:
    """The section of a run: the base's, less what belongs to its method if that is another."""
    kind = settings.get("method", place["method"])
    if not METHODS[kind].prunes:
        return {"method": kind, "freeze_iter": base["freeze_iter"], **settings}
    other = kind != base["method"]
    section = {k: v for k, v in base.items() if not (other and k in _OF_METHOD)}
    section |= {"method": kind, "ratio": place["ratio"], **settings}
    if section.get("keep") and "ratio" not in settings:
        del section["ratio"]
    return section


def _share(sparsity: dict[str, Any], ratio: float | None) -> float:
    """What a run is compared at; the base's pattern where neither base nor grid has a ratio."""
    if not METHODS[sparsity["method"]].prunes:
        return 0.0
    return 1 - sparsity["keep"]["n"] / sparsity["keep"]["of"] if ratio is None else ratio


def _set_scale(tree: dict[str, Any], base: Config, scale: int) -> None:
    """Makes a configuration one of another scale, with the same low-resolution crops."""
    tree["scale"] = scale
    if "upscale" in tree["network_g"]:
        tree["network_g"]["upscale"] = scale
    tree["datasets"]["train"]["gt_size"] = base.train_data.gt_size // base.scale * scale
    for key, entry in tree["datasets"].items():
        entry.pop("scale", None)
        folder = entry.get("dataroot_lq")
        if folder and scale != base.scale and "{s}" not in folder:
            raise ConfigError(
                f"base: datasets.{key}.dataroot_lq is of x{base.scale}, and the grid has "
                f"x{scale}: write {{s}} for the scale in it, or drop it"
            )
    for metric in tree["val"]["metrics"].values():
        if metric.get("crop_border") == base.scale:
            metric["crop_border"] = scale
