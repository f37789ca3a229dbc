"""imresize against MATLAB's files and an exact reference; image files, pairs and the LR cache."""

import io
import os
import threading
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from issp import data
from tests.utils.disk import full_disk

SET5 = Path(__file__).parents[3] / "shared" / "data" / "benchmarks" / "Set5"
needs_set5 = pytest.mark.skipif(not SET5.is_dir(), reason=f"golden images are not at {SET5}")


def photo(height, width, seed=0):
    """A smooth random picture with some noise, [H, W, 3] uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0, 1, (3, 3))]
    img = 127 + 90 * np.stack(waves, axis=2) + rng.normal(0, 20, (height, width, 3))
    return img.clip(0, 255).astype(np.uint8)


def save(path, img):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(img).save(path)
    return path


@pytest.fixture
def hr_folder(tmp_path):
    for i, size in enumerate([(50, 61), (64, 48), (49, 49)]):
        save(tmp_path / "set" / f"{i:04d}.png", photo(*size, seed=i))
    return tmp_path / "set"


def exact_pass(column, scale, border):
    """One pass over a list of integers in exact rational arithmetic."""

    def cubic(x):
        x = abs(x)
        if x <= 1:
            return Fraction(3, 2) * x**3 - Fraction(5, 2) * x**2 + 1
        return -Fraction(1, 2) * x**3 + Fraction(5, 2) * x**2 - 4 * x + 2 if x <= 2 else Fraction(0)

    n, stretch = len(column), min(scale, Fraction(1))
    out = []
    for j in range(1, ceil(n * scale) + 1):
        u = j / scale + Fraction(1, 2) * (1 - 1 / scale)
        total = weights = Fraction(0)
        for i in range(floor(u - 2 / stretch) - 1, ceil(u + 2 / stretch) + 2):
            w = stretch * cubic(stretch * (u - i))
            k = i - 1
            if border == "replicate":
                k = min(max(k, 0), n - 1)
            else:
                k %= 2 * n
                k = k if k < n else 2 * n - 1 - k
            total, weights = total + w * column[k], weights + w
        out.append(min(max(floor(total / weights + Fraction(1, 2)), 0), 255))
    return out


@pytest.mark.parametrize("border", ["symmetric", "replicate"])
@pytest.mark.parametrize("scale", ["1/2", "1/3", "1/4", "2", "3", "4", "2/5", "1"])
def test_imresize_equals_exact_arithmetic(scale, border):
    img = np.random.default_rng(3).choice([0, 9, 128, 255], (9, 7)).astype(np.uint8)
    scale = Fraction(scale)
    rows = np.array([exact_pass(c, scale, border) for c in img.T.tolist()]).T
    want = np.array([exact_pass(r, scale, border) for r in rows.tolist()])
    got = data.imresize(img, scale, border)
    assert got.dtype == np.uint8 and np.array_equal(got, want)
    assert np.array_equal(data.imresize(img, float(scale), border), want)
    colour = data.imresize(np.stack([img, img[::-1], 255 - img], axis=2), scale, border)
    assert np.array_equal(colour[:, :, 0], want)


@needs_set5
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_imresize_equals_matlab_on_set5(scale):
    files = data.list_images(SET5 / "HR")
    assert len(files) == 5
    clamped = 0
    for file in files:
        hr = data.mod_crop(data.read_image(file), scale)
        lr = data.read_image(SET5 / "LR_bicubic" / f"X{scale}" / f"{file.stem}x{scale}.png")
        assert np.array_equal(data.imresize(hr, 1 / scale), lr), file.stem
        clamped += np.count_nonzero(data.imresize(hr, 1 / scale, "replicate") != lr)
    assert clamped > 0  # these files decide which border is MATLAB's


@pytest.mark.parametrize("size,scale,out", [(99, 1 / 3, 33), (100, 1 / 3, 34), (10, 0.1, 1)])
def test_imresize_size_is_the_exact_ceiling(size, scale, out):
    assert data.imresize(np.zeros((size, 2), np.uint8), scale).shape[0] == out


@pytest.mark.parametrize(
    "img,scale,error,word",
    [
        (np.zeros((4, 4), np.float32), 2, TypeError, "float32"),
        ([[1]], 2, TypeError, "list"),
        (np.zeros(4, np.uint8), 2, ValueError, "H, W"),
        (np.zeros((0, 4, 3), np.uint8), 2, ValueError, "non-empty"),
        (np.zeros((4, 4), np.uint8), 0, ValueError, "positive"),
        (np.zeros((4, 4), np.uint8), -0.5, ValueError, "positive"),
        (np.zeros((4, 4), np.uint8), float("nan"), ValueError, "positive"),
        (np.zeros((4, 4), np.uint8), float("inf"), ValueError, "positive"),
    ],
)
def test_imresize_refuses(img, scale, error, word):
    with pytest.raises(error, match=word):
        data.imresize(img, scale)


def test_read_image_rules(tmp_path):
    rgb = photo(9, 11)
    alpha = np.dstack([rgb, np.arange(99, dtype=np.uint8).reshape(9, 11)])
    grey16 = rgb[:, :, 0].astype(np.uint16) * 256 + 77
    paletted = Image.fromarray(rgb).quantize(8)
    assert np.array_equal(data.read_image(save(tmp_path / "rgb.png", rgb)), rgb)
    assert np.array_equal(data.read_image(save(tmp_path / "rgba.png", alpha)), rgb)
    grey = np.repeat(rgb[:, :, :1], 3, axis=2)
    assert np.array_equal(data.read_image(save(tmp_path / "grey.png", rgb[:, :, 0])), grey)
    assert np.array_equal(data.read_image(save(tmp_path / "grey16.png", grey16)), grey)
    assert np.array_equal(data.read_image(save(tmp_path / "la.png", alpha[:, :, [0, 3]])), grey)
    paletted.save(tmp_path / "p.png", transparency=0)
    assert np.array_equal(data.read_image(tmp_path / "p.png"), np.array(paletted.convert("RGB")))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(data.read_image(tmp_path / "turned.png"), np.rot90(rgb, -1))
    assert data.image_size(tmp_path / "turned.png") == (11, 9)
    assert data.image_size(tmp_path / "rgb.png") == (9, 11)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tif"])
@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.7])
def test_damaged_files_name_themselves(tmp_path, suffix, keep):
    buffer = io.BytesIO()
    Image.fromarray(photo(64, 64)).save(buffer, Image.registered_extensions()[suffix])
    whole = buffer.getvalue()
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(ValueError, match=f"broken\\{suffix}") as caught:
        data.read_image(path)
    assert "\n" not in str(caught.value)


def test_read_image_other_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        data.read_image(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="small.png is 5 x 4 .* 8 x 8"):
        data.read_image(save(tmp_path / "small.png", photo(4, 5)), min_side=8)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="float.tif .* 8-bit RGB"):
        data.read_image(tmp_path / "float.tif")


def test_write_image_is_whole_or_absent(tmp_path, monkeypatch):
    img = photo(8, 9)
    data.write_image(tmp_path / "new" / "a.png", img)
    assert np.array_equal(data.read_image(tmp_path / "new" / "a.png"), img)
    before = (tmp_path / "new" / "a.png").read_bytes()
    with open(tmp_path / "new" / "a.png", "rb") as reader:
        data.write_image(tmp_path / "new" / "a.png", img[:, :, 0])
        assert reader.read() == before  # whoever is reading keeps the old file whole
    before = (tmp_path / "new" / "a.png").read_bytes()

    full_disk(monkeypatch)
    with pytest.raises(OSError, match="a.png: No space left"):
        data.write_image(tmp_path / "new" / "a.png", img)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a.png"]
    assert (tmp_path / "new" / "a.png").read_bytes() == before
    with pytest.raises(ValueError, match="suffix"):
        data.write_image(tmp_path / "a.xyz", img)
    with pytest.raises(ValueError, match="4"):
        data.write_image(tmp_path / "a.png", np.zeros((4, 4, 4), np.uint8))


def test_list_images_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        data.list_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="no files"):
        data.list_images(tmp_path)
    (tmp_path / "weights.mat").write_bytes(b"1")
    with pytest.raises(ValueError, match="weights.mat"):
        data.list_images(tmp_path)
    save(tmp_path / "b.png", photo(4, 4))
    save(tmp_path / "a.JPG", photo(4, 4))
    assert [f.name for f in data.list_images(tmp_path)] == ["a.JPG", "b.png"]
    with pytest.raises(ValueError, match="is a file"):
        data.list_images(tmp_path / "b.png")


def test_tensor_conversion_round_trip():
    img = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    tensor = data.to_tensor(img)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert np.array_equal(data.to_image(tensor), img)
    halves = torch.tensor([0.5, 1.5, 2.5, -9.0, 999.0]).div(255).reshape(1, 1, 5)
    assert data.to_image(halves).ravel().tolist() == [0, 2, 2, 0, 255]  # half to even, clamped
    with pytest.raises(ValueError, match="NaN"):
        data.to_image(torch.full((3, 2, 2), float("nan")))


LAYOUTS = [
    ("HR", "LR_bicubic/X4", "{}", "{}x4"),
    ("hr", "lr", "{}", "{}"),
    ("HR", "LR_bicubic/X4", "{}", "{}_LRBI_x4"),
    ("DIV2K_train_HR", "DIV2K_train_LR_bicubic/X4", "{}", "{}x4"),
    ("GTmod12", "LRbicx4", "{}", "{}"),
]


@pytest.mark.parametrize("hr_dir,lr_dir,hr_name,lr_name", LAYOUTS)
def test_layouts(tmp_path, hr_dir, lr_dir, hr_name, lr_name):
    for i, size in enumerate([(32, 41), (33, 32)]):
        img = photo(*size, seed=i)
        save(tmp_path / hr_dir / f"{hr_name.format(f'000{i}')}.png", img)
        lr = data.imresize(data.mod_crop(img, 4), 1 / 4)
        save(tmp_path / lr_dir / f"{lr_name.format(f'000{i}')}.png", 255 - lr)
    explicit = data.PairedFolder(tmp_path / hr_dir, 4, tmp_path / lr_dir, lr_name)
    for pairs in (data.PairedFolder(tmp_path, 4), explicit):
        assert pairs.names == ["0000", "0001"] and pairs.sizes() == [(32, 40), (32, 32)]
        lr, hr = pairs.load(0)
        assert hr.shape == (32, 40, 3) and lr.shape == (8, 10, 3)
        assert np.array_equal(255 - lr, data.imresize(hr, 1 / 4))  # the file, not one made anew
        assert pairs.paths(1)[0].endswith(lr_name.format("0001") + ".png")
    if "LR_bicubic" in lr_dir:  # there is no X2: those are made
        assert data.PairedFolder(tmp_path, 2, cache_dir=False).lr_files is None


def test_pair_errors(tmp_path, hr_folder):
    lr = tmp_path / "low"
    save(lr / "0000x4.png", photo(12, 15))
    with pytest.raises(FileNotFoundError, match="0001x4 .2 of 3"):
        data.PairedFolder(hr_folder, 4, lr)
    with pytest.raises(FileNotFoundError, match="0000_lr"):
        data.PairedFolder(hr_folder, 4, lr, "{}_lr")
    with pytest.raises(ValueError, match="filename_tmpl"):
        data.PairedFolder(hr_folder, 4, lr, "x4")
    for i, size in ((1, (16, 12)), (2, (13, 12))):
        save(lr / f"000{i}x4.png", photo(*size))
    pairs = data.PairedFolder(hr_folder, 4, lr)
    for call in (pairs.sizes, lambda: pairs.load(2)):
        with pytest.raises(ValueError, match="0002x4.png is 12 x 13 .* 12 x 12 .*49 x 49"):
            call()
    with pytest.raises(FileNotFoundError, match="absent"):
        data.PairedFolder(tmp_path / "absent", 4)
    save(hr_folder / "0001.bmp", photo(8, 8))
    with pytest.raises(ValueError, match="same name"):
        data.PairedFolder(hr_folder, 4)


def test_cache_is_keyed_by_content_and_repairs_itself(tmp_path, hr_folder):
    cache = tmp_path / "cache"
    pairs = data.PairedFolder(hr_folder, 4, cache_dir=cache)
    lr, hr = pairs.load(0)
    assert np.array_equal(lr, data.imresize(hr, 1 / 4)) and hr.shape == (48, 60, 3)
    (entry,) = cache.rglob("*.png")
    assert np.array_equal(data.read_image(entry), lr)  # a picture that anybody can look at
    before = entry.stat().st_mtime_ns
    assert np.array_equal(pairs.load(0)[0], lr) and entry.stat().st_mtime_ns == before  # read
    whole = entry.read_bytes()
    pairs.load(1)
    (other,) = set(cache.rglob("*.png")) - {entry}
    for damage in (b"", whole[:60], b"no image", whole[:-20], other.read_bytes()):
        entry.write_bytes(damage)
        assert np.array_equal(pairs.load(0)[0], lr)
        assert entry.read_bytes() == whole  # made again
    save(entry, photo(12, 15))  # a picture of the right size that is not ours
    assert np.array_equal(pairs.load(0)[0], lr)
    stat = (hr_folder / "0000.png").stat()
    save(hr_folder / "0000.png", 255 - photo(50, 61))
    os.utime(hr_folder / "0000.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new_lr, new_hr = pairs.load(0)
    assert np.array_equal(new_lr, data.imresize(new_hr, 1 / 4)) and (new_lr != lr).any()


def test_a_flipped_bit_in_the_cache_is_found(tmp_path, hr_folder):
    pairs = data.PairedFolder(hr_folder, 4, cache_dir=tmp_path / "cache")
    lr, _ = pairs.load(0)
    (entry,) = (tmp_path / "cache").rglob("*.png")
    whole = entry.read_bytes()
    for position in range(0, 8 * len(whole), 131):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        entry.write_bytes(damaged)
        assert np.array_equal(pairs.load(0)[0], lr), position
        assert entry.read_bytes() == whole


def test_no_home_folder_is_one_warning(hr_folder, monkeypatch):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "ISSP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    pairs = data.PairedFolder(hr_folder, 2)
    with pytest.warns(
        RuntimeWarning, match="not cached: .*unknown home folder.*ISSP_CACHE"
    ) as caught:
        for i in range(3):
            lr, hr = pairs.load(i)
            assert np.array_equal(lr, data.imresize(hr, 1 / 2))
        data.PairedFolder(hr_folder, 4).load(0)  # another data set
    assert len(caught) == 1
    with pytest.raises(ValueError, match="^~/photos: the home folder is unknown; set HOME"):
        data.list_images("~/photos")


def test_cache_shared_and_unwritable(tmp_path, hr_folder):
    cache, wrong = tmp_path / "cache", []

    def read():
        pairs = data.PairedFolder(hr_folder, 2, cache_dir=cache)
        for i in range(3):
            lr, hr = pairs.load(i)
            if not np.array_equal(lr, data.imresize(hr, 1 / 2)):
                wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong and len(list(cache.rglob("*.png"))) == 3
    assert not list(cache.rglob("*.tmp"))
    (tmp_path / "file").write_bytes(b"")
    pairs = data.PairedFolder(hr_folder, 2, cache_dir=tmp_path / "file")
    with pytest.warns(RuntimeWarning, match="cache_dir"):
        lr, hr = pairs.load(0)
    assert np.array_equal(lr, data.imresize(hr, 1 / 2))
