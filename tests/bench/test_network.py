"""`python -m bench network`: what is pruned, the check before the clock, table and command."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import bench
import issp
from bench import network
from bench.harness import timing
from bench.harness.errors import ParityError
from bench.network import DenseNetwork, NetworkTimes, PackedNetwork, TimeShares
from bench.sparse import calls
from issp import models, num_pruned
from issp.nn import report as layer_report
from issp.ops.keep import Unit
from tests.sr.networks import small_edsr, small_swinir

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = network.Settings(
    sparsities=(0.75,), size=(8, 8), rounds=4, seconds=0.05, flush_bytes=1 << 12
)


def command(*words: str) -> int:
    return bench.main(["network", *words])


def cells(markdown: str) -> list[dict[str, str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


class TestPrune:
    @pytest.mark.parametrize("make", [small_edsr, small_swinir])
    def test_v_1_prunes_the_smallest_of_every_layer_exactly(self, make):
        before = layers(model := make())
        dense = {name: m.weight.detach().clone() for name, m in before.items()}
        assert network.prune(model, 0.75, v=1) == {}
        for name, module in layers(model).items():
            zero, magnitude = module.weight == 0, dense[name].abs()
            assert int(zero.sum()) == num_pruned(zero.numel(), 0.75), name
            assert magnitude[zero].max() <= magnitude[~zero].min(), name

    def test_rows_share_a_pattern_where_v_and_a_pattern_fit(self):
        model = small_edsr()
        ungrouped = network.prune(model, 0.75, v=4)
        assert ungrouped == {"v=4 does not divide 3 outputs": ["conv_last"]}
        for name, module in layers(model).items():
            rows = (module.weight != 0).flatten(1)
            if name != "conv_last":
                assert torch.equal(rows, rows[::4].repeat_interleave(4, 0)), name
                # 3 input channels have 1:3, which prunes less than asked, never more.
                kept = 1 / 3 if name == "conv_first" else 0.25
                assert rows.float().mean() == pytest.approx(kept), name
        assert int((model.conv_last.weight == 0).sum()) == num_pruned(3 * 8 * 9, 0.75)

    def test_units_are_pruned_together(self):
        model = small_edsr()
        assert network.prune(model, 0.75, v=1, unit=Unit(4, 2)) == {}
        for name, module in layers(model).items():
            if name in ("conv_first", "conv_last"):  # 3 channels, 3 rows
                assert (module.weight != 0).all()
                continue
            kept = (module.weight != 0).flatten(2).unflatten(1, (-1, 2)).unflatten(0, (-1, 4))
            per_unit = kept.sum((1, 3))
            assert set(per_unit.unique().tolist()) == {0, 8}, name
            assert int((per_unit == 0).sum()) == num_pruned(per_unit.numel(), 0.75), name

    def test_a_layer_without_a_pattern_is_named_and_unstructured(self):
        model = small_edsr()
        ungrouped = network.prune(model, 0.9, v=4)
        reason = "no N:M of 3 input channels prunes so much"
        assert ungrouped[reason] == ["conv_first"]
        weight = model.conv_first.weight
        assert int((weight == 0).sum()) == num_pruned(weight.numel(), 0.9)

    def test_every_layer_keeps_its_norm(self):
        model = small_edsr()
        before = {name: m.weight.norm().item() for name, m in layers(model).items()}
        network.prune(model, 0.9, v=1)
        after = {name: m.weight.norm().item() for name, m in layers(model).items()}
        assert after == pytest.approx(before)


class TestCheck:
    @pytest.mark.parametrize("make", [small_edsr, small_swinir])
    @pytest.mark.parametrize("v", [1, 4])
    def test_a_packed_network_passes(self, make, v, timed, tmp_path):
        model, x = make().eval(), torch.rand(1, 3, 16, 16)
        network.prune(model, 0.75, v)
        cache = issp.nn.autotune.Cache(tmp_path / "choices.json")
        packed = issp.pack(model, x, cache=cache)
        assert any(line.is_sparse for line in packed.report.lines)
        network.check("tiny", model, packed, x)

    @pytest.mark.parametrize("make", [small_edsr, small_swinir])
    @pytest.mark.parametrize("index", [0, 1, -1])
    def test_a_layer_that_is_wrong_by_a_thousandth_is_refused(self, make, index):
        model, x = make().eval(), torch.rand(1, 3, 16, 16)
        network.prune(model, 0.9, v=1)
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            list(layers(wrong).values())[index].weight *= 1.001
        with pytest.raises(ParityError, match="tiny: the output is off by .* dense by"):
            network.check("tiny", model, wrong, x)

    def test_another_shape_and_nan_are_refused(self):
        model, x = small_edsr(), torch.rand(1, 3, 8, 8)
        for wrong, words in (
            (lambda x: model(x)[..., 1:], "has shape .1, 3, 16, 15., not .1, 3, 16, 16."),
            (lambda x: model(x) * float("nan"), "is off by nan"),
        ):
            with pytest.raises(ParityError, match=words):
                network.check("tiny", model, wrong, x)

    def test_a_large_input_is_cut(self):
        seen = []

        def record(x):
            seen.append(x.shape)
            return model(x)

        model = small_edsr()
        network.check("tiny", model, record, torch.rand(1, 3, 96, 40))
        assert seen == [(1, 3, 48, 40)]


class TestTimeShares:
    def test_time_is_shared_out_by_what_packing_chose(self, monkeypatch):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        lines = [
            layer_report.Line("0", "4x4", 0.5, choice="rows"),
            layer_report.Line("2", "4x4", 0.5, choice="dense"),
        ]
        model.report = layer_report.LayerReport(lines, "machine")
        # A clock that layers advance, and nothing else.
        now = [0.0]
        monkeypatch.setattr(network.time, "perf_counter", lambda: now[0])
        for i, seconds in enumerate((2.0, 1.0, 5.0)):
            forward = model[i].forward

            def slow(x, forward=forward, seconds=seconds):
                now[0] += seconds
                return forward(x)

            model[i].forward = slow
        shares = network.time_shares(model, torch.rand(2, 4))
        assert (shares.sparse, shares.dense, shares.rest) == pytest.approx((2 / 8, 5 / 8, 1 / 8))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def packed_row(v: int, sparsity: float, seconds: float) -> PackedNetwork:
    lines = [
        layer_report.Line(name, "8x8", sparsity, choice=choice)
        for name, choice in (("a", "rows"), ("b", "dense"), ("c", "rows v=4"))
    ]
    layers = layer_report.LayerReport(lines, "machine")
    task = timing.Task(lambda: None, lambda: None, samples={"warm": [seconds] * 5})
    return PackedNetwork(v, sparsity, 2000, 100, layers, task, TimeShares(0.5, 0.2, 0.3))


def dense_row(variant: str, precision: str, seconds: float | None) -> DenseNetwork:
    samples = {} if seconds is None else {"warm": [seconds]}
    return DenseNetwork(
        variant, precision, timing.Task(lambda: None, lambda: None, samples=samples)
    )


class TestTable:
    def times(self, bf16: float | None = 3e-3) -> NetworkTimes:
        dense = [
            dense_row("fp32", "fp32", 12e-3),
            dense_row("fp32 channels_last", "fp32", 8e-3),
            dense_row("bf16 AMX", "bf16", bf16),
        ]
        packed = [packed_row(1, 0.9, 4e-3), packed_row(4, 0.99, 2e-3)]
        return NetworkTimes("tiny x2", "1x3x8x8", "warm", dense, packed)

    def test_the_baseline_is_the_fastest_fp32_layout(self):
        times = self.times()
        assert [times.speed(row) for row in times.packed] == [2, 4]
        assert [times.speed(row, "bf16") for row in times.packed] == [0.75, 1.5]
        first, second = cells(network.table(times, "machine", FAST).markdown())
        assert first | {"v": "4", "sparsity": "99 %"} == {
            "model": "tiny x2",
            "input": "1x3x8x8",
            "v": "4",
            "sparsity": "99 %",
            "kept weights": "100 (5 %)",
            "dense fp32 ms": "12",
            "dense fp32 channels_last ms": "8",
            "packed ms": "4",
            "spread": "0 %",
            "speed": "2",
            "sparse layers": "2 of 3",
            "time in sparse layers": "50 %",
            "in dense layers": "20 %",
            "the rest": "30 %",
            "dense bf16 AMX ms": "3",
            "speed over bf16": "0.75",
        }
        assert second["speed"] == "4" and second["speed over bf16"] == "1.5"

    def test_where_bf16_is_faster_a_note_says_so(self):
        notes = network.notes(self.times(), FAST)
        assert "Dense bf16 is faster than packed fp32 at v=1 at 90 %." in notes
        notes = network.notes(self.times(bf16=9e-3), FAST)
        assert not any("is faster" in note for note in notes)

    def test_what_does_not_run_is_a_dash_and_a_note(self):
        times = self.times(bf16=None)
        times.dense[2].task.error = "warm: no such kernel"
        assert cells(network.table(times, "machine", FAST).markdown())[0]["speed over bf16"] == "-"
        notes = network.notes(times, FAST)
        assert "dense bf16 AMX could not be timed, warm: no such kernel." in notes
        del times.dense[2]
        notes = network.notes(times, FAST)
        assert "This machine has no fast bfloat16: no such column." in notes

    def test_a_network_that_stays_dense_says_why(self):
        times = self.times()
        times.packed[0].layers.whole = issp.nn.autotune.Choice(
            "packed", {"packed": 1.0, "dense": 2.0}
        )
        notes = [n for n in network.notes(times, FAST) if "left it dense" in n]
        assert len(notes) == 1 and notes[0].startswith("v=4 at 99 %: `issp.pack` left it dense.")


class TestMeasure:
    @pytest.mark.full
    def test_every_row_is_timed_and_the_model_left_as_it_is(self, timed):
        model = small_edsr()
        before = copy.deepcopy(model.state_dict())
        times = network.measure("tiny x2", model, replace(FAST, sparsities=(0.75, 0.9)))
        assert [row.name for row in times.packed] == [
            *("v=1 at 75 %", "v=1 at 90 %", "v=4 at 75 %", "v=4 at 90 %")
        ]
        weights = sum(m.weight.numel() for m in layers(model).values())
        kept = sum(
            m.weight.numel() - num_pruned(m.weight.numel(), 0.75) for m in layers(model).values()
        )
        assert (times.packed[0].weights, times.packed[0].kept) == (weights, kept)
        assert all(times.seconds(row) > 0 for row in times.all())
        assert [d.name for d in times.dense[:2]] == ["dense fp32", "dense fp32 channels_last"]
        for row in cells(network.table(times, "machine", FAST).markdown()):
            assert row["sparse layers"] == f"{len(layers(model))} of {len(layers(model))}"
        shared = "v=4 at 75 %, v=4 at 90 %: v = 1 and unstructured in conv_last: v=4 does not"
        assert any(note.startswith(shared) for note in network.notes(times, FAST))
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())

    def test_dense_has_the_pruned_weights_in_every_layout(self):
        model, x = small_edsr().eval(), torch.rand(1, 3, 8, 8)
        rows = network.dense_networks(model, x)
        names = [v.name for v in calls.dense_variants(network.ANY_LAYER, "cpu")]
        assert [row.variant for row in rows] == names
        for row in rows:
            row.task.call()

    def test_nothing_is_timed_when_the_output_is_wrong(self, timed, monkeypatch):
        right = issp.pack

        def wrong(*args, **kwargs):
            packed = right(*args, **kwargs)
            with torch.no_grad():
                packed.conv_last.values.mul_(1.01)
            return packed

        monkeypatch.setattr(issp, "pack", wrong)
        monkeypatch.setattr(network, "interleave", lambda *a: pytest.fail("timed"))
        with pytest.raises(ParityError, match="tiny x2, v=1 at 75 %: the output is off"):
            network.measure("tiny x2", small_edsr(), FAST)

    def test_a_layer_that_packing_finds_wrong_ends_the_benchmark(self, timed, monkeypatch, capsys):
        right = issp.nn.SparseConv2d.forward
        monkeypatch.setattr(issp.nn.SparseConv2d, "forward", lambda *a: right(*a) + 1e-3)
        monkeypatch.setattr(network, "interleave", lambda *a: pytest.fail("timed"))
        monkeypatch.setattr(network.models, "build", lambda name, scale: small_edsr(upscale=scale))
        assert command("--model", "edsr-tiny", "--size", "8", "--sparsity", "0.75", "--v", "1") == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.match(r"bench: edsr-tiny x4, v=1 at 75 %: the sparse result of conv_\w+ is", line)


class TestCommand:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        made = {"edsr-tiny": small_edsr, "swinir-light": small_swinir}
        monkeypatch.setattr(network.models, "build", lambda name, scale: made[name](upscale=scale))

    @pytest.mark.full
    def test_writes_tables_picture_and_samples(self, timed, capsys, tmp_path):
        pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
        files = {x: tmp_path / f"network.{x}" for x in ("md", "png", "json")}
        words = ["--model", "edsr-tiny", "swinir-light", "--size", "8x16", "--seconds", "0.02"]
        words += ["--sparsity", "0.75", "--v", "1", "2", "--scale", "2", "--quick"]
        words += ["--threads", "1", "--out", str(files["md"]), "--plot", str(files["png"])]
        assert command(*words, "--samples", str(files["json"])) == 0
        text = files["md"].read_text()
        assert capsys.readouterr().out.strip() == text.strip()
        assert re.findall("### (.*)", text) == [
            f"{name} x2 on 1x3x8x16, packed and dense" for name in ("edsr-tiny", "swinir-light")
        ]
        assert "1 threads" in text and "issp " in text and "Random weights (seed 0)" in text
        assert files["png"].read_bytes().startswith(b"\x89PNG")
        records = json.loads(files["json"].read_text())
        assert [[row["v"] for row in record["rows"]] for record in records] == [[1, 2]] * 2
        assert all(row["seconds"]["packed"] for record in records for row in record["rows"])

    def test_the_same_seed_is_the_same_network(self, timed, monkeypatch):
        seen = []
        monkeypatch.setattr(
            network, "measure", lambda name, model, settings: seen.append(model) or fake
        )
        fake = NetworkTimes("", "", "warm", [], [])
        for seed in ("1", "1", "2"):
            assert command("--model", "edsr-tiny", "--seed", seed) == 0
        one, same, other = (model.conv_first.weight for model in seen)
        assert torch.equal(one, same) and not torch.equal(one, other)

    def test_nothing_is_printed_when_parity_is_red(self, monkeypatch, capsys):
        def wrong(model, example, cache):
            packed = copy.deepcopy(model)
            packed.conv_last.weight.data *= 1.01
            packed.report = layer_report.LayerReport([], "machine")
            return packed

        monkeypatch.setattr(issp, "pack", wrong)
        assert command("--model", "edsr-tiny", "--size", "8", "--sparsity", "0.75") == 1
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1
        assert "edsr-tiny x4, v=1 at 75 %: the output is off by" in shown.err

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("--threads", "0"), "--threads is 0"),
            (("--v", "4", "0"), "--v is 0"),
            (("--sparsity", "0.9", "1.0"), "--sparsity is 1.0"),
            (("--size", "4,8"), "'4,8' is not a product"),
            (("--size", "12"), "--size 12x12 does not suit swinir-light: give multiples of 8"),
            (("--seconds", "0"), "--seconds is 0"),
            (("--plot", "/nowhere/x.png"), "create /nowhere"),
        ],
    )
    def test_bad_input_is_one_sentence_and_status_2(self, words, sentence, capsys):
        assert command("--model", "swinir-light", *words) == 2
        shown = capsys.readouterr()
        assert sentence in shown.err and shown.err.count("\n") == 1 and shown.out == ""


@pytest.mark.parametrize("name", models.names())
def test_every_preset_fits_the_default_size(name):
    network.check_size(name, 4, network.Settings().size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.full
def test_cuda_has_every_precision():
    times = network.measure("tiny x2", small_edsr(), replace(FAST, device="cuda"))
    assert times.others() == ["tf32", "bf16"] and times.mode == "eager"
    assert all(times.seconds(row) for row in times.all())
    assert "the rest" not in cells(network.table(times, "machine", FAST).markdown())[0]
