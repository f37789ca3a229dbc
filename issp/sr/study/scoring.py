"""The scores of a run: both channels of every test set, computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from issp.sr import builders, data, evaluate, results
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
    upscaler: Callable[[np.ndarray], np.ndarray],
    run: Path,
    identity: Mapping[str, Any],
    test: Mapping[str, EvalData],
) -> None:
    """Adds scores to the results of a run, one set after the other.

    Args:
        upscaler: as in `issp.sr.evaluate.evaluate`.
        run: folder of the run.
        identity: what all its results have in common.
        test: the sets; those that have scores are left out.
    """
    for name in missing_sets(run, test):
        dataset = data.EvalDataset(builders.pairs(test[name], identity["scale"]))
        common = {"set": name, "images": len(dataset), "lr": dataset.pairs.lr_source, **identity}
        rows = [
            Result(**common, channel=channel, psnr=mean.psnr, ssim=mean.ssim)
            for channel, mean in _both_channels(upscaler, dataset).items()
        ]
        results.add(run / results.FILE_NAME, rows)


def _both_channels(
    upscaler: Callable[[np.ndarray], np.ndarray], dataset: data.EvalDataset
) -> dict[str, evaluate.Score]:
    """Mean scores by channel; every image is upscaled once."""
    images: list[np.ndarray] = []

    def keep(_: str, sr: np.ndarray, __: evaluate.Score) -> None:
        images.append(sr)

    luma, rgb = (evaluate.Protocol(y_channel=y) for y in (True, False))
    first = evaluate.evaluate(upscaler, dataset, luma, luma, keep)
    upscaled = iter(images)
    second = evaluate.evaluate(lambda _: next(upscaled), dataset, rgb, rgb)
    return {"y": evaluate.mean(first), "rgb": evaluate.mean(second)}
