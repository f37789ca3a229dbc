"""The folder of a study: refused for another study, and its report, from files of finished runs."""

import copy
import re
from pathlib import Path

import pytest

from issp import cli
from issp.sr import config, results
from issp.sr.results import Result
from issp.sr.run_folder import RunFolder
from issp.sr.study import plan, report
from issp.sr.study.folder import StudyFolder
from issp.utils.environment import git_revision
from issp.utils.errors import ConfigError
from tests.sr.study.files import study_tree, write

pytest.importorskip("yaml", reason="PyYAML reads the study files")
pytest.importorskip("matplotlib", reason="the report has a figure")

# PSNR in dB of seed 0 and seed 1.
SCORES = {"iss-p": (31.0, 31.2), "iht": (30.5, 30.5)}


@pytest.fixture
def tree(tmp_path):
    return study_tree("photos", tmp_path)


def load(tree, tmp_path):
    return StudyFolder(plan.load(write(tree, tmp_path / "study.yml")))


def finish(folder, run):
    """Makes the files that the report reads of a run."""
    run_folder = RunFolder(folder.path / "runs" / run.name)
    run_folder.create(run.config)
    run_folder.release()
    psnr = SCORES[run.method][run.seed]
    identity = (run.method, run.network, run.scale, run.sparsity, run.seed, "waves")
    model = f"runs/{run.name}/models/net_g_latest.safetensors"
    results.write(
        run_folder.path / results.FILE_NAME,
        [
            Result(*identity, channel, psnr - loss, 0.9, zeros=0.80123, model=model)
            for channel, loss in (("y", 0), ("rgb", 2))
        ],
    )
    (run_folder.log / "train.csv").write_text(
        "iteration,stage,lr,loss,seconds\n2,pruning,1e-3,0.5,10\n60,fine-tuning,1e-3,0.25,1\n"
    )


@pytest.fixture
def finished(tree, tmp_path):
    """The folder of a study with three finished runs of four."""
    folder = load(tree, tmp_path)
    folder.begin()
    folder.end()
    for run in folder.study.runs[:3]:
        finish(folder, run)
    return folder


def test_the_report_has_means_spreads_and_what_is_missing(finished):
    text = report.write(finished).read_text()
    assert "3 of 4 runs are finished." in text
    assert "Not finished: EDSR_x2_iht_0.8_seed1." in text
    luma, rgb = (text.split(f"### EDSR, sparsity 0.8, {title}")[1] for title in ("Y", "RGB"))
    # Two seeds: 31.1 and the deviation 0.2 / sqrt(2); one seed: no deviation.
    row = r"\| ISS-P +\| +x2 \| +2 \| \*\*31\.10\*\* ± 0\.14 \| \*\*0\.9000\*\* ± 0\.0000 \|"
    assert re.search(row, luma)
    assert re.search(r"\| IHT +\| +x2 \| +1 \| +<u>30\.50</u> \| ", luma)
    assert re.search(r"\| ISS-P .* \*\*29\.10\*\* ± 0\.14 ", rgb)
    assert "* EDSR x2, 80 %: iss-p 31.100 ± 0.141 > iht 30.500\n" in text
    # 2 iterations of 10 s and 58 of 1 s.
    assert re.search(r"iss-p_0\.8_seed0 \| 80\.123 % \| 0:01:18 \| +0\.25000", text)


def test_the_report_says_the_budget_the_machine_and_the_revision_once(finished):
    text = report.write(finished).read_text()
    assert (
        "Budget of every run: 30 pruning and 30 fine-tuning iterations of 2 patches of 8 x 8 "
        "low-resolution pixels of photos, Adam at 0.001 and from 0.001 to 0.00025 in fine-tuning "
        "(MultiStepLR, times 0.5 after 2, 4)." in text
    )
    assert re.search(r"^Computed on: .*threads.*denormal.*torch", text, re.MULTILINE)
    revision = git_revision(Path(report.__file__).parent) or "unknown"
    assert f"\nRevision: {revision}.\n" in text


def test_the_report_names_runs_of_another_budget(finished):
    path = finished.path / "runs" / "EDSR_x2_iht_0.8_seed0" / "config.yml"
    tree = config.load_yaml(path)
    tree["train"]["total_iter"] = 70
    path.write_text(config.dump(config.parse(tree)))
    text = report.write(finished).read_text()
    _, first, second = text.split("Budget of every run, which differs:\n\n")[1].split("* ", 2)
    assert first.startswith("30 pruning and 30 fine-tuning")
    assert first.endswith(": EDSR_x2_iss-p_0.8_seed0, EDSR_x2_iss-p_0.8_seed1\n")
    assert second.startswith("30 pruning and 40 fine-tuning")
    assert second.split("\n")[0].endswith(": EDSR_x2_iht_0.8_seed0")


def test_report_alone_trains_nothing(finished, tmp_path, capsys):
    assert cli.main(["study", str(tmp_path / "study.yml"), "--report"]) == 0
    assert capsys.readouterr().out == f"see {finished.path / 'report.md'}\n"
    names = {path.name for path in finished.path.iterdir()}
    assert names == {"report.md", "psnr.png", "results.csv", "runs", "study.yml"}
    assert (finished.path / "psnr.png").read_bytes()[:4] == b"\x89PNG"
    assert [r.psnr for r in results.read(finished.path) if r.channel == "y"] == [31.0, 30.5, 31.2]


def test_a_report_of_what_has_not_begun_is_refused(tree, tmp_path, capsys):
    assert cli.main(["study", str(write(tree, tmp_path / "study.yml")), "--report"]) == 2
    assert "has not begun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_grid_may_grow(finished, tree, tmp_path):
    tree["grid"]["seed"] = [0, 1, 2]
    tree["base"]["logger"]["print_freq"] = 7
    load(tree, tmp_path).check()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("base.train.total_iter", 80, r"train\.total_iter was 60 and is 80 now; restore it"),
        ("base.datasets.train.gt_size", 32, r"datasets\.train\.gt_size was 16 and is 32 now"),
        ("methods", {"iss-p": {"shrink": 0.5}}, r"sparsity\.shrink was 0\.95 and is 0\.5 now"),
        ("grid.seed", [0], r"has the run EDSR_x2_iss-p_0\.8_seed1: choose another --out"),
    ],
)
def test_the_folder_of_another_study_is_refused(finished, tree, tmp_path, key, value, sentence):
    changed = copy.deepcopy(tree)
    config.set_key(changed, key, value)
    with pytest.raises(ConfigError, match=sentence):
        load(changed, tmp_path).check()


def test_a_folder_of_other_files_is_refused(tree, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert cli.main(["study", str(write(tree, tmp_path / "study.yml"))]) == 2
    assert "out holds other files: choose another --out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_dry_run_and_a_report_at_once_are_refused(capsys):
    assert cli.main(["study", "any.yml", "--dry-run", "--report"]) == 2
    assert "--report: not allowed with argument --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("option", [(), ("--dry-run",), ("--report",)])
def test_a_folder_that_cannot_be_made_is_refused_first(tree, tmp_path, capsys, option):
    (tmp_path / "file").touch()
    file, out = write(tree, tmp_path / "study.yml"), tmp_path / "file" / "out"
    assert cli.main(["study", str(file), "-o", str(out), *option]) == 2
    error = capsys.readouterr().err
    assert error.endswith("file is a file; choose a folder\n") and error.count("\n") == 1


def test_a_study_goes_on_where_its_folder_was_moved(finished, tmp_path):
    finished.path.rename(tmp_path / "moved")
    study = plan.load(tmp_path / "moved" / "study.yml")
    assert study.out == tmp_path / "moved"
    folder = StudyFolder(study)
    folder.check()
    assert [folder.is_finished(run) for run in study.runs] == [True, True, True, False]
