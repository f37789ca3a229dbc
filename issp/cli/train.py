"""`issp train`: from a YAML file with BasicSR's keys, from flags, or from a file and flags."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from issp.cli.common import name_crowding, named_folders
from issp.utils.errors import ConfigError
from issp.utils.files import user_path

HELP = "train a network and prune it on the way, from a YAML file or flags"
EXAMPLE = (
    "issp train --model edsr-tiny --scale 2 --hr photos/ --val Set5=benchmarks/Set5\n"
    "             --sparsity 0.9 --iters 2000 --freeze-at 1000 --batch 16 --patch 96 --name tiny\n"
    "  issp train configs/train_issp_swinir_light_x4.yml --set train.optim_g.lr=1e-4\n"
    "  issp train experiments/tiny/config.yml --resume\n"
    "  torchrun --nproc_per_node=4 -m issp train CONFIG.yml  # a process for each of 4 GPUs"
)

# The paper's milestones as shares of the fine-tuning stage: 250k, 400k, ... of 500k. They stay
# shares in config.yml, so that a run resumed with more --iters decays later.
_MILESTONES = (0.5, 0.8, 0.9, 0.95)
_BETAS = (0.9, 0.99)  # the paper's

_METHODS = "iss-p (default), iht, iss-r, l1, scratch, srp, assl, sls, dense"
# flag: (key, type, help)
_FLAGS: dict[str, tuple[str, Any, str]] = {
    "--name": ("name", str, "results go to experiments/NAME"),
    "--model": ("network_g.type", str, "edsr-tiny, edsr-baseline, edsr-l, swinir-light, cat-r"),
    "--scale": ("scale", int, "2, 3 or 4"),
    "--seed": ("manual_seed", int, "seed of every random number (default: 0)"),
    "--device": ("device", str, "auto, cpu or cuda (default: auto)"),
    "--hr": (
        "datasets.train.dataroot_gt",
        str,
        "folder of training images (default: a few sample photographs)",
    ),
    "--lr-images": ("datasets.train.dataroot_lq", str, "folder of their low-resolution files"),
    "--batch": ("datasets.train.batch_size_per_gpu", int, "crops per iteration (default: 16)"),
    "--patch": ("datasets.train.gt_size", int, "side of the high-resolution crop (64 x scale)"),
    "--workers": ("datasets.train.num_worker_per_gpu", int, "data processes (default: 0)"),
    "--iters": ("train.total_iter", int, "all iterations, the pruning stage included"),
    "--lr": ("train.optim_g.lr", float, "learning rate (default: 2e-4)"),
    "--optimizer": ("train.optim_g.type", str, "Adam, AdamW or SGD (default: Adam)"),
    "--warmup": ("train.warmup_iter", int, "iterations of linear warm-up"),
    "--ema": ("train.ema_decay", float, "decay of the averaged model (default: 0, none)"),
    "--sparsity": ("sparsity.ratio", float, "share of each layer to prune; absent: dense training"),
    "--method": ("sparsity.method", str, _METHODS),
    "--shrink": ("sparsity.shrink", float, "factor on unimportant weights (default: 0.95)"),
    "--freeze-at": ("sparsity.freeze_iter", int, "iteration that fixes the mask (default: half)"),
    "--val-freq": ("val.val_freq", int, "iterations between validations"),
    "--print-freq": ("logger.print_freq", int, "iterations between log lines"),
    "--save-freq": ("logger.save_checkpoint_freq", int, "iterations between checkpoints"),
    "--pretrained": ("path.pretrain_network_g", str, "weights to start from"),
    "--root": ("path.experiments_root", str, "folder of all runs (default: experiments)"),
}

_PRUNING_FLAGS = ("--method", "--shrink", "--freeze-at")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG.yml", help="BasicSR's keys; see configs/"
    )
    for flag, (key, kind, text) in _FLAGS.items():
        metavar = "N" if kind is int else "X" if kind is float else "TEXT"
        parser.add_argument(flag, dest=key, type=kind, metavar=metavar, help=text)
    parser.add_argument("--val", nargs="+", metavar="[NAME=]DIR", help="validation folders")
    parser.add_argument(
        "--exclude", nargs="+", metavar="NAME_PATTERN", help="layers to leave dense"
    )
    parser.add_argument(
        "--milestones", nargs="+", type=int, metavar="N", help="fine-tuning iterations"
    )
    parser.add_argument("--save-images", action="store_true", help="keep validation images")
    parser.add_argument("--no-tensorboard", action="store_true", help="write CSV logs only")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="any key of the file"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the latest state")
    parser.add_argument("--quiet", action="store_true", help="print nothing")


def main(args: argparse.Namespace) -> int:
    """Trains; the final model is experiments/NAME/models/net_g_latest.safetensors."""
    from issp.sr import distributed

    try:
        with distributed.joined() as ranks:
            args.quiet = args.quiet or not ranks.is_main
            _train(args)
    except distributed.OtherRankEnded as end:
        return end.status
    return 0


def _train(args: argparse.Namespace) -> None:
    from issp.sr import config
    from issp.utils.errors import explain_out_of_memory

    tree = config.load_yaml(args.config) if args.config else _defaults(args)
    if args.resume:
        _follow_moved_run(tree, user_path(args.config))
    _apply_flags(tree, args)
    settings = config.parse(tree)

    from issp.sr.train import train

    with explain_out_of_memory("use a smaller --batch or --patch"):
        if not args.quiet:
            name_crowding(args)
        train(settings, resume=args.resume, quiet=args.quiet)


def _follow_moved_run(tree: dict[str, Any], path: Path) -> None:
    """A run resumes where its config.yml lies, whatever place and name it had when it began."""
    from issp.sr import config

    folder = path.resolve().parent
    if path.name != "config.yml" or not (folder / "training_states").is_dir():
        return
    paths = tree.get("path")
    root = paths.get("experiments_root") if isinstance(paths, dict) else None
    recorded = Path(str(root or "experiments")) / str(tree.get("name"))
    if not (recorded.is_dir() and recorded.samefile(folder)):
        config.set_key(tree, "name", folder.name)
        config.set_key(tree, "path.experiments_root", str(folder.parent))


def _follow_images(tree: dict[str, Any], args: argparse.Namespace) -> None:
    """--hr names other images: what the file says about its own does not belong to them."""
    datasets = tree.get("datasets")
    entry = datasets.get("train") if isinstance(datasets, dict) else None
    if getattr(args, _FLAGS["--hr"][0]) is None or not isinstance(entry, dict):
        return
    for key in ("type", "dataroot_lq", "filename_tmpl", "meta_info_file"):
        value = entry.pop(key, None)
        if value is not None and key != "type" and not args.quiet:
            print(f"--hr: the file's datasets.train.{key} ({value}) is of other images, not used")


def _apply_flags(tree: dict[str, Any], args: argparse.Namespace) -> None:
    from issp.sr import config

    _follow_images(tree, args)
    dense = not tree.get("sparsity")
    for key, _, _ in _FLAGS.values():
        if getattr(args, key) is not None:
            config.set_key(tree, key, getattr(args, key))
    given = [flag for flag in _PRUNING_FLAGS if getattr(args, _FLAGS[flag][0]) is not None]
    given += ["--exclude"] if args.exclude else []
    is_sparse = getattr(args, _FLAGS["--sparsity"][0]) is not None
    if dense and given and not is_sparse and args.__dict__[_FLAGS["--method"][0]] != "dense":
        raise ConfigError(f"{given[0]} is about pruning: add --sparsity, such as --sparsity 0.9")
    if args.val:
        datasets = tree.get("datasets")
        if isinstance(datasets, dict):
            for key in [key for key in datasets if str(key).startswith(("val", "test"))]:
                del datasets[key]
        for i, (name, folder) in enumerate(named_folders(args.val).items()):
            entry = {"name": name, "dataroot_gt": folder}
            config.set_key(tree, f"datasets.val_{i + 1}", entry)
    if args.exclude:
        config.set_key(tree, "sparsity.exclude", args.exclude)
    if args.milestones:
        config.set_key(tree, "train.scheduler.milestones", args.milestones)
    if args.save_images:
        config.set_key(tree, "val.save_img", True)
    if args.no_tensorboard:
        config.set_key(tree, "logger.use_tb_logger", False)
    for entry in args.set:
        key, separator, text = entry.partition("=")
        if not separator:
            raise ConfigError(f"--set {entry}: write KEY=VALUE, such as train.optim_g.lr=1e-4")
        config.set_key(tree, key, _value(text))


def _value(text: str) -> Any:
    import yaml

    from issp.sr import config

    with contextlib.suppress(yaml.YAMLError):
        return config.parse_yaml(text, f"--set {text}")
    return text


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration of a run without a file, in proportion to its length."""
    if args.resume:
        raise ConfigError("--resume needs the run's configuration: experiments/NAME/config.yml")
    flags = {flag: getattr(args, key) for flag, (key, _, _) in _FLAGS.items()}
    missing = [flag for flag in ("--model", "--scale", "--iters") if flags[flag] is None]
    if missing:
        raise ConfigError(f"pass a CONFIG.yml, or {', '.join(missing)} (see issp train --help)")
    iters, scale = flags["--iters"], flags["--scale"]
    tree: dict[str, Any] = {"name": f"{flags['--model']}_x{scale}", "datasets": {"train": {}}}
    if flags["--hr"] is None:
        tree["datasets"]["train"]["type"] = "SamplePhotographs"
        if not args.val:
            tree["datasets"]["val"] = {"name": "samples", "type": "SamplePhotographs"}
    if flags["--sparsity"] is not None or flags["--method"] == "dense":
        tree["sparsity"] = {"freeze_iter": max(1, iters // 2)}
    tree["train"] = {"scheduler": {"milestones": list(_MILESTONES)}}
    if flags["--optimizer"] != "SGD":
        tree["train"]["optim_g"] = {"betas": list(_BETAS)}
    tree["val"] = {
        "val_freq": max(1, min(5000, iters // 10)),
        "metrics": {
            "psnr": {"type": "calculate_psnr", "test_y_channel": True},
            "ssim": {"type": "calculate_ssim", "test_y_channel": True},
        },
    }
    often = max(1, min(100, iters // 20))
    tree["logger"] = {"print_freq": often, "save_checkpoint_freq": max(1, min(5000, iters // 4))}
    return tree
