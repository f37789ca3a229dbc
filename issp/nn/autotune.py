"""Chooses the fastest of several ways to compute a layer, measured once per machine and shape.

The file of choices is JSON in the user's cache folder (`ISSP_CACHE` names another folder), readable
and safe to delete.
"""

from __future__ import annotations

import functools
import json
import os
import random
import statistics
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from issp.ops import backends
from issp.ops.info import gpu, version
from issp.utils.environment import cpu_name
from issp.utils.files import atomic_write, cache_folder, exclusive, user_path

_FORMAT = 2
_MARGIN = 0.03  # a gain below this is a tie
_WIN_SHARE = 0.75  # share of the rounds in which a winner must be faster
ROUNDS = 15
SECONDS = 1.0  # to spend on one choice, roughly
_MIN_ROUNDS = 5
_SLOW = 1.0  # seconds: a call this long needs no second warm-up call
# Times that spread by more, as on a busy machine, choose for this time alone.
MAX_SPREAD = 0.25
MAX_AGE = 30 * 24 * 3600.0  # seconds: another program, driver or clock rate may have come
_FOREVER = 1e12  # seconds


@dataclass(frozen=True)
class Choice:
    """The fastest candidate, and the times that say so.

    Attributes:
        name: of the chosen candidate.
        microseconds: median of each candidate.
        errors: candidate -> the error that kept it from being timed.
        reason: of the choice, in words.
        spread: of the times of the fastest dense and the fastest sparse candidate: the larger
            distance of their quartiles, as a share of the larger median.
        measured: when, in seconds since 1970.
        remembered: it comes from the file; False: measured now.
    """

    name: str
    microseconds: dict[str, float]
    errors: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    spread: float = 0.0
    measured: float = 0.0
    remembered: bool = False

    @property
    def is_current(self) -> bool:
        """Whether it may be used again: its times hardly spread, and it is not old."""
        return self.spread <= MAX_SPREAD and 0 <= time.time() - self.measured <= MAX_AGE


def machine(device: str) -> str:
    """All that a choice depends on beside the layer: processor, instruction set, threads, versions.

    Args:
        device: "cpu" or "cuda".
    """
    back_end = backends.active(device)
    vectors = torch.backends.cpu.get_cpu_capability()
    parts = [cpu_name(), vectors, f"{torch.get_num_threads()} threads"]
    if back_end == "cpp":
        parts.append(f"kernels {torch.ops.issp._cpu_capability()}")
    if device == "cuda":
        facts = gpu()
        assert facts is not None  # a tensor is on it
        conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        precision = f"{torch.backends.cuda.matmul.fp32_precision} {conv.fp32_precision}"
        parts = [facts["name"], f"CUDA {facts['cuda']}", f"float32 by {precision}"]
        parts.append(f"cudnn.benchmark {torch.backends.cudnn.benchmark:d}")
    parts += [f"torch {torch.__version__}", f"issp {version()} {back_end} {_fingerprint()}"]
    return "; ".join(parts)


@functools.cache
def _fingerprint() -> str:
    """Checksum of the kernels: the version of the package stands still while they change."""
    root = Path(__file__).parents[1]
    sources = [*root.glob("_C*"), *root.glob("_CUDA*"), root / "ops" / "reference" / "sparse.py"]
    for name in ("triton_kernels", "../triton_kernels"):
        sources += (root / name).glob("*.py")
    value = 0
    for path in sorted(set(sources)):
        value = zlib.crc32(path.read_bytes(), value)
    return f"{value:08x}"


class Cache:
    """Choices in a file, by machine and key. A file that is broken is reported and started anew.

    Args:
        path: of the file; default: choices.json in `issp.utils.files.cache_folder()`. Its folder is
            made when needed.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = cache_folder() / "choices.json" if path is None else user_path(path)

    def get(self, machine: str, key: str) -> Choice | None:
        """The stored choice of this machine and key, or None."""
        stored = self._read().get(machine, {}).get(key)
        return None if stored is None else Choice(**stored, remembered=True)

    def put(self, machine: str, key: str, choice: Choice) -> None:
        """Adds or replaces one choice; those of others, written in the meantime, stay.

        Where the system has no file locks, one of two choices that are written at once may be
        dropped: it is measured again. A folder that cannot be written is a warning, not an error.
        """

        def add(machines: dict[str, dict[str, Any]]) -> None:
            stored = {name: getattr(choice, name) for name in _STORED}
            machines.setdefault(machine, {})[key] = stored

        self._change(add)

    def forget(self, machine: str, keys: Iterable[str]) -> None:
        """Removes choices of this machine, so that they are measured again; see `put`."""

        def remove(machines: dict[str, dict[str, Any]]) -> None:
            for key in keys:
                machines.get(machine, {}).pop(key, None)

        self._change(remove)

    def _change(self, change: Callable[[dict[str, dict[str, Any]]], None]) -> None:
        try:
            with exclusive(self.path):
                machines = self._read()
                change(machines)
                content = {"format": _FORMAT, "machines": machines}
                text = json.dumps(content, indent=1, sort_keys=True)
                atomic_write(self.path, text.encode(), durable=False)
        except OSError as error:
            warnings.warn(
                f"the choice of a layer's path cannot be kept in {self.path} "
                f"({error.strerror or error}): set ISSP_CACHE to a folder that can be written",
                RuntimeWarning,
                stacklevel=3,
            )

    def _read(self) -> dict[str, dict[str, Any]]:
        problem: str | None
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            problem = str(error)
        except (ValueError, RecursionError) as error:  # no text, no JSON, numbers without end
            problem = f"no JSON: {error}"
        else:
            if isinstance(content, dict) and content.get("format") in range(1, _FORMAT):
                return {}  # of an older version
            problem = _problem(content)
        if problem is None:
            return content["machines"]
        warnings.warn(
            f"{self.path} is not a file of choices ({problem}): what it should hold is measured "
            "again and the file is replaced",
            RuntimeWarning,
            stacklevel=3,
        )
        return {}


_STORED = {
    **{"name": str, "microseconds": dict, "errors": dict, "reason": str},
    **{"spread": int | float, "measured": int | float},
}


def _problem(content: Any) -> str | None:
    """What is wrong with the content of a file of choices."""
    if not isinstance(content, dict) or not isinstance(content.get("machines"), dict):
        return 'it has no "machines"'
    if content.get("format") != _FORMAT:
        return f"its format is {content.get('format')!r}, not {_FORMAT}"
    for name, choices in content["machines"].items():
        if not isinstance(choices, dict) or not all(map(_is_choice, choices.values())):
            return f"the choices of {name!r} are not those of this program"
    return None


def _is_choice(stored: Any) -> bool:
    return (
        isinstance(stored, dict)
        and stored.keys() == _STORED.keys()
        and all(isinstance(stored[name], kind) for name, kind in _STORED.items())
        and all(isinstance(x, int | float) and x > 0 for x in stored["microseconds"].values())
        and all(0 <= stored[name] < _FOREVER for name in ("spread", "measured"))
        and stored["name"] in stored["microseconds"]
    )


def choose(
    key: str,
    dense: Mapping[str, Callable[[], object]],
    sparse: Mapping[str, Callable[[], object]],
    device: str = "cpu",
    cache: Cache | None = None,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> Choice:
    """The fastest candidate; a dense one unless a sparse one is clearly faster.

    A choice from the cache is used while it is current, see `Choice.is_current`.

    Every candidate is timed in turn, in another order each round. A sparse one is chosen if it is
    faster than the fastest dense one by more than 3 % in the median of the rounds and faster in
    three quarters of them; the same holds between the first dense one and the others.

    Args:
        key: all that tells this measurement from others on this machine: what, shapes, dtype.
        dense: name -> call; the first is the plain one, which must run.
        sparse: name -> call; one that fails is left out, with its error in the choice.
        device: "cpu" or "cuda".
        cache: where choices are kept; default: the user's.
        rounds: calls of each candidate.
        seconds: to spend on all of them, roughly; at least five rounds are made.

    Raises:
        ValueError: no dense candidate, or a name that is used twice.
    """
    if not dense or dense.keys() & sparse.keys():
        raise ValueError("choose needs a dense candidate, and a name of its own for each")
    cache = Cache() if cache is None else cache
    name = machine(device)
    stored = cache.get(name, key)
    candidates = {*dense, *sparse}
    if (
        stored is not None
        and stored.is_current
        and stored.microseconds.keys() | stored.errors.keys() == candidates
    ):
        return stored
    choice = measure(dense, sparse, device, rounds=rounds, seconds=seconds)
    choice = replace(choice, measured=time.time())
    cache.put(name, key, choice)
    return choice


def measure(
    dense: Mapping[str, Callable[[], object]],
    sparse: Mapping[str, Callable[[], object]],
    device: str = "cpu",
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    min_rounds: int = _MIN_ROUNDS,
) -> Choice:
    """As `choose`, but measured now, without a cache.

    Args:
        dense, sparse, device, rounds, seconds: see `choose`.
        min_rounds: rounds that are made however slow they are.
    """
    seconds_of = _timer(device)
    calls = {**dense, **sparse}
    plain = next(iter(dense))
    once = 0.0
    errors: dict[str, str] = {}
    for name, call in calls.items():
        try:
            once += seconds_of(call)
        except Exception as error:  # a candidate may fail in any way; the choice tells of it
            if name == plain:
                raise
            errors[name] = (str(error).splitlines() or [type(error).__name__])[0]
    rounds = min(rounds, max(min_rounds, int(seconds / once)))
    names = [name for name in calls if name not in errors]
    firsts = {name: seconds_of(calls[name]) for name in names}
    samples = {name: [first] if first > _SLOW else [] for name, first in firsts.items()}
    # In another order each round: nobody always comes after the one that emptied the caches.
    order = random.Random(0)
    for i in range(rounds):
        order.shuffle(names)
        for name in names:
            if len(samples[name]) == i:
                samples[name].append(seconds_of(calls[name]))
    return decide(samples, list(dense), errors)


def _timer(device: str) -> Callable[[Callable[[], object]], float]:
    """A function that times a call, in seconds; on a GPU with a cold L2, launches included."""

    def on_cpu(call: Callable[[], object]) -> float:
        before = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - before) * 1e-9

    if device != "cuda":
        return on_cpu
    flush_bytes = 4 * torch.cuda.get_device_properties().L2_cache_size
    lines = torch.ones(max(flush_bytes, 64) // 8, dtype=torch.int64, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_gpu(call: Callable[[], object]) -> float:
        lines.sum()  # reads only: dirty lines would cost the next call
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    return on_gpu


def decide(
    samples: Mapping[str, Sequence[float]],
    dense: Sequence[str],
    errors: Mapping[str, str] | None = None,
) -> Choice:
    """Chooses by times that were taken round by round.

    Args:
        samples: candidate -> seconds, one per round.
        dense: names of the dense candidates, the plain one first.
        errors: candidates that could not be timed, and why.
    """
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    best = dense[0]
    for name in sorted((n for n in dense if n in samples), key=medians.__getitem__):
        if _faster(samples[name], samples[best]):
            best = name
            break
    # The fastest in the median first; if its gain is not clear, the next one may still win.
    fastest = min(medians[n] for n in dense if n in medians)
    chosen, reason = best, "no sparse candidate"
    for name in sorted((n for n in samples if n not in dense), key=medians.__getitem__):
        if medians[name] < (1 - _MARGIN) * fastest and _faster(samples[name], samples[best]):
            chosen, reason = name, f"{fastest / medians[name]:.2f} times as fast as dense"
            break
        if reason == "no sparse candidate":
            ratio = medians[name] / fastest
            reason = (
                f"sparse takes {ratio:.2f} times as long"
                if ratio > 1 + _MARGIN
                else "sparse and dense take the same time within the noise"
            )
    spread = _deciding_spread(samples, medians, dense)
    if spread > MAX_SPREAD:
        reason += f"; times spread by {100 * spread:.0f} %, so the next time measures again"
    microseconds = {name: round(1e6 * seconds, 3) for name, seconds in medians.items()}
    return Choice(chosen, microseconds, dict(errors or {}), reason, round(spread, 4))


def _deciding_spread(
    samples: Mapping[str, Sequence[float]], medians: Mapping[str, float], dense: Sequence[str]
) -> float:
    """See `Choice.spread`."""
    kinds = [n for n in samples if n in dense], [n for n in samples if n not in dense]
    fastest = [min(names, key=medians.__getitem__) for names in kinds if names]
    distances = [0.0]
    for seconds in (samples[name] for name in fastest):
        if len(seconds) > 1:
            first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
            distances.append(third - first)
    return max(distances) / max(medians[name] for name in fastest)


def _faster(one: Sequence[float], other: Sequence[float]) -> bool:
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    wins = sum(ratio < 1 for ratio in ratios)
    return wins >= _WIN_SHARE * len(ratios) and statistics.median(ratios) < 1 - _MARGIN
