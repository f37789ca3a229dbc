"""State dicts of other image sizes, or without buffers that follow from the sizes, load equal."""

import pytest
import torch

from issp import models
from tests.sr.networks import small_cat, small_cat_axial, small_swinir

pytestmark = pytest.mark.usefixtures("one_thread")

DERIVED = ("attn_mask", "attn_mask_0", "attn_mask_1", "rpe_biases", "relative_position_index")
every_transformer = pytest.mark.parametrize(
    "make", [small_swinir, small_cat, small_cat_axial], ids=lambda f: f.__name__
)


def is_derived(key):
    return key.rpartition(".")[2] in DERIVED


def assert_computes_the_same(model, other):
    for side in (16, 24, 32):  # the image sizes of both, and one of neither
        x = torch.rand(1, 3, side, side)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), other.eval()(x))


@every_transformer
@pytest.mark.parametrize("there, here", [(16, 24), (32, 16)])
def test_a_state_dict_of_another_image_size_computes_the_same(make, there, here):
    saved, model = make(img_size=there), make(img_size=here)
    state = saved.state_dict()
    shapes = {k: v.shape for k, v in state.items()}
    assert any(shapes[k] != v.shape for k, v in model.state_dict().items())
    model.load_state_dict(state)
    assert_computes_the_same(model, saved)
    assert {k: v.shape for k, v in state.items()} == shapes  # the caller's own


@every_transformer
def test_derived_buffers_may_be_absent(make):
    saved, model = make(), make()
    state = {k: v for k, v in saved.state_dict().items() if not is_derived(k)}
    assert len(state) < len(saved.state_dict()) or make is small_cat_axial
    model.load_state_dict(state)
    assert_computes_the_same(model, saved)


@every_transformer
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "to_empty"])
def test_a_network_from_the_meta_device_gets_its_buffers(make, assign):
    saved = make()
    with torch.device("meta"):
        model = make()
    if not assign:
        model.to_empty(device="cpu")
    state = {k: v for k, v in saved.state_dict().items() if not is_derived(k)}
    model.load_state_dict(state, assign=assign)
    assert_computes_the_same(model, saved)


def test_rounded_buffers_agree():
    """As an interpolation of two state dicts leaves them: floats, a little off."""
    saved, model = small_swinir(), small_swinir(img_size=32)
    state = {
        k: v.float() * 0.3 + v.float() * 0.7 if is_derived(k) else v
        for k, v in saved.state_dict().items()
    }
    model.load_state_dict(state)
    assert_computes_the_same(model, saved)


def test_a_rectangular_image_size_agrees():
    saved, model = small_swinir(img_size=(16, 40)), small_swinir(img_size=24)
    model.load_state_dict(saved.state_dict())
    assert_computes_the_same(model, saved)


@pytest.mark.parametrize(
    "saved, model, key",
    [
        (small_cat(split_size_0=[8], split_size_1=[4]), small_cat(), "rpe_biases|attn_mask_0"),
        (small_cat(split_size_0=[4], split_size_1=[4]), small_cat(), "rpe_biases|attn_mask_0"),
        (small_cat_axial(split_size_0=[8]), small_cat_axial(), "attn_mask_0"),
    ],
    ids=["turned", "square", "axial"],
)
def test_other_windows_are_refused(saved, model, key):
    """No weight of CAT depends on its windows: only these buffers tell."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shapes = {k: v.shape for k, v in saved.state_dict().items() if not is_derived(k)}
    assert shapes == {k: v.shape for k, v in before.items() if not is_derived(k)}
    with pytest.raises(RuntimeError, match=f"({key}) belongs to other window sizes"):
        model.load_state_dict(saved.state_dict())


def test_a_network_without_shifts_does_not_take_one_with_them():
    with pytest.raises(RuntimeError, match="Unexpected.*blocks.1.attn_mask"):
        small_swinir(img_size=8).load_state_dict(small_swinir(img_size=16).state_dict())


# network_g of options that XPixelGroup/BasicSR, JingyunLiang/SwinIR and zhengchen1999/CAT publish.
PUBLISHED_OPTIONS = {
    "EDSR_Mx4": {
        **{"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_block": 16},
        **{"upscale": 4, "res_scale": 1, "img_range": 255.0, "rgb_mean": [0.4488, 0.4371, 0.4040]},
    },
    "SwinIR_SRx4": {
        **{"type": "SwinIR", "upscale": 4, "in_chans": 3, "img_size": 48, "window_size": 8},
        **{"img_range": 1.0, "depths": [6] * 6, "embed_dim": 180, "num_heads": [6] * 6},
        **{"mlp_ratio": 2, "upsampler": "pixelshuffle", "resi_connection": "1conv"},
    },
    "SwinIR_gray_dn": {
        **{"type": "SwinIR", "upscale": 1, "in_chans": 1, "img_size": 128, "window_size": 8},
        **{"img_range": 1.0, "depths": [6] * 6, "embed_dim": 180, "num_heads": [6] * 6},
        **{"mlp_ratio": 2, "upsampler": "", "resi_connection": "1conv"},
    },
    "SwinIR_real_L": {
        **{"type": "SwinIR", "upscale": 4, "in_chans": 3, "img_size": 64, "window_size": 8},
        **{"img_range": 1.0, "depths": [6] * 9, "embed_dim": 240, "num_heads": [8] * 9},
        **{"mlp_ratio": 2, "upsampler": "nearest+conv", "resi_connection": "3conv"},
    },
    "CAT_A_2_x3": {
        **{"type": "CAT", "upscale": 3, "in_chans": 3, "img_size": 64, "img_range": 1.0},
        **{"split_size_0": [4] * 6, "split_size_1": [0] * 6, "depth": [6] * 6, "embed_dim": 180},
        **{"num_heads": [6] * 6, "mlp_ratio": 4, "resi_connection": "1conv"},
        **{"block_name": "CATB_axial", "upsampler": "pixelshuffle"},
    },
}


# Their papers give 1.5, 11.9, 28.0 and 16.6 million.
PARAMETERS = {
    "EDSR_Mx4": 1_517_571,
    "SwinIR_SRx4": 11_900_199,
    "SwinIR_gray_dn": 11_497_681,
    "SwinIR_real_L": 28_013_059,
    "CAT_A_2_x3": 16_640_743,
}


@pytest.mark.parametrize("name", PUBLISHED_OPTIONS)
def test_published_options_make_the_published_network(name):
    with torch.device("meta"):
        model = models.from_config(PUBLISHED_OPTIONS[name])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def shortened(network_g):
    """The options with one group of two blocks."""
    lists = {key: value[:1] for key, value in network_g.items() if isinstance(value, list)}
    lists |= {key: [2] for key in ("depths", "depth") if key in network_g}
    lists |= {key: network_g[key] for key in ("rgb_mean",) if key in network_g}
    return {**network_g, **lists, **({"num_block": 1} if "num_block" in network_g else {})}


@pytest.mark.parametrize("name", [n for n, g in PUBLISHED_OPTIONS.items() if g["upscale"] > 1])
def test_the_driver_loads_a_file_of_the_published_network(name, tmp_path):
    pytest.importorskip("pydantic", reason="it checks the configuration")
    from issp import builders, config

    network_g = shortened(PUBLISHED_OPTIONS[name])
    trained = {**network_g, "img_size": 16} if "img_size" in network_g else network_g
    saved = models.from_config(trained).eval()
    state = {f"module.{key}": value for key, value in saved.state_dict().items()}
    torch.save({"params": state}, tmp_path / "net_g.pth")
    tree = {
        "name": "run",
        "scale": network_g["upscale"],
        "network_g": network_g,
        "datasets": {"train": {"type": "SamplePhotographs"}},
        "train": {"total_iter": 1},
        "path": {"pretrain_network_g": str(tmp_path / "net_g.pth"), "strict_load_g": True},
    }
    model = builders.network(config.parse(tree)).eval()
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(x), saved(x))
