"""Endless training batches that resume at the batch where they stopped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch

from issp.sr.data.checks import check_whole
from issp.sr.data.datasets import TrainDataset
from issp.sr.data.sampler import Draw, EnlargedSampler


class TrainLoader:
    """Iterator over training batches, with or without worker processes.

    Without workers a batch is sliced from the images in memory on demand, which for
    small models on a CPU is faster than a transfer from another process. The batches are the same
    with and without workers. :meth:`state_dict` counts the batches that were returned, not those
    that workers prepared ahead. No global random generator is used.

    Args:
        dataset: where the samples come from.
        batch_size: samples per batch of this rank.
        seed: fixes the order of the images; None: the data set's.
        enlarge_ratio: copies of the data set per epoch.
        rank, world: this process and their number.
        num_workers: processes that prepare batches.
        prefetch: batches each of them prepares ahead.
        pin_memory: put batches into page-locked memory (CUDA).
        shuffle: False takes the images in the order of their names.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        dataset: TrainDataset,
        batch_size: int,
        seed: int | None = None,
        enlarge_ratio: int = 1,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        shuffle: bool = True,
    ):
        check_whole("batch_size", batch_size, 1)
        check_whole("num_workers", num_workers, 0)
        seed = dataset.seed if seed is None else seed
        self.dataset, self.batch_size = dataset, batch_size
        self.sampler = EnlargedSampler(len(dataset), enlarge_ratio, seed, rank, world, shuffle)
        self.num_workers, self.prefetch, self.pin_memory = num_workers, prefetch, pin_memory
        self._batches: Iterator | None = None

    @property
    def epoch(self) -> int:
        """Epoch of the next batch's first sample, from 0."""
        return self.sampler.epoch

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        """Next batch, as :meth:`TrainDataset.batch` gives it.

        Raises:
            FileNotFoundError, ValueError: an image cannot be read, named in the message.
        """
        if self.num_workers == 0:
            batch = self.dataset.batch(self.sampler.draws(self.sampler.position, self.batch_size))
            if self.pin_memory:
                batch = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()}
        else:
            if self._batches is None:
                self._batches = self._start_workers()
            batch = next(self._batches)
            if isinstance(batch, _Failure):
                self.close()
                raise batch.error
        self.sampler.position += self.batch_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position after the last returned batch; see :class:`EnlargedSampler`."""
        return {"sampler": self.sampler.state_dict(), "crop_seed": self.dataset.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with the batch after the saved position.

        Raises:
            ValueError: the state is of another data set or seed.
        """
        if "sampler" not in state or "crop_seed" not in state:
            raise ValueError("this is not a state of TrainLoader: sampler or crop_seed is missing")
        if state["crop_seed"] != self.dataset.seed:
            raise ValueError(
                f"cannot resume the crops: the seed was {state['crop_seed']} when saved and is "
                f"{self.dataset.seed} now"
            )
        self.sampler.load_state_dict(state["sampler"])
        self.close()

    def close(self) -> None:
        """Stops the workers; the next batch starts new ones."""
        self._batches = None

    def _start_workers(self) -> Iterator:
        self.dataset.preload()  # before the fork, so that workers share the memory
        sampler, size = self.sampler, self.batch_size
        loader = torch.utils.data.DataLoader(
            _Batches(self.dataset),
            batch_size=None,
            sampler=(sampler.draws(start, size) for start in count(sampler.position, size)),
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch,
            pin_memory=self.pin_memory,
            # Without one of its own, DataLoader draws from torch's global generator.
            generator=torch.Generator("cpu").manual_seed(0),
        )
        with torch.device("cpu"):  # where DataLoader draws a number with it
            return iter(loader)


class _Failure:
    """An error in a worker; DataLoader would add the worker's traceback to the message."""

    def __init__(self, error: Exception):
        self.error = error


class _Batches:
    """A data set whose items are whole batches."""

    def __init__(self, dataset: TrainDataset):
        self.dataset = dataset

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any] | _Failure:
        try:
            return self.dataset.batch(draws)
        except (OSError, ValueError) as error:
            return _Failure(error)
