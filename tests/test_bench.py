"""The benchmark tables, their refusal on wrong bits, the shape tables and the GPU script."""

import argparse
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from issp import backends, bench, num_pruned, ops, reference, shapes
from issp.bench import peers, report, step, timing
from issp.bench.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "on_gpu.sh"
TINY = [(32, 16), (5, 2), (16, 16, 3, 3)]
FAST = step.Settings(
    rounds=3, seconds=0.05, settle=2, whole=False, flush_bytes=1 << 16, probe_bytes=1 << 16
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_model(monkeypatch):
    """`swinir-light` becomes three small tensors."""
    monkeypatch.setattr(shapes, "prunable_shapes", lambda name, scale: TINY)
    monkeypatch.setattr(step, "CpuClock", lambda flush_bytes: timing.CpuClock(1 << 16))


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.main(parser.parse_args(["step", "--model", "swinir-light", *words]))


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


class TestShapes:
    @pytest.mark.parametrize(
        ("model", "scale", "layers", "weights"),
        [
            ("swinir-light", 4, 103, 880_740),
            ("swinir-light", 3, 103, 869_400),
            ("swinir-light", 2, 103, 861_300),
            ("edsr-l", 4, 69, 43_070_976),
            ("cat-r", 4, 480, 16_506_900),
        ],
    )
    def test_counts(self, model, scale, layers, weights):
        table = shapes.prunable_shapes(model, scale)
        assert (len(table), sum(map(math.prod, table))) == (layers, weights)

    @pytest.mark.parametrize(
        ("model", "pruned"),
        [
            ("swinir-light", (792_666, 836_703, 871_933)),
            ("edsr-l", (38_763_906, 40_917_443, 42_640_284)),
            ("cat-r", (14_856_320, 15_681_539, 16_341_607)),
        ],
    )
    def test_pruned_counts_are_the_authors(self, model, pruned):
        numels = list(map(math.prod, shapes.prunable_shapes(model)))
        found = tuple(sum(num_pruned(n, ratio) for n in numels) for ratio in (0.9, 0.95, 0.99))
        assert found == pruned

    @pytest.mark.parametrize("model", ["swinir-light", "edsr-baseline"])
    @pytest.mark.parametrize("scale", shapes.SCALES)
    def test_order_is_the_networks(self, model, scale):
        models = pytest.importorskip("issp.models", reason="the networks are not installed")
        kinds = (torch.nn.Conv2d, torch.nn.Linear)
        net = models.build(model, scale)
        found = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, kinds)]
        assert found == shapes.prunable_shapes(model, scale)

    def test_unknown_names_are_refused(self):
        with pytest.raises(ValueError, match="no shape table for 'vgg': known are swinir-light"):
            shapes.prunable_shapes("vgg")
        with pytest.raises(ValueError, match="scale is 5"):
            shapes.prunable_shapes("edsr-l", 5)


@pytest.fixture(scope="module")
def table(one_thread):
    step.check_parity(TINY, FAST)
    return step.measure("tiny", TINY, FAST)


class TestTable:
    def test_has_every_row_and_well_formed_markdown(self, table):
        rows = cells(table.markdown())
        assert {len(row) for row in rows} == {len(rows[0])}
        assert set(rows[1]) == {"---", "---:"}
        assert [row[0] for row in rows[2:]] == [row.name for row in peers.ROWS]
        numbers = [cell.rstrip(" %") for row in rows[2:] for cell in row[1:]]
        assert all(cell == "-" or math.isfinite(float(cell)) for cell in numbers)

    def test_names_the_machine(self, table):
        wanted = r"\d+ cores, 1 threads; load .*; torch .*; Python .*; issp \w+\+?; back end \w+"
        assert re.search(wanted, table.markdown())

    def test_ratios_and_times_are_positive(self, table):
        for line in table.lines:
            for mode in table.modes():
                assert line.seconds[mode] > 0 and table.ratio(line, mode) > 0
            assert table.rate(line) == line.traffic / line.seconds["cold"]
            assert table.share(line) == table.rate(line) / table.roof.rate
        assert table.ratio(table.line(peers.BASE), "cold") == 1

    def test_memory_of_the_step_is_its_scratch_and_of_argsort_its_indices(self, table):
        state = Workload(TINY, FAST.sparsity).state
        scratch = state.scratch.nbytes / sum(state.numels)
        assert table.line(peers.STEP).extra >= scratch
        largest = max(map(math.prod, TINY))
        indices = 8 * largest / sum(map(math.prod, TINY))
        assert table.line("authors' numpy argsort").extra > indices

    def test_a_peer_that_fails_becomes_a_note(self):
        def fail(work):
            def call():
                raise RuntimeError("not for this dtype\nsecond line")

            return call

        broken = peers.Row(
            "broken", traffic=lambda n, size: n, counted="nothing", make=fail,
            prepare=Workload.restore,
        )  # fmt: skip
        table = step.measure("tiny", TINY, FAST, [*peers.ROWS[:6], broken])
        assert "broken could not be timed, cold: not for this dtype" in table.markdown()
        assert cells(table.markdown())[-1][1] == "-"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda_table_times_launches_and_graphs():
    settings = step.Settings(rounds=3, seconds=0.05, settle=2, whole=False, device="cuda")
    step.check_parity(TINY, settings)
    table = step.measure("tiny", TINY, settings)
    assert table.modes() == ["eager", "graph", "graph, warm"]
    fused = table.line(peers.STEP).seconds
    assert all(fused[mode] > 0 for mode in table.modes())
    # numpy cannot be captured: only the column of launches has its time.
    authors = table.line("authors' numpy argsort").seconds
    assert authors["eager"] > 0 and authors["graph"] is None


class TestParity:
    def test_wrong_bits_are_refused_before_timing(self, monkeypatch, tiny_model, capsys, tmp_path):
        right = ops.soft_shrink_

        def wrong(weights, state, *args, **kwargs):
            right(weights, state, *args, **kwargs)
            weights[-1].view(-1)[7] = -weights[-1].view(-1)[7]

        monkeypatch.setattr(ops, "soft_shrink_", wrong)
        out = tmp_path / "table.md"
        assert command("--quick", "--out", str(out)) == 1
        shown = capsys.readouterr()
        assert shown.out == "" and not out.exists()
        assert re.search(r"not bitwise equal .*weight of 2304 elements, step 0", shown.err)

    def test_wrong_masks_are_refused(self, monkeypatch):
        right = ops.soft_shrink_

        def wrong(weights, state, *args, **kwargs):
            right(weights, state, *args, **kwargs)
            state.packed[0] ^= 1

        monkeypatch.setattr(ops, "soft_shrink_", wrong)
        with pytest.raises(RuntimeError, match="masks, step 0, bracket True"):
            step.check_parity(TINY, FAST)

    @pytest.mark.parametrize("dtype", step.DTYPES)
    def test_the_step_passes_in_every_dtype(self, dtype):
        step.check_parity(TINY, step.Settings(dtype=dtype))


class TestCommand:
    def test_writes_the_table_and_the_picture(self, tiny_model, capsys, tmp_path):
        pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
        out, picture = tmp_path / "table.md", tmp_path / "times.png"
        arguments = ("--quick", "--seconds", "0.01", "--settle", "1")
        assert command(*arguments, "--out", str(out), "--plot", str(picture)) == 0
        assert capsys.readouterr().out.strip() == out.read_text().strip()
        assert "swinir-light x4: 3 tensors, 2826 weights, float32" in out.read_text()
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["table.md", "times.png"]

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("--sparsity", "1.5"), "sparsity is 1.5"),
            (("--threads", "0"), "--threads is 0"),
            (("--seconds", "0"), "--seconds is 0"),
            (("--settle", "0"), "--settle is 0"),
            (("--shrink", "2"), "--shrink is 2"),
            (("--out", "/nowhere/table.md"), "create /nowhere"),
        ],
    )
    def test_bad_input_is_one_sentence_and_status_2(self, words, sentence, capsys):
        assert command(*words) == 2
        shown = capsys.readouterr()
        assert sentence in shown.err and shown.err.count("\n") == 1 and shown.out == ""

    def test_no_gpu_is_said(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert command("--device", "cuda") == 2
        assert "torch sees no CUDA device" in capsys.readouterr().err

    def test_a_full_disk_leaves_the_old_file(self, monkeypatch, tmp_path):
        path = tmp_path / "table.md"
        path.write_text("old")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            report.write_atomically(path, b"new")
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


class TestTiming:
    def test_slow_tasks_run_less_often_and_none_never(self):
        class Clock:
            modes = (timing.Mode("only", cold=False),)

            def compile(self, call, mode):
                return call

            def time(self, call, mode):
                return call()

        order = []

        def task(name, seconds):
            return timing.Task(lambda: order.append(name) or seconds, lambda: None)

        tasks = {"fast": task("fast", 0.001), "mid": task("mid", 0.25), "slow": task("slow", 9.0)}
        timing.interleave(list(tasks.values()), Clock(), rounds=8, seconds=1.0)
        assert {k: len(t.samples["only"]) for k, t in tasks.items()} == dict(fast=8, mid=4, slow=1)
        assert "mid" in order[3:8] and "mid" in order[-3:]  # spread over the rounds
        assert tasks["slow"].median("only") == 9.0 and tasks["slow"].spread("only") is None

    def test_peak_counts_torch_and_numpy_temporaries(self):
        x = torch.ones(1 << 16)
        assert timing.peak_bytes(lambda: x.mul_(2), "cpu") < 4096
        assert timing.peak_bytes(lambda: x + (x + 1), "cpu") >= 2 * x.nbytes
        assert timing.peak_bytes(lambda: x.numpy() + 1, "cpu") >= x.nbytes

    def test_drift_moves_by_the_learning_rate_and_settling_keeps_parity(self):
        work = Workload([(256, 64)], 0.95)
        before = work.weights[0].clone()
        work.drift()
        moved = (work.weights[0] - before).std().item()
        assert 0.9e-4 * 2 < moved < 1.1e-4 * 2
        work.settle(3)
        kept = work.state.masks()[0].sum().item()
        assert kept == 256 * 64 - num_pruned(256 * 64, 0.95)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
class TestScript:
    def run(self, *words: str, out: Path | None = None) -> subprocess.CompletedProcess:
        # An empty CUDA_VISIBLE_DEVICES hides the GPU of a machine that has one.
        env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        env["OUT"] = str(out or "/nowhere/results")
        done = ["bash", str(SCRIPT), *words]
        return subprocess.run(done, env=env, capture_output=True, text=True, timeout=120)

    def test_syntax_and_habits(self):
        assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
        assert os.access(SCRIPT, os.X_OK)
        text = SCRIPT.read_text()
        assert "set -u -o pipefail" in text
        # Unquoted expansions break on folders with spaces: arguments of commands are all quoted.
        bare = re.findall(r"(?m)^\s*(?:run|mkdir|rm|cd)\b[^\n|]*?\s\$\{?(?:OUT|PYTHON)\b", text)
        assert bare == []
        # The settings of the card are never touched.
        assert not re.search(r"nvidia-smi\s+-(?:r|pm|pl|ac|lgc|c|mig)\b", text)

    def test_without_a_gpu_one_sentence_and_status_3(self, tmp_path):
        done = self.run(out=tmp_path / "results")
        assert done.returncode == 3
        assert done.stderr.count("\n") == 1
        assert "only the parts info and build can run" in done.stderr
        assert not (tmp_path / "results").exists()

    def test_info_needs_none_and_leaves_a_summary(self, tmp_path):
        done = self.run("--parts", "info", out=tmp_path / "results")
        assert done.returncode == 0, done.stdout + done.stderr
        summary = (tmp_path / "results" / "summary.txt").read_text()
        assert re.search(r"\| info +\| passed ", summary) and done.stdout.endswith(summary)
        assert "torch " + torch.__version__ in (tmp_path / "results" / "info.txt").read_text()

    def test_dry_run_names_every_part_and_writes_nothing(self, tmp_path):
        done = self.run("--dry-run", out=tmp_path / "results")
        assert done.returncode == 0 and list(tmp_path.iterdir()) == []
        parts = re.findall(r"(?m)^== (\w+)$", done.stdout)
        assert parts == ["info", "build", "tests", "sanitize", "bench", "ncu", "suite"]
        for word in ("memcheck", "racecheck", "synccheck", "gpu__time_duration.sum", "build_ext"):
            assert word in done.stdout
        # What a GPU machine gives back is limited to eight files.
        named = set(re.findall(r"\[\d+ s, ([\w.]+)\]", done.stdout)) | {"step.png", "summary.txt"}
        assert len(named) == 8

    @pytest.mark.parametrize("words", [("--parts", "info,lunch"), ("--fast",), ("--parts",)])
    def test_bad_arguments_are_status_2(self, words):
        done = self.run(*words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_sanitizer_cases_equal_the_reference(monkeypatch, capsys):
    path = str(ROOT / "bench" / "sanitize.py")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [path, "--device", "cpu"])
    assert runpy.run_path(path)["main"]() == 0
    assert "26 of 26 cases equal" in capsys.readouterr().out


@pytest.mark.skipif(
    backends.active("cpu") == "reference", reason="the reference cannot differ from itself"
)
def test_sanitizer_cases_find_a_wrong_tie(monkeypatch, capsys):
    path = str(ROOT / "bench" / "sanitize.py")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [path, "--device", "cpu"])

    def last_of_the_ties(w, k):
        chosen = torch.zeros(w.numel(), dtype=torch.bool)
        order = torch.sort(reference.key(w).flip(0), stable=True).indices
        chosen[w.numel() - 1 - order[:k]] = True
        return chosen

    monkeypatch.setattr(reference, "selected", last_of_the_ties)
    assert runpy.run_path(path)["main"]() == 1
    shown = capsys.readouterr().out
    assert "soft_shrink_ torch.float32 ties True step 0" in shown
    assert "soft_shrink_ torch.float32 ties False step 0" not in shown
