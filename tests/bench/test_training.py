"""The tables of `python -m bench optim` and `train`, and their refusal on wrong numbers."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import bench
import issp
from bench import optim, optim_parity, step, train
from bench.harness import bandwidth, settings, timing
from bench.harness.errors import ParityError
from bench.harness.training import (
    OPTIMIZERS,
    Gradients,
    OptimizerSpec,
    TrainingReplica,
    steady_replica,
)
from issp import backends

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = optim.Settings(
    rounds=2, seconds=0.05, settle=2, flush_bytes=1 << 16, probe_bytes=1 << 16
)  # fmt: skip
PRUNING = 0.75, 0.9


def network() -> nn.Module:
    torch.manual_seed(0)
    return issp.models.EDSR(3, 3, num_feat=4, num_block=1, upscale=2)


@pytest.fixture
def tiny(monkeypatch):
    """Every model becomes a very small EDSR, and nothing large is read between the calls."""
    monkeypatch.setattr(optim.models, "build", lambda name, scale: network())
    monkeypatch.setattr(settings, "CpuClock", lambda flush_bytes: timing.CpuClock(1 << 16))
    monkeypatch.setitem(bandwidth.DEFAULT_BYTES, "cpu", 1 << 16)


def command(*words: str) -> int:
    return bench.main(words)


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


class TestReplicas:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_a_copy_goes_on_bit_for_bit_and_shares_nothing(self, name):
        start, gradients = steady_replica(network(), OPTIMIZERS[name], *PRUNING, steps=3)
        copy = TrainingReplica.copy_of(network(), OPTIMIZERS[name], "fused", True, *PRUNING)
        copy.copy_state_from(start)
        copy.set_gradients(gradients)
        for key in OPTIMIZERS[name].moments:
            pointers = [
                {m.data_ptr() for m in x.moments(x.parameters(), key)} for x in (copy, start)
            ]
            assert pointers[0].isdisjoint(pointers[1])
        gradients.renew()
        for replica in (copy, start):
            replica.optimizer.step()
        assert "bit-identical" in train.difference(copy, start)

    def test_gradients_change_in_place(self):
        parameters = [torch.zeros(3, 4), torch.zeros(1)]
        gradients = Gradients(parameters)
        places = [g.data_ptr() for g in gradients.tensors]
        gradients.renew()
        first = [g.clone() for g in gradients.tensors]
        gradients.renew()
        assert [g.data_ptr() for g in gradients.tensors] == places
        assert all((a != b).any() for a, b in zip(first, gradients.tensors, strict=True))
        assert 0.2e-3 < first[0].std() < 3e-3

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_the_op_alone_does_what_the_class_does(self, name):
        spec = OPTIMIZERS[name]
        start, gradients = steady_replica(network(), spec, *PRUNING, steps=2)
        op_replica = TrainingReplica.copy_of(network(), spec, "fused", False, *PRUNING)
        optimizer_replica = TrainingReplica.copy_of(network(), spec, "issp", True, *PRUNING)
        for replica in (op_replica, optimizer_replica):
            replica.copy_state_from(start)
            replica.set_gradients(gradients)
        call = op_replica.fused_call(True)  # steps once, to leave thresholds behind
        optimizer_replica.optimizer.step()
        gradients.renew()
        call()
        optimizer_replica.optimizer.step()
        for x, y in zip(op_replica.parameters(), optimizer_replica.parameters(), strict=True):
            assert torch.equal(x, y)

    def test_masks_apart_are_zero_in_weights_and_moments(self):
        start, gradients = steady_replica(network(), OPTIMIZERS["adam"], *PRUNING, steps=2)
        masks = [mask.float() for mask in start.pruner.masks().values()]
        replica = TrainingReplica.copy_of(network(), OPTIMIZERS["adam"], "fused", False, *PRUNING)
        replica.copy_state_from(start)
        replica.set_gradients(gradients)
        replica.step_then_mask(masks)()
        chosen = replica.prunable()
        for tensors in (chosen, *(replica.moments(chosen, x) for x in ("exp_avg", "exp_avg_sq"))):
            assert all((x[m == 0] == 0).all() for x, m in zip(tensors, masks, strict=True))
            assert all((x[m == 1] != 0).any() for x, m in zip(tensors, masks, strict=True))

    @pytest.mark.parametrize(("name", "each"), [("adam", 28), ("adamw", 28), ("sgd", 20)])
    def test_bytes_of_an_update(self, name, each):
        assert OPTIMIZERS[name].traffic(1000) == each * 1000
        assert OPTIMIZERS[name].traffic(1000, pruned=800) == each * 1000 + 100


class TestParity:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_passes(self, name):
        optim_parity.check([name], "cpu", 0.95, 0.95)

    def test_wrong_bits_of_the_op_are_refused_before_timing(self, monkeypatch, tiny, capsys):
        right = torch.ops.issp.adam_soft_shrink_

        def adam_soft_shrink_(weights, *args):
            right(weights, *args)
            weights[1].view(-1)[5] *= 1 + 1e-6

        monkeypatch.setattr(OptimizerSpec, "op", property(lambda self: adam_soft_shrink_))
        for name in ("optim", "train"):
            assert command(name, "--quick") == 1
            shown = capsys.readouterr()
            assert shown.out == ""
            assert "not bitwise equal to the reference (weights[1], step 0" in shown.err

    def test_an_update_that_is_not_torchs_is_refused(self, monkeypatch):
        right = issp.optim.SGD.step

        def wrong(self, closure=None):
            right(self, closure)
            self.param_groups[0]["params"][-1].data[3] += 1e-6

        monkeypatch.setattr(issp.optim.SGD, "step", wrong)
        with pytest.raises(ParityError, match="more than 2 ulp .SGD: weight 5, step 0, 1"):
            optim_parity.check(["sgd"], "cpu", 0.95, 0.95)


@pytest.fixture(scope="module")
def table(one_thread):
    return optim.measure("tiny x2", network(), OPTIMIZERS["adam"], FAST)


@pytest.mark.full
class TestOptim:
    def test_has_every_variant_and_ratios_to_torchs_fused_optimizer(self, table):
        rows = cells(table.markdown())
        assert rows[0][2] == "over torch Adam fused"
        assert [row[0] for row in rows[2:]] == [v.name.format("Adam") for v in optim.VARIANTS]
        assert all(row[2] == "1" for row in rows[2:3])
        numbers = [cell.rstrip(" %") for row in rows[2:] for cell in row[1:]]
        assert all(cell in ("-", "0", "no kernel") or float(cell) > 0 for cell in numbers)
        assert all(row["runs"] == 2 for row in table.rows if row["warm"] != "no kernel")

    def test_counts_the_masks_bits_of_pruned_weights_alone(self, table):
        pruned = sum(m.weight.numel() for m in network().modules() if isinstance(m, nn.Conv2d))
        numel = sum(p.numel() for p in network().parameters())
        update = table.row("torch Adam fused")["traffic"] * numel
        assert update == 28 * numel
        for name in (
            "issp op alone",
            "issp Adam, pruner attached",
            "torch Adam fused, then foreach masks",
        ):
            assert table.row(name)["traffic"] * numel == pytest.approx(update + pruned / 8)

    def test_says_which_path_the_class_took(self, table):
        text = table.markdown()
        assert re.search(
            r"- issp Adam, pruner attached: group 0: (fused, 6 pruned and 6 o|tor)", text
        )
        assert re.search(
            r"- issp Adam, frozen pruner: group 0: (fused, 6 pruned and 6 oth|tor)", text
        )

    def test_an_op_without_a_kernel_is_named_not_timed(self, monkeypatch):
        monkeypatch.setattr(backends, "by_reference", lambda device: ["adam_soft_shrink_"])
        table = optim.measure("tiny x2", network(), OPTIMIZERS["adam"], FAST)
        rows = {row[0]: row for row in cells(table.markdown())}
        for name in ("issp op alone", "issp op alone, cold start"):
            assert rows[name][1] == "no kernel" and rows[name][-1] == "0"

    def test_a_variant_that_fails_becomes_a_note(self):
        def fail(replica, masks):
            def call():
                raise RuntimeError("no such kernel")

            return call

        broken = optim.Variant("broken {}", "fused", "update", fail)
        few = [optim.VARIANTS[0], broken]
        table = optim.measure("tiny x2", network(), OPTIMIZERS["adam"], FAST, few)
        assert "broken Adam could not be timed, cold: no such kernel." in table.markdown()

    def test_command_writes_tables_picture_and_samples(self, tiny, capsys, tmp_path):
        pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
        files = {x: tmp_path / f"optim.{x}" for x in ("md", "png", "json")}
        words = ["optim", "--quick", "--settle", "1", "--seconds", "0.01", "--optimizer", "sgd"]
        words += ["--model", "edsr-l", "--out", str(files["md"]), "--plot", str(files["png"])]
        assert command(*words, "--samples", str(files["json"])) == 0
        assert capsys.readouterr().out.strip() == files["md"].read_text().strip()
        assert "### edsr-l x4, SGD: 12 tensors" in files["md"].read_text()
        assert files["png"].read_bytes().startswith(b"\x89PNG")
        (record,) = json.loads(files["json"].read_text())
        assert len(record["rows"]) == len(optim.VARIANTS)


@pytest.fixture(scope="module")
def variants(one_thread):
    sparsity, shrink = PRUNING
    chosen = train.Settings(
        sparsity=sparsity, shrink=shrink, device="cpu", batch=1, patch=8, seconds=0.1, settle=2
    )
    data = train.Data(2, "cpu")
    variants = train.make_variants(network(), data, chosen)
    train.time_iterations(variants, data, chosen)
    return variants


@pytest.mark.full
class TestTrain:
    def test_measures_every_variant_on_the_same_rounds(self, variants):
        rows = cells(train.table("title", "machine", variants, []).markdown())
        names = [train.DENSE, train.AFTER, train.FUSED, train.AUTHORS]
        assert [row[0] for row in rows[2:]] == names
        assert rows[2][2] == "1" and rows[2][6] == "-"
        dense, after, fused, authors = variants
        assert dense.iteration.keys() == after.iteration.keys() == fused.iteration.keys()
        assert authors.iteration.keys() <= dense.iteration.keys() and 0 in authors.iteration
        for variant in variants:
            assert all(0 < variant.update[i] < t for i, t in variant.iteration.items())

    def test_sparse_variants_end_alike(self, variants):
        after, fused = (variant.replica for variant in variants[1:3])
        for one, other in zip(after.parameters(), fused.parameters(), strict=True):
            # torch's kernels round the last few elements of a tensor in another order.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        text = train.difference(after, fused)
        assert re.match(r"The two sparse variants (are bit-identical|differ in)", text)

    def test_ratios_are_taken_round_by_round(self):
        slow = train.TrainVariant("slow", None)
        dense = train.TrainVariant("dense", None)
        for i in range(5):
            dense.iteration[i], slow.iteration[i] = 1.0 + i, 1.5 * (1.0 + i)
            dense.update[i], slow.update[i] = 0.1, 0.3
        assert train.ratios(slow, dense) == [1.5] * 5
        assert train.pruning_seconds(slow, dense) == pytest.approx(0.2)
        row = cells(train.table("title", "machine", [dense, slow], []).markdown())[-1]
        assert row == ["slow", "4500", "1.5", "1.5 to 1.5", "300", "6.7 %", "200", "6.7 %", "5"]

    def test_a_difference_is_counted_and_named(self):
        start, _ = steady_replica(network(), OPTIMIZERS["adam"], *PRUNING, steps=2)
        copy = TrainingReplica.copy_of(network(), OPTIMIZERS["adam"], "fused", True, *PRUNING)
        copy.copy_state_from(start)
        with torch.no_grad():
            copy.model.conv_last.weight[0, 0, 0, 0] += 0.5
            copy.moments(copy.parameters(), "exp_avg_sq")[0].view(-1)[:2] += 1
        numel = 3 * sum(p.numel() for p in copy.parameters())
        text = train.difference(start, copy)
        assert f"differ in 3 of {numel} weights and moments" in text
        assert "first: weights of conv_last.weight; largest difference 1)" in text
        assert "in 0 bits of the masks" in text

    def test_command_writes_table_picture_and_samples(self, tiny, capsys, tmp_path):
        pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
        files = {x: tmp_path / f"train.{x}" for x in ("md", "png", "json")}
        words = ["train", "--quick", "--model", "swinir-light", "--settle", "1", "--scale", "2"]
        words += ["--batch", "1", "--patch", "8", "--seconds", "0.05", "--plot", str(files["png"])]
        words += ["--out", str(files["md"]), "--samples", str(files["json"])]
        assert command(*words) == 0
        text = files["md"].read_text()
        assert capsys.readouterr().out.strip() == text.strip()
        assert "### training swinir-light x2: 1259 weights, batch 1, patch 8 (LR)" in text
        assert files["png"].read_bytes().startswith(b"\x89PNG")
        (record,) = json.loads(files["json"].read_text())
        row = next(row for row in record["rows"] if row["what"] == train.FUSED)
        assert row["seconds"].keys() == {"round", "iteration", "update"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("optim", "--settle", "0"), "--settle is 0"),
        (("optim", "--sparsity", "2"), "sparsity is 2"),
        (("train", "--batch", "0"), "--batch is 0"),
        (("train", "--patch", "-3"), "--patch is -3"),
        (("train", "--seconds", "0"), "--seconds is 0"),
        (("train", "--plot", "/nowhere/x.png"), "create /nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(words, sentence, capsys):
    assert command(*words) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err and shown.err.count("\n") == 1 and shown.out == ""


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_help_shows_an_example_that_parses(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command(name, "--help")
    assert stop.value.code == 0
    examples = re.findall(r"python -m bench (.*)", capsys.readouterr().out)
    commands = [words.split() for words in examples if words.startswith(f"{name} -")]
    assert commands and all(bench.parse(words)[1].benchmark == name for words in commands)
    assert step.EXAMPLE.count("python -m bench step") == 3


def test_only_the_benchmark_that_is_run_is_imported():
    code = "import sys, bench; bench.BENCHMARKS; sys.exit(any(x in sys.modules for x in MODULES))"
    modules = ["torch", *(f"bench.{name}" for name in bench.BENCHMARKS)]
    process = subprocess.run([sys.executable, "-c", code.replace("MODULES", repr(modules))])
    assert process.returncode == 0
