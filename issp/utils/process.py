"""This process among others: started as the command or not, how its threads wait, who is busy.

GNU OpenMP, which torch's CPU builds use, lets a thread that waits spin 300 000 times, some 10 ms,
before it sleeps. On an idle machine that saves the wake-up. On a busy one the spinning thread keeps
a core from the thread that it waits for: with five other processes on two cores, whole iterations
became 30 times slower (bench/results/busy-2026-11-30.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Some 0.4 ms: longer than the gaps between the layers of a network, shorter than a time slice.
_SPIN_COUNT = "10000"
_WAIT_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# Parameters of glibc's mallopt, from malloc.h, and the settings that users have for them.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MALLOC_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")


def is_issp_command() -> bool:
    """Whether this process was started as `issp` or `python -m issp`."""
    if sys.argv[:1] == ["-m"]:  # Python is importing the package that it will run
        following = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return following[:1] == ["issp"]
    return Path(sys.argv[0] if sys.argv else "").name.removesuffix(".exe") == "issp"


def limit_spinning() -> None:
    """Makes waiting OpenMP threads sleep after some 0.4 ms, unless the user chose otherwise.

    OpenMP reads the setting when torch is loaded; afterwards this function does nothing.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAIT_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed for what is allocated next, unless the user chose otherwise.

    By default malloc maps each tensor of more than 32 MB anew, and returns it: the system fills
    thousands of pages with zeros for every layer. Packed edsr-tiny takes 1.5 times as long on a
    tile of 256 x 256, and 2.1 times if the process asks for large pages too. Only glibc has this
    switch; elsewhere nothing changes.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _MALLOC_SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Gives the system back what malloc keeps of freed memory, where malloc can do that."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int | None:
    """Memory that this process holds, as the system counts it; None where it does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def use_large_pages() -> None:
    """Lets torch ask for pages of 2 MB, unless the user chose otherwise.

    Layers of images allocate tens of MB each. In pages of 4 KB the system spends more time on them
    than a sparse layer on its work, and what is freed becomes holes: peak memory was twice as high.
    torch reads the setting at its first allocation; afterwards this function does nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextlib.contextmanager
def prompt_interrupt(grace: float = 0.7) -> Iterator[None]:
    """Ends the process with status 130 if Ctrl-C is not acted on in time.

    Python acts on a signal between two of its instructions, and one layer of a large network takes
    seconds. Only for what may end anywhere: files are written by `atomic_write`.

    Args:
        grace: seconds that KeyboardInterrupt gets to leave this context.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while (number := os.read(reader, 1)) != b"\0":
            if number[0] == signal.SIGINT and not left.wait(grace):
                os.write(2, b"interrupted\n")
                os._exit(128 + signal.SIGINT)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(previous)
        os.write(writer, b"\0")
        watcher.join()
        os.close(reader)
        os.close(writer)


def waiting() -> str:
    """How idle OpenMP threads wait, as the environment says."""
    chosen = [f"{name}={os.environ[name]}" for name in _WAIT_SETTINGS if name in os.environ]
    return ", ".join(chosen) or "OpenMP's default"


class LoadMeter:
    """Cores that other processes keep busy, from its creation on."""

    def __init__(self) -> None:
        self._start = self._sample()

    def busy_cores(self) -> float | None:
        """The mean number since the creation; None where the system does not tell."""
        end = self._sample()
        if self._start is None or end is None or end[0] - self._start[0] < 0.05:
            return None
        wall, busy, own = (after - before for before, after in zip(self._start, end, strict=True))
        return max(0.0, (busy - own) / wall)

    @staticmethod
    def _sample() -> tuple[float, float, float] | None:
        # Seconds: the clock, all processes together, this process.
        try:
            with open("/proc/stat", encoding="ascii") as file:
                user, nice, system, _idle, _wait, irq, softirq, *_ = file.readline().split()[1:]
        except (OSError, ValueError):
            return None
        ticks = sum(map(int, (user, nice, system, irq, softirq)))
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def crowded(busy_cores: float | None, threads: int) -> str | None:
    """One sentence when other processes leave fewer cores than there are threads.

    Args:
        busy_cores: what `LoadMeter` measured.
        threads: that compute in this process.
    """
    cores = os.cpu_count() or 1
    if busy_cores is None or threads < 2 or threads <= cores - busy_cores + 0.5:
        return None
    free = max(1, round(cores - busy_cores))
    return (
        f"other processes keep {busy_cores:.1f} of {cores} cores busy, and {threads} threads wait"
        f" for each other: OMP_NUM_THREADS={free} is probably faster"
    )
