"""All benchmarks in one call, the GPU script, the sanitizer's cases."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
from bench import all as everything
from bench import sanitize
from issp import backends, ops
from issp.ops import reference
from issp.ops.reference import pruning

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "on_gpu.sh"
GPU_PARTS = ["sanitize", "parity", "step", "optim", "nm", "products"]


STAND_IN = """
import json, sys, time
name, out = sys.argv[1], sys.argv[sys.argv.index("--samples") + 1]
print(f"### table of {name}", flush=True)
if name == "bad":
    print("first line\\nbench: not bitwise equal", file=sys.stderr)
    sys.exit(1)
time.sleep(60 if name == "hanging" else 0)
open(out, "w").write(json.dumps([{"title": name, "words": sys.argv[2:]}]))
"""


class TestEverything:
    @pytest.mark.full
    def test_one_that_fails_and_one_that_hangs_are_named_and_the_rest_runs(
        self, monkeypatch, tmp_path, capsys
    ):
        (tmp_path / "run.py").write_text(STAND_IN)
        (tmp_path / "results").mkdir()
        monkeypatch.setattr(everything, "COMMAND", (str(tmp_path / "run.py"),))
        monkeypatch.setattr(everything, "PLAN", {x: [x] for x in ("bad", "hanging", "good")})
        words = ["--folder", str(tmp_path / "results"), "--limit", "2", "--device", "cuda"]
        assert bench.main(["all", *words]) == 1
        shown, progress = capsys.readouterr()
        assert progress.splitlines()[:3] == [
            f"{name}: begins, at most 2 s" for name in ("bad", "hanging", "good")
        ]
        assert "bad: failed: bench: not bitwise equal" in shown
        assert "first line\nbench: not bitwise equal" in shown  # all of it, for the log
        assert "hanging: stopped after its 2 s" in shown and "good: passed" in shown
        text = (tmp_path / "results" / "bench.md").read_text()
        assert re.findall("### (.*)", text) == [
            "table of bad",
            "bad: failed: bench: not bitwise equal",
            "table of hanging",
            "hanging: stopped after its 2 s",
            "table of good",
        ]
        samples = json.loads((tmp_path / "results" / "samples.json").read_text())
        timed = {name: outcome["samples"] for name, outcome in samples.items()}
        assert [len(timed[name]) for name in ("bad", "hanging", "good")] == [0, 0, 1]
        assert timed["good"][0]["words"][:2] == ["--device", "cuda"]
        # One of them again: the others stay, in the order of the plan.
        assert bench.main(["all", *words, "--only", "good"]) == 0
        assert (tmp_path / "results" / "bench.md").read_text() == text

    def test_samples_of_something_else_are_one_sentence_and_status_2(self, tmp_path, capsys):
        for text in ('{"step": []}', '{"step": {"name": "step"}}', "[1]", "{"):
            (tmp_path / "samples.json").write_text(text)
            assert bench.main(["all", "--folder", str(tmp_path)]) == 2
            shown = capsys.readouterr().err
            assert "was not written by this benchmark" in shown and shown.count("\n") == 1
            assert (tmp_path / "samples.json").read_text() == text

    def test_every_benchmark_and_option_of_the_plan_exists(self):
        for device, pace in everything.PACE.items():
            for name, words in everything.PLAN.items():
                options = [*words, "--device", device, "--threads", "2", *pace.get(name, [])]
                _, args = bench.parse([*options, "--plot", "x.png"])
                assert args.device == device

    def test_a_missing_folder_is_one_sentence_and_status_2(self, capsys):
        assert bench.main(["all", "--folder", "/nowhere/results"]) == 2
        shown = capsys.readouterr().err
        assert "/nowhere/results does not exist" in shown and shown.count("\n") == 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
class TestScript:
    def run(self, *words: str, out: Path | None = None) -> subprocess.CompletedProcess:
        # An empty CUDA_VISIBLE_DEVICES hides the GPU of a machine that has one.
        env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        env["OUT"] = str(out or "/nowhere/results")
        command = ["bash", str(SCRIPT), *words]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    def test_syntax_and_habits(self):
        assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
        assert os.access(SCRIPT, os.X_OK)
        text = SCRIPT.read_text()
        assert "set -u -o pipefail" in text
        # Unquoted expansions break on folders with spaces: arguments of commands are all quoted.
        unquoted = re.findall(r"(?m)^\s*(?:run|mkdir|rm|cd)\b[^\n|]*?\s\$\{?(?:OUT|PYTHON)\b", text)
        assert unquoted == []
        # The settings of the card are never touched.
        assert not re.search(r"nvidia-smi\s+-(?:r|pm|pl|ac|lgc|c|mig)\b", text)

    def test_without_a_gpu_one_sentence_and_status_3(self, tmp_path):
        process = self.run(out=tmp_path / "results")
        assert process.returncode == 3
        assert process.stderr.count("\n") == 1
        assert "only the parts info and build can run" in process.stderr
        assert not (tmp_path / "results").exists()

    @pytest.mark.full
    def test_info_needs_none_and_leaves_a_summary(self, tmp_path):
        process = self.run("--parts", "info", out=tmp_path / "results")
        assert process.returncode == 0, process.stdout + process.stderr
        summary = (tmp_path / "results" / "summary.txt").read_text()
        assert re.search(r"\| info +\| passed ", summary)
        assert "torch " + torch.__version__ in summary

    def test_dry_run_names_every_part_and_writes_nothing(self, tmp_path):
        process = self.run("--dry-run", out=tmp_path / "results")
        assert process.returncode == 0 and list(tmp_path.iterdir()) == []
        parts = re.findall(r"(?m)^== (\w+)$", process.stdout)
        assert parts == ["info", "build", *GPU_PARTS]
        for word in ("memcheck", "racecheck", "synccheck", "initcheck", "build_ext"):
            assert word in process.stdout
        on_demand = self.run("--dry-run", "--parts", "ncu,tables,suite").stdout
        assert "gpu__time_duration.sum" in on_demand
        # What a GPU machine gives back is limited to eight files.
        named = set(re.findall(r"\[\d+ s, ([\w.]+)\]", process.stdout + on_demand))
        assert named == {"summary.txt", "log.txt", "ncu.txt"}
        assert len(named | {"bench.md", "samples.json"} | set(everything.PICTURES)) == 8

    def test_twelve_minutes_are_enough_beside_the_build(self):
        shown = self.run("--dry-run").stdout
        limits = [int(x) for x in re.findall(r"\[(\d+) s, ", re.sub(r".*build_ext.*", "", shown))]
        assert len(limits) == 11 and sum(limits) <= 12 * 60

    def test_the_benchmarks_are_those_of_the_plan(self):
        shown = self.run("--dry-run").stdout + self.run("--dry-run", "--parts", "tables").stdout
        for limit, names in re.findall(r"-m bench all .* --limit (\d+) --only (.*)", shown):
            found = re.findall(r"nm [\d:]+|[\w-]+", names)
            assert found and set(found) <= set(everything.PLAN) and int(limit) >= 40

    def on_a_gpu(self, tmp_path, **environment) -> subprocess.CompletedProcess:
        """The part ncu, where a driver and a GPU are pretended; issp still sees none."""
        folder = tmp_path / "bin"
        folder.mkdir()
        lies = f'case "$*" in *is_available*) exit 0 ;; esac\nexec "{sys.executable}" "$@"\n'
        for name, text in (("nvidia-smi", ""), ("python", lies)):
            (folder / name).write_text("#!/bin/sh\n" + text)
            (folder / name).chmod(0o755)
        env = {k: v for k, v in os.environ.items() if not k.startswith("ISSP_")}
        env |= {"PYTHON": str(folder / "python"), "OUT": str(tmp_path / "results")}
        env |= {"PATH": f"{folder}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", **environment}
        command = ["bash", str(SCRIPT), "--parts", "ncu"]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    def test_another_back_end_than_cuda_is_one_sentence_and_status_4(self, tmp_path):
        process = self.on_a_gpu(tmp_path)
        assert process.returncode == 4, process.stdout + process.stderr
        sentence = "on cuda reference is active, not cuda: torch sees no CUDA device"
        assert process.stdout.count("on_gpu.sh:") == 1 and sentence in process.stdout
        assert "ISSP_BACKEND=reference tests and measures reference" in process.stdout
        assert sentence in (tmp_path / "results" / "summary.txt").read_text()
        assert "== ncu" not in process.stdout and "Traceback" not in process.stdout

    def test_a_forced_back_end_that_cannot_run_is_status_4_too(self, tmp_path):
        process = self.on_a_gpu(tmp_path, ISSP_BACKEND="triton")
        assert process.returncode == 4, process.stdout + process.stderr
        assert "on_gpu.sh: ISSP_BACKEND=triton cannot run" in process.stdout
        assert "Traceback" not in process.stdout

    def test_the_back_end_that_was_asked_for_goes_on(self, tmp_path):
        process = self.on_a_gpu(tmp_path, ISSP_BACKEND="reference")
        assert process.returncode in (0, 1), process.stdout + process.stderr
        assert "on cuda reference is active" in process.stdout and "== ncu" in process.stdout

    def test_the_back_end_is_asked_after_the_build_and_before_the_tests(self):
        shown = self.run("--dry-run").stdout
        assert shown.index("build_ext") < shown.index("backends.active('cuda')")
        assert shown.index("backends.active('cuda')") < shown.index("== sanitize")
        assert shown.count("backends.active('cuda')") == 1

    @pytest.mark.parametrize("words", [("--parts", "info,lunch"), ("--fast",), ("--parts",)])
    def test_bad_arguments_are_status_2(self, words):
        process = self.run(*words)
        assert process.returncode == 2 and process.stderr.count("\n") == 1


IMITATION = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in *"$FAILING"*) [ -z "$FAILING" ] || exit 1 ;; esac
case "$*" in *build_ext*) touch issp/_CUDA.abi3.so ;; esac
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
class TestScriptOnAnImitatedGpu:
    """A checkout in which Python and the tools only write down how they are called."""

    @pytest.fixture(autouse=True)
    def checkout(self, tmp_path):
        self.root, self.out = tmp_path / "checkout", tmp_path / "results"
        for folder in ("bench", "csrc", "issp"):
            (self.root / folder).mkdir(parents=True)
        shutil.copy(SCRIPT, self.root / "bench")
        (self.root / "setup.py").write_text("")
        self.tools = tmp_path / "bin"
        self.tools.mkdir()
        for name in ("python", "nvidia-smi", "compute-sanitizer", "ncu"):
            (self.tools / name).write_text(IMITATION)
            (self.tools / name).chmod(0o755)
        self.calls = tmp_path / "calls.txt"

    def run(self, *words, failing="", out=None, status=0, **environment) -> list[str]:
        """The parts that have run, in their order."""
        self.calls.write_text("")
        env = {"PYTHON": "python", "PATH": f"{self.tools}:/usr/bin:/bin", "FAILING": failing}
        env |= {"OUT": str(out or self.out), "CALLS": str(self.calls), **environment}
        command = ["bash", str(self.root / "bench" / "on_gpu.sh"), *words]
        process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert process.returncode == status, process.stdout + process.stderr
        self.shown = process.stdout + process.stderr
        return re.findall(r"(?m)^== (\w+)$", process.stdout)

    def result(self, part: str) -> str:
        rows = re.findall(rf"(?m)^\| {part} +\| (.*?) +\|", (self.out / "summary.txt").read_text())
        return rows[-1]

    def test_the_back_end_is_asked_before_anything_runs_on_the_gpu(self):
        assert self.run() == ["info", "build", *GPU_PARTS]
        calls = self.calls.read_text()
        on_gpu = [calls.index(x) for x in ("--tool memcheck", "-m pytest tests", "-m bench all")]
        assert calls.index("backends.active('cuda')") < min(on_gpu)
        assert re.findall(r"--tool (\w+)", calls) == [
            "memcheck", "racecheck", "synccheck", "initcheck"
        ]  # fmt: skip
        assert {self.result(part) for part in ("info", "build", *GPU_PARTS)} == {"passed"}

    def test_a_part_that_fails_stops_no_other_and_runs_again(self):
        assert self.run(failing="-m pytest", status=1) == ["info", "build", *GPU_PARTS]
        assert self.result("parity") == "failed" and self.result("products") == "passed"
        assert self.run() == ["parity"]
        assert "== step has passed before: --parts step runs it again" in self.shown
        assert self.result("parity") == "passed"
        assert self.run() == []

    def test_a_part_by_its_name_runs_in_any_case(self):
        self.run()
        assert self.run("--parts", "optim,nm") == ["optim", "nm"]
        assert "--only nm 2:4 nm 2:32" in self.calls.read_text()

    def test_what_there_was_no_time_for_runs_in_the_next_call(self):
        assert self.run(DEADLINE="0", status=1) == []
        assert self.result("info") == self.result("nm") == "not begun: no time left"
        assert self.run() == ["info", "build", *GPU_PARTS]

    def test_an_empty_folder_goes_on_from_an_earlier_one(self, tmp_path):
        self.run(failing="must-show", status=1)
        (self.out / "bench.md").write_text("earlier tables")
        new = tmp_path / "new"
        assert self.run(out=new, RESUME=str(self.out)) == ["products"]
        assert (new / "bench.md").read_text() == "earlier tables"
        self.run(out=tmp_path / "other", RESUME=str(tmp_path / "nowhere"), status=2)
        assert "nowhere has no summary.txt: name the folder of an earlier call" in self.shown

    def test_a_library_that_is_newer_than_its_sources_is_not_built(self):
        self.run("--parts", "build")
        assert "build_ext" in self.calls.read_text()
        self.run("--parts", "build")
        assert "build_ext" not in self.calls.read_text() and "is used as it is" in self.shown
        os.utime(self.root / "setup.py", (2**33, 2**33))
        self.run("--parts", "build")
        assert "build_ext" in self.calls.read_text()

    def test_another_back_end_stops_everything(self):
        assert self.run(failing="backends.active", status=4) == ["info", "build"]
        assert "-m pytest" not in self.calls.read_text()


@pytest.mark.full
def test_sanitizer_cases_equal_the_reference(capsys):
    assert sanitize.main(["--device", "cpu"]) == 0
    assert "94 of 94 cases equal" in capsys.readouterr().out


@pytest.mark.full
def test_sanitizer_cases_find_a_wrong_product(monkeypatch, capsys):
    right = ops.nm_matmul
    monkeypatch.setattr(ops, "nm_matmul", lambda *args: right(*args) * 1.05)
    assert sanitize.main(["--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "differs from the reference: sparse linear 4->64, 129 tokens N:M v=4" in shown
    assert "90 of 94 cases equal" in shown


@pytest.mark.skipif(
    backends.active("cpu") == "reference", reason="the reference cannot differ from itself"
)
@pytest.mark.full
def test_sanitizer_cases_find_a_wrong_tie(monkeypatch, capsys):

    def last_of_the_ties(w, k):
        chosen = torch.zeros(w.numel(), dtype=torch.bool)
        order = torch.sort(reference.key(w).flip(0), stable=True).indices
        chosen[w.numel() - 1 - order[:k]] = True
        return chosen

    monkeypatch.setattr(pruning, "selected", last_of_the_ties)
    assert sanitize.main(["--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "soft_shrink_ torch.float32 ties True step 0" in shown
    assert "soft_shrink_ torch.float32 ties False step 0" not in shown
