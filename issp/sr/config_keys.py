"""The keys of a training configuration: BasicSR's as dataclasses, with their types and defaults.

The dataclasses are the list of keys. Keys of BasicSR that mean nothing to a single-process driver
are accepted by name (`HARMLESS`): its files run unchanged. `train.total_iter` counts all
iterations, those of the pruning stage (`sparsity.freeze_iter`) included; the scheduler's milestones
count fine-tuning iterations only (method notes, section 1.3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class TrainData:
    """`datasets.train`: where the crops come from."""

    dataroot_gt: str | None = None
    dataroot_lq: str | None = None
    filename_tmpl: str | None = None
    name: str = "train"
    type: str = "PairedImageDataset"
    gt_size: int = 0  # 0: 64 low-resolution pixels
    use_hflip: bool = True
    use_rot: bool = True
    batch_size_per_gpu: int = 16
    num_worker_per_gpu: int = 0
    dataset_enlarge_ratio: int = 1
    small: str = "error"  # images smaller than the crop: "error" or "skip"


@dataclass
class EvalData:
    """`datasets.val*` and `datasets.test*`: whole images with their truth."""

    dataroot_gt: str | None = None
    dataroot_lq: str | None = None
    filename_tmpl: str | None = None
    name: str = ""
    type: str = "PairedImageDataset"


@dataclass
class Optimizer:
    """`train.optim_g`."""

    type: str = "Adam"
    lr: float = 2e-4
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8


@dataclass
class Scheduler:
    """`train.scheduler`, counted in fine-tuning iterations when the model is pruned."""

    type: str = "MultiStepLR"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.5
    periods: list[int] = field(default_factory=list)
    restart_weights: list[float] = field(default_factory=lambda: [1.0])
    eta_min: float = 0.0


@dataclass
class Loss:
    """`train.pixel_opt`."""

    type: str = "L1Loss"
    loss_weight: float = 1.0
    reduction: str = "mean"


@dataclass
class Train:
    """`train`."""

    total_iter: int = 0
    warmup_iter: int = -1
    ema_decay: float = 0.0
    optim_g: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)
    pixel_opt: Loss = field(default_factory=Loss)


@dataclass
class Metric:
    """One entry of `val.metrics`; crop_border None means the scale."""

    type: str = "calculate_psnr"
    crop_border: int | None = None
    test_y_channel: bool = False


@dataclass
class Val:
    """`val`."""

    val_freq: int = 5000
    save_img: bool = False
    metrics: dict[str, Metric] = field(default_factory=dict)


@dataclass
class Logger:
    """`logger`."""

    print_freq: int = 100
    save_checkpoint_freq: int = 5000
    use_tb_logger: bool = True
    keep_training_states: int = 2
    grad_stats_freq: int = 0  # iterations between rows of gradients.csv; 0: none


@dataclass
class Paths:
    """`path`."""

    pretrain_network_g: str | None = None
    param_key_g: str = "params"
    strict_load_g: bool = True
    resume_state: str | None = None
    experiments_root: str = "experiments"


@dataclass
class Keep:
    """`sparsity.keep`, and the form of an N:M entry in `sparsity.overrides`."""

    n: int = 0
    of: int = 0
    v: int = 1
    layout: str = "channels"
    tail: str = "error"


@dataclass
class Sparsity:
    """`sparsity`: what `issp.attach` gets. The section's absence means dense training."""

    method: str = "iss-p"
    ratio: float = 0.95
    shrink: float = 0.95
    freeze_iter: int = 100_000
    exclude: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    keep: Keep | None = None


@dataclass
class Config:
    """A whole training run."""

    name: str = ""
    scale: int = 0
    manual_seed: int = 0
    device: str = "auto"
    network_g: dict[str, Any] = field(default_factory=dict)
    train_data: TrainData = field(default_factory=TrainData)
    val_data: list[EvalData] = field(default_factory=list)
    path: Paths = field(default_factory=Paths)
    train: Train = field(default_factory=Train)
    val: Val = field(default_factory=Val)
    logger: Logger = field(default_factory=Logger)
    sparsity: Sparsity | None = None

    @property
    def freeze_iter(self) -> int:
        """Iterations of the pruning stage; 0 for dense training."""
        return self.sparsity.freeze_iter if self.sparsity else 0

    @property
    def folder(self) -> Path:
        """experiments/<name>."""
        return Path(self.path.experiments_root) / self.name


# BasicSR's keys without a meaning here. val.pbar, logger.wandb and the like change no result;
# meta_info_file would only repeat the file list of dataroot_gt.
HARMLESS = {
    "": ("model_type", "num_gpu", "dist_params", "find_unused_parameters", "is_train", "dist"),
    "datasets.*": (
        *("phase", "scale", "io_backend", "meta_info_file", "use_shuffle"),
        *("prefetch_mode", "num_prefetch_queue", "pin_memory"),
    ),
    "path": ("ignore_resume_networks", "root", "models", "training_states", "log", "visualization"),
    "train.scheduler": ("last_epoch",),
    "train.optim_g": ("amsgrad",),
    "train": ("manual_seed",),
    "val": ("pbar", "suffix", "use_pbar", "grids"),
    "val.metrics.*": ("better", "input_order"),
    "logger": ("wandb", "save_latest_freq"),
}
CHOICES = {
    "train.optim_g.type": ("Adam", "AdamW", "SGD"),
    "train.scheduler.type": ("MultiStepLR", "CosineAnnealingRestartLR"),
    "train.pixel_opt.type": ("L1Loss", "MSELoss", "CharbonnierLoss"),
    "train.pixel_opt.reduction": ("mean",),
    "val.metrics.*.type": ("calculate_psnr", "calculate_ssim"),
    "datasets.*.type": ("PairedImageDataset", "SamplePhotographs"),
    "datasets.*.small": ("error", "skip"),
}
