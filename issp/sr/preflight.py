"""What can be checked before the first iteration is checked then, not after hours of training."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from issp.sr import checkpoint, data, logging
from issp.sr.config import Config
from issp.sr.run_folder import RunFolder
from issp.utils.errors import ConfigError
from issp.utils.files import check_folder

Say = Callable[[str], None]
_EVERY = 10  # seconds between lines of progress


def check_images(
    batches: data.TrainLoader,
    validation: Mapping[str, data.EvalDataset],
    score: Callable[[str, data.EvalDataset], object],
    say: Say,
) -> None:
    """Decodes every validation image, and the training images that are held in memory.

    Of each validation set the smallest image is scored as the validation will: its border and the
    window of SSIM must fit into it, and the network must take its size.

    Args:
        batches: the training images.
        validation: name -> images.
        score: upscales and scores a set.
        say: shows a line of text.

    Raises:
        ValueError, OSError: an image that is missing, damaged, of the wrong size or too small.
    """
    for name, dataset in validation.items():
        report, sides = _Reporter(f"{name}: decoding image", say), []
        for i in range(len(dataset)):
            sides.append(min(dataset.load(i)[1].shape[:2]))
            report(i + 1, len(dataset))
        smallest = sides.index(min(sides))
        image = {dataset.pairs.names[smallest]: dataset.load(smallest)[1]}
        try:
            score(name, data.EvalDataset(data.PairedArrays(image, dataset.scale)))
        except ValueError as error:
            path = dataset.pairs.paths(smallest)[1]
            raise ConfigError(f"validation image {path} of {name}: {error}") from None
    batches.dataset.preload(_Reporter("training images: decoding image", say))


def check_logs(folder: RunFolder, names: Iterable[str]) -> None:
    """Reads the logs that a resumed run goes on with, and looks at what else it will write.

    Args:
        folder: of the run.
        names: of the logs, in `folder.log`.

    Raises:
        ConfigError: a file that is none of this program's, or damaged, is in a place of its own.
        OSError: a folder or the text log cannot be written.
    """
    for path in (folder.log / name for name in names):
        try:
            if path.exists():
                logging.read_csv(path)
        except ValueError as error:
            raise ConfigError(f"{error}; move it away to resume without it") from None
    files = [folder.path / "config.yml", folder.log / "environment.json", folder.log / "train.log"]
    folders = [folder.log / "tensorboard"]
    wrong = [path for path in files if path.is_dir()]
    wrong += [path for path in folders if path.exists() and not path.is_dir()]
    if wrong:
        kind = "folder" if wrong[0].is_dir() else "file"
        raise ConfigError(f"{wrong[0]} is a {kind} that the run did not write: move it away")
    for place in (folder.path, folder.models, folder.states, folder.images, folder.log):
        check_folder(place)
    text = folder.log / "train.log"  # the other files are replaced
    if text.exists() and not os.access(text, os.W_OK):
        raise PermissionError(f"cannot write {text}: no permission")


@torch.no_grad()
def check_crop(dataset: data.TrainDataset, model: nn.Module) -> None:
    """Sends one training crop through the network, whose windows may not divide it.

    Raises:
        ConfigError: the network refuses its size.
    """
    weight = next(model.parameters())
    was_training = model.training
    model.eval()  # draws no random number
    try:
        model(dataset[0]["lq"][None].to(weight.device, weight.dtype))
    except ValueError as error:
        raise ConfigError(f"datasets.train.gt_size {dataset.gt_size}: {error}") from None
    finally:
        model.train(was_training)


def check_disk(config: Config, model: nn.Module, states: int, start: int, say: Say) -> None:
    """Compares what the run will write with the free space, from the sizes of the tensors.

    Args:
        config: of the run.
        model: its network.
        states: how many copies of the network a training state holds.
        start: iterations done already.
        say: shows a line of text, when the space will not do to the end.

    Raises:
        OSError: the folder cannot be made or written.
        ConfigError: not even one checkpoint fits.
    """
    check_folder(config.folder)
    # A tenth for masks, indices and the archives around the tensors.
    size = 1.1 * sum(t.numel() * t.element_size() for t in model.state_dict().values())
    often = config.logger.save_checkpoint_freq
    models = math.ceil((config.train.total_iter - start) / often)
    # A new model or state is complete before an old one goes.
    if config.logger.keep_models is not None:
        models = min(models, config.logger.keep_models + 1)
    models += 2  # latest and best
    needed = size * (models + states * (config.logger.keep_training_states + 1))
    place = config.folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size * (1 + states):
        raise ConfigError(
            f"{place} has {_bytes(free)} free and one checkpoint takes "
            f"{_bytes(size * (1 + states))}: free space or choose another --root"
        )
    if free < needed:
        say(
            f"{place} has {_bytes(free)} free and the checkpoints will take "
            f"{_bytes(needed)}: free space, use a larger logger.save_checkpoint_freq or "
            "logger.keep_models: 1"
        )


def idle_gpus(config: Config, device: torch.device, processes: int = 1) -> str | None:
    """A line about GPUs that `num_gpu: auto` would take in BasicSR.

    Args:
        config: of the run.
        device: of this process.
        processes: of the training, each with a device.
    """
    count = torch.cuda.device_count()
    if device.type != "cuda" or count < 2 or config.num_gpu != "auto" or processes > 1:
        return None
    return (
        f"num_gpu is auto, but one process was started: it trains on {device}, one of {count} "
        f"GPUs; torchrun --nproc_per_node={count} -m issp train uses all"
    )


def idle_shards(config: Config, processes: int) -> str | None:
    """A line about settings of parallel training that have no effect on this one."""
    if config.train.parallel != "fsdp":
        return None
    if processes == 1:
        return "train.parallel is fsdp, but one process was started, which has all weights"
    if config.find_unused_parameters:
        return "without effect with train.parallel fsdp: find_unused_parameters"
    return None


def lost_zeros(config: Config, model: nn.Module) -> str | None:
    """A line about zeros of the pretrained weights that the training does not keep."""
    if not config.path.pretrain_network_g or (config.sparsity and config.sparsity.from_zeros):
        return None
    counts = checkpoint.sparsity(model)
    if not counts["zeros"]:
        return None
    return (
        f"{100 * counts['ratio']:.1f} % of the pretrained weights are zero, and this training "
        "fills them again: sparsity.from_zeros=true keeps them zero"
    )


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


class _Reporter:
    """Shows how far a long loop is, some seconds apart."""

    def __init__(self, what: str, say: Say):
        self._what, self._say, self._last = what, say, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last > _EVERY:
            self._last = time.monotonic()
            self._say(f"{self._what} {done} of {total}")
