"""What all benchmarks that time something have among their settings."""

from __future__ import annotations

from dataclasses import dataclass

from bench.harness.bandwidth import BandwidthProbe
from bench.harness.timing import CpuClock, CudaClock


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """Where and how long to measure.

    Attributes:
        device: "cpu" or "cuda".
        rounds: calls of each row in each mode.
        seconds: limit per row and mode; slow rows get fewer calls, at least one.
        flush_bytes: read between calls to empty the caches; None: the clock's choice.
        probe_bytes: of the buffers that give the bandwidth; None: the default of
            `BandwidthProbe`.
    """

    device: str = "cpu"
    rounds: int = 30
    seconds: float = 6.0
    flush_bytes: int | None = None
    probe_bytes: int | None = None

    def clock(self) -> CpuClock | CudaClock:
        """A clock of the device."""
        return (CudaClock if self.device == "cuda" else CpuClock)(self.flush_bytes)

    def probe(self, nbytes: int | None = None) -> BandwidthProbe:
        """The probe of the device; nbytes: of its buffers where the settings say nothing."""
        return BandwidthProbe(self.device, self.probe_bytes or nbytes)
