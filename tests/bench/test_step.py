"""`python -m bench step`: its tables, refusal of wrong bits, scaling, and the shape tables."""

import json
import math
import re

import pytest
import torch

import bench
from bench import baselines, cub, scaling, step
from bench.harness import bandwidth, settings, timing
from bench.harness.memory import peak_bytes
from bench.harness.step_table import Entry, make
from bench.harness.workload import Workload
from issp import models, num_pruned, ops
from issp.sr import shapes
from issp.utils import files

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = [(32, 16), (5, 2), (16, 16, 3, 3)]
FAST = step.Settings(
    rounds=3, seconds=0.05, settle=2, whole=False, flush_bytes=1 << 16, probe_bytes=1 << 16
)


@pytest.fixture
def tiny_model(monkeypatch):
    """`swinir-light` becomes three small tensors."""
    monkeypatch.setattr(shapes, "prunable_shapes", lambda name, scale: TINY)
    monkeypatch.setattr(settings, "CpuClock", lambda flush_bytes: timing.CpuClock(1 << 16))
    monkeypatch.setitem(bandwidth.DEFAULT_BYTES, "cpu", 1 << 16)


def command(*words: str) -> int:
    return bench.main(["step", "--model", "swinir-light", *words])


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
        actual = tuple(sum(num_pruned(n, ratio) for n in numels) for ratio in (0.9, 0.95, 0.99))
        assert actual == pruned

    @pytest.mark.parametrize("model", ["swinir-light", "edsr-baseline"])
    @pytest.mark.parametrize("scale", shapes.SCALES)
    def test_order_is_the_networks(self, model, scale):
        kinds = (torch.nn.Conv2d, torch.nn.Linear)
        net = models.build(model, scale)
        actual = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, kinds)]
        assert actual == shapes.prunable_shapes(model, scale)

    def test_unknown_names_are_refused(self):
        with pytest.raises(ValueError, match="unknown model 'vgg': known: edsr-tiny"):
            shapes.prunable_shapes("vgg")
        with pytest.raises(ValueError, match="unknown scale 5 for edsr-l"):
            shapes.prunable_shapes("edsr-l", 5)


@pytest.fixture(scope="module")
def table(one_thread):
    step.check_parity(TINY, FAST)
    return step.measure("tiny", TINY, FAST)


@pytest.mark.full
class TestTable:
    def test_has_every_row_and_well_formed_markdown(self, table):
        rows = cells(table.markdown())
        assert {len(row) for row in rows} == {len(rows[0])}
        assert all(re.fullmatch("-+:?", cell) for cell in rows[1])
        assert [row[0] for row in rows[2:]] == [row.name for row in baselines.OPERATIONS]
        numbers = [cell.rstrip(" %") for row in rows[2:] for cell in row[1:]]
        assert all(cell == "-" or math.isfinite(float(cell)) for cell in numbers)

    def test_names_the_machine(self, table):
        wanted = r"\d+ cores, 1 threads; load .*; torch .*; Python .*; issp [\w-]+; back end \w+"
        assert re.search(wanted, table.markdown())

    def test_ratios_and_times_are_positive(self, table):
        peak = max(table.limits["copy"], table.limits["multiply"])
        numel = sum(map(math.prod, TINY))
        for row in table.rows:
            for mode in ("warm", "cold"):
                assert row[mode] > 0 and row[f"{mode} ratio"] > 0
            assert row["rate"] == row["traffic"] * numel / row["cold"]
            assert row["share"] == row["rate"] / peak
        assert table.row(baselines.BASE)["cold ratio"] == 1

    def test_memory_of_the_step_is_its_scratch_and_of_argsort_its_indices(self, table):
        state = Workload(TINY, FAST.sparsity).state
        scratch = state.scratch.nbytes / sum(state.numels)
        assert table.row(baselines.STEP)["extra"] >= scratch
        largest = max(map(math.prod, TINY))
        indices = 8 * largest / sum(map(math.prod, TINY))
        assert table.row("authors' numpy argsort")["extra"] > indices

    def test_a_baseline_that_fails_becomes_a_note(self):
        def fail(workload):
            def call():
                raise RuntimeError("not for this dtype\nsecond line")

            return call

        broken = baselines.Operation(
            "broken", traffic=lambda n, size: n, counted="nothing", make=fail,
            prepare=Workload.restore,
        )  # fmt: skip
        table = step.measure("tiny", TINY, FAST, [*baselines.OPERATIONS[:6], broken])
        assert "broken could not be timed, cold: not for this dtype" in table.markdown()
        assert cells(table.markdown())[-1][1] == "-"

    def test_what_is_not_installed_is_named(self, monkeypatch):
        monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(cub.shutil, "which", lambda name: None)
        rows = [op for op in baselines.operations("cuda") if op not in baselines.OPERATIONS]
        table = step.measure("tiny", TINY, FAST, [*baselines.OPERATIONS[:4], *rows])
        last = {row[0]: row[1] for row in cells(table.markdown())[-2:]}
        assert last == {
            "FlashInfer top_k_mask_logits": "not installed",
            "CUB DeviceTopK": "not installed",
        }

    def test_roofline_is_counted_bytes_over_the_best_bandwidth(self):
        task = timing.Task(lambda: None, lambda: None, samples={"cold": [0.5]})
        table = make(
            title="title",
            machine="machine",
            clock=timing.CpuClock(1 << 16),
            bandwidth=bandwidth.Bandwidth(30e9, 40e9, 8),
            numel=10**9,
            entries=[Entry("op", task, traffic=10e9)],
            base="op",
        )
        (row,) = table.rows
        assert row["rate"] == 20e9 and row["share"] == 0.5
        actual = dict(zip(*(cells(table.markdown())[i] for i in (0, 2)), strict=True))
        assert (actual["B/weight"], actual["GB/s"], actual["of roofline"]) == ("10", "20", "50 %")
        assert "40 GB/s, the faster of copying (30) and multiplying in place (40)" in (
            table.markdown()
        )

    def test_bandwidth_is_that_of_both_buffers(self):
        probe = bandwidth.BandwidthProbe("cpu", 1 << 12)
        for task, seconds in zip(probe.tasks, (2.0, 4.0), strict=True):
            task.call()
            task.samples["cold"] = [seconds]
        assert probe.result("cold") == bandwidth.Bandwidth(
            copy=4096.0, multiply=2048.0, nbytes=4096
        )

    @pytest.mark.parametrize("k", [1, 17, 100])
    def test_quantile_is_asked_for_the_threshold(self, k):
        x = torch.randn(100)
        assert baselines.quantile(x.abs(), k) == ops.magnitude_threshold([x], [k])[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.full
def test_cuda_table_times_launches_and_graphs():
    on_gpu = step.Settings(rounds=3, seconds=0.05, settle=2, whole=False, device="cuda")
    step.check_parity(TINY, on_gpu)
    table = step.measure("tiny", TINY, on_gpu)
    assert all(table.row(baselines.STEP)[mode] > 0 for mode in ("eager", "graph", "graph, warm"))
    # numpy cannot be captured: only the column of launches has its time.
    authors = table.row("authors' numpy argsort")
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
    @pytest.mark.full
    def test_writes_the_table_and_the_picture(self, tiny_model, capsys, tmp_path):
        pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
        out, picture = tmp_path / "table.md", tmp_path / "times.png"
        arguments = ("--quick", "--seconds", "0.01", "--settle", "1")
        assert command(*arguments, "--out", str(out), "--plot", str(picture)) == 0
        assert capsys.readouterr().out.strip() == out.read_text().strip()
        assert "swinir-light x4: 3 tensors, 2826 weights, float32" in out.read_text()
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["table.md", "times.png"]

    @pytest.mark.full
    def test_writes_every_sample(self, tiny_model, tmp_path):
        out = tmp_path / "samples.json"
        arguments = ("--quick", "--seconds", "0.01", "--settle", "1")
        assert command(*arguments, "--samples", str(out)) == 0
        (table,) = json.loads(out.read_text())
        row = next(row for row in table["rows"] if row["what"] == baselines.STEP)
        seconds = row["seconds"]
        assert seconds.keys() == {"warm", "cold"} and all(len(x) == 7 for x in seconds.values())
        assert table["roofline"]["copy"] > 0

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("--sparsity", "1.5"), "sparsity is 1.5"),
            (("--threads", "0"), "--threads is 0"),
            (("--seconds", "0"), "--seconds is 0"),
            (("--settle", "0"), "--settle is 0"),
            (("--shrink", "2"), "--shrink is 2"),
            (("--out", "/nowhere/table.md"), "create /nowhere"),
            (("--samples", "/nowhere/samples.json"), "create /nowhere"),
            (("--scaling", "--largest", "10"), "--largest is 10"),
            (("--scaling", "--budget", "0"), "--budget is 0"),
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

    @pytest.mark.full
    def test_a_full_disk_leaves_the_old_file(self, tiny_model, monkeypatch, capsys, tmp_path):
        path = tmp_path / "table.md"
        path.write_text("old")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files.os, "replace", full)
        words = ("--quick", "--seconds", "0.01", "--settle", "1", "--out", str(path))
        assert command(*words) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


class TestScaling:
    @pytest.fixture
    def points(self):
        return [scaling.Point(n, [(1, n)]) for n in (100, 1000)]

    @pytest.mark.full
    def test_both_curves_are_printed_written_and_drawn(self, tiny_model, capsys, tmp_path):
        pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
        paths = {x: tmp_path / f"scaling.{x}" for x in ("md", "png", "json")}
        words = ["--scaling", "--quick", "--largest", "1000", "--settle", "1"]
        words += ["--out", str(paths["md"]), "--plot", str(paths["png"])]
        assert command(*words, "--samples", str(paths["json"])) == 0
        text = paths["md"].read_text()
        assert capsys.readouterr().out.strip() == text.strip()
        rows = [row for row in cells(text) if row[0].isdigit()]
        assert [row[0] for row in rows] == ["1000", "1", "3", "10"]
        assert all(float(cell.rstrip(" %")) > 0 for row in rows for cell in row)
        assert paths["png"].read_bytes().startswith(b"\x89PNG")
        curves = json.loads(paths["json"].read_text())
        assert [curve["roofline"]["axis"] for curve in curves] == ["weights", "tensors"]

    def test_layers_have_one_fan_in_whatever_their_size(self):
        sizes = (100, 1000, 3000, 10**7)
        assert list(map(scaling.layer, sizes)) == [(1, 100), (1, 1000), (3, 1000), (10**4, 1000)]

    def test_what_does_not_fit_memory_says_so(self, monkeypatch, points):
        monkeypatch.setattr(scaling, "free_bytes", lambda device: 20_000)
        curve = scaling.measure("weights", (baselines.STEP, baselines.TOPK), points, FAST, 60.0)
        assert points[0].skipped == {}
        assert list(points[1].skipped) == [baselines.TOPK]
        expected = "1000 weights: torch.topk skipped, needs up to 4.1e-05 GB and 1.8e-05 GB are"
        assert expected in curve.markdown()
        assert cells(curve.markdown())[-1][2] == "-"

    def test_what_does_not_fit_the_budget_says_so(self, points):
        curve = scaling.measure("weights", (baselines.STEP,), points, FAST, 0.0)
        assert all("0 s are left" in point.skipped[baselines.STEP] for point in points)
        assert set(cells(curve.markdown())[-1][1:]) == {"-"}


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
        rounds = [order[i : i + 2] for i in range(3, len(order) - 1)]
        assert ["fast", "mid"] in rounds and ["mid", "fast"] in rounds  # another order each time

    def test_peak_counts_torch_and_numpy_temporaries(self):
        x = torch.ones(1 << 16)
        assert peak_bytes(lambda: x.mul_(2), "cpu") < 4096
        assert peak_bytes(lambda: x + (x + 1), "cpu") >= 2 * x.nbytes
        assert peak_bytes(lambda: x.numpy() + 1, "cpu") >= x.nbytes

    def test_a_perturbation_moves_by_the_learning_rate_and_settling_keeps_parity(self):
        workload = Workload([(256, 64)], 0.95)
        before = workload.weights[0].clone()
        workload.perturb()
        moved = (workload.weights[0] - before).std().item()
        assert 0.9e-4 * 2 < moved < 1.1e-4 * 2
        workload.warm_up(3)
        kept = workload.state.masks()[0].sum().item()
        assert kept == 256 * 64 - num_pruned(256 * 64, 0.95)
