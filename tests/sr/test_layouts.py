"""Where published data sets keep their pairs, and what must not be taken for an original."""

import numpy as np
import pytest
from PIL import Image

from issp import data


def picture(height, width, seed):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(levels).resize((width, height)))


def fill(folder, hr_form, lr_form, names=("a", "b"), scale=2, size=(24, 32)):
    """Originals, and LR files that are not those that would be made: their negatives."""
    for seed, name in enumerate(names):
        hr = picture(*size, seed)
        data.write_image(folder / f"{hr_form.format(name)}.png", hr)
        if lr_form:
            low = 255 - data.imresize(hr, 1 / scale)
            data.write_image(folder / f"{lr_form.format(name)}.png", low)
    return folder


def assert_read(pairs, names=("a", "b")):
    """The LR files were read, not made, and belong to their originals."""
    assert pairs.names == list(names) and pairs.lr_files is not None
    for i in range(len(pairs)):
        lr, hr = pairs.load(i)
        assert np.array_equal(lr, 255 - data.imresize(hr, 1 / pairs.scale))
    assert pairs.sizes() == [(24, 32)] * len(names)


PUBLISHED = [
    ("{}_SRF_2_HR", "{}_SRF_2_LR", ["img_001_SRF_2", "img_002_SRF_2"]),  # Urban100
    ("{}_HR", "{}_LR", ["baby", "bird"]),
    ("{}_HR", "{}_LR2", ["Canon_001", "Canon_002"]),  # RealSR
    ("{}", "{}x2", ["0801", "0802"]),  # DIV2K, in one folder
    ("{}", "{}_LRBI_x2", ["a", "b"]),
    ("{}_HR", "{}x2", ["a", "b"]),
    ("{}_HR_x2", "{}_LRBI_x2", ["baby", "bird"]),  # RCAN
    ("{}", "{}_bicLRx2", ["a", "b"]),
]


@pytest.mark.parametrize("hr_form,lr_form,names", PUBLISHED)
def test_both_kinds_in_one_folder(tmp_path, hr_form, lr_form, names):
    bases = [name.removesuffix("_SRF_2") for name in names]
    fill(tmp_path, hr_form, lr_form, bases)
    assert_read(data.PairedFolder(tmp_path, 2, cache_dir=False), names)
    assert_read(data.PairedFolder(tmp_path, 2, filename_tmpl="{}", cache_dir=False), names)


def test_urban100_is_found_by_its_folder_and_scale(tmp_path):
    fill(tmp_path / "image_SRF_2", "{}_SRF_2_HR", "{}_SRF_2_LR", ["img_001"])
    fill(tmp_path / "image_SRF_4", "{}_SRF_4_HR", "{}_SRF_4_LR", ["img_001"], scale=4)
    for scale in (2, 4):
        pairs = data.PairedFolder(tmp_path, scale, cache_dir=False)
        assert_read(pairs, [f"img_001_SRF_{scale}"])
    wrong = data.PairedFolder(tmp_path / "image_SRF_2", 4, cache_dir=False)
    for call in (wrong.sizes, lambda: wrong.load(0)):
        with pytest.raises(ValueError, match=r"SRF_2_LR.png is 16 x 12 pixels but 8 x 6 belong"):
            call()


def test_results_of_methods_are_no_originals(tmp_path):
    fill(tmp_path, "{}_HR", "{}_LR")
    for method in ("bicubic", "SRCNN", "A+"):
        fill(tmp_path, f"{{}}_{method}", None)
    assert_read(data.PairedFolder(tmp_path, 2, cache_dir=False))
    fill(tmp_path, "{}", None, ["photo"])
    with pytest.raises(ValueError, match=r"low-resolution images \(a_LR\), but none for photo.png"):
        data.PairedFolder(tmp_path, 2)


def test_a_pair_that_is_not_complete_is_named(tmp_path):
    fill(tmp_path, "{}_HR", "{}_LR")
    (tmp_path / "b_LR.png").unlink()
    with pytest.raises(ValueError, match="but none for b_HR.png: add it, or move them"):
        data.PairedFolder(tmp_path, 2)
    fill(tmp_path / "div", "{}", "{}x2")
    fill(tmp_path / "div", "{}", "{}x4", ["a"], scale=4)
    with pytest.raises(FileNotFoundError, match="no file bx4 .1 of 2 pairs"):
        data.PairedFolder(tmp_path / "div", 4)


def test_lr_files_of_other_scales_are_neither_originals_nor_used(tmp_path):
    fill(tmp_path, "{}", "{}x2")
    pairs = data.PairedFolder(tmp_path, 4, cache_dir=False)
    assert pairs.names == ["a", "b"] and pairs.lr_files is None
    lr, hr = pairs.load(1)
    assert np.array_equal(lr, data.imresize(hr, 1 / 4))


def test_names_that_only_look_like_it_are_originals(tmp_path):
    fill(tmp_path, "{}", None, ["grid3x3", "poster_LR", "scan_HR", "x2"])
    pairs = data.PairedFolder(tmp_path, 2)
    assert pairs.names == ["grid3x3", "poster_LR", "scan_HR", "x2"] and pairs.lr_files is None


def test_templates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = fill(tmp_path / "one", "{}_clean", "{}_small")
    options = {"scale": 2, "cache_dir": False}
    assert_read(data.PairedFolder(one / "{}_clean", lq_root="{}_small", **options))
    assert_read(data.PairedFolder(one / "{}_clean.png", lq_root="one/{}_small.png", **options))
    assert_read(data.PairedFolder("one/{}_clean", filename_tmpl="{}_small", **options))
    fill(tmp_path / "two", "GT/{}_HR", "small/of2/{}x2")
    for lq in ("two/small/of2", "two/small/of{s}/{}x{s}"):
        pairs = data.PairedFolder("two/GT", lq_root=lq, **options)
        assert_read(pairs, ["a_HR", "b_HR"])
    fill(tmp_path / "rcan", "HR/Set5/x2/{}_HR_x2", "LR/LRBI/Set5/x2/{}_LRBI_x2")
    pairs = data.PairedFolder("rcan/HR/Set5/x2", lq_root="rcan/LR/LRBI/Set5/x2", **options)
    assert_read(pairs, ["a_HR_x2", "b_HR_x2"])
    with pytest.raises(FileNotFoundError, match="has no file a_tiny .2 of 2.*--lr-images"):
        data.PairedFolder(one / "{}_clean", lq_root="{}_tiny", **options)
    with pytest.raises(ValueError, match=r"has no image \{\}_dirty; it holds a_clean.png"):
        data.PairedFolder(one / "{}_dirty", **options)
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere for low-resolution"):
        data.PairedFolder("two/GT", lq_root="nowhere/{}", **options)


@pytest.mark.parametrize(
    "inner",
    ["LR_bicubic/X2", "lr", "DIV2K_valid_LR_bicubic/X2", "LRbicx2", "Set5_LR", "Set5_LR_x2"]
    + ["DIV2K_train_LR_unknown/X2", "DIV2K_train_LR_mild", "LRBI", "lq_x4", "B100_LQ"],
)
def test_low_resolution_folders_are_no_originals(tmp_path, inner):
    fill(tmp_path / inner, "{}", None)
    with pytest.raises(ValueError, match="is a folder of low-resolution images by its name"):
        data.PairedFolder(tmp_path / inner, 2)


def test_two_published_folders_are_ambiguous(tmp_path):
    for split in ("train", "valid"):
        fill(tmp_path / f"DIV2K_{split}_HR", "{}", None)
    with pytest.raises(ValueError, match="DIV2K_train_HR and DIV2K_valid_HR; name the one to use"):
        data.PairedFolder(tmp_path, 2)


def test_a_published_folder_beside_lr_files_that_are_named(tmp_path):
    fill(tmp_path / "DIV2K_valid_HR", "{}", None)
    for seed, name in enumerate("ab"):
        low = 255 - data.imresize(picture(24, 32, seed), 1 / 2)
        data.write_image(tmp_path / "DIV2K_valid_LR_unknown" / "X2" / f"{name}x2.png", low)
    assert_read(data.PairedFolder(tmp_path, 2, tmp_path / "DIV2K_valid_LR_unknown"))
    assert data.PairedFolder(tmp_path, 2).lr_source == "made"


def test_stray_files_do_not_make_an_lr_folder(tmp_path):
    fill(tmp_path / "HR", "{}", None)
    fill(tmp_path / "LR_bicubic" / "X2", "{}x2", None, size=(12, 16))
    (tmp_path / "LR_bicubic" / ".DS_Store").write_bytes(b"")
    (tmp_path / "LR_bicubic" / "readme.txt").write_bytes(b"")
    assert data.PairedFolder(tmp_path, 4).lr_files is None
    assert data.PairedFolder(tmp_path, 2).lr_files is not None


def test_kinds_of_files_within_a_pair(tmp_path):
    """Grey beside colour, 16 bit beside 8, JPEG beside PNG."""
    hr = picture(24, 32, 0)
    grey = np.repeat(hr[:, :, :1], 3, axis=2)
    (tmp_path / "HR").mkdir(), (tmp_path / "LR").mkdir()
    Image.fromarray(hr[:, :, 0].astype(np.uint16) * 256 + 7).save(tmp_path / "HR" / "a.png")
    low = data.imresize(grey, 1 / 2)
    Image.fromarray(low).save(tmp_path / "LR" / "a.tif")
    pairs = data.PairedFolder(tmp_path, 2)
    assert np.array_equal(pairs.load(0)[0], low) and np.array_equal(pairs.load(0)[1], grey)
    assert pairs.sizes() == [(24, 32)]


def test_prepare_leaves_out_low_resolution_images(tmp_path):
    fill(tmp_path / "div", "{}", "{}x2")
    result = data.prepare(tmp_path / "div", tmp_path / "out", scales=(2,))
    assert result.sources == 2
    made = data.PairedFolder(tmp_path / "out", 2)
    assert made.names == ["a", "b"]
    lr, hr = made.load(0)
    assert np.array_equal(lr, data.imresize(hr, 1 / 2))


def test_a_template_that_names_the_originals_themselves_is_refused(tmp_path):
    """BasicSR's default `filename_tmpl: '{}'` asks for nothing; --lr-images '{}' does."""
    data.write_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="template {} of low-resolution files names the originals"):
        data.PairedFolder(tmp_path, 2, "{}")
