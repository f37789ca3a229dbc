"""The autotuner: never the slower, remembered per machine and shape, in a file that survives."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from issp.nn import autotune
from issp.nn.autotune import Cache, Choice, choose, decide
from tests.utils.disk import full_disk

ROOT = Path(__file__).resolve().parents[2]


def sleeping(seconds: float):
    return lambda: time.sleep(seconds)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "deep" / "choices.json")


def noisy(median: float, noise: float, rounds: int = 16) -> list[float]:
    return [median * (1 + noise * (-1) ** i * (i % 4) / 3) for i in range(rounds)]


class Clock:
    """Time passes in the candidates alone: each takes its next time in seconds, then the last."""

    def __init__(self, monkeypatch):
        self.now = 1_000_000_000.0
        monkeypatch.setattr(autotune, "_timer", lambda device: self.seconds_of)
        monkeypatch.setattr(autotune.time, "time", lambda: self.now)

    def seconds_of(self, call):
        before = self.now
        call()
        return self.now - before

    def candidate(self, *seconds: float):
        left = list(seconds)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class TestDecide:
    def test_sparse_wins_where_it_is_faster(self):
        choice = decide({"dense": noisy(4, 0.1), "rows": noisy(1, 0.1)}, ["dense"])
        assert choice.name == "rows" and choice.microseconds["rows"] == pytest.approx(1e6, rel=0.1)
        assert choice.reason == "4.00 times as fast as dense"

    def test_dense_wins_where_it_is_faster(self):
        choice = decide({"dense": noisy(1, 0.1), "rows": noisy(4, 0.1)}, ["dense"])
        assert choice.name == "dense" and choice.reason == "sparse takes 4.00 times as long"

    @pytest.mark.parametrize("gain", [1.0, 0.99, 0.975])
    def test_dense_on_a_tie(self, gain):
        choice = decide({"dense": [1.0] * 9, "rows": [gain] * 9}, ["dense"])
        assert choice.name == "dense"
        assert choice.reason == "sparse and dense take the same time within the noise"

    def test_dense_where_the_noise_is_larger_than_the_gain(self):
        # Faster by 5 % in the median, but slower in a third of the rounds.
        rows = [0.95, 0.95, 1.2] * 5
        assert decide({"dense": [1.0] * 15, "rows": rows}, ["dense"]).name == "dense"
        assert decide({"dense": [1.0] * 15, "rows": [0.95] * 15}, ["dense"]).name == "rows"

    def test_the_baseline_is_the_fastest_dense_layout(self):
        samples = {"dense": [3.0] * 9, "channels_last": [1.0] * 9, "rows": [2.0] * 9}
        choice = decide(samples, ["dense", "channels_last"])
        assert choice.name == "channels_last"
        samples["rows"] = [0.5] * 9
        assert decide(samples, ["dense", "channels_last"]).name == "rows"

    def test_the_plain_layout_on_a_tie_of_layouts(self):
        samples = {"dense": [1.0] * 9, "channels_last": [0.99] * 9}
        assert decide(samples, ["dense", "channels_last"]).name == "dense"

    def test_the_fastest_of_several_forms(self):
        samples = {"dense": [8.0] * 9, "rows": [3.0] * 9, "v=4": [2.0] * 9, "v=8": [4.0] * 9}
        assert decide(samples, ["dense"]).name == "v=4"

    def test_a_form_in_doubt_does_not_hide_a_safe_one(self):
        wild = [0.7, 0.7, 1.4] * 3
        samples = {"dense": [1.0] * 9, "wild": wild, "safe": [0.8] * 9}
        assert decide(samples, ["dense"]).name == "safe"


class TestChoose:
    def test_measures_once_and_remembers(self, cache, clock):
        calls = []

        def fast():
            calls.append(1)
            clock.now += 1e-4

        dense = {"dense": clock.candidate(2e-3)}
        choice = choose("a layer", dense, {"rows": fast}, cache=cache, rounds=5)
        assert choice.name == "rows" and not choice.remembered
        assert choice.microseconds == pytest.approx({"dense": 2000, "rows": 100}, rel=1e-3)
        before = len(calls)
        again = choose("a layer", dense, {"rows": fast}, cache=cache)
        assert again.remembered and len(calls) == before
        assert (again.name, again.microseconds) == (choice.name, choice.microseconds)
        choose("another layer", dense, {"rows": fast}, cache=cache, rounds=5)
        assert len(calls) > before

    def test_times_by_the_clock(self, cache):
        candidates = {"dense": sleeping(2e-3)}, {"rows": lambda: None}
        choice = choose("a layer", *candidates, cache=cache, rounds=5)
        assert choice.name == "rows" and choice.microseconds["dense"] > 1900
        assert abs(time.time() - choice.measured) < 60

    def test_never_picks_the_slower(self, cache):
        choice = choose(
            "a layer", {"dense": lambda: None}, {"rows": sleeping(1e-3)}, cache=cache, rounds=5
        )
        assert choice.name == "dense"

    def test_another_number_of_threads_is_measured_anew(self, cache, clock, threads):
        dense = {"dense": clock.candidate(1e-3)}
        threads(1)
        choose("a layer", dense, {}, cache=cache, rounds=5)
        threads(2)
        assert not choose("a layer", dense, {}, cache=cache).remembered
        threads(1)
        assert choose("a layer", dense, {}, cache=cache).remembered
        machines = json.loads(cache.path.read_text())["machines"]
        assert len(machines) == 2 and all(torch.__version__ in name for name in machines)

    def test_other_candidates_are_measured_anew(self, cache):
        choose("a layer", {"dense": lambda: None}, {}, cache=cache, rounds=5)
        again = choose(
            "a layer", {"dense": sleeping(1e-3)}, {"rows": lambda: None}, cache=cache, rounds=5
        )
        assert not again.remembered and again.name == "rows"

    def test_a_candidate_that_fails_is_left_out_with_its_error(self, cache):
        def fail():
            raise RuntimeError("not for this shape\nsecond line")

        choice = choose("a layer", {"dense": lambda: None}, {"rows": fail}, cache=cache, rounds=5)
        assert choice.name == "dense" and choice.errors == {"rows": "not for this shape"}
        with pytest.raises(RuntimeError, match="not for this shape"):
            choose("b", {"dense": fail}, {"rows": lambda: None}, cache=cache, rounds=5)

    def test_slow_candidates_are_called_a_few_times_only(self, cache):
        calls = []
        slow = {"dense": lambda: (calls.append(1), time.sleep(0.02))}
        choose("a layer", slow, {}, cache=cache, rounds=100, seconds=0.02)
        assert len(calls) <= 8

    @pytest.mark.parametrize("dense", [{}, {"rows": lambda: None}])
    def test_bad_candidates_are_refused(self, cache, dense):
        with pytest.raises(ValueError, match="needs a dense candidate, and a name of its own"):
            choose("a layer", dense, {"rows": lambda: None}, cache=cache)


BUSY = (1.0, 1.0) + (1.0, 9.0, 2.0, 1.0, 8.0) * 3
DAY = 24 * 3600.0


class TestAge:
    """Choices measured on a busy machine, or long ago, are made again."""

    def choose(self, cache, clock, dense=(3e-3,), rows=(1e-3,)):
        candidates = {"dense": clock.candidate(*dense)}, {"rows": clock.candidate(*rows)}
        return choose("a layer", *candidates, cache=cache, rounds=9)

    def test_of_a_quiet_machine_are_kept_for_a_month(self, cache, clock):
        first = self.choose(cache, clock)
        assert (first.name, first.spread, first.remembered) == ("rows", 0.0, False)
        clock.now += 29 * DAY
        again = self.choose(cache, clock, rows=(9e-3,))
        assert again.remembered and again.name == "rows"
        clock.now += 2 * DAY
        late = self.choose(cache, clock, rows=(9e-3,))
        assert not late.remembered and late.name == "dense"
        assert self.choose(cache, clock).remembered  # the new date is in the file

    def test_of_a_clock_that_ran_ahead_are_made_again(self, cache, clock):
        self.choose(cache, clock)
        clock.now -= DAY
        assert not self.choose(cache, clock).remembered

    @pytest.mark.parametrize("busy", ["dense", "rows"])
    def test_of_a_busy_machine_serve_once(self, cache, clock, busy):
        first = self.choose(cache, clock, **{busy: [1e-3 * t for t in BUSY]})
        assert first.spread > 1 and not first.is_current
        assert "so the next time measures again" in first.reason
        again = self.choose(cache, clock)
        assert not again.remembered and again.name == "rows" and again.spread == 0
        assert self.choose(cache, clock).remembered

    def test_the_spread_is_that_of_the_times_that_decide(self):
        wild = [1.0, 9.0, 2.0, 1.0, 8.0]
        samples = {"dense": [2.0] * 5, "slow": [10 * t for t in wild], "rows": [1.0] * 5}
        assert decide(samples, ["dense"]).spread == 0
        # The quartiles of 8, 9, 10, 11, 12 are 9 and 11; what spreads far below dense is clear.
        samples["rows"] = [0.08, 0.12, 0.1, 0.09, 0.11]
        assert decide(samples, ["dense"]).spread == pytest.approx(0.02 / 2)
        samples["rows"] = [8.0, 12.0, 10.0, 9.0, 11.0]
        assert decide(samples, ["dense"]).spread == pytest.approx(0.2)
        samples["dense"] = [2.0 * t for t in wild]
        assert decide(samples, ["dense"]).spread == pytest.approx((16 - 2) / 10)

    def test_one_round_has_no_spread(self):
        assert decide({"dense": [2.0], "rows": [1.0]}, ["dense"]).spread == 0


GOOD = Choice("dense", {"dense": 2.0, "rows": 3.5}, {"v=4": "no kernel"}, "because")


class TestFile:
    def test_round_trip_and_readable(self, cache):
        cache.put("this machine", "a layer", GOOD)
        choice = cache.get("this machine", "a layer")
        assert choice.remembered
        assert [getattr(choice, n) for n in ("name", "microseconds", "errors", "reason")] == [
            *(GOOD.name, GOOD.microseconds, GOOD.errors, GOOD.reason)
        ]
        assert cache.get("this machine", "b") is None and cache.get("b", "a layer") is None
        content = json.loads(cache.path.read_text())
        assert content["machines"]["this machine"]["a layer"]["microseconds"]["rows"] == 3.5
        assert [path.name for path in cache.path.parent.iterdir()] == ["choices.json"]

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "no JSON"),
            ('{"format": 1, "machines": {"a": {"b"', "no JSON"),
            ("[1, 2]", 'it has no "machines"'),
            ('{"machines": {}}', "its format is None, not 2"),
            ('{"format": 99, "machines": {}}', "its format is 99, not 2"),
            ('{"format": 2, "machines": {"m": 3}}', "the choices of 'm' are not those"),
            ('{"format": 2, "machines": {"m": {"a layer": {"name": "x"}}}}', "of 'm' are not"),
            (
                '{"format": 2, "machines": {"m": {"k": {"name": "gone", "microseconds": '
                '{"dense": 1}, "errors": {}, "reason": "", "spread": 0, "measured": 0}}}}',
                "of 'm' are not those",
            ),
            ("[" * 100_000, "no JSON"),
            ('{"format": ' + "9" * 5000 + "}", "no JSON"),
            *(
                (
                    '{"format": 2, "machines": {"m": {"k": {"name": "dense", "microseconds": '
                    '{"dense": 1}, "errors": {}, "reason": "", "spread": 0, '
                    f'"measured": {number}}}}}}}}}',
                    "of 'm' are not those",
                )
                for number in ("1" + "0" * 400, "1e999", "NaN")
            ),
        ],
        ids=lambda text: text[:40],
    )
    def test_a_broken_or_unknown_file_is_reported_and_rebuilt(self, cache, text, problem):
        cache.path.parent.mkdir()
        cache.path.write_text(text)
        with pytest.warns(RuntimeWarning, match="is not a file of choices") as seen:
            assert cache.get("m", "a layer") is None
        assert problem in str(seen[0].message) and str(cache.path) in str(seen[0].message)
        with pytest.warns(RuntimeWarning, match="is not a file of choices"):
            cache.put("m", "a layer", GOOD)
        assert cache.get("m", "a layer").name == "dense"

    def test_a_file_of_an_older_version_is_replaced_without_a_word(self, cache):
        cache.path.parent.mkdir()
        old = {"name": "dense", "microseconds": {"dense": 1}, "errors": {}, "reason": ""}
        cache.path.write_text(json.dumps({"format": 1, "machines": {"m": {"a layer": old}}}))
        assert cache.get("m", "a layer") is None
        cache.put("m", "a layer", GOOD)
        assert cache.get("m", "a layer").reason == "because"

    def test_what_is_forgotten_is_measured_anew(self, cache):
        for key in ("a", "b", "c"):
            cache.put("m", key, GOOD)
        cache.forget("m", ["a", "c", "never there"])
        cache.forget("another machine", ["b"])
        assert [cache.get("m", key) is None for key in ("a", "b", "c")] == [True, False, True]

    def test_binary_rubbish_is_reported(self, cache):
        cache.path.parent.mkdir()
        cache.path.write_bytes(b"\xff\xfe\x00\x80")
        with pytest.warns(RuntimeWarning, match="is not a file of choices"):
            assert cache.get("m", "a layer") is None

    def test_a_folder_that_cannot_be_made_is_a_warning(self, tmp_path):
        (tmp_path / "file").write_text("")
        cache = Cache(tmp_path / "file" / "choices.json")
        with pytest.warns(RuntimeWarning, match="set ISSP_CACHE to a folder"):
            cache.put("m", "a layer", GOOD)

    def test_threads_that_write_at_once_lose_nothing(self, cache):
        def write(i):
            for j in range(10):
                Cache(cache.path).put("m", f"{i} {j}", GOOD)

        workers = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(json.loads(cache.path.read_text())["machines"]["m"]) == 40

    @pytest.mark.full
    def test_processes_that_write_at_once_lose_nothing(self, cache):
        script = (
            "import sys; from issp.nn.autotune import Cache, Choice\n"
            "for j in range(20): Cache(sys.argv[1]).put('m', f'{sys.argv[2]} {j}', "
            "Choice('dense', {'dense': 1.0}))"
        )
        command = [sys.executable, "-c", script, str(cache.path)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        workers = [subprocess.Popen([*command, str(i)], env=env) for i in range(2)]
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
        assert len(json.loads(cache.path.read_text())["machines"]["m"]) == 40

    def test_an_interrupted_write_leaves_the_old_file(self, cache, monkeypatch):
        cache.put("m", "a layer", GOOD)
        full_disk(monkeypatch)
        with pytest.warns(RuntimeWarning, match="No space left"):
            cache.put("m", "b", GOOD)
        monkeypatch.undo()
        assert cache.get("m", "a layer").name == "dense" and cache.get("m", "b") is None
        assert not list(cache.path.parent.glob("*.tmp"))

    def test_folder_is_the_users_or_the_given_one(self, monkeypatch, tmp_path):
        monkeypatch.delenv("ISSP_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert Cache().path == tmp_path / "cache" / "issp" / "choices.json"
        monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "choices"))
        assert Cache().path == tmp_path / "choices" / "choices.json"


def test_machine_does_not_wait(monkeypatch):
    """`issp.info` waits for the load of the machine, which no choice depends on."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
    assert autotune.machine("cpu")


def test_machine_names_all_that_times_depend_on(threads, monkeypatch):
    threads(2)
    before = autotune.machine("cpu")
    for part in ("2 threads", f"torch {torch.__version__}", "issp "):
        assert part in before
    monkeypatch.setattr(autotune, "_fingerprint", lambda: "other kernels")
    assert autotune.machine("cpu") != before
