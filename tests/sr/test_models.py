"""The networks: their options, states, copies, errors and configurations."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from issp import models
from issp.nn.pixel_shuffle import PixelShuffle
from issp.sr.models import SwinIR
from issp.sr.models.layers import DropPath, merge, partition, shift_mask
from tests.sr.networks import (
    SMALL,
    build_on_meta,
    every_small,
    small_cat,
    small_edsr,
    small_swinir,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["pixelshuffle", "pixelshuffledirect", "nearest+conv", ""])
def test_every_swinir_upsampler(kind):
    scale = 4 if kind else 1
    model = small_swinir(upsampler=kind, upscale=4).eval()
    assert model.scale == scale
    assert model(torch.rand(2, 3, 16, 24)).shape == (2, 3, 16 * scale, 24 * scale)


def test_swinir_for_real_photographs_x2_has_one_step():
    """As the authors' 003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x2_GAN.pth."""
    model = small_swinir(upsampler="nearest+conv", upscale=2).eval()
    assert [k for k in model.state_dict() if "conv_up" in k] == ["conv_up1.weight", "conv_up1.bias"]
    x = torch.rand(1, 3, 16, 24)
    assert model(x).shape == (1, 3, 32, 48)
    with torch.no_grad():
        model.conv_up1.weight.zero_()
        model.conv_up1.bias.zero_()
        y = model(x)
    # Nothing comes through the only step: what remains is constant but for the borders.
    assert torch.equal(y[..., 4:-4, 4:-4], y[..., 4:5, 4:5].expand(1, 3, 24, 40))


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_edsr_scales(scale):
    assert small_edsr(upscale=scale)(torch.rand(1, 3, 5, 7)).shape == (1, 3, 5 * scale, 7 * scale)


@every_small
def test_one_channel(make):
    extra = {"num_in_ch": 1, "num_out_ch": 1, "rgb_mean": [0.5]} if make is small_edsr else None
    model = make(**(extra or {"in_chans": 1}))
    assert model(torch.rand(1, 1, 16, 16)).shape == (1, 1, 32, 32)


@every_small
def test_mean_and_range_are_undone(make):
    model = make(img_range=255.0).eval()
    last = model.upsample[0] if make is small_swinir else model.conv_last
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, 51.0)
    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
    y = model(torch.rand(1, 3, 16, 16))
    torch.testing.assert_close(y, (51.0 / 255 + mean).expand_as(y))


@pytest.mark.parametrize("make", [small_swinir, small_cat], ids=lambda f: f.__name__)
def test_three_conv_residual_has_the_published_keys(make):
    model = make(resi_connection="3conv")
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    dim = model.config["embed_dim"]
    for prefix in ("layers.0.conv", "conv_after_body"):
        assert shapes[f"{prefix}.0.weight"] == (dim // 4, dim, 3, 3)
        assert shapes[f"{prefix}.2.weight"] == (dim // 4, dim // 4, 1, 1)
        assert shapes[f"{prefix}.4.weight"] == (dim, dim // 4, 3, 3)
    assert model(torch.rand(1, 3, 16, 16)).shape == (1, 3, 32, 32)


def test_absolute_position_embedding_ties_the_size():
    model = small_swinir(ape=True)
    assert model.state_dict()["absolute_pos_embed"].shape == (1, 256, 16)
    model(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="ape=True works at its img_size"):
        model(torch.rand(1, 3, 24, 16))


def test_window_as_large_as_the_image_is_not_shifted():
    model = small_swinir(img_size=8)
    assert not [k for k in model.state_dict() if "attn_mask" in k]
    assert model.pad_multiple == 8


def test_partition_and_merge_are_inverse():
    x = torch.arange(2 * 8 * 12 * 3.0).reshape(2, 8, 12, 3)
    windows = partition(x, (4, 6))
    assert windows.shape == (2, 4, 24, 3)
    assert torch.equal(windows[1, 3, 23], x[1, 7, 11])
    assert torch.equal(windows[0, 1, 7], x[0, 1, 7])
    assert torch.equal(merge(windows, (4, 6), (8, 12)), x)


def test_shift_mask_separates_opposite_borders_only():
    mask = shift_mask((4, 4), (2, 2), (1, 1))
    assert mask.shape == (4, 4, 4)
    assert torch.equal(mask[0], torch.zeros(4, 4))
    # Right-hand window: its second column comes from the left border.
    apart = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]])
    assert torch.equal(mask[1], -100.0 * apart)
    # Corner: four regions, none of which sees another.
    assert torch.equal(mask[3], -100.0 * (1.0 - torch.eye(4)))


@pytest.mark.parametrize("make", SMALL[1:], ids=lambda f: f.__name__)
def test_masks_made_for_a_size_equal_the_stored_ones(make):
    small, large = make(img_size=16), make(img_size=32)
    weights = {k: v for k, v in small.state_dict().items() if "attn_mask" not in k}
    large.load_state_dict(weights, strict=False)
    small.eval(), large.eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(small(x), large(x))


@pytest.mark.parametrize("make", SMALL[1:], ids=lambda f: f.__name__)
def test_both_attention_paths_agree(make):
    model, x = make().eval(), torch.rand(2, 3, 16, 32)
    with torch.no_grad():
        fused = model(x)
    torch.testing.assert_close(fused, model(x).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "shape, order",
    [
        *(((2, 18, 5, 7), order) for order in (torch.contiguous_format, torch.channels_last)),
        *(((1, 9, 1, 1), order) for order in (torch.contiguous_format, torch.channels_last)),
        ((0, 9, 4, 4), torch.contiguous_format),
        ((18, 5, 7), torch.contiguous_format),
    ],
)
def test_pixel_shuffle_is_torchs(shape, order):
    x = torch.randn(shape).to(memory_format=order).requires_grad_()
    expected, y = nn.PixelShuffle(3)(x), PixelShuffle(3)(x)
    assert torch.equal(y, expected) and y.is_contiguous(memory_format=order)
    if x.numel():  # torch's pixel_shuffle has no backward for an empty batch
        upstream = torch.randn_like(y)
        (actual,) = torch.autograd.grad(y, x, upstream)
        assert torch.equal(actual, torch.autograd.grad(expected, x, upstream)[0])


def test_pixel_shuffle_refuses_channels_that_do_not_divide():
    with pytest.raises(RuntimeError, match="divisible"):
        PixelShuffle(2)(torch.randn(1, 6, 4, 4))


def test_drop_path_drops_whole_samples_in_training_only():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(y[:, :1, :1].expand_as(y), y)
    assert (y[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert drop.eval()(x) is x


def test_stochastic_depth_grows_linearly_and_is_on_in_training():
    model = build_on_meta("swinir-light", 2)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx(torch.linspace(0, 0.1, 24).tolist())
    small = small_swinir(drop_path_rate=0.9)
    x = torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(small(x), small(x))
        small.eval()
        assert torch.equal(small(x), small(x))


def test_transformer_initialisation():
    torch.manual_seed(0)
    model = models.build("swinir-light", 4)
    fc1 = model.layers[0].residual_group["blocks"][0].mlp.fc1
    assert fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not fc1.bias.any()
    assert model.norm.weight.eq(1).all() and not model.norm.bias.any()
    table = model.layers[0].residual_group["blocks"][0].attn.relative_position_bias_table
    assert table.std().item() == pytest.approx(0.02, rel=0.1)
    # PyTorch's default for a convolution: uniform within 1 / sqrt(fan in).
    bound = (60 * 9) ** -0.5
    assert 0.99 * bound < model.conv_after_body.weight.abs().max().item() <= bound


@every_small
def test_every_parameter_gets_a_gradient(make):
    model = make()
    model(torch.rand(2, 3, 16, 24)).square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing


@every_small
def test_checkpointed_training_gives_the_same_gradients(make):
    if make is small_edsr:
        model = twin = make()
    else:
        name = "use_checkpoint" if make is small_swinir else "use_chk"
        model, twin = make(drop_path_rate=0.0), make(drop_path_rate=0.0, **{name: True})
        twin.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 16, 16)
    grads = []
    for net in (model, twin):
        net.zero_grad()
        net(x).square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@every_small
def test_copies_work_alone(make):
    model = make().eval()
    x = torch.rand(1, 3, 16, 24)
    model(x).mean().backward()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), model(x))
        assert (clone.config, clone.arch, clone.scale) == (model.config, model.arch, 2)


@every_small
def test_meta_build_then_load_is_the_same_network(make):
    model = make().eval()
    with torch.device("meta"):
        twin = make().eval()
    twin.to_empty(device="cpu").load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(twin(x), model(x))


@every_small
def test_compiles_without_graph_breaks(make):
    model = make().eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)


# Errors


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: models.build("swinir-lite", 4), ValueError, "did you mean 'swinir-light'"),
        (lambda: models.build("edsr_l", 4), ValueError, "did you mean 'edsr-l'"),
        (lambda: models.build("edsr-l", 5), ValueError, "must be 2, 3 or 4"),
        (lambda: models.build("edsr-tiny", 2, num_feats=4), TypeError, "did you mean 'num_feat'"),
        (lambda: models.build("edsr-tiny", 2, upscale=4), TypeError, "scale=4"),
        (lambda: SwinIR(window=8), TypeError, "did you mean 'window_size'"),
        (lambda: models.from_config({"upscale": 2}), ValueError, "no 'type'"),
        (lambda: models.from_config("edsr-l"), TypeError, "must be a dict"),
        (lambda: models.from_config({"type": "SwinIr"}), ValueError, "did you mean 'SwinIR'"),
        (
            lambda: models.from_config({"type": "CAT", "depths": [2]}),
            ValueError,
            "did you mean 'depth'",
        ),
        (lambda: small_edsr(upscale=5), ValueError, "power of two or 3"),
        (lambda: small_edsr(num_out_ch=1), ValueError, "must equal num_in_ch"),
        (lambda: small_edsr(num_in_ch=1, num_out_ch=1), ValueError, "one mean per input channel"),
        (lambda: small_swinir(upsampler="pixelshufle"), ValueError, "'pixelshuffle'"),
        (lambda: small_swinir(upsampler="nearest+conv", upscale=3), ValueError, "2 and 4, not 3"),
        (lambda: small_swinir(resi_connection="2conv"), ValueError, "did you mean '[13]conv'"),
        (lambda: small_swinir(img_size=20), ValueError, "multiple of window_size 8"),
        (lambda: small_swinir(embed_dim=15), ValueError, "divisible by num_heads 2"),
        (lambda: small_swinir(patch_size=2), ValueError, "patch_size 1 only"),
        (lambda: small_swinir(norm_layer=nn.BatchNorm2d), ValueError, "torch.nn.LayerNorm"),
        (lambda: small_swinir(depths=[2, 2]), ValueError, "one entry per group"),
        (lambda: small_swinir(drop_path_rate=2), ValueError, "drop_path_rate is 2: .* below 1"),
        (lambda: small_cat(drop_path_rate=-0.1), ValueError, "drop_path_rate is -0.1: it must be"),
        (lambda: small_swinir(mlp_ratio=0.01), ValueError, "mlp_ratio is 0.01: of 16 channels"),
        (lambda: small_cat(mlp_ratio=-1), ValueError, "mlp_ratio is -1: of .* it leaves none"),
        (lambda: small_cat(num_heads=[3]), ValueError, "must be even"),
        (lambda: small_cat(block_name="regular"), ValueError, "did you mean 'CATB_regular'"),
        (lambda: small_cat(split_size_1=[0]), ValueError, "split_size_0 and split_size_1"),
        (lambda: small_cat(img_size=9), ValueError, "img_size 9 must be a multiple of split sizes"),
        (lambda: small_cat(embed_dim=16), ValueError, "at least 32"),
        (lambda: small_cat(upsampler="nearest+conv"), ValueError, "unknown upsampler"),
    ],
)
def test_construction_errors_name_the_remedy(call, error, words):
    with pytest.raises(error, match=words):
        call()


@every_small
def test_input_errors(make):
    model = make()
    for shape in ((3, 16, 16), (1, 4, 16, 16)):
        with pytest.raises(ValueError, match="takes images"):
            model(torch.rand(shape))
    if model.pad_multiple > 1:
        with pytest.raises(ValueError, match="issp.models.upscale"):
            model(torch.rand(1, 3, 16, 17))


# Configurations


@every_small
def test_config_rebuilds_the_network(make):
    model = make().eval()
    config = json.loads(json.dumps(model.config))
    twin = models.from_config(config).eval()
    assert config == json.loads(json.dumps(model.config)) == twin.config
    twin.load_state_dict(model.state_dict(), strict=True)
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(twin(x), model(x))


def test_config_of_tuples_and_positions():
    model = SwinIR((16, 24), 1, depths=(2,), num_heads=(2,), embed_dim=8, window_size=8)
    assert model.config["img_size"] == [16, 24]
    assert model.config["depths"] == [2]
    assert "norm_layer" not in model.config
    assert models.from_config(model.config).img_size == (16, 24)


@pytest.mark.parametrize("name", models.names())
def test_every_preset_records_its_name_scale_and_config(name):
    model = build_on_meta(name, 3)
    assert (model.arch, model.scale, model.config["upscale"]) == (name, 3, 3)
    json.dumps(model.config)


def test_overrides_do_not_leak_into_the_preset():
    small = models.build("edsr-tiny", 2, num_block=1)
    assert small.config["num_block"] == 1
    assert models.build("edsr-tiny", 2).config["num_block"] == 8


def test_basicsr_network_g():
    network_g = {
        "type": "SwinIR",
        "upscale": 4,
        "in_chans": 3,
        "img_size": 64,
        "window_size": 8,
        "img_range": 1.0,
        "depths": [6, 6, 6, 6],
        "embed_dim": 60,
        "num_heads": [6, 6, 6, 6],
        "mlp_ratio": 2,
        "upsampler": "pixelshuffledirect",
        "resi_connection": "1conv",
    }
    before = dict(network_g)
    with torch.device("meta"):
        model = models.from_config(network_g)
    assert network_g == before
    assert list(model.state_dict()) == list(build_on_meta("swinir-light", 4).state_dict())
