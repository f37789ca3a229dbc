"""A setting is honoured, refused or named: none is accepted and forgotten."""

import copy

import pytest
import torch

from issp import data
from issp.sr import builders, config, preflight
from issp.sr.distributed import Ranks
from issp.sr.train import train
from issp.utils.errors import ConfigError

yaml = pytest.importorskip("yaml", reason="PyYAML reads the configuration files")

PLAIN = """
name: run
scale: 2
device: cpu
network_g: {type: EDSR, num_feat: 8, num_block: 1}
datasets: {train: {dataroot_gt: hr, gt_size: 16, batch_size_per_gpu: 3}}
train: {total_iter: 100}
"""


def parsed(**changes):
    """The plain configuration with some keys set, "a__b" for a.b."""
    tree = yaml.safe_load(PLAIN)
    for key, value in changes.items():
        config.set_key(tree, key.replace("__", "."), copy.deepcopy(value))
    return config.parse(tree)


def built_optimizer(**options):
    model = torch.nn.Conv2d(2, 2, 1)
    return builders.optimizer(parsed(train__optim_g=options), model)


def test_every_option_of_an_optimizer_reaches_it():
    (adam,) = built_optimizer(
        type="AdamW", lr=0.01, weight_decay=0.1, betas=[0.5, 0.75], eps=1e-3, amsgrad=True
    ).param_groups
    assert (adam["lr"], adam["weight_decay"], adam["eps"]) == (0.01, 0.1, 1e-3)
    assert list(adam["betas"]) == [0.5, 0.75] and adam["amsgrad"] is True
    (sgd,) = built_optimizer(type="SGD", momentum=0.8, nesterov=True, weight_decay=0.2).param_groups
    assert (sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0.8, True, 0.2)
    (sgd,) = built_optimizer(type="SGD", momentum=0.8, dampening=0.25).param_groups
    assert sgd["dampening"] == 0.25
    # Not Adam's first beta: what torch does without momentum.
    assert built_optimizer(type="SGD").param_groups[0]["momentum"] == 0


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD"])
def test_an_option_that_a_file_leaves_out_has_the_default_of_torch(kind):
    model = torch.nn.Linear(2, 2)
    (expected,) = getattr(torch.optim, kind)(model.parameters(), lr=2e-4).param_groups
    (actual,) = built_optimizer(type=kind, lr=2e-4).param_groups
    options = [key for key in config.Optimizer.model_fields if key in expected]
    assert "weight_decay" in options and len(options) >= 4
    for key in options:
        as_tuple = tuple if isinstance(expected[key], tuple) else lambda value: value
        assert as_tuple(actual[key]) == expected[key], key


def test_amsgrad_keeps_the_largest_second_moment():
    model = torch.nn.Conv2d(2, 2, 1)
    optimizer = builders.optimizer(parsed(train__optim_g={"amsgrad": True}), model)
    model(torch.ones(1, 2, 4, 4)).sum().backward()
    optimizer.step()
    assert "max_exp_avg_sq" in optimizer.state[model.weight]


@pytest.mark.parametrize(
    "section, options, part",
    [
        ("optim_g", {"type": "SGD", "betas": [0.9, 0.99]}, "has betas, which SGD does not take"),
        ("optim_g", {"type": "SGD", "amsgrad": True}, "amsgrad"),
        ("optim_g", {"type": "Adam", "momentum": 0.9}, "has momentum, which Adam does not take"),
        ("optim_g", {"type": "SGD", "nesterov": True}, "Nesterov momentum requires a momentum"),
        ("optim_g", {"betas": [0.9]}, "betas"),
        ("optim_g", {"betas": [0.9, 1.5]}, "1.5"),
        ("optim_g", {"maximize": True}, "unknown key train.optim_g.maximize"),
        ("scheduler", {"milestones": [5], "periods": [9]}, "has periods, which MultiStepLR"),
        (
            "scheduler",
            {"type": "CosineAnnealingRestartLR", "periods": [9], "milestones": [5]},
            "has milestones",
        ),
        ("scheduler", {"milestones": [5], "last_epoch": 4}, "last_epoch is 4"),
        ("scheduler", {"milestones": [5.5]}, "is 5.5"),
    ],
)
def test_an_option_of_another_type_is_refused(section, options, part):
    with pytest.raises(ConfigError, match=part):
        builders.optimizer(parsed(**{f"train__{section}": options}), torch.nn.Conv2d(2, 2, 1))


def test_a_milestone_below_one_is_a_share_of_fine_tuning():
    c = parsed(train__scheduler={"milestones": [0.95, 7, 0.5]}, sparsity={"freeze_iter": 40})
    assert c.milestones == [7, 30, 57]
    assert parsed(train__scheduler={"milestones": [0.5]}, train__total_iter=1000).milestones == [
        500
    ]
    again = config.parse(config.to_tree(c))
    assert again.train.scheduler.milestones == [0.95, 7, 0.5], "a longer run resolves them anew"


@pytest.mark.parametrize(
    "sparsity", [{"method": "iht"}, {"keep": {"n": 1, "of": 4}}, {"ratio": 0.5, "shrink": 0.5}]
)
def test_config_yml_of_a_run_parses_again(sparsity):
    c = config.to_tree(parsed(sparsity={"freeze_iter": 9, **sparsity}))
    assert config.to_tree(config.parse(c)) == c


def test_a_file_of_an_earlier_revision_still_parses():
    """It wrote out the options of every type, with their defaults."""
    idle = {
        "milestones": [9],
        "gamma": 0.5,
        "periods": [],
        "restart_weights": [1.0],
        "eta_min": 0.0,
    }
    assert parsed(train__scheduler=idle).train.scheduler.options == {
        "milestones": [9],
        "gamma": 0.5,
    }


@pytest.mark.parametrize(
    "ratio, part",
    [
        (1, "above 0 and at most 0.995"),
        (1.0, "at most 0.995"),
        (0.999, "at most 0.995"),
        (95, "write 0.95 for 95 %"),
        (100, "write 1 for 100 %"),
        (0, "prunes nothing"),
        (-0.5, "is -0.5"),
        (float("nan"), "must be a finite number, got nan"),
    ],
)
def test_an_impossible_sparsity_is_refused(ratio, part):
    with pytest.raises(ConfigError, match=rf"^sparsity\.ratio .*{part}"):
        parsed(sparsity={"ratio": ratio, "freeze_iter": 10})


def test_the_sparsity_of_a_single_layer_has_the_same_bounds():
    for ratio, part in ((95, "write 0.95 for 95 %"), (1, "at most 0.995"), (-1, "is -1")):
        with pytest.raises(
            ConfigError, match=rf"sparsity\.overrides\.conv_last is .*{part}|{part}"
        ):
            parsed(sparsity={"freeze_iter": 9, "overrides": {"conv_last": ratio}})
    assert parsed(sparsity={"freeze_iter": 9, "overrides": {"conv_last": 0}}).sparsity.overrides


@pytest.mark.parametrize(
    "section, part",
    [
        ({"from_zeros": True, "ratio": 0.9}, "from_zeros keeps the zeros .* drop ratio"),
        ({"from_zeros": True, "freeze_iter": 9}, "drop freeze_iter"),
        ({"from_zeros": True}, "path.pretrain_network_g"),
        ({"ratio": 0.95, "freeze_iter": 9, "keep": {"n": 1, "of": 4}}, "ratio beside keep"),
        ({"method": "iht", "shrink": 0.95, "freeze_iter": 9}, "method iht does not use it"),
        ({"method": "dense", "ratio": 0.9}, "has ratio, but method dense prunes nothing"),
        ({"method": "srp", "options": {"limt": 1}}, "no option \"limt\": did you mean 'limit'"),
        ({"method": "srp", "options": {"limit": 0}}, "^sparsity.options: limit is 0"),
        ({"method": "srp", "options": {"limit": "high"}}, "^sparsity.options: limit is 'high'"),
        (
            {"method": "srp", "options": {"constrained": 3}},
            "^sparsity.options: constrained must be a name pattern or several",
        ),
        (
            {"method": "iss-p", "options": {"shrink": 0.9}},
            "^sparsity.options has shrink: write it as sparsity.shrink",
        ),
        ({"method": "iss-q"}, "^sparsity.method is 'iss-q': did you mean 'iss-"),
        ({"method": "iss-q", "options": {"a": 1}}, "^sparsity.method is 'iss-q'"),
    ],
)
def test_settings_of_pruning_that_contradict_are_refused(section, part):
    with pytest.raises(ConfigError, match=part):
        parsed(sparsity=section)


def test_options_of_a_method_may_be_numbers_that_yaml_reads_as_text():
    section = {"method": "assl", "freeze_iter": 9}
    section["options"] = {"weight": "1e-8", "constrained": "body.*"}
    assert parsed(sparsity=section).sparsity.options == {"weight": 1e-8, "constrained": "body.*"}


@pytest.mark.parametrize(
    "key, value, part",
    [
        ("model_type", "ESRGANModel", "'ESRGANModel' is not supported"),
        ("is_train", False, "is_train is false"),
        ("num_gpu", -1, "num_gpu is -1"),
        ("train__ema_decay", 1, "ema_decay is 1"),
        ("manual_seed", 2**64, "manual_seed is 18446744073709551616"),
        ("train__manual_seed", -(2**64), "manual_seed is -18446744073709551616"),
        ("num_gpu", "two", "num_gpu is 'two'"),
        ("datasets__train__task", "CAR", "'CAR' is not supported"),
        ("datasets__train__scale", 4, r"datasets\.train\.scale is 4 but scale is 2"),
        ("datasets__train__type", "SamplePhotographs", "has dataroot_gt"),
        ("val__metrics__psnr__better", "lower", "'lower' is not supported"),
        ("val__metrics__psnr__input_order", "CHW", "'CHW' is not supported"),
        ("val__metrics__psnr__crop_border", -1, "crop_border is -1"),
        ("train__optim_g__weight_decay", -0.1, "weight_decay is -0.1"),
        ("datasets__train__batch_size_per_gpu", 10**20, r"must be in 1\.\.1048576"),
        ("datasets__train__dataset_enlarge_ratio", 10**20, r"must be in 1\.\.1048576"),
        ("datasets__train__num_worker_per_gpu", 10**20, r"must be in 0\.\.1024"),
    ],
)
def test_what_is_not_built_is_refused(key, value, part):
    with pytest.raises(ConfigError, match=part):
        parsed(**{key: value})


def test_the_authors_files_name_several_gpus():
    """They parse; one process names the equal batch."""
    with pytest.raises(ConfigError, match=r"num_gpu is 4.*batch_size_per_gpu to 12"):
        Ranks().check(parsed(num_gpu=4))
    for harmless in ({"num_gpu": 1}, {"num_gpu": "auto"}, {"num_gpu": 0}, {"dist": False}):
        Ranks().check(parsed(**harmless))


def test_processes_that_nobody_numbers_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but 'RANK' is not as torchrun sets"):
        train(parsed())


def test_num_gpu_auto_says_that_other_gpus_are_idle(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    line = preflight.idle_gpus(parsed(num_gpu="auto"), torch.device("cuda:0"))
    assert line == (
        "num_gpu is auto, but one process was started: it trains on cuda:0, one of 8 GPUs; "
        "torchrun --nproc_per_node=8 -m issp train uses all"
    )
    assert preflight.idle_gpus(parsed(num_gpu="auto"), torch.device("cuda:0"), 2) is None
    assert preflight.idle_gpus(parsed(num_gpu=1), torch.device("cuda:0")) is None
    assert preflight.idle_gpus(parsed(num_gpu="auto"), torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert preflight.idle_gpus(parsed(num_gpu="auto"), torch.device("cuda:0")) is None


def test_num_gpu_zero_is_the_cpu():
    assert parsed(num_gpu=0, device="auto").device == "cpu"
    with pytest.raises(ConfigError, match="num_gpu is 0 but device is cuda"):
        parsed(num_gpu=0, device="cuda")


def test_older_names_and_places_of_keys():
    c = parsed(
        train__manual_seed=7, datasets__train__use_flip=False, path__strict_load=False,
        path__pretrain_model_g="a.pth", datasets__train__task="SR",
    )  # fmt: skip
    assert c.manual_seed == 7 and config.parse(config.to_tree(c)).manual_seed == 7
    assert c.train_data.use_hflip is False and c.path.strict_load_g is False
    assert c.path.pretrain_network_g == "a.pth"
    with pytest.raises(ConfigError, match=r"train\.manual_seed 7 contradicts"):
        parsed(train__manual_seed=7, manual_seed=8)


def test_what_a_file_asks_for_in_vain_is_listed():
    c = parsed(
        logger__wandb={"project": "sr", "resume_id": None}, val__suffix="x", val__pbar=False,
        datasets__train__prefetch_mode="cuda", datasets__train__phase=None,
        datasets__val_2={"dataroot_gt": "a", "pin_memory": True}, dist_params={"port": 29500},
    )  # fmt: skip
    assert sorted(c.unused_keys()) == [
        "datasets.train.prefetch_mode", "datasets.val_2.pin_memory", "dist_params",
        "logger.wandb", "val.suffix",
    ]  # fmt: skip
    assert parsed(logger__wandb={"project": None}).unused_keys() == []


def test_a_key_that_stands_twice_names_both_lines(tmp_path):
    file = tmp_path / "twice.yml"
    file.write_text("name: a\ntrain:\n  total_iter: 5\n  ema_decay: 0\n  total_iter: 9\n")
    with pytest.raises(
        ConfigError, match=r"twice\.yml has the key total_iter twice, in lines 3 and 5"
    ):
        config.load_yaml(file)
    file.write_text("a: &base {x: 1, y: 2}\nb: {<<: *base, x: 3}\nc: [{x: 1}, {x: 2}]\nd: *base\n")
    assert config.load_yaml(file)["b"] == {"x": 3, "y": 2}, "merging overrides on purpose"


@pytest.fixture
def photos(tmp_path):
    for i, name in enumerate(("a", "b", "c d")):
        image = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(i))
        data.write_image(tmp_path / "hr" / f"{name}.png", image.to(torch.uint8).numpy())
    return tmp_path / "hr"


def test_meta_info_file_chooses_the_images(photos, tmp_path):
    meta = tmp_path / "meta.txt"
    meta.write_text("c d.png (24,24,3)\n\na.png\n")
    c = parsed(datasets__train__dataroot_gt=str(photos), datasets__train__meta_info_file=str(meta))
    dataset = builders.loader(c, pin_memory=False).dataset
    assert [dataset.pairs.names[i] for i in dataset.images] == ["c d", "a"]
    meta.write_text("a.png (24,24,3)\nnone.png (24,24,3)\n")
    with pytest.raises(FileNotFoundError, match=r"no none\.png, which meta_info_file .*1 of 2"):
        builders.loader(c, pin_memory=False)
    meta.write_text("\n")
    with pytest.raises(ValueError, match="names no image"):
        builders.loader(c, pin_memory=False)
    meta.unlink()
    with pytest.raises(ValueError, match="cannot read meta_info_file"):
        builders.loader(c, pin_memory=False)


def test_use_shuffle_false_draws_in_order(photos):
    c = parsed(datasets__train__dataroot_gt=str(photos), datasets__train__use_shuffle=False)
    paths = [path for _ in range(2) for path in next(builders.loader(c, False))["gt_path"]]
    assert [p.rsplit("/")[-1] for p in paths[:3]] == ["a.png", "b.png", "c d.png"]


# One small file for each form in which the authors of the paper and BasicSR write their options.
AUTHORS = """
name: authors
model_type: CATModle
scale: 4
num_gpu: 4
manual_seed: 10
datasets:
  train:
    task: SR
    name: DF2K
    type: PairedImageDataset
    dataroot_gt: DF2K/HR
    dataroot_lq: DF2K/LR_bicubic/X4
    filename_tmpl: '{}x4'
    io_backend: {type: disk}
    gt_size: 256
    use_hflip: True
    use_rot: True
    use_shuffle: True
    num_worker_per_gpu: 64
    batch_size_per_gpu: 8
    dataset_enlarge_ratio: 100
    prefetch_mode: ~
  val: {task: SR, name: Set5, type: PairedImageDataset, dataroot_gt: Set5/HR}
network_g: {type: EDSR, num_feat: 8, num_block: 1}
path: {pretrain_network_g: ~, strict_load_g: True, resume_state: ~}
train:
  optim_g: {type: Adam, lr: !!float 2e-4, weight_decay: 0, betas: [0.9, 0.99]}
  scheduler: {type: MultiStepLR, milestones: [250000, 400000], gamma: 0.5}
  total_iter: 500000
  warmup_iter: -1
  pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}
val:
  val_freq: !!float 5e3
  save_img: False
  metrics: {psnr: {type: calculate_psnr, crop_border: 4, test_y_channel: True}}
logger:
  print_freq: 100
  save_checkpoint_freq: !!float 5e4
  use_tb_logger: True
  wandb: {project: ~, resume_id: ~}
dist_params: {backend: nccl, port: 29600}
"""


@pytest.mark.parametrize("kind", ["CATModle", "SwinIRModel", "SRModel"])
@pytest.mark.parametrize("gpus", [1, 2, 4, "auto"])
def test_files_of_the_authors_and_of_basicsr_parse(kind, gpus):
    c = config.parse(yaml.safe_load(AUTHORS) | {"model_type": kind, "num_gpu": gpus})
    assert (c.scale, c.manual_seed, c.train_data.batch_size_per_gpu) == (4, 10, 8)
    assert c.milestones == [250_000, 400_000] and c.train_data.filename_tmpl == "{}x4"
    assert c.unused_keys() == ["dist_params"]
