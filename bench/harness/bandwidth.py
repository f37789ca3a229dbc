"""The machine's memory bandwidth, measured in the rounds of the rows that are compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.harness.timing import Task

# The working set of the large networks, so that the caches keep the same share of both.
DEFAULT_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Bandwidth:
    """Bandwidth in bytes per second, read and written bytes both counted.

    Attributes:
        copy: of copying one buffer to another.
        multiply: of multiplying a buffer in place. On a CPU it is the faster one, since a copy
            reads the lines that it overwrites as well.
        nbytes: of the buffer.
    """

    copy: float
    multiply: float
    nbytes: int

    @property
    def peak(self) -> float:
        """The faster of the two: what memory gives to a pass that reads and writes."""
        return max(self.copy, self.multiply)

    def share(self, traffic: float, seconds: float) -> float:
        """Share of the roofline that a call reaches which must move `traffic` bytes."""
        return traffic / seconds / self.peak

    def limits(self) -> dict[str, float]:
        """For the samples file."""
        return {"copy": self.copy, "multiply": self.multiply, "bytes": self.nbytes}

    def __str__(self) -> str:
        return (
            f"{self.peak / 1e9:.4g} GB/s, the faster of copying ({self.copy / 1e9:.4g}) and "
            f"multiplying in place ({self.multiply / 1e9:.4g}) {self.nbytes / 1e6:.0f} MB in the "
            "same rounds; read and written bytes both count"
        )


class BandwidthProbe:
    """Two tasks to be timed among the rows.

    Args:
        device: "cpu" or "cuda".
        nbytes: of each of its two buffers; default: 256 MiB, 1 GiB on a GPU.
    """

    def __init__(self, device: str, nbytes: int | None = None) -> None:
        self._source = torch.ones((nbytes or DEFAULT_BYTES[device]) // 4, device=device)
        self._target = self._source.clone()
        self._copy = Task(lambda: self._target.copy_(self._source), lambda: None)
        self._multiply = Task(lambda: self._target.mul_(1.0), lambda: None)
        self.tasks = [self._copy, self._multiply]

    def result(self, mode: str) -> Bandwidth:
        """The bandwidth that was measured in one mode."""
        moved = 2.0 * self._source.nbytes
        return Bandwidth(
            copy=moved / self._copy.median(mode),
            multiply=moved / self._multiply.median(mode),
            nbytes=self._source.nbytes,
        )
