"""The configuration: BasicSR's files run, mistakes are named with the nearest key."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from issp.sr import builders, config
from issp.utils.errors import ConfigError, OutOfMemoryError

yaml = pytest.importorskip("yaml", reason="PyYAML reads the configuration files")

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("train_*.yml"))

# As BasicSR's users write it: numbers as text to YAML 1.1, keys for launchers and other loggers.
BASICSR = """
name: run
model_type: SRModel
scale: 2
num_gpu: 1
manual_seed: 7
datasets:
  train:
    name: DIV2K
    type: PairedImageDataset
    dataroot_gt: hr
    dataroot_lq: lr
    filename_tmpl: '{}x2'
    io_backend: {type: disk}
    gt_size: 96
    use_hflip: true
    use_rot: true
    use_shuffle: true
    num_worker_per_gpu: 6
    batch_size_per_gpu: 16
    dataset_enlarge_ratio: 100
    prefetch_mode: ~
  val:
    name: Set5
    type: PairedImageDataset
    dataroot_gt: set5
    io_backend: {type: disk}
network_g: {type: EDSR, num_in_ch: 3, num_out_ch: 3, num_feat: 8, num_block: 1, upscale: 2}
path: {pretrain_network_g: ~, strict_load_g: true, resume_state: ~}
train:
  ema_decay: 0.999
  optim_g: {type: Adam, lr: 2e-4, weight_decay: 0, betas: [0.9, 0.99]}
  scheduler: {type: MultiStepLR, milestones: [20, 40], gamma: 0.5}
  total_iter: !!float 1e2
  warmup_iter: -1
  pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}
val:
  val_freq: !!float 5e3
  save_img: false
  pbar: false
  metrics:
    psnr: {type: calculate_psnr, crop_border: 2, test_y_channel: false, better: higher}
logger:
  print_freq: 100
  save_checkpoint_freq: !!float 5e3
  use_tb_logger: true
  wandb: {project: ~, resume_id: ~}
dist_params: {backend: nccl, port: 29500}
"""


@pytest.fixture
def tree():
    return yaml.safe_load(BASICSR)


def test_a_basicsr_file_is_understood(tree):
    c = config.parse(tree)
    assert c.train.optim_g.lr == 2e-4 and isinstance(c.train.optim_g.lr, float)
    assert (c.train.total_iter, c.val.val_freq) == (100, 5000)
    assert isinstance(c.train.total_iter, int)
    assert (c.train_data.gt_size, c.train_data.batch_size_per_gpu) == (96, 16)
    assert [d.name for d in c.val_data] == ["Set5"]
    assert c.val.metrics["psnr"].test_y_channel is False
    assert c.sparsity is None and c.freeze_iter == 0


def test_the_sparsity_section(tree):
    tree["sparsity"] = {
        "ratio": 0.9,
        "freeze_iter": "40",
        "exclude": "*last*",
        "overrides": {"body.*": 0.5, "upsample.0": {"n": 2, "of": 8}},
    }
    c = config.parse(tree)
    assert (c.sparsity.method, c.sparsity.shrink, c.freeze_iter) == ("iss-p", 0.95, 40)
    assert c.sparsity.exclude == ["*last*"]
    assert c.sparsity.overrides == {"body.*": 0.5, "upsample.0": config.Keep(n=2, of=8)}


def test_to_tree_is_what_parse_reads(tree):
    tree["sparsity"] = {"freeze_iter": 40, "keep": {"n": 1, "of": 2}}
    c = config.to_tree(config.parse(tree))
    assert config.to_tree(config.parse(c)) == c
    assert config.to_tree(config.parse(yaml.safe_load(config.dump(config.parse(tree))))) == c


@pytest.mark.parametrize(
    "key, wrong, hint",
    [
        ("trian", {}, "'train'"),
        ("train.total_iters", 5, "train.total_iters: did you mean 'total_iter'?"),
        ("datasets.train.gtsize", 96, "'gt_size'"),
        ("datasets.valid", {}, "datasets.valid: did you mean 'val'?"),
        ("datasets.val.dataroot", "x", "'dataroot_"),
        ("sparsity.freeze_itr", 5, "'freeze_iter'"),
        ("val.metrics.psnr.y_channel", True, "'test_y_channel'"),
        ("train.optim_g.type", "Adan", "did you mean 'Adam'?"),
        ("train.pixel_opt.type", "L2Loss", "did you mean 'L1Loss'?"),
        ("sparsity.overrides", {"a.b": {"n": 2, "m": 4}}, "unknown key sparsity.overrides.a.b.m: "),
    ],
)
def test_a_wrong_key_or_choice_names_the_nearest(tree, key, wrong, hint):
    config.set_key(tree, key, wrong)
    with pytest.raises(ValueError) as error:
        config.parse(tree)
    assert hint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, wrong",
    [
        ("scale", 1),
        ("scale", 2.5),
        ("name", "a/b"),
        ("name", ""),
        ("network_g", {}),
        ("train.total_iter", 0),
        ("train.optim_g.lr", "fast"),
        ("train.optim_g.lr", float("nan")),
        ("train.optim_g.lr", float("inf")),
        ("train.warmup_iter", 1e400),
        ("datasets.train.use_rot", "yes please"),
        ("datasets.train.gt_size", 97),
        ("datasets.train.dataroot_gt", None),
        ("sparsity.ratio", 1.5),
        ("sparsity.freeze_iter", 101),
        ("val.val_freq", 0),
        ("train", "many"),
        ("train.scheduler", {"type": "CosineAnnealingRestartLR"}),
        ("train.scheduler", {"type": "CosineAnnealingRestartLR", "periods": [0]}),
        ("train.scheduler.gamma", -0.5),
        ("train.pixel_opt.loss_weight", -1),
        ("name", "a\0b"),
        ("train.total_iter", True),
        ("train.optim_g.betas", [0.9, "x"]),
        ("datasets.val.io_backend", {"type": "lmdb"}),
        ("datasets.val", None),
        ("sparsity.overrides", {"conv_last": "half"}),
    ],
)
def test_an_unusable_value_is_named(tree, key, wrong):
    config.set_key(tree, key, wrong)
    with pytest.raises(ValueError, match=key.split(".")[-1]):
        config.parse(tree)


def test_numbers_of_the_network_may_be_text_to_yaml(tree):
    tree["network_g"]["res_scale"] = "1e-1"
    assert builders.network(config.parse(tree)).body[0].res_scale == 0.1


def test_a_sentence_names_the_dotted_key(tree):
    tree["train"]["optim_g"]["betas"] = [0.9, "x"]
    tree["trian"] = {}  # a misspelt key comes first, whatever else is wrong
    with pytest.raises(ConfigError, match="^unknown key trian: did you mean 'train'\\?$"):
        config.parse(tree)
    del tree["trian"]
    with pytest.raises(
        ConfigError, match=r"^train\.optim_g\.betas\[1\] must be a number, got 'x'$"
    ):
        config.parse(tree)


def test_arguments_that_the_network_does_not_take_are_the_users(tree):
    c = config.parse(tree | {"network_g": {"type": "edsr-tiny", "num_feats": 8}})
    with pytest.raises(ConfigError, match="network_g: EDSR has no argument 'num_feats'"):
        builders.network(c)
    c = config.parse(tree | {"network_g": {"type": "EDSR", "num_feat": "many"}})
    with pytest.raises(ConfigError, match="^network_g: "):
        builders.network(c)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "a: !!python/object:os.system {}"])
def test_bad_yaml_is_one_sentence(tmp_path, text):
    file = tmp_path / "bad.yml"
    file.write_text(text)
    with pytest.raises(ValueError, match="bad.yml") as error:
        config.load_yaml(file)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"none\.yml"):
        config.load_yaml(tmp_path / "none.yml")


@pytest.mark.parametrize(
    "value",
    ["!!float abc", "!!int abc", "!!bool abc", "!!int ''", "!!timestamp abc", "2024-13-45"],
)
def test_a_value_that_is_none_of_its_yaml_type_is_one_sentence(tmp_path, value):
    path = tmp_path / "tagged.yml"
    path.write_text(f"name: run\ntrain: {{total_iter: {value}}}\n")
    with pytest.raises(ConfigError, match=r"tagged\.yml has a value that is none of its YAML type"):
        config.load_yaml(path)


def test_yaml_nested_too_deeply_is_one_sentence(tmp_path):
    path = tmp_path / "deep.yml"
    path.write_text("a: " + "[" * 3000 + "]" * 3000)
    with pytest.raises(ConfigError, match=r"deep\.yml is nested too deeply"):
        config.load_yaml(path)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_the_shipped_configurations_build_their_networks(file):
    c = config.parse(config.load_yaml(file))
    with torch.device("meta"):
        model = builders.network(c)
    assert model.scale == c.scale
    assert c.freeze_iter < c.train.total_iter
    fine_tuning = c.train.total_iter - c.freeze_iter
    assert max(c.train.scheduler.milestones) <= fine_tuning


def test_the_paper_has_its_configurations():
    names = {file.stem for file in CONFIGS}
    wanted = {f"train_issp_swinir_light_x{s}" for s in (2, 3, 4)}
    assert wanted | {"train_issp_edsr_l_x4", "train_issp_cat_r_x4", "train_issp_cpu"} <= names


def _rates(tree, count):
    c = config.parse(tree)
    return [builders.learning_rate(c, i) for i in range(1, count + 1)]


def _torch_rates(make, count, base=2e-4):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler, rates = make(optimizer), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_milestones_count_from_the_freeze(tree):
    def steps(opt):
        return torch.optim.lr_scheduler.MultiStepLR(opt, [20, 40], gamma=0.5)

    dense = _rates(copy.deepcopy(tree), 60)
    assert dense == pytest.approx(_torch_rates(steps, 60))
    tree["sparsity"] = {"freeze_iter": 30}
    sparse = _rates(tree, 90)
    assert sparse[:30] == [2e-4] * 30
    assert sparse[30:] == dense


def test_cosine_and_warm_up(tree):
    tree["train"]["scheduler"] = {
        "type": "CosineAnnealingRestartLR", "periods": [50], "eta_min": 1e-6,
    }  # fmt: skip
    tree["train"]["warmup_iter"] = 4

    def cosine(opt):
        return torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50, eta_min=1e-6)

    rates = _rates(tree, 51)
    assert rates[:4] == pytest.approx([0.5e-4, 1e-4, 1.5e-4, 2e-4])
    assert rates[4:] == pytest.approx(_torch_rates(cosine, 51)[4:])
    tree["train"]["scheduler"] |= {"periods": [10, 20], "restart_weights": [1, 0.5]}
    rates = _rates(tree, 40)
    # BasicSR restarts one step after a period has reached its minimum, and stays at the last one.
    assert rates[10] == pytest.approx(1e-6) and rates[11] > 0.9e-4 and rates[35] == rates[30]


def test_overrides_reach_the_pruner(tree):
    tree["sparsity"] = {
        "freeze_iter": 50, "exclude": ["conv_first"],
        "keep": {"n": 1, "of": 4}, "overrides": {"conv_last": 0.25},
    }  # fmt: skip
    c = config.parse(tree)
    model = builders.network(c)
    pruner = builders.pruner(c, model, builders.optimizer(c, model), None)
    targets = {row.name: row.target for row in pruner.summary().rows}
    assert "conv_first" not in targets
    assert targets["conv_last"] == 0.25
    assert (targets["body.0.conv1"].n, targets["body.0.conv1"].of) == (1, 4)


def test_the_network_and_the_scale_must_agree(tree):
    tree["network_g"]["upscale"] = 4
    tree["datasets"]["train"]["gt_size"] = 96
    with pytest.raises(ValueError, match="upscale is 4 but scale is 2"):
        builders.network(config.parse(tree))
    tree["network_g"] = {"type": "edsr-tiny", "upscale": 4}  # also of a network by its name
    with pytest.raises(ValueError, match="upscale is 4 but scale is 2"):
        builders.network(config.parse(tree))


def test_a_network_that_no_memory_holds_names_the_remedy(tree):
    tree["network_g"] |= {"type": "EDSR", "num_feat": 1_000_000}
    sentence = "the machine has not enough memory: make network_g smaller"
    with pytest.raises(OutOfMemoryError, match=sentence):
        builders.network(config.parse(tree))


@pytest.mark.parametrize("name", ["..", "a/b", "/tmp", "."])
def test_the_name_of_a_validation_set_is_a_folder_name(tree, name):
    """Its images go to visualization/<name>."""
    tree["datasets"]["val"] = {"name": name, "dataroot_gt": "images"}
    with pytest.raises(ConfigError, match="datasets.val.name must be a plain folder name"):
        config.parse(tree)


@pytest.mark.parametrize(
    "name, said",
    [
        ("gpu0", "'gpu0' is unknown: use auto"),
        ("meta", "'meta' is not supported: use auto"),
        ("cuda:99", "'cuda:99' is absent: torch sees"),
    ],
)
def test_a_device_that_is_not_there_is_named(name, said):
    with pytest.raises(ConfigError, match=said):
        builders.device(name)


@pytest.mark.full
def test_pydantic_is_named_where_it_is_missing():
    code = "import sys; sys.modules['pydantic'] = None; import issp.sr.config"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("issp.utils.errors.MissingPackageError: ")
    assert "pydantic" in done.stderr.splitlines()[-1]
