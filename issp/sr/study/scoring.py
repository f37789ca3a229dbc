"""The scores of a trained run: both channels of every test set, computed once and kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from issp.sr import builders, checkpoint, data, evaluate, results
from issp.sr.config import EvalData
from issp.sr.results import Result

MODEL = Path("models", "net_g_latest.safetensors")  # in the folder of a run


def missing_sets(run: Path, sets: Iterable[str]) -> list[str]:
    """The sets of which the folder of a run has no scores yet.

    Raises:
        ValueError: its results are damaged.
    """
    path = run / results.FILE_NAME
    known = {result.set for result in results.read(path)} if path.exists() else set()
    return [name for name in sets if name not in known]


def score(
    model: nn.Module, run: Path, identity: dict[str, Any], test: Mapping[str, EvalData]
) -> None:
    """Adds the scores of a model to its run's results, one set after the other.

    Args:
        model: the final model of the run, with exact zeros.
        run: folder of the run.
        identity: method, arch, scale, sparsity and seed of its results.
        test: the sets; those that have scores are left out.
    """
    zeros = checkpoint.sparsity(model)["ratio"]
    for name in missing_sets(run, test):
        dataset = data.EvalDataset(builders.pairs(test[name], identity["scale"]))
        common = {**identity, "set": name, "images": len(dataset), "zeros": zeros}
        common |= {
            "lr": dataset.pairs.lr_source,
            "model": str(Path(run.parent.name, run.name, MODEL)),
        }
        rows = _both_channels(model, dataset)
        results.add(
            run / results.FILE_NAME,
            [
                Result(**common, channel=channel, psnr=mean.psnr, ssim=mean.ssim)
                for channel, mean in rows.items()
            ],
        )


def _both_channels(model: nn.Module, dataset: data.EvalDataset) -> dict[str, evaluate.Score]:
    """Mean scores by channel; every image goes through the network once."""
    images: list[np.ndarray] = []

    def keep(_: str, sr: np.ndarray, __: evaluate.Score) -> None:
        images.append(sr)

    luma, rgb = (evaluate.Protocol(y_channel=y) for y in (True, False))
    first = evaluate.evaluate(evaluate.of_model(model), dataset, luma, luma, keep)
    upscaled = iter(images)
    second = evaluate.evaluate(lambda _: next(upscaled), dataset, rgb, rgb)
    return {"y": evaluate.mean(first), "rgb": evaluate.mean(second)}
