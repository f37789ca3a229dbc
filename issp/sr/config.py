"""The training configuration: BasicSR's YAML keys as pydantic models, checked before training.

The models are the list of keys, with types and defaults. Every key is honoured, refused or named:
those of BasicSR that mean nothing to a driver of one process are accepted (`IGNORED_KEYS`), so its
files run, and `Config.unused_keys` lists those that a file sets. An unknown key is an error that
names the nearest one.

`train.total_iter` counts all iterations, those of the pruning stage (`sparsity.freeze_iter`)
included; the scheduler's milestones count fine-tuning iterations only (docs/method.md,
section 1.3), and one below 1 is a share of that stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from issp.pruning import methods
from issp.utils.errors import ConfigError, MissingPackageError, import_optional
from issp.utils.files import user_path
from issp.utils.text import suggest

try:
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Discriminator,
        Field,
        ModelWrapValidatorHandler,
        PrivateAttr,
        StrictBool,
        Tag,
        ValidationError,
        ValidationInfo,
        field_validator,
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


def _with_numbers(value: dict[str, Any]) -> dict[str, Any]:
    """The values of a section of other names, whose numbers YAML 1.1 may have read as text."""
    return {k: _number_from_text(v) if isinstance(v, str) else v for k, v in value.items()}


def listed(value: Any) -> Any:
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


# Of crops, copies of the images, and processes: more would fill the memory or the process table.
_MANY, _MOST_WORKERS = 2**20, 1024
_SEEDS = _between(-(2**63), 2**63 - 1)  # what torch takes

# Strict: true is no number, and 1 is not true. Text may be written as a number (name: 2024).
Integer = Annotated[int, Field(strict=True), BeforeValidator(_number_from_text)]
Number = Annotated[
    float, Field(strict=True, allow_inf_nan=False), BeforeValidator(_number_from_text)
]
Periods = Annotated[list[Annotated[Integer, _between(1)]], BeforeValidator(listed)]
RestartWeights = Annotated[list[Annotated[Number, _between(0)]], BeforeValidator(listed)]
Numbers = Annotated[list[Number], BeforeValidator(listed)]
Texts = Annotated[list[str], BeforeValidator(listed)]
FilePath = Annotated[str, AfterValidator(lambda path: str(user_path(path)))]


def _check_milestone(value: float) -> float:
    if not (0 < value < 1 or (value >= 0 and float(value).is_integer())):
        raise ValueError(f"is {value}: it must be a whole number, or a share between 0 and 1")
    return value


Milestone = Annotated[Number, AfterValidator(_check_milestone)]


def _check_layer(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"is {value!r}: it must be a name pattern or the number of a layer")
    return value


Layers = Annotated[list[Annotated[Any, AfterValidator(_check_layer)]], BeforeValidator(listed)]


class Section(BaseModel):
    """A section of the file: unknown keys are refused, an empty value means the default.

    Attributes:
        IGNORED_KEYS: keys of BasicSR that have no meaning here.
        RENAMED_KEYS: names of earlier releases of BasicSR -> the present ones.
    """

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, validate_default=True)
    IGNORED_KEYS: ClassVar[tuple[str, ...]] = ()
    RENAMED_KEYS: ClassVar[dict[str, str]] = {}

    _unused: tuple[str, ...] = PrivateAttr(default=())

    @classmethod
    def unknown_keys(cls, tree: dict[Any, Any]) -> tuple[list[Any], Iterable[str]]:
        """Keys of `tree` that the section does not take, and those that it does."""
        known = [*cls.model_fields, *cls.IGNORED_KEYS]
        return [key for key in tree if key not in known], known

    @model_validator(mode="wrap")
    @classmethod
    def _check_keys(cls, tree: Any, handler: ModelWrapValidatorHandler[Section]) -> Section:
        if not isinstance(tree, dict):
            return handler(tree)
        tree = {cls.RENAMED_KEYS.get(key, key): value for key, value in tree.items()}
        unknown, known = cls.unknown_keys(tree)
        if unknown:
            context = {"key": unknown[0], "hint": suggest(unknown[0], known)}
            raise PydanticCustomError("unknown_key", "unknown key {key}: {hint}", context)
        section = handler(
            {
                key: value
                for key, value in tree.items()
                if key not in cls.IGNORED_KEYS
                and (value is not None or key not in cls.model_fields)
            }
        )
        section._unused = tuple(k for k in tree if k in cls.IGNORED_KEYS and _asks(tree[k]))
        return section

    def unused_keys(self) -> list[str]:
        """The dotted keys of `IGNORED_KEYS` that this section and those in it set."""
        entries = {**dict(self), **(self.__pydantic_extra__ or {})}
        found = list(self._unused)
        for key, value in entries.items():
            inner = value if isinstance(value, dict) else {"": value}
            for name, section in inner.items():
                if isinstance(section, Section):
                    path = f"{key}.{name}" if name else key
                    found += [f"{path}.{unused}" for unused in section.unused_keys()]
        return found


SectionType = TypeVar("SectionType", bound=Section)


class TypedSection(Section):
    """A section whose `type` decides which of its keys have a meaning; others are None.

    Attributes:
        TYPE_OPTIONS: type -> key -> its default.
        IDLE: values that a key of another type may have, because they ask for nothing.
    """

    TYPE_OPTIONS: ClassVar[dict[str, dict[str, Any]]]
    IDLE: ClassVar[tuple[Any, ...]] = ()

    type: str

    @model_validator(mode="after")
    def _check_options(self) -> TypedSection:
        own = self.TYPE_OPTIONS[self.type]
        for key in sorted({k for options in self.TYPE_OPTIONS.values() for k in options}):
            value = getattr(self, key)
            if key not in own and value not in (None, *self.IDLE):
                raise ValueError(f"has {key}, which {self.type} does not take: drop it")
            if key not in own or value is None:
                setattr(self, key, own.get(key))
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The keys that have a meaning for this `type`, and their values."""
        return {key: getattr(self, key) for key in self.TYPE_OPTIONS[self.type]}


def _asks(value: Any) -> bool:
    """A value that wants something: `wandb: {project: ~}` and `pbar: false` do not."""
    return any(map(_asks, value.values())) if isinstance(value, dict) else bool(value)


def _section() -> Any:
    """An absent section: its defaults, checked as if they stood in the file."""
    return Field(default_factory=dict, validate_default=True)


class _Images(Section):
    """What all entries of `datasets` have."""

    IGNORED_KEYS = ("phase", "prefetch_mode", "num_prefetch_queue")
    RENAMED_KEYS = {"use_flip": "use_hflip"}

    dataroot_gt: str | None = None
    dataroot_lq: str | None = None
    filename_tmpl: str | None = None
    meta_info_file: str | None = None
    scale: Integer | None = None
    task: Annotated[str, _one_of("SR")] = "SR"
    name: str = ""
    type: Annotated[str, _one_of("PairedImageDataset", "SamplePhotographs")] = "PairedImageDataset"
    io_backend: Annotated[dict[str, Any], AfterValidator(_on_disk)] = Field({}, exclude=True)

    @model_validator(mode="after")
    def _has_images(self) -> _Images:
        folders = ("dataroot_gt", "dataroot_lq", "filename_tmpl", "meta_info_file")
        if self.type == "PairedImageDataset" and not self.dataroot_gt:
            raise ValueError("needs dataroot_gt, the folder of original images")
        given = [key for key in folders if getattr(self, key)]
        if self.type == "SamplePhotographs" and given:
            raise ValueError(f"has {given[0]}: drop it, or `type: SamplePhotographs`")
        return self


class TrainData(_Images):
    """`datasets.train`: where the crops come from."""

    name: str = "train"
    gt_size: Annotated[Integer, _between(0)] = 0  # 0: 64 low-resolution pixels
    use_hflip: StrictBool = True
    use_rot: StrictBool = True
    use_shuffle: StrictBool = True
    pin_memory: StrictBool = True  # has a meaning on a GPU alone
    batch_size_per_gpu: Annotated[Integer, _between(1, _MANY)] = 16
    num_worker_per_gpu: Annotated[Integer, _between(0, _MOST_WORKERS)] = 0
    dataset_enlarge_ratio: Annotated[Integer, _between(1, _MANY)] = 1
    small: Annotated[str, _one_of("error", "skip")] = "error"  # images smaller than the crop


class EvalData(_Images):
    """`datasets.val*` and `datasets.test*`: whole images with their originals."""

    name: Annotated[str, AfterValidator(lambda name: name and _folder_name(name))] = ""
    IGNORED_KEYS = (*_Images.IGNORED_KEYS, "use_shuffle", "pin_memory")


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
        keys: dict[str, str] = {}
        for key, entry in self.evaluation.items():
            entry.name = entry.name or key
            if entry.name in keys:
                raise ValueError(
                    f"{keys[entry.name]} and {key} are both called {entry.name!r}: "
                    "give each a name of its own"
                )
            keys[entry.name] = key
        return self

    @property
    def evaluation(self) -> dict[str, EvalData]:
        """The entries `val*` and `test*` by key."""
        return self.__pydantic_extra__


_ADAM = {"weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False}
_SGD = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False}


class Optimizer(TypedSection):
    """`train.optim_g`; what a file leaves out has torch's default, as in BasicSR."""

    TYPE_OPTIONS = {"Adam": _ADAM, "AdamW": {**_ADAM, "weight_decay": 0.01}, "SGD": _SGD}

    type: Annotated[str, _one_of("Adam", "AdamW", "SGD")] = "Adam"
    lr: Annotated[Number, _between(0)] = 2e-4
    weight_decay: Annotated[Number, _between(0)] | None = None
    betas: Annotated[Numbers | None, Field(min_length=2, max_length=2)] = None
    eps: Number | None = None
    amsgrad: StrictBool | None = None
    momentum: Number | None = None
    dampening: Number | None = None
    nesterov: StrictBool | None = None


class Scheduler(TypedSection):
    """`train.scheduler`, counted in fine-tuning iterations when the model is pruned."""

    TYPE_OPTIONS = {
        "MultiStepLR": {"milestones": [], "gamma": 0.5},
        "CosineAnnealingRestartLR": {"periods": [], "restart_weights": [1.0], "eta_min": 0.0},
    }
    IDLE = ([], 0.5, [1.0], 0.0)  # the defaults, which earlier revisions wrote to config.yml

    type: Annotated[str, _one_of(*TYPE_OPTIONS)] = "MultiStepLR"
    milestones: Annotated[list[Milestone], BeforeValidator(listed)] | None = None
    gamma: Annotated[Number, _between(0)] | None = None
    periods: Periods | None = None
    restart_weights: RestartWeights | None = None
    eta_min: Annotated[Number, _between(0)] | None = None
    last_epoch: Annotated[Integer, _between(-1, -1)] = -1

    @model_validator(mode="after")
    def _check_periods(self) -> Scheduler:
        if self.type == "CosineAnnealingRestartLR" and (
            not self.periods or len(self.restart_weights or ()) not in (1, len(self.periods))
        ):
            raise ValueError("needs periods and one restart weight for each of them")
        return self


class Loss(Section):
    """`train.pixel_opt`."""

    type: Annotated[str, _one_of("L1Loss", "MSELoss", "CharbonnierLoss")] = "L1Loss"
    loss_weight: Annotated[Number, _between(0)] = 1.0
    reduction: Annotated[str, _one_of("mean")] = "mean"


class Train(Section):
    """`train`."""

    manual_seed: Annotated[Integer, _SEEDS] | None = (
        None  # an older place of the file's manual_seed
    )
    total_iter: Annotated[Integer, _between(1)] = 0
    warmup_iter: Integer = -1
    ema_decay: Annotated[Number, _between(0, 0.999999)] = 0.0  # 1 would keep the first weights
    # What several processes have of the network: all of it (DistributedDataParallel), or their
    # rows of each weight (fully_shard).
    parallel: Annotated[str, _one_of("ddp", "fsdp")] = "ddp"
    optim_g: Optimizer = _section()
    scheduler: Scheduler = _section()
    pixel_opt: Loss = _section()


class Metric(Section):
    """One entry of `val.metrics`; crop_border None means the scale."""

    type: Annotated[str, _one_of("calculate_psnr", "calculate_ssim")] = "calculate_psnr"
    better: Annotated[str, _one_of("higher")] = "higher"
    input_order: Annotated[str, _one_of("HWC")] = "HWC"
    crop_border: Annotated[Integer, _between(0)] | None = None
    test_y_channel: StrictBool = False


class Val(Section):
    """`val`."""

    IGNORED_KEYS = ("pbar", "suffix", "use_pbar", "grids")

    val_freq: Annotated[Integer, _between(1)] = 5000
    save_img: StrictBool = False
    soft: StrictBool = True  # while pruning, also score the model whose weights are not masked
    metrics: dict[str, Metric] = {}

    @model_validator(mode="after")
    def _one_of_each_type(self) -> Val:
        names: dict[str, str] = {}
        for name, metric in self.metrics.items():
            if metric.type in names:
                raise ValueError(
                    f"metrics {names[metric.type]} and {name} are both {metric.type}: keep one of "
                    "them, and use `issp test` for the other"
                )
            names[metric.type] = name
        return self


class Logger(Section):
    """`logger`."""

    IGNORED_KEYS = ("wandb", "save_latest_freq")

    print_freq: Annotated[Integer, _between(1)] = 100
    save_checkpoint_freq: Annotated[Integer, _between(1)] = 5000
    use_tb_logger: StrictBool = True
    keep_training_states: Annotated[Integer, _between(1)] = 2
    # Of net_g_<iteration>, beside the best and the latest model; None: all, as BasicSR.
    keep_models: Annotated[Integer, _between(1)] | None = None
    # Iterations between the rows of gradients.csv and of masks.csv; 0: none.
    grad_stats_freq: Annotated[Integer, _between(0)] = 0
    mask_stats_freq: Annotated[Integer, _between(0)] = 0
    # Name patterns and numbers of the recorded layers; empty: all.
    grad_stats_layers: Layers = []
    mask_stats_layers: Layers = []
    layer_index_base: Annotated[Integer, _between(0, 1)] = 1  # number of the first layer

    @model_validator(mode="after")
    def _check_recorded(self) -> Logger:
        for kind in ("grad_stats", "mask_stats"):
            if getattr(self, f"{kind}_layers") and not getattr(self, f"{kind}_freq"):
                raise ValueError(f"has {kind}_layers, but records nothing of them: set {kind}_freq")
        return self


class Paths(Section):
    """`path`."""

    IGNORED_KEYS = ("ignore_resume_networks", "root", "models", "training_states")
    IGNORED_KEYS += ("log", "visualization")
    RENAMED_KEYS = {"pretrain_model_g": "pretrain_network_g", "strict_load": "strict_load_g"}

    pretrain_network_g: FilePath | None = None
    param_key_g: str = "params"
    strict_load_g: StrictBool = True
    resume_state: FilePath | None = None
    experiments_root: FilePath = "experiments"


class Keep(Section):
    """`sparsity.keep`, and the form of an N:M entry in `sparsity.overrides`."""

    n: Integer = 0
    of: Integer = 0
    v: Integer = 1
    layout: str = "channels"
    tail: str = "error"
    c: Integer = 1


class Unit(Section):
    """`sparsity.unit`, also written [v, c]."""

    v: Integer = 0
    c: Integer = 1
    tail: str = "error"


def _as_unit(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) != 2:
        raise ValueError(f"is {value}: write [v, c], output rows and input channels")
    return dict(zip("vc", value, strict=True))


def _kind_of_target(value: Any) -> str:
    return "<keep>" if isinstance(value, dict | Keep) else "<ratio>"


def _check_ratio(value: float) -> float:
    if 1 < value <= 100:
        raise ValueError(f"is {value:g}: write {value / 100:g} for {value:g} %")
    if value == 0:
        raise ValueError("is 0, which prunes nothing: leave it out for dense training")
    # issp.num_pruned never prunes more of a layer.
    if not 0 < value <= 0.995:
        raise ValueError(f"is {value:g}: it must be above 0 and at most 0.995")
    return value


def _check_override(value: float) -> float:
    return value if value == 0 else _check_ratio(value)  # 0: the layer stays dense


# pydantic names the chosen kind in the place of an error; `_dotted` leaves what is in <> out.
Target = Annotated[
    Annotated[Number, AfterValidator(_check_override), Tag("<ratio>")]
    | Annotated[Keep, Tag("<keep>")],
    Discriminator(_kind_of_target),
]


def _check_method(name: str) -> str:
    if name not in methods.METHODS:
        raise ValueError(f"is {name!r}: {suggest(name, methods.METHODS)}")
    return name


def _check_accelerate(value: Any) -> bool | str:
    if value is True or value is False or value == "auto":
        return value
    raise ValueError(f"is {value!r}: it must be true, false or auto")


class Sparsity(Section):
    """`sparsity`: what `issp.attach` gets. The section's absence means dense training."""

    method: Annotated[str, AfterValidator(_check_method)] = "iss-p"
    # Of the method, see `issp.methods`.
    options: Annotated[dict[str, Any], AfterValidator(_with_numbers)] = {}
    ratio: Annotated[Number, AfterValidator(_check_ratio)] | None = None
    shrink: Annotated[Number, _between(0, 1)] | None = None
    freeze_iter: Annotated[Integer, _between(1)] | None = None
    exclude: Texts = []
    overrides: dict[str, Target] = {}
    keep: Keep | None = None
    unit: Annotated[Unit | None, BeforeValidator(_as_unit)] = None
    from_zeros: StrictBool = False
    accelerate: Annotated[bool | str, BeforeValidator(_check_accelerate)] = False

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "shrink" in options:
            raise ValueError("has shrink: write it as sparsity.shrink")
        try:
            if "method" in info.data:  # otherwise it is unknown, which is said of the method
                methods.create(info.data["method"], **options)
        except (ValueError, TypeError) as error:
            raise PydanticCustomError("option", "{text}", {"text": str(error)}) from None
        return options

    @model_validator(mode="after")
    def _check_together(self) -> Sparsity:
        pruning = ("ratio", "shrink", "freeze_iter", "keep", "unit", "overrides")
        given = [key for key in pruning if getattr(self, key) not in (None, {})]
        if self.from_zeros and given:
            raise ValueError(f"from_zeros keeps the zeros that the weights have: drop {given[0]}")
        if self.keep and self.ratio is not None:
            raise ValueError("has ratio beside keep, the N:M pattern of all layers: drop one")
        if self.keep and self.unit:
            raise ValueError(
                "has unit beside keep, the N:M pattern of all layers: give keep v and c"
            )
        made = methods.create(self.method, **self.options)
        if self.unit and made.prunes and not made.takes_units:
            raise ValueError(f"has unit, but method {self.method} prunes single weights: drop it")
        if self.shrink is not None and "shrink" not in made.options():
            raise ValueError(f"has shrink, but method {self.method} does not use it: drop it")
        if not made.prunes and self.accelerate:
            raise ValueError(f"has accelerate, but method {self.method} prunes nothing: drop it")
        if not made.prunes and given and given != ["freeze_iter"]:
            key = next(key for key in given if key != "freeze_iter")
            raise ValueError(f"has {key}, but method {self.method} prunes nothing: drop it")
        if not self.from_zeros:
            self.freeze_iter = self.freeze_iter or 100_000
            if made.prunes:
                self.ratio = None if self.keep else self.ratio or made.default_sparsity
            if "shrink" in made.options() and self.shrink is None:
                self.shrink = 0.95
        return self


def _folder_name(value: str) -> str:
    if not value or Path(value).name != value or value in (".", "..") or "\0" in value:
        raise ValueError(f"must be a plain folder name, got {value!r}")
    return value


def _with_type(value: dict[str, Any]) -> dict[str, Any]:
    if not value.get("type"):
        raise ValueError("has no type: name a network, such as `type: SwinIR`")
    return _with_numbers(value)


def _gpus(value: int | str) -> int | str:
    if value != "auto" and not (isinstance(value, int) and value >= 0):
        raise ValueError(f"is {value!r}: it must be a whole number, or auto")
    return value


# Of BasicSR and of the authors; all train by a pixel loss alone.
_MODEL_TYPES = ("SRModel", "SwinIRModel", "CATModel", "CATModle")


class Config(Section):
    """A whole training run."""

    IGNORED_KEYS = ("dist_params",)

    name: Annotated[str, AfterValidator(_folder_name)] = ""
    model_type: Annotated[str, _one_of(*_MODEL_TYPES)] = "SRModel"
    scale: Annotated[Integer, _between(2)] = 0
    num_gpu: Annotated[Any, BeforeValidator(_number_from_text), AfterValidator(_gpus)] = "auto"
    dist: StrictBool = False
    find_unused_parameters: StrictBool = False
    is_train: StrictBool = True
    manual_seed: Annotated[Integer, _SEEDS] = 0
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
        for key, entry in {"train": self.train_data, **self.datasets.evaluation}.items():
            if entry.scale not in (None, self.scale):
                raise ValueError(f"datasets.{key}.scale is {entry.scale} but scale is {self.scale}")
        if self.logger.mask_stats_freq and not self.sparsity:
            raise ValueError("logger.mask_stats_freq records masks: add a sparsity section")
        if self.sparsity and self.sparsity.from_zeros and not self.path.pretrain_network_g:
            raise ValueError("sparsity.from_zeros needs sparse weights: path.pretrain_network_g")
        return self

    @model_validator(mode="after")
    def _check_shards(self) -> Config:
        """Refuses what needs whole layers where `train.parallel` shards them."""
        if self.train.parallel != "fsdp":
            return self
        remedy = "train with parallel: ddp, whose masks are the same"
        for key in ("grad_stats_freq", "mask_stats_freq"):
            if getattr(self.logger, key):
                raise ValueError(f"logger.{key} records whole layers, not shards: {remedy}")
        if self.sparsity and self.sparsity.accelerate:
            raise ValueError(f"sparsity.accelerate needs whole layers, not shards: {remedy}")
        method = self.sparsity and self.sparsity.method
        if method and not methods.METHODS[method].takes_shards:
            known = ", ".join(name for name, one in methods.METHODS.items() if one.takes_shards)
            raise ValueError(
                f"sparsity.method {method} needs whole layers, but train.parallel is fsdp: use one "
                f"of {known}, or parallel: ddp"
            )
        return self

    @model_validator(mode="after")
    def _apply_older_keys(self) -> Config:
        """`train.manual_seed`, and BasicSR's way to ask for the CPU, `num_gpu: 0`."""
        seed = self.train.manual_seed
        if seed is not None and "manual_seed" in self.model_fields_set and seed != self.manual_seed:
            raise ValueError(f"train.manual_seed {seed} contradicts manual_seed: drop one")
        self.manual_seed = self.manual_seed if seed is None else seed
        self.train.manual_seed = None
        if not self.is_train:
            raise ValueError("is_train is false, but this command trains: see issp test --help")
        if self.num_gpu == 0 and self.device not in ("auto", "cpu"):
            raise ValueError(f"num_gpu is 0 but device is {self.device}: make them agree")
        self.device = "cpu" if self.num_gpu == 0 else self.device
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
        """Iterations of the pruning stage; 0 for dense training and for `from_zeros`."""
        return (self.sparsity and self.sparsity.freeze_iter) or 0

    @property
    def milestones(self) -> list[int]:
        """`train.scheduler.milestones` in fine-tuning iterations, ascending; shares resolved."""
        stage = self.train.total_iter - self.freeze_iter
        given = self.train.scheduler.milestones or []
        return sorted(round(m * stage) if 0 < m < 1 else int(m) for m in given)

    @property
    def folder(self) -> Path:
        """experiments/<name>."""
        return Path(self.path.experiments_root) / self.name


def parse(tree: dict[str, Any]) -> Config:
    """Checks nested mappings (a YAML file's content) and fills in the defaults.

    Raises:
        ConfigError: a key is unknown (the nearest is named), missing, or has an unusable value.
    """
    return validated(Config, tree)


def validated(section: type[SectionType], tree: dict[str, Any]) -> SectionType:
    """As `parse`, for another file made of sections."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


# The start of pydantic's type of an error -> what the value must be.
_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
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
        tree = parse_yaml(user_path(path).read_text(encoding="utf-8"), str(path))
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


def parse_yaml(text: str, source: str) -> Any:
    """The value that YAML text stands for, read as safe_load does.

    Args:
        text: YAML.
        source: what the text is, for the error.

    Raises:
        ConfigError: a key stands twice in one mapping, or a value is none of its YAML type.
        yaml.YAMLError: it is not YAML.
    """
    yaml = import_optional("yaml", "PyYAML", "YAML files")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _refuse_duplicates(node, source)
        return loader.construct_document(node) if node else None
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply") from None
    except (ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        # What PyYAML's constructors raise for `!!float abc`, `!!bool abc` and the date 2024-13-45.
        raise ConfigError(f"{source} has a value that is none of its YAML type: {error}") from None


def _refuse_duplicates(root: Any, source: str) -> None:
    """Raises ConfigError for a key that stands twice in one mapping: YAML would take the last."""
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))
        lines: dict[Any, int] = {}
        for item in node.value:  # pairs in a mapping, nodes in a sequence
            key, value = item if isinstance(item, tuple) else (None, item)
            todo.append(value)
            if key is None or not isinstance(key.value, str) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                raise ConfigError(
                    f"{source} has the key {key.value} twice, in lines {first} and {line}: drop one"
                )
            lines[key.value] = line


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
    return config.model_dump(exclude_none=True)


def dump(config: Config) -> str:
    """The configuration as YAML text."""
    yaml = import_optional("yaml", "PyYAML", "YAML files")
    return yaml.safe_dump(to_tree(config), sort_keys=False)
