"""The tables of `python -m bench conv` and `matmul`: ratios, break-even, targets, command."""

import json
import math
import re
import time
from dataclasses import replace

import pytest
import torch

import bench
from bench.harness import timing
from bench.harness.bandwidth import Bandwidth
from bench.sparse import calls as sparse_calls
from bench.sparse import layers as sparse_layers
from bench.sparse import measure, tables, targets
from bench.sparse.forms import Form
from bench.sparse.layer_times import Entry, LayerTimes, break_even
from bench.sparse.layers import Layer
from issp import ops

pytestmark = pytest.mark.usefixtures("one_thread")

CONV = Layer((8, 8, 3, 3), (1, 8, 6, 5), ("tiny",))
LINEAR = Layer((8, 8), (2, 5, 8))
FAST = measure.Settings(
    sparsities=(0.5, 0.75),
    threads=(1,),
    rounds=4,
    seconds=0.02,
    probe_bytes=1 << 16,
    probe_side=16,
)


@pytest.fixture
def quick(monkeypatch):
    """The command's probes become small."""
    monkeypatch.setattr(measure, "SMALLEST_PROBE", 1 << 16)
    original = measure.settings_of
    monkeypatch.setattr(
        measure,
        "settings_of",
        lambda args: replace(original(args), rounds=4, probe_side=16),
    )


def command(*words: str) -> int:
    return bench.main(words)


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def entry(name: str, seconds: float, dense: bool = False, **more) -> Entry:
    task = timing.Task(lambda: None, lambda: None, samples={"warm": [seconds]})
    rest = {"pass_": "forward", "precision": "fp32", "flops": 2e9, "nbytes": 1e6} | more
    return Entry(name=name, task=task, dense=dense, **rest)


def times_of(*entries: Entry) -> LayerTimes:
    peaks = {"fp32": 1e12, "bf16": 8e12}
    return LayerTimes(CONV, 2, "machine", ["warm"], Bandwidth(1e9, 2e9, 8), peaks, list(entries))


def markdown(times: LayerTimes) -> str:
    return "\n".join(table.markdown() for table in tables.layer_tables(times))


class TestLayerTimes:
    @pytest.mark.parametrize(
        ("curve", "words"),
        [
            ([], None),
            ([(0.5, 1.2), (0.9, 4.0)], "below 50 %"),
            ([(0.5, 0.2), (0.99, 0.9)], "above 99 %"),
            ([(0.5, 0.5), (0.75, 1.0), (0.9, 2.0)], "75 %"),
            ([(0.5, 0.25), (0.75, 0.5), (0.9375, 2.0)], "87.5 %"),
            # Faster once, then slower again: only what lies behind the last loss counts.
            ([(0.5, 1.5), (0.75, 0.5), (0.9375, 2.0)], "87.5 %"),
            ([(0.9, 0.5), (0.9, 2.0)], "90 %"),
            ([(0.5, 0.5), (1.0, 2.0)], "100 %"),
        ],
    )
    def test_break_even(self, curve, words):
        assert break_even(curve) == words

    def test_the_baseline_is_the_fastest_dense_fp32_layout(self):
        times = times_of(
            entry("dense fp32", 4e-3, True),
            entry("dense fp32 channels_last", 2e-3, True),
            entry("dense bf16", 4e-4, True, precision="bf16"),
            entry("issp rows", 5e-4, sparsity=0.9, actual=0.9, flops=2e8),
        )
        ours = times.entries[-1]
        assert times.best("forward", "fp32").name == "dense fp32 channels_last"
        assert times.over(ours, times.best("forward", "fp32")) == 4
        assert times.curve("issp rows", "forward", None) == [(0.9, pytest.approx(0.8))]
        rows = cells(markdown(times))
        (line,) = (row for row in rows if row[0] == "issp rows")
        assert line[4] == "400" and line[6:] == ["4", "8", "4", "0.8"]
        assert rows[-1] == [
            *(CONV.name, "forward", "2", "issp rows"),
            "4",
            "below 90 %",
            "above 90 %",
        ]

    def test_roofline_is_the_slower_of_arithmetic_and_memory(self):
        times = times_of(entry("a", 4e-3), entry("b", 4e-3, nbytes=6e6))
        assert times.share(times.entries[0]) == pytest.approx(0.5)  # 2 GFLOP at 1 TFLOP/s
        assert times.share(times.entries[1]) == pytest.approx(0.75)  # 6 MB at 2 GB/s

    def test_a_row_without_the_first_mode_is_judged_by_the_next(self):
        times = times_of(entry("dense fp32", 4e-3, True), entry("torch CSR", 1.0))
        times.modes = ["graph", "warm"]
        times.entries[0].task.samples["graph"] = [2e-3]
        assert [times.seconds(e) for e in times.entries] == [2e-3, 1.0]
        assert times.seconds(times.entries[1], "graph") is None

    def test_what_could_not_be_timed_is_a_dash(self):
        failed = entry("issp rows", 1.0, sparsity=0.9, actual=0.9)
        failed.task.samples.clear()
        rows = cells(markdown(times_of(entry("dense fp32", 4e-3, True), failed)))
        assert [row for row in rows if row[0] == "issp rows"][0][2:] == ["-"] * 6
        assert rows[-1] == [CONV.name, "forward", "2", "issp rows", "-", "-", "-"]


@pytest.fixture(scope="module", params=[CONV, LINEAR], ids=["conv", "linear"])
def times(request, one_thread):
    (times,) = measure.measure(request.param, FAST)
    return times


@pytest.mark.full
class TestMeasure:
    def test_has_every_row_and_well_formed_markdown(self, times):
        names = [e.name for e in times.entries if e.pass_ == "forward"]
        dense = [f"dense {v.name}" for v in sparse_calls.dense_variants(times.layer, "cpu")]
        csr = "torch CSR of unfold" if times.layer.conv else "torch CSR"
        ours = [f"issp {form.name}" for form in FAST.forms for _ in FAST.sparsities]
        assert names == [*dense, *ours, csr, csr]
        steps = [e.name for e in times.entries if e.pass_ == "step"]
        assert steps == names[:-2]
        for table in tables.layer_tables(times):
            assert len({len(row) for row in cells(table.markdown())}) == 1
        assert all(times.seconds(e) > 0 and times.share(e) > 0 for e in times.entries)

    def test_useful_work_is_that_of_the_stored_weights(self, times):
        dense = math.prod(times.layer.weight) * 2 * times.layer.applications
        for e in times.entries:
            factor = 3 if e.pass_ == "step" else 1
            stored_fraction = 1 if e.dense else 1 - e.actual
            assert e.flops == pytest.approx(factor * stored_fraction * dense)

    def test_ratios_to_every_dense_and_break_even(self, times):
        text = markdown(times)
        head = next(row for row in cells(text) if row[0] == "what")
        assert head[6] == "over best fp32" and head[7] == "over fp32"
        summary = [row for row in cells(text) if row[3] == "issp N:M v=4"]
        assert [row[1] for row in summary] == ["forward", "step"]
        assert all(re.search(r"\d %", cell) for row in summary for cell in row[-2:])

    def test_what_does_not_fit_is_a_note(self):
        settings = replace(FAST, passes=("forward",), forms=(Form(nm=False), Form(4)))
        (times,) = measure.measure(Layer((6, 8), (3, 8)), settings)
        assert "N:M v=4 at 50 %: left out, v=4 does not divide 6 outputs." in times.notes
        assert {e.name for e in times.entries if not e.dense} == {"issp unstructured", "torch CSR"}

    def test_a_baseline_that_fails_is_a_note(self, monkeypatch):
        monkeypatch.setattr(sparse_calls, "MOST_UNFOLDED", 100)
        (times,) = measure.measure(CONV, FAST)
        assert any(note.startswith("torch CSR of unfold: left out, the") for note in times.notes)

    def test_a_short_call_is_repeated_and_a_slow_one_is_not(self):
        calls = []
        warm_up = measure.WarmUp(lambda: calls.append(1))
        warm_up()
        assert len(calls) > 10
        slow = []
        warm_up = measure.WarmUp(lambda: (slow.append(1), time.sleep(measure.SLOW * 1.1)))
        for _ in range(3):
            warm_up()
        assert len(slow) == 1

    def test_every_number_of_threads_has_its_times(self):
        before = torch.get_num_threads()
        settings = replace(FAST, threads=(1, 2), passes=("forward",), sparsities=(0.5,))
        one, two = measure.measure(CONV, settings)
        assert (one.threads, two.threads) == (1, 2) and "2 threads" in two.machine
        assert torch.get_num_threads() == before


LAST = ": speed over the best dense fp32 layout, and break-even"


class TestCommand:
    def test_nothing_is_printed_when_parity_is_red(self, monkeypatch, capsys, quick):
        right = ops.nm_conv2d
        monkeypatch.setattr(ops, "nm_conv2d", lambda *a, **kw: right(*a, **kw) + 1e-3)
        words = ["--shape", "8x8x3x3", "--size", "6", "--sparsity", "0.5", "--threads", "1"]
        assert command("conv", *words) == 1
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1
        assert "3x3 8->8 at 6x6, N:M v=1, 1:2 (50 %): y is off by" in shown.err

    @pytest.mark.full
    def test_conv_writes_tables_picture_and_samples(self, quick, capsys, tmp_path):
        pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
        files = {x: tmp_path / f"conv.{x}" for x in ("md", "png", "json")}
        words = ["--shape", "8x8x3x3", "8x8x1x1", "--size", "6", "--sparsity", "0.5", "0.9"]
        words += ["--threads", "1", "2", "--seconds", "0.01", "--out", str(files["md"])]
        words += ["--plot", str(files["png"]), "--samples", str(files["json"])]
        assert command("conv", *words) == 0
        text = files["md"].read_text()
        assert capsys.readouterr().out.strip() == text.strip()
        ends = (", forward", ", training step: forward, dX, dW", LAST)
        assert re.findall("### (.*)", text) == [
            *(f"3x3 8->8 at 6x6, 1 thread{end}" for end in ends),
            *(f"3x3 8->8 at 6x6, 2 threads{end}" for end in ends),
            *(f"1x1 8->8 at 6x6, 1 thread{end}" for end in ends),
            *(f"1x1 8->8 at 6x6, 2 threads{end}" for end in ends),
            "Speed over the best dense fp32 layout, and break-even, all layers",
        ]
        rows = cells(text[text.index("### Speed") :])
        assert rows[0] == [
            *("layer", "pass", "threads", "form", "50 %", "90 %"),
            *("over fp32 from", "over any from"),
        ]
        # Three forms, twice in each pass, and torch's CSR forward: two layers, two threads.
        assert len(rows) == 2 + 4 * (2 * 3 + 1) and {len(row) for row in rows} == {8}
        assert files["png"].read_bytes().startswith(b"\x89PNG")
        records = json.loads(files["json"].read_text())
        assert len(records) == 13 and all(x["seconds"]["warm"] for x in records[0]["rows"])

    @pytest.mark.full
    def test_matmul_of_a_network(self, quick, capsys):
        words = ["--model", "swinir-light", "--size", "8", "--sparsity", "0.9", "--v", "1"]
        assert command("matmul", *words, "--threads", "1", "--passes", "forward") == 0
        titles = re.findall("### (.*)", capsys.readouterr().out)
        assert titles == [
            f"linear {x}, 64 tokens (swinir-light), 1 thread{end}"
            for x in ("60->180", "60->60", "60->120", "120->60")
            for end in (", forward", LAST)
        ] + ["Speed over the best dense fp32 layout, and break-even, all layers"]

    def test_grouped_convolutions_are_named(self, capsys, monkeypatch):
        layers = [Layer((180, 1, 3, 3), (1, 180, 16, 16), ("cat-r",), groups=180), CONV]
        monkeypatch.setattr(sparse_layers, "of_models", lambda *args: layers)
        monkeypatch.setattr(measure, "measure", lambda layer, settings: [])
        assert command("conv", "--model", "cat-r", "--size", "16") == 0
        assert "3x3 180->180 in 180 groups at 16x16: not timed" in capsys.readouterr().out

    @pytest.mark.full
    def test_must_show_has_every_figure_with_its_target(self, quick, capsys, monkeypatch, tmp_path):
        tiny = (
            Layer((8, 50, 3, 3), (1, 50, 6, 6)),
            Layer((4, 50, 3, 3), (1, 50, 8, 8)),
            Layer((8, 50, 1, 1), (1, 50, 4, 4)),
        )
        monkeypatch.setattr(targets, "LAYERS", tiny)
        samples = tmp_path / "must.json"
        words = ["--must-show", "--threads", "1", "--seconds", "0.01", "--samples", str(samples)]
        assert command("conv", *words) == 0
        text = capsys.readouterr().out
        assert text.startswith("### What must show, 1 thread")
        rows = cells(text)
        number = r"[\d.]+"
        three = rf"{number} / {number} / {number} \(must: %s\)"
        wanted_of = {
            tiny[0].name: ("4 / 7 / 16", "4 / 7 / 16", "6 / 10 / 25", "6 / 10 / 25"),
            tiny[1].name: ("5 / 8 / 20", "5 / 8 / 20", "7 / 11 / 30", "7 / 11 / 30"),
            tiny[2].name: ("4 / 6 / 9", "4 / 6 / 9", "6 / 9 / 14", "6 / 9 / 14"),
        }
        for row, (name, wanted) in zip((rows[2], rows[4], rows[5]), wanted_of.items(), strict=True):
            assert row[0] == name
            for cell, target in zip(row[1:], wanted, strict=True):
                assert re.fullmatch(three % target, cell), cell
        assert rows[3][0] == f"{tiny[0].name}, step at 95 %"
        assert all(re.fullmatch(rf"{number} \(must: 3\)", cell) for cell in rows[3][1:])
        assert re.search(r"\d+ of 40 targets reached", text)
        long = [row for row in rows if row[-1] in ("yes", "no")]
        assert len(long) == 40
        for row in long:
            assert (float(row[-3]) >= float(row[-2].removeprefix(">= "))) == (row[-1] == "yes")
        _, details = json.loads(samples.read_text())
        assert len(details["rows"]) == 40 and all(r["seconds"]["warm"] for r in details["rows"])

    def test_the_figures_that_must_show_are_the_agreed_ones(self):
        names = [layer.name for layer in targets.LAYERS]
        assert names == ["3x3 256->256 at 48x48", "3x3 60->60 at 64x64", "1x1 256->256 at 32x32"]
        simt, cores = targets.GOALS["cuda"]
        assert simt.targets[:2] == ((9, 15, 35), (4, 6, 10)) and simt.base == "fp32"
        assert cores.targets[0] == (4, 8, 18) and cores.base == "tf32" and cores.form.v == 16

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("conv", "--threads", "0"), "--threads is 0"),
            (("conv", "--v", "4", "0"), "--v is 0"),
            (("conv", "--sparsity", "0.9", "1.0"), "--sparsity is 1.0"),
            (("matmul", "--sparsity", "-0.1"), "--sparsity is -0.1"),
            (("conv", "--shape", "60x60"), "--shape 60x60 has 2 numbers: give OxIxKHxKW"),
            (("matmul", "--shape", "60x60x3x3"), "has 4 numbers: give OxI"),
            (("matmul", "--shape", "60,60"), "'60,60' is not a product"),
            (("conv", "--size", "0"), "'0' is not a product of positive numbers"),
            (("conv", "--shape", "8x8x3x3", "--model", "edsr-l"), "exclude each other"),
            (("matmul", "--model", "edsr-l", "--size", "8"), "have no such layer"),
            (("matmul", "--seconds", "0"), "--seconds is 0"),
            (("conv", "--plot", "/nowhere/x.png"), "create /nowhere"),
        ],
    )
    def test_bad_input_is_one_sentence_and_status_2(self, words, sentence, capsys):
        assert command(*words) == 2
        shown = capsys.readouterr()
        assert sentence in shown.err and shown.err.count("\n") == 1 and shown.out == ""

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
    def test_without_a_gpu_one_sentence(self, capsys):
        assert command("conv", "--device", "cuda") == 2
        assert "torch sees no CUDA device: use --device cpu" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.full
def test_cuda_tables_have_every_precision():
    forms = (Form(nm=False), Form(4), Form(16, precision="tf32"), Form(16, precision="bf16"))
    settings = replace(FAST, device="cuda", forms=forms, probe_bytes=None)
    layer = Layer((32, 32, 3, 3), (1, 32, 16, 16))
    (times,) = measure.measure(layer, settings)
    assert times.modes == ["graph", "eager"]
    assert {"fp32", "tf32", "bf16", "fp16"} <= set(times.peaks)
