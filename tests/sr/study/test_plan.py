"""The runs that a study file makes, and the sentences for files that cannot be one."""

import copy
from pathlib import Path

import pytest

from issp import cli
from issp.sr import builders, config
from issp.sr.study import plan
from issp.utils.errors import ConfigError
from tests.sr.study.files import study_tree, write

pytest.importorskip("yaml", reason="PyYAML reads the study files")

ROOT = Path(__file__).resolve().parents[3]
STUDIES = sorted((ROOT / "configs").glob("study_*.yml"))


@pytest.fixture
def tree(tmp_path):
    return study_tree("photos", tmp_path)


def load(tree, tmp_path, **changes):
    """The study of a file with some keys set, "a__b" for a.b."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        config.set_key(tree, key.replace("__", "."), value)
    return plan.load(write(tree, tmp_path / "study.yml"))


def test_a_grid_is_every_combination_with_the_methods_innermost(tree, tmp_path):
    study = load(tree, tmp_path)
    assert [run.name for run in study.runs] == [
        "EDSR_x2_iss-p_0.8_seed0",
        "EDSR_x2_iht_0.8_seed0",
        "EDSR_x2_iss-p_0.8_seed1",
        "EDSR_x2_iht_0.8_seed1",
    ]
    for run in study.runs:
        settings = run.config
        assert (settings.sparsity.method, settings.manual_seed) == (run.method, run.seed)
        assert settings.sparsity.ratio == run.sparsity == 0.8
        assert settings.folder == tmp_path / "out" / "runs" / run.name
        assert settings.network_g == {**tree["base"]["network_g"], "type": "EDSR"}


def test_an_axis_that_is_left_out_has_the_value_of_the_base(tree, tmp_path):
    tree["base"]["sparsity"] |= {"method": "iht", "ratio": 0.7}
    (run,) = load(tree, tmp_path, grid={}).runs
    assert run.name == "EDSR_x2_iht_0.7_seed3"


def test_runs_keep_the_models_that_the_report_needs_unless_the_base_says_more(tree, tmp_path):
    assert {run.config.logger.keep_models for run in load(tree, tmp_path).runs} == {1}
    tree["base"]["logger"]["keep_models"] = 7
    assert {run.config.logger.keep_models for run in load(tree, tmp_path).runs} == {7}


def test_a_base_in_another_file_is_found_beside_the_study_and_may_be_changed(tree, tmp_path):
    base = {**tree["base"], "name": "alone"}
    write(base, tmp_path / "base.yml")
    changes = {"logger.grad_stats_freq": 5, "train.optim_g.lr": 2e-3}
    study = load(tree, tmp_path, base="base.yml", set=changes)
    for run in study.runs:
        assert run.config.logger.grad_stats_freq == 5 and run.config.train.optim_g.lr == 2e-3
        assert run.config.train.total_iter == 60
    # The file that a study keeps needs no other.
    (tmp_path / "base.yml").unlink()
    kept = write(study.file.model_dump(exclude_none=True), tmp_path / "kept" / "study.yml")
    assert [run.config for run in plan.load(kept).runs] == [run.config for run in study.runs]


def test_excluded_combinations_are_no_runs(tree, tmp_path):
    grid = {"method": ["iss-p", "iht"], "ratio": [0.8, 0.9], "seed": [0, 1]}
    exclude = [{"method": "iht", "ratio": 0.9}, {"seed": [1], "ratio": [0.8]}]
    runs = load(tree, tmp_path, grid=grid, exclude=exclude).runs
    assert [(run.method, run.sparsity, run.seed) for run in runs] == [
        ("iss-p", 0.8, 0),
        ("iht", 0.8, 0),
        ("iss-p", 0.9, 0),
        ("iss-p", 0.9, 1),
    ]
    with pytest.raises(ConfigError, match="exclude leaves no run"):
        load(tree, tmp_path, exclude=[{"ratio": 0.8}])


def test_another_scale_keeps_the_low_resolution_crop_and_the_border(tree, tmp_path):
    tree["base"]["network_g"]["upscale"] = 2
    tree["base"]["val"] = {
        "metrics": {
            "psnr": {"crop_border": 2},
            "ssim": {"type": "calculate_ssim", "crop_border": 6},
        }
    }
    for run in load(tree, tmp_path, grid__scale=[2, 3, 4]).runs:
        settings = run.config
        assert settings.scale == settings.network_g["upscale"] == run.scale
        assert settings.train_data.gt_size == 8 * run.scale
        borders = [metric.crop_border for metric in settings.val.metrics.values()]
        assert borders == [run.scale, 6]


def test_low_resolution_files_of_one_scale_are_refused_for_another(tree, tmp_path):
    tree["base"]["datasets"]["train"]["dataroot_lq"] = "lr/X2"
    load(tree, tmp_path, grid__scale=2)
    with pytest.raises(ConfigError, match=r"train\.dataroot_lq is of x2, and the grid has x3"):
        load(tree, tmp_path, grid__scale=[2, 3])
    load(tree, tmp_path, grid__scale=[2, 3], base__datasets__train__dataroot_lq="lr/X{s}")


def test_networks_of_the_grid_replace_that_of_the_base(tree, tmp_path):
    grid = {"network": ["edsr-tiny", "swinir-light"], "method": "iht"}
    names = [run.name for run in load(tree, tmp_path, grid=grid).runs]
    assert names == ["edsr-tiny_x2_iht_0.95_seed3", "swinir-light_x2_iht_0.95_seed3"]
    for run in load(tree, tmp_path, grid=grid).runs:
        assert run.config.network_g == {"type": run.network}


def test_a_method_keeps_its_own_settings_and_gets_those_of_no_other(tree, tmp_path):
    tree["base"]["sparsity"] |= {"method": "iss-p", "shrink": 0.5, "overrides": {"body.*": 0.1}}
    tree["methods"] = {"slow": {"method": "iss-p", "shrink": 0.99}, "iht": {"exclude": ["*last"]}}
    runs = load(tree, tmp_path, grid={"method": ["iss-p", "slow", "iht"]}).runs
    sections = {run.method: run.config.sparsity for run in runs}
    assert [sections[name].shrink for name in ("iss-p", "slow", "iht")] == [0.5, 0.99, None]
    assert [section.method for section in sections.values()] == ["iss-p", "iss-p", "iht"]
    assert [section.exclude for section in sections.values()] == [[], [], ["*last"]]
    assert all(section.overrides == {"body.*": 0.1} for section in sections.values())
    assert all(section.freeze_iter == 30 for section in sections.values())


def test_a_method_with_a_target_of_its_own_is_compared_at_the_ratio_of_its_place(tree, tmp_path):
    tree["methods"] = {"two": {"method": "iht", "keep": {"n": 2, "of": 4}}, "iht": {"ratio": 0.75}}
    two, iht = load(tree, tmp_path, grid={"method": ["two", "iht"], "ratio": 0.8}).runs
    assert two.sparsity == iht.sparsity == 0.8
    assert two.config.sparsity.ratio is None and two.config.sparsity.keep.n == 2
    assert iht.config.sparsity.ratio == 0.75


def test_a_base_of_a_pattern_has_the_sparsity_of_the_pattern(tree, tmp_path):
    tree["base"]["sparsity"]["keep"] = {"n": 2, "of": 4}
    (run,) = load(tree, tmp_path, grid={"method": "iht"}).runs
    assert run.sparsity == 0.5 and run.name == "EDSR_x2_iht_0.5_seed3"
    with pytest.raises(ConfigError, match="ratio beside keep"):
        load(tree, tmp_path, grid={}, methods={"iss-p": {"ratio": 0.8}})


def test_dense_training_is_one_run_with_the_stages_of_the_others(tree, tmp_path):
    tree["base"]["sparsity"] |= {"overrides": {"body.*": 0.1}, "exclude": ["*last"]}
    grid = {"method": ["dense", "iss-p"], "ratio": [0.8, 0.9], "seed": [0, 1]}
    runs = load(tree, tmp_path, grid=grid).runs
    dense = [run for run in runs if run.method == "dense"]
    assert [run.name for run in dense] == ["EDSR_x2_dense_seed0", "EDSR_x2_dense_seed1"]
    assert len(runs) == 2 + 4 and {run.sparsity for run in dense} == {0}
    assert all(run.config.sparsity.ratio is None for run in dense)
    rates = {
        tuple(builders.learning_rate(run.config, i) for i in (1, 30, 31, 33, 35, 60))
        for run in runs
    }
    assert rates == {(1e-3, 1e-3, 1e-3, 5e-4, 2.5e-4, 2.5e-4)}


def test_test_sets_are_folders_or_entries_of_datasets(tree, tmp_path):
    entry = {"dataroot_gt": "set14/HR", "dataroot_lq": "set14/X2"}
    study = load(tree, tmp_path, test={"Set5": "set5", "Set14": entry})
    assert study.test["Set5"].dataroot_gt == "set5"
    assert study.test["Set14"].dataroot_lq == "set14/X2"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"grids": {}}, r"unknown key grids: did you mean 'grid'\?"),
        ({"grid__methods": ["iht"]}, r"unknown key grid\.methods: did you mean 'method'\?"),
        ({"grid__method": ["ihtt"]}, r"method: 'ihtt' is unknown: did you mean 'iht'\?"),
        ({"grid__network": ["edsr-tin"]}, r"'edsr-tin' is unknown: did you mean 'edsr-tiny'\?"),
        ({"grid__seed": [0, 0]}, r"grid\.seed has 0 twice: drop one"),
        ({"grid__seed": ["x"]}, r"grid\.seed\[0\] must be a whole number, got 'x'"),
        ({"grid__ratio": [95]}, r"EDSR_x2_iss-p_95_seed0: sparsity\.ratio is 95: write 0\.95"),
        (
            {"exclude": [{"methd": "iht"}]},
            r"unknown key exclude\[0\]\.methd: did you mean",
        ),
        ({"methods": {"a": {}}}, r"methods\.a: 'a' is unknown"),
        ({"methods": {"a": {"method": ["iht"]}}}, r"methods\.a: \['iht'\] is unknown"),
        ({"methods": {"iht": {"freeze_iter": 3}}}, r"methods\.iht has freeze_iter: it is the same"),
        ({"methods": {"iht": {"shrnk": 3}}}, r"iht_0\.8_seed0: unknown key sparsity\.shrnk"),
        ({"test": {}}, r"test names no set"),
        ({"test": {"a": {"dataroot": "x"}}}, r"unknown key test\.a\.dataroot"),
        ({"base__sparsity": None}, r"base has no sparsity\.freeze_iter"),
        (
            {"base__train__total_itr": 3},
            r"base: unknown key train\.total_itr: did you mean",
        ),
        ({"set": {"train.totl_iter": 3}}, r"base: unknown key train\.totl_iter: did you mean"),
        ({"set": {"scale.x": 3}}, r"scale\.x: scale is not a section"),
        ({"base__path": {"resume_state": "x"}}, r"base has path\.resume_state: drop it"),
        ({"base": "nowhere.yml"}, r"cannot read configuration .*nowhere\.yml"),
        ({"out": ""}, r"out"),
    ],
)
def test_a_wrong_file_is_one_sentence(tree, tmp_path, capsys, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(tree, tmp_path, **changes)
    assert cli.main(["study", str(tmp_path / "study.yml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--workers", "--threads"])
def test_impossible_numbers_of_processes_are_refused(tree, tmp_path, capsys, option):
    path = write(tree, tmp_path / "study.yml")
    assert cli.main(["study", str(path), option, "0"]) == 2
    assert f"{option} is 0: it must be from 1 to" in capsys.readouterr().err


def test_missing_images_are_named_before_anything_is_written(tree, tmp_path, capsys):
    assert cli.main(["study", str(write(tree, tmp_path / "study.yml"))]) == 2
    assert "photos" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_a_dry_run_lists_the_runs_and_needs_no_images(tree, tmp_path, capsys):
    assert cli.main(["study", str(write(tree, tmp_path / "study.yml")), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:5] for line in lines if line.startswith("| EDSR")]
    assert [row[0].strip() for row in rows] == [
        f"EDSR_x2_{method}_0.8_seed{seed}" for seed in (0, 1) for method in ("iss-p", "iht")
    ]
    assert {(row[1].strip(), row[2].strip()) for row in rows} == {("60", "new")}
    assert not (tmp_path / "out").exists()


def test_the_committed_study_has_all_methods_and_two_at_other_ratios():
    study = plan.load(ROOT / "configs" / "study_cpu.yml")
    places = {(run.method, run.sparsity, run.seed) for run in study.runs}
    at_95 = {"iss-p", "iht", "iss-r", "l1", "scratch", "srp", "assl", "sls"}
    expected = {(method, 0.95) for method in at_95} | {("dense", 0)}
    expected |= {(method, ratio) for method in ("iss-p", "iht") for ratio in (0.9, 0.99)}
    assert places == {(*place, seed) for place in expected for seed in (0, 1)}
    for run in study.runs:
        assert (run.config.freeze_iter, run.config.train.total_iter) == (8000, 16000)
        assert run.config.milestones == [4000, 6400, 7200, 7600]
        assert run.config.train.optim_g.lr == 5e-4 and run.config.train.scheduler.gamma == 0.5
        images = run.config.train_data
        assert (images.gt_size, images.batch_size_per_gpu) == (40, 8)


@pytest.mark.full
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_networks_of_the_studies_are_those_of_their_bases(path):
    study = plan.load(path)
    base = config.parse({**study.file.base, "name": "base"})
    (run,) = [run for run in study.runs if run.scale == base.scale][:1]
    assert builders.network(run.config).config == builders.network(base).config


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_repository_can_be_planned(path):
    study = plan.load(path)
    assert study.runs and len({run.config.train.total_iter for run in study.runs}) == 1
    assert len({run.config.freeze_iter for run in study.runs}) == 1
