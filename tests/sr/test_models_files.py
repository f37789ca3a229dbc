"""State dicts of other image sizes, or without buffers that follow from the sizes, load equal."""

import pytest
import torch

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
