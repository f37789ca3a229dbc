"""The order of images and the number that fixes each crop: functions of (seed, position)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from issp.sr.data.checks import check_whole

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Draw(NamedTuple):
    """One training sample: the image and the number that fixes its crop and flips."""

    image: int
    counter: int


def hash64(seed: int, counters: np.ndarray, stream: int = 0) -> np.ndarray:
    """Uniform 64-bit numbers, one per counter, the same on every machine and numpy version.

    Args:
        seed: any integer.
        counters: uint64 array of any shape.
        stream: separates uses of the same seed and counters.

    Returns:
        uint64 array of the shape of ``counters``.

    Source: SplitMix64's finaliser (Steele, Lea and Flood 2014) over a mixed key.
    """
    key = _mix_int((_mix_int(int(seed) & _MASK) + (int(stream) + 1) * _GOLDEN) & _MASK)
    x = counters.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class EnlargedSampler:
    """Endless stream of draws; an epoch is a shuffle of ``ratio`` copies of the data set.

    With several ranks each takes every ``world``-th draw of one common stream, so no draw is
    repeated or dropped and the stream does not depend on ``world``. :meth:`state_dict` holds the
    position; ``load_state_dict`` continues from it.

    Args:
        size: number of images.
        ratio: copies of the data set per epoch (BasicSR's dataset_enlarge_ratio).
        seed: fixes the order.
        rank, world: this process and their number.
        shuffle: False draws the images in order.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        size: int,
        ratio: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
    ):
        self.size, self.ratio = check_whole("size", size, 1), check_whole("ratio", ratio, 1)
        check_whole("world", world, 1)
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0 .. {world - 1}, got {rank}")
        self.seed = int(seed)
        self.rank, self.world, self.shuffle = rank, world, shuffle
        self.position = 0  # draws taken by this rank
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def epoch(self) -> int:
        """Epoch of the next draw, from 0."""
        return (self.position * self.world + self.rank) // (self.size * self.ratio)

    def draws(self, start: int, count: int) -> list[Draw]:
        """The ``count`` draws of this rank from position ``start`` on, without moving."""
        counters = [(start + i) * self.world + self.rank for i in range(count)]
        return [Draw(self._image(counter), counter) for counter in counters]

    def take(self, count: int) -> list[Draw]:
        """The next ``count`` draws."""
        draws = self.draws(self.position, count)
        self.position += count
        return draws

    def __iter__(self) -> Iterator[Draw]:
        while True:
            yield self.take(1)[0]

    def state_dict(self) -> dict[str, Any]:
        """Position (of all ranks together) and what the order depends on."""
        settings = {key: getattr(self, key) for key in ("size", "ratio", "seed", "shuffle")}
        return {"position": self.position * self.world, **settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved position.

        Raises:
            ValueError: the state is of another data set, seed or ratio, so that the order would
                not be continued.
        """
        actual = self.state_dict()
        for key in actual:
            if key not in state:
                raise ValueError(f"sampler state has no {key!r}; it is not one of this class")
            if key != "position" and state[key] != actual[key]:
                raise ValueError(
                    f"cannot resume the data order: {key} was {state[key]} when saved and is "
                    f"{actual[key]} now; restore it or start without the sampler's state"
                )
        self.position = int(state["position"]) // self.world

    def _image(self, counter: int) -> int:
        epoch, index = divmod(counter, self.size * self.ratio)
        if not self.shuffle:
            return index % self.size
        if self._order is None or self._order[0] != epoch:
            indices = np.arange(self.size * self.ratio, dtype=np.uint64)
            # A shuffle by sorted hashes is the same in every release of numpy.
            order = np.argsort(hash64(self.seed, indices, stream=epoch + 1), kind="stable")
            self._order = (epoch, order % self.size)
        return int(self._order[1][index])
