"""The networks: equal to the published ones, with their exact counts and layers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from issp import models
from issp.sr.shapes import prunable_shapes
from tests.sr.networks import build_on_meta

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
GOLDEN_FILES = {
    "arch_edsr_x4": "EDSR",
    "arch_swinir_x4": "SwinIR",
    "arch_swinir_x2_24x40": "SwinIR",
    "arch_cat_x4": "CAT",
}


def load_golden(name):
    path = GOLDEN / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"golden file {path} is not on this machine")
    data = np.load(path)
    config = {"type": GOLDEN_FILES[name], **json.loads(str(data["config"]))}
    state = {k[3:]: torch.from_numpy(data[k]) for k in data.files if k.startswith("sd.")}
    return config, state, torch.from_numpy(data["x"]), torch.from_numpy(data["y"])


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "no_grad"])
@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_output_equals_published_network(name, grad):
    config, state, x, y = load_golden(name)
    model = models.from_config(config).eval()
    model.load_state_dict(state, strict=True)
    # The two modes take different attention kernels.
    with torch.set_grad_enabled(grad):
        out = model(x)
    assert (out.detach() - y).abs().max().item() <= 1e-5


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_fresh_state_dict_has_the_published_order_shapes_and_buffers(name):
    config, state, _, _ = load_golden(name)
    model = models.from_config(config)
    actual = model.state_dict()
    assert list(actual) == list(state)
    assert {k: v.shape for k, v in actual.items()} == {k: v.shape for k, v in state.items()}
    for key, _ in model.named_buffers():
        assert torch.equal(actual[key], state[key]), key


# docs/method.md, section 5: parameters, prunable layers, their weights, state_dict entries.
COUNTS = [
    ("edsr-l", 2, 40_729_603, 68, 40_711_680, 136),
    ("edsr-l", 3, 43_680_003, 68, 43_660_800, 136),
    ("edsr-l", 4, 43_089_923, 69, 43_070_976, 138),
    ("swinir-light", 2, 910_152, 103, 861_300, 366),
    ("swinir-light", 3, 918_267, 103, 869_400, 366),
    ("swinir-light", 4, 929_628, 103, 880_740, 366),
    ("cat-r", 2, 16_456_103, 479, 16_359_444, 1718),
    ("cat-r", 3, 16_640_743, 479, 16_543_764, 1718),
    ("cat-r", 4, 16_603_815, 480, 16_506_900, 1720),
    ("edsr-baseline", 4, 1_517_571, 37, 1_514_880, 74),
]


@pytest.mark.parametrize("name, scale, params, layers, weights, entries", COUNTS)
def test_counts(name, scale, params, layers, weights, entries):
    model = build_on_meta(name, scale)
    shapes = prunable_shapes(name, scale)
    assert sum(p.numel() for p in model.parameters()) == params
    assert (len(shapes), sum(map(math.prod, shapes))) == (layers, weights)
    assert len(model.state_dict()) == entries


LAYER_TABLES = {
    "swinir-light": {
        (60, 3, 3, 3): 1,
        (180, 60): 24,
        (60, 60): 24,
        (120, 60): 24,
        (60, 120): 24,
        (60, 60, 3, 3): 5,
        (48, 60, 3, 3): 1,
    },
    "edsr-l": {
        (256, 3, 3, 3): 1,
        (256, 256, 3, 3): 65,
        (1024, 256, 3, 3): 2,
        (3, 256, 3, 3): 1,
    },
    "cat-r": {
        (180, 3, 3, 3): 1,
        (540, 180): 36,
        (180, 180): 36,
        (5, 2): 72,
        (5, 5): 144,
        (3, 5): 72,
        (720, 180): 36,
        (180, 720): 36,
        (180, 1, 3, 3): 36,
        (180, 180, 3, 3): 7,
        (64, 180, 3, 3): 1,
        (256, 64, 3, 3): 2,
        (3, 64, 3, 3): 1,
    },
}


@pytest.mark.parametrize("name", LAYER_TABLES)
def test_layer_table(name):
    shapes = prunable_shapes(name, 4)
    assert {shape: shapes.count(shape) for shape in shapes} == LAYER_TABLES[name]


def test_layer_order_of_swinir_is_the_one_the_paper_indexes():
    modules = build_on_meta("swinir-light", 4).named_modules()
    names = [name for name, module in modules if isinstance(module, nn.Conv2d | nn.Linear)]
    assert names[0] == "conv_first"
    group = "layers.1.residual_group.blocks.2"
    assert names[35:37] == [f"{group}.attn.proj", f"{group}.mlp.fc1"]
    assert names[79:81] == [
        "layers.3.residual_group.blocks.0.mlp.fc2",
        "layers.3.residual_group.blocks.1.attn.qkv",
    ]
