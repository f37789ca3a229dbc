"""`python -m bench deploy`: its processes and rows, missing runtimes, wrong results, bad input."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import issp
from bench import deploy
from bench.deploy import rounds, torch_ways, worker
from bench.deploy.rounds import Way
from bench.harness.errors import BenchmarkFailed, ParityError
from bench.network import prune
from tests.sr.networks import small_edsr

pytest.importorskip("safetensors", reason="the processes read the network as safetensors")
pytest.importorskip("onnx", reason="torch writes the file of the runtimes with onnx")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def case(tmp_path, monkeypatch):
    """The folder of a small network, its input and its result."""
    monkeypatch.setattr(deploy.models, "build", lambda name, scale: small_edsr(upscale=scale))
    folder = tmp_path / "case"
    args = argparse.Namespace(v=1, unit=None, seed=0)
    deploy._write_case(folder, deploy._random("edsr-tiny", 2, args, 0.75), (8, 16), seed=0)
    return folder


def cells(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_a_process_times_calls_and_leaves_its_result(case):
    onnxruntime = pytest.importorskip("onnxruntime", reason="it is the quickest to start")
    way = Way("onnxruntime", None, case)
    rounds.measure([way], 1, {}, rounds=3, seconds=1e-9)
    assert len(way.seconds) == 3 and min(way.seconds) > 0 and way.missing is None
    assert way.version == onnxruntime.__version__ and way.error < 1e-5
    assert way.file_bytes == (case / "model.onnx").stat().st_size
    if sys.platform == "linux":
        assert way.peak > 2**24


def test_processes_are_stopped_while_another_is_asked(case, monkeypatch):
    pytest.importorskip("onnxruntime", reason="it is the quickest to start")
    states = []
    ask = rounds.Process.time

    def state(process):
        with open(f"/proc/{process._process.pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0]

    def timed(process, calls):
        ask(process, calls)
        others = [other for other in started if other is not process]
        # A signal takes its time to arrive on a busy machine.
        end = time.monotonic() + 10
        while any(state(other) != "T" for other in others) and time.monotonic() < end:
            time.sleep(0.01)
        states.extend(state(other) for other in others)

    started = []
    begin = rounds.Process.__init__

    def init(process, *args):
        begin(process, *args)
        started.append(process)

    monkeypatch.setattr(rounds.Process, "time", timed)
    monkeypatch.setattr(rounds.Process, "__init__", init)
    ways = [Way("onnxruntime", sparsity, case) for sparsity in (0.75, 0.9)]
    rounds.measure(ways, 1, {}, rounds=2, seconds=1e-9)
    if sys.platform == "linux":
        assert states == ["T"] * 4
    assert all(process._process.poll() == 0 for process in started)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no prctl")
def test_a_stopped_process_ends_with_its_parent(case):
    pytest.importorskip("onnxruntime", reason="it is the quickest to start")
    code = "from pathlib import Path; import os, sys; from bench.deploy import rounds; "
    code += "way = rounds.Way('onnxruntime', None, Path(sys.argv[1])); "
    code += "print(rounds.Process(way, 1, sys.executable)._process.pid, flush=True); os._exit(1)"
    environment = {**os.environ, "PYTHONPATH": str(rounds.ROOT)}
    words = [sys.executable, "-c", code, str(case)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    place = Path(f"/proc/{int(done.stdout)}")
    for _ in range(100):
        if not place.exists() or ") Z " in (place / "stat").read_text():
            return
        time.sleep(0.1)
    pytest.fail("it is still there")


@pytest.mark.full
def test_every_way_of_torch_and_ours_computes_the_same(case):
    ways = [Way(name, 0.75, case) for name in (*torch_ways.OURS, *torch_ways.DENSE)]
    rounds.measure(ways, 1, {}, rounds=1, seconds=1e-9)
    for way in ways:
        # torch.compile needs a compiler, which not every machine has.
        assert way.missing is None or "compile" in way.name, way
        if way.seconds:
            assert way.error <= (rounds.BITS_16 if "16" in way.name else rounds.BITS_32), way
            assert way.file_bytes > 0
    assert ways[0].report


def test_a_runtime_that_is_not_there_is_a_cell(case, monkeypatch, capsys, tmp_path):
    place = tmp_path / "empty"
    place.mkdir()
    for name in ("deepsparse", "openvino"):
        (place / f"{name}.py").write_text("raise ImportError('no such package')")
    # The interpreter of a runtime sees nothing of this one's path.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={place} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    words = ["--model", "edsr-tiny", "--scale", "2", "--size", "8", "--sparsity", "0.75"]
    words += ["--threads", "1", "--rounds", "1", "--seconds", "0.001"]
    words += ["--ways", "deepsparse", "openvino f32"]
    words += ["--deepsparse-python", str(python), "--openvino-python", str(python)]
    files = {kind: tmp_path / f"deploy.{kind}" for kind in ("md", "json")}
    words += ["--out", str(files["md"]), "--samples", str(files["json"])]
    assert bench.main(["deploy", *words]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == files["md"].read_text().strip()
    rows = cells(shown)
    missing = "not installed (no such package)"
    assert [(row["way"], row["latency ms"]) for row in rows] == [
        ("deepsparse", missing),
        ("openvino f32", missing),
    ]
    (record,) = json.loads(files["json"].read_text())
    assert record["rows"][0]["sparsity"] == "75 %" and record["rows"][1]["sparsity"] == "any"


def test_a_runtime_that_dies_is_a_cell_and_ours_an_error(case, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Illegal instruction' >&2\nexit 132\n")
    python.chmod(0o755)
    way = Way("deepsparse", 0.75, case)
    rounds.measure([way], 1, {"deepsparse": python}, rounds=1, seconds=1)
    assert way.missing == "Illegal instruction" and not way.seconds
    with pytest.raises(BenchmarkFailed, match="issp.pack fp32 ended:\nIllegal"):
        rounds.measure([Way("issp.pack fp32", 0.75, case)], 1, {"issp.pack": python}, 1, 1)


def test_a_wrong_result_of_ours_ends_it_and_of_others_is_said(case):
    expected = np.load(case / "expected.npy")
    ways = [Way(name, 0.75, case) for name in ("issp.pack fp32", "torch fp32")]
    for way in ways:
        np.save(case / f"{way.name}.npy", expected * 1.1)
    with pytest.raises(ParityError, match="issp.pack fp32: the result is off by 0.1 from torch"):
        rounds._compare(ways[0])
    rounds._compare(ways[1])
    assert ways[1].error == pytest.approx(0.1, rel=1e-4)


def test_ratios_are_over_the_fastest_of_torch_and_of_all_others(case):
    ways = [
        Way("issp.pack fp32", 0.9, case, seconds=[1e-3] * 4),
        Way("torch fp32", None, case, seconds=[6e-3] * 4),
        Way("torch bf16 channels_last", None, case, seconds=[4e-3] * 4),
        Way("deepsparse", 0.9, case, seconds=[2e-3] * 4),
        Way("openvino f32", None, case, missing="not installed"),
        Way("torch.compile bf16", None, case, seconds=[1e-3] * 4, error=2.0),
    ]
    rows = cells(deploy._table_of(ways, "title", []).markdown())
    over = [
        (r["speed over the fastest of torch"], r["over the fastest of all others"]) for r in rows
    ]
    assert over == [("4", "2"), ("0.667", "0.333"), ("1", "0.5"), ("2", "1"), *[("-", "-")] * 2]
    assert rows[0]["latency ms"] == "1" and rows[4]["latency ms"] == "not installed"


def test_zeros_matter_to_some_ways_alone(tmp_path):
    folders = [(0.9, tmp_path / "90"), (0.99, tmp_path / "99")]
    ways = deploy._ways(rounds.all_ways(), folders)
    names = [way.name for way in ways]
    for name in rounds.all_ways():
        assert names.count(name) == (2 if name.startswith(("issp", "deepsparse")) else 1), name
    assert {way.name.split()[0] for way in ways} >= {"torch", "onnxruntime", "openvino"}
    assert not set(torch_ways.OURS) & set(torch_ways.DENSE) & set(worker.RUNTIMES)


def test_a_trained_network_keeps_its_weights_and_zeros(monkeypatch, capsys, tmp_path):
    torch.manual_seed(3)
    model = small_edsr()
    prune(model, 0.75, 1, None)
    issp.save(model, tmp_path / "own.safetensors")
    written = []
    monkeypatch.setattr(rounds, "export", lambda model, x, path: written.append(model))
    monkeypatch.setattr(rounds, "measure", lambda ways, *_: written.extend(ways))
    words = ["--trained", str(tmp_path / "own.safetensors"), "--size", "8", "--threads", "1"]
    assert bench.main(["deploy", *words, "--ways", "issp.pack fp32", "torch fp32"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("### EDSR x2, own.safetensors on 1x3x8x8, 1 threads")
    assert [row["sparsity"] for row in cells(shown)] == ["75 %", "any"]
    assert "Trained weights, as the file has them." in shown and "Random" not in shown
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(written[0].state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--threads", "0"), "--threads is 0"),
        (("--trained", "x", "--unit", "16x2"), "--trained and --model exclude each other"),
        (("--sparsity", "1.5"), "--sparsity is 1.5"),
        (("--size", "4,8"), "'4,8' is not a product"),
        (("--size", "12"), "--size 12x12 does not suit swinir-light: give multiples of 8"),
        (("--seconds", "0"), "--seconds is 0"),
        (("--rounds", "0"), "--rounds is 0"),
        (("--unit", "16"), 'unit "16": write vxc'),
        (("--unit", "16x2", "--v", "4"), "--unit and --v exclude each other"),
        (("--deepsparse-python", "/nowhere/python"), "/nowhere/python is no program"),
        (("--out", "/nowhere/x.md"), "create /nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(words, sentence, capsys):
    assert bench.main(["deploy", "--model", "swinir-light", *words]) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_a_trained_network_is_read_before_anything_is_measured(capsys, tmp_path):
    assert bench.main(["deploy", "--trained", str(tmp_path / "x.safetensors")]) == 2
    shown = capsys.readouterr()
    assert "x.safetensors" in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_the_interpreter_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("ISSP_DEEPSPARSE_PYTHON", os.devnull)
    _, args = bench.parse(["deploy"])
    assert str(args.deepsparse_python) == os.devnull
    assert torch.get_num_threads() == 1, "the processes have their threads, this one keeps its own"
