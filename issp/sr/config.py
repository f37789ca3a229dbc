"""The training configuration: BasicSR's YAML keys as pydantic models, checked before training.

The models are the list of keys, with types and defaults. Keys of BasicSR that mean nothing to a
driver of one process are accepted by name (`IGNORED_KEYS`), so its files run unchanged. An unknown
key is an error that names the nearest one.

`train.total_iter` counts all iterations, those of the pruning stage (`sparsity.freeze_iter`)
included; the scheduler's milestones count fine-tuning iterations only (docs/method.md,
section 1.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

from issp.utils.errors import ConfigError, MissingPackageError, import_optional
from issp.utils.text import suggest

try:
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Discriminator,
        Field,
        StrictBool,
        Tag,
        ValidationError,
        model_validator,
    )
    from pydantic_core import PydanticCustomError
except ImportError:
    raise MissingPackageError("training configurations", "pydantic") from None


def _number_from_text(value: Any) -> Any:
    """A number that YAML 1.1 reads as text (2e-4), and a whole one that it reads as 5e3."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    """A single value as a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def _between(low: float, high: float | None = None) -> AfterValidator:
    def check(value: float) -> float:
        if not (value >= low and (high is None or value <= high)):  # NaN is refused as well
            limits = f"at least {low}" if high is None else f"in {low}..{high}"
            raise ValueError(f"is {value}: it must be {limits}")
        return value

    return AfterValidator(check)


def _one_of(*choices: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is not supported: {suggest(value, choices)}")
        return value

    return AfterValidator(check)


def _on_disk(value: dict[str, Any]) -> dict[str, Any]:
    """Refuses other back ends; options of the disk back end mean nothing."""
    backend = value.get("type", "disk")
    if backend != "disk":
        raise ValueError(f"{backend!r}: only image files on disk are read")
    return {}


# Strict: true is no number, and 1 is not true. Text may be written as a number (name: 2024).
Integer = Annotated[int, Field(strict=True), BeforeValidator(_number_from_text)]
Number = Annotated[float, Field(strict=True), BeforeValidator(_number_from_text)]
Integers = Annotated[list[Integer], BeforeValidator(_listed)]
Numbers = Annotated[list[Number], BeforeValidator(_listed)]
Texts = Annotated[list[str], BeforeValidator(_listed)]


class Section(BaseModel):
    """A section of the file: unknown keys are refused, an empty value means the default.

    Attributes:
        IGNORED_KEYS: keys of BasicSR that have no meaning here.
    """

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, validate_default=True)
    IGNORED_KEYS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def unknown_keys(cls, tree: dict[Any, Any]) -> tuple[list[Any], Iterable[str]]:
        """Keys of `tree` that the section does not take, and those that it does."""
        known = [*cls.model_fields, *cls.IGNORED_KEYS]
        return [key for key in tree if key not in known], known

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        unknown, known = cls.unknown_keys(tree)
        if unknown:
            context = {"key": unknown[0], "hint": suggest(unknown[0], known)}
            raise PydanticCustomError("unknown_key", "unknown key {key}: {hint}", context)
        return {
            key: value
            for key, value in tree.items()
            if key not in cls.IGNORED_KEYS and (value is not None or key not in cls.model_fields)
        }


def _section() -> Any:
    """An absent section: its defaults, checked as if they stood in the file."""
    return Field(default_factory=dict, validate_default=True)


class _Images(Section):
    """What all entries of `datasets` have."""

    # meta_info_file would only repeat the file list of dataroot_gt.
    IGNORED_KEYS = ("phase", "scale", "meta_info_file", "use_shuffle", "prefetch_mode")
    IGNORED_KEYS += ("num_prefetch_queue", "pin_memory")

    dataroot_gt: str | None = None
    dataroot_lq: str | None = None
    filename_tmpl: str | None = None
    name: str = ""
    type: Annotated[str, _one_of("PairedImageDataset", "SamplePhotographs")] = "PairedImageDataset"
    io_backend: Annotated[dict[str, Any], AfterValidator(_on_disk)] = Field({}, exclude=True)

    @model_validator(mode="after")
    def _has_images(self) -> _Images:
        if self.type == "PairedImageDataset" and not self.dataroot_gt:
            raise ValueError("needs dataroot_gt, the folder of original images")
        return self


class TrainData(_Images):
    """`datasets.train`: where the crops come from."""

    name: str = "train"
    gt_size: Annotated[Integer, _between(0)] = 0  # 0: 64 low-resolution pixels
    use_hflip: StrictBool = True
    use_rot: StrictBool = True
    batch_size_per_gpu: Annotated[Integer, _between(1)] = 16
    num_worker_per_gpu: Annotated[Integer, _between(0)] = 0
    dataset_enlarge_ratio: Annotated[Integer, _between(1)] = 1
    small: Annotated[str, _one_of("error", "skip")] = "error"  # images smaller than the crop


class EvalData(_Images):
    """`datasets.val*` and `datasets.test*`: whole images with their originals."""


class Datasets(Section):
    """`datasets`: `train`, and any number of `val*` and `test*`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, EvalData] = Field(init=False)

    train: TrainData = _section()

    @classmethod
    def unknown_keys(cls, tree: dict[Any, Any]) -> tuple[list[Any], Iterable[str]]:
        """As in every section; BasicSR's rule for the keys of evaluation sets."""
        prefixes = ("val", "test")
        unknown = [k for k in tree if k != "train" and str(k).split("_")[0] not in prefixes]
        return unknown, ("train", "val", "test_1")

    @model_validator(mode="after")
    def _name_sets(self) -> Datasets:
        for key, entry in self.evaluation.items():
            entry.name = entry.name or key
        return self

    @property
    def evaluation(self) -> dict[str, EvalData]:
        """The entries `val*` and `test*` by key."""
        return self.__pydantic_extra__


class Optimizer(Section):
    """`train.optim_g`."""

    IGNORED_KEYS = ("amsgrad",)

    type: Annotated[str, _one_of("Adam", "AdamW", "SGD")] = "Adam"
    lr: Annotated[Number, _between(0)] = 2e-4
    weight_decay: Number = 0.0
    betas: Numbers = [0.9, 0.99]
    eps: Number = 1e-8


class Scheduler(Section):
    """`train.scheduler`, counted in fine-tuning iterations when the model is pruned."""

    IGNORED_KEYS = ("last_epoch",)

    type: Annotated[str, _one_of("MultiStepLR", "CosineAnnealingRestartLR")] = "MultiStepLR"
    milestones: Integers = []
    gamma: Number = 0.5
    periods: Integers = []
    restart_weights: Numbers = [1.0]
    eta_min: Number = 0.0

    @model_validator(mode="after")
    def _check_periods(self) -> Scheduler:
        if self.type == "CosineAnnealingRestartLR" and (
            not self.periods or len(self.restart_weights) not in (1, len(self.periods))
        ):
            raise ValueError("needs periods and one restart weight for each of them")
        return self


class Loss(Section):
    """`train.pixel_opt`."""

    type: Annotated[str, _one_of("L1Loss", "MSELoss", "CharbonnierLoss")] = "L1Loss"
    loss_weight: Number = 1.0
    reduction: Annotated[str, _one_of("mean")] = "mean"


class Train(Section):
    """`train`."""

    IGNORED_KEYS = ("manual_seed",)

    total_iter: Annotated[Integer, _between(1)] = 0
    warmup_iter: Integer = -1
    ema_decay: Annotated[Number, _between(0, 1)] = 0.0
    optim_g: Optimizer = _section()
    scheduler: Scheduler = _section()
    pixel_opt: Loss = _section()


class Metric(Section):
    """One entry of `val.metrics`; crop_border None means the scale."""

    IGNORED_KEYS = ("better", "input_order")

    type: Annotated[str, _one_of("calculate_psnr", "calculate_ssim")] = "calculate_psnr"
    crop_border: Integer | None = None
    test_y_channel: StrictBool = False


class Val(Section):
    """`val`."""

    IGNORED_KEYS = ("pbar", "suffix", "use_pbar", "grids")

    val_freq: Annotated[Integer, _between(1)] = 5000
    save_img: StrictBool = False
    metrics: dict[str, Metric] = {}


class Logger(Section):
    """`logger`."""

    IGNORED_KEYS = ("wandb", "save_latest_freq")

    print_freq: Annotated[Integer, _between(1)] = 100
    save_checkpoint_freq: Annotated[Integer, _between(1)] = 5000
    use_tb_logger: StrictBool = True
    keep_training_states: Annotated[Integer, _between(1)] = 2
    grad_stats_freq: Annotated[Integer, _between(0)] = 0  # between rows of gradients.csv; 0: none


class Paths(Section):
    """`path`."""

    IGNORED_KEYS = ("ignore_resume_networks", "root", "models", "training_states")
    IGNORED_KEYS += ("log", "visualization")

    pretrain_network_g: str | None = None
    param_key_g: str = "params"
    strict_load_g: StrictBool = True
    resume_state: str | None = None
    experiments_root: str = "experiments"


class Keep(Section):
    """`sparsity.keep`, and the form of an N:M entry in `sparsity.overrides`."""

    n: Integer = 0
    of: Integer = 0
    v: Integer = 1
    layout: str = "channels"
    tail: str = "error"


def _kind_of_target(value: Any) -> str:
    return "<keep>" if isinstance(value, dict | Keep) else "<ratio>"


# pydantic names the chosen kind in the place of an error; `_dotted` leaves what is in <> out.
Target = Annotated[
    Annotated[Number, Tag("<ratio>")] | Annotated[Keep, Tag("<keep>")],
    Discriminator(_kind_of_target),
]


class Sparsity(Section):
    """`sparsity`: what `issp.attach` gets. The section's absence means dense training."""

    method: str = "iss-p"
    ratio: Annotated[Number, _between(0, 1)] = 0.95
    shrink: Annotated[Number, _between(0, 1)] = 0.95
    freeze_iter: Annotated[Integer, _between(1)] = 100_000
    exclude: Texts = []
    overrides: dict[str, Target] = {}
    keep: Keep | None = None


def _folder_name(value: str) -> str:
    if not value or Path(value).name != value or value in (".", ".."):
        raise ValueError(f"must be a plain folder name, got {value!r}")
    return value


def _with_type(value: dict[str, Any]) -> dict[str, Any]:
    if not value.get("type"):
        raise ValueError("has no type: name a network, such as `type: SwinIR`")
    return value


class Config(Section):
    """A whole training run."""

    IGNORED_KEYS = ("model_type", "num_gpu", "is_train", "dist", "dist_params")
    IGNORED_KEYS += ("find_unused_parameters",)

    name: Annotated[str, AfterValidator(_folder_name)] = ""
    scale: Annotated[Integer, _between(2)] = 0
    manual_seed: Integer = 0
    device: str = "auto"
    network_g: Annotated[dict[str, Any], AfterValidator(_with_type)] = {}
    datasets: Datasets = _section()
    path: Paths = _section()
    train: Train = _section()
    val: Val = _section()
    logger: Logger = _section()
    sparsity: Sparsity | None = None

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        total, crop = self.train.total_iter, self.train_data.gt_size
        if self.freeze_iter > total:
            raise ValueError(
                f"sparsity.freeze_iter is {self.freeze_iter}: it must be in 1..{total}"
            )
        if crop % self.scale:
            raise ValueError(f"datasets.train.gt_size {crop} is no multiple of {self.scale}")
        self.train_data.gt_size = crop or 64 * self.scale
        return self

    @property
    def train_data(self) -> TrainData:
        """`datasets.train`."""
        return self.datasets.train

    @property
    def val_data(self) -> list[EvalData]:
        """The entries `val*` and `test*` of `datasets`."""
        return list(self.datasets.evaluation.values())

    @property
    def freeze_iter(self) -> int:
        """Iterations of the pruning stage; 0 for dense training."""
        return self.sparsity.freeze_iter if self.sparsity else 0

    @property
    def folder(self) -> Path:
        """experiments/<name>."""
        return Path(self.path.experiments_root) / self.name


def parse(tree: dict[str, Any]) -> Config:
    """Checks nested mappings (a YAML file's content) and fills in the defaults.

    Raises:
        ConfigError: a key is unknown (the nearest is named), missing, or has an unusable value.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


# The start of pydantic's type of an error -> what the value must be.
_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "model": "a section of keys and values",
    "dict": "a section of keys and values",
}


def _sentence(error: ValidationError) -> str:
    """The first problem as a sentence that names the key; a misspelt key comes first."""
    problems = error.errors()
    problem = next((p for p in problems if p["type"] == "unknown_key"), problems[0])
    key, context = _dotted(problem["loc"]), problem.get("ctx", {})
    if problem["type"] == "unknown_key":
        return f"unknown key {_dotted((*problem['loc'], str(context['key'])))}: {context['hint']}"
    if "error" in context:  # raised by a validator above
        return f"{key} {context['error']}".strip()
    wanted = _WANTED.get(problem["type"].split("_")[0])
    if wanted is None:
        return f"{key}: {problem['msg']}"
    return f"{key or 'the configuration'} must be {wanted}, got {problem['input']!r}"


def _dotted(place: tuple[int | str, ...]) -> str:
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.startswith("<"):
            text += f".{part}" if text else part
    return text


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, read with safe_load.

    Raises:
        ConfigError: unreadable, not YAML, or not a mapping; the line is named.
        MissingPackageError: PyYAML is not installed.
    """
    yaml = import_optional("yaml", "PyYAML", "YAML files")
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read configuration {path}: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path} is not valid YAML: {line}{problem}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values, such as `name: my-run`")
    return tree


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Writes tree[a][b][c] for "a.b.c", making the sections on the way.

    Raises:
        ConfigError: something on the way is not a section.
    """
    *sections, last = dotted.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"{dotted}: {section} is not a section")
    tree[last] = value


def to_tree(config: Config) -> dict[str, Any]:
    """The nested mapping that `parse` makes this configuration from."""
    return {key: value for key, value in config.model_dump().items() if value is not None}


def dump(config: Config) -> str:
    """The configuration as YAML text."""
    yaml = import_optional("yaml", "PyYAML", "YAML files")
    return yaml.safe_dump(to_tree(config), sort_keys=False)
