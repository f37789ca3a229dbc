"""Draws, crops and batches for training; prepare; the sample photographs."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from issp import data
from issp.sr.data.sampler import hash64


def coordinates(height, width):
    """A picture each of whose pixels says where it is, [H, W, 3] uint8."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, (y * 7 + x * 3) % 251], axis=2).astype(np.uint8)


def save(path, img):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(img).save(path)
    return path


@pytest.fixture
def pairs():
    return data.PairedArrays({"a": coordinates(40, 52), "b": coordinates(37, 33)}, 2)


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in ("lq", "gt")) and a["gt_path"] == b["gt_path"]


def test_hash_is_fixed_for_ever():
    got = hash64(10, np.arange(3, dtype=np.uint64), 2)
    assert got.dtype == np.uint64 and len(set(got.tolist())) == 3
    assert got.tolist() == [1680192907746216859, 3096121184556813918, 11267402569962813747]
    many = hash64(1, np.arange(200_000, dtype=np.uint64))
    ones = [((many >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)]
    assert max(abs(p - 0.5) for p in ones) < 0.006  # five standard deviations
    cells = np.bincount((many >> np.uint64(58)).astype(int), minlength=64)
    assert 20 < ((cells - 3125) ** 2 / 3125).sum() < 130  # chi-square, 63 degrees of freedom


def test_sampler_epochs_ranks_and_resume():
    sampler = data.EnlargedSampler(7, ratio=3, seed=4)
    draws = sampler.take(42)
    for epoch in (draws[:21], draws[21:]):
        assert Counter(d.image for d in epoch) == dict.fromkeys(range(7), 3)
    assert [d.image for d in draws[:21]] != [d.image for d in draws[21:]]
    assert [d.counter for d in draws] == list(range(42)) and sampler.epoch == 2
    ranks = [data.EnlargedSampler(7, 3, 4, rank, 2).take(21) for rank in (0, 1)]
    assert [d for pair in zip(*ranks, strict=True) for d in pair] == draws
    other = data.EnlargedSampler(7, 3, seed=5).take(42)
    assert [d.image for d in other] != [d.image for d in draws]
    resumed = data.EnlargedSampler(7, ratio=3, seed=4)
    first = data.EnlargedSampler(7, ratio=3, seed=4)
    first.take(17)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.take(25) == draws[17:]
    with pytest.raises(ValueError, match="size was 7 when saved and is 8 now"):
        data.EnlargedSampler(8, ratio=3, seed=4).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="position"):
        first.load_state_dict({})
    straight = data.EnlargedSampler(3, shuffle=False).take(5)
    assert [d.image for d in straight] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("args", [(0,), (3, 0), (3, 1, 0, 2, 2), (3, 1, 0, 0, 0), (2.5,)])
def test_sampler_refuses(args):
    with pytest.raises(ValueError, match="must be"):
        data.EnlargedSampler(*args)


def test_crops_fit_together_and_cover_everything(pairs):
    dataset = data.TrainDataset(pairs, 16, hflip=False, rot=False)
    lr = [data.to_tensor(pairs.load(i)[0]) for i in (0, 1)]
    places = Counter()
    for n in range(3000):
        item = dataset[data.Draw(n % 2, n)]
        gt = (item["gt"] * 255).round().to(int)
        top, left = gt[0, 0, 0].item(), gt[1, 0, 0].item()
        assert top % 2 == left % 2 == 0
        assert torch.equal(gt[0, :, 0], torch.arange(top, top + 16))
        assert torch.equal(gt[1, 0], torch.arange(left, left + 16))
        window = lr[n % 2][:, top // 2 : top // 2 + 8, left // 2 : left // 2 + 8]
        assert torch.equal(item["lq"], window)
        places[n % 2, top, left] += 1
    assert item["gt_path"] == "b" and item["gt"].dtype == torch.float32
    # a: 13 x 19 places, b: 11 x 9; 1500 draws each: the chance to miss one of b is 3e-5
    assert {k[1:] for k in places if k[0] == 1} == {
        (y, x) for y in range(0, 22, 2) for x in range(0, 18, 2)
    }
    assert max(k[1] for k in places) == 24 and max(k[2] for k in places) == 36


def test_flips_are_the_eight_symmetries_each_as_often(pairs):
    plain = data.TrainDataset(pairs, 16, hflip=False, rot=False)
    turned = data.TrainDataset(pairs, 16)
    mirrored = data.TrainDataset(pairs, 16, rot=False)
    seen, mirrors = Counter(), 0
    for n in range(800):
        draw = data.Draw(0, n)
        a, b, c = plain[draw], turned[draw], mirrored[draw]
        forms = [
            {k: f(a[k]) for k in ("lq", "gt")}
            for f in (
                lambda x: x,
                lambda x: x.flip(2),
                lambda x: x.flip(1),
                lambda x: x.flip(1, 2),
                lambda x: x.mT,
                lambda x: x.flip(2).mT,
                lambda x: x.flip(1).mT,
                lambda x: x.flip(1, 2).mT,
            )
        ]
        fits = [all(torch.equal(f[k], b[k]) for k in f) for f in forms]
        assert sum(fits) == 1
        seen[fits.index(True)] += 1
        mirror = torch.equal(c["gt"], a["gt"].flip(2))
        assert mirror or torch.equal(c["gt"], a["gt"])
        mirrors += mirror
    assert len(seen) == 8 and min(seen.values()) > 60 and 340 < mirrors < 460


def test_samples_depend_on_seed_and_counter_alone(pairs):
    a, b = data.TrainDataset(pairs, 16, seed=1), data.TrainDataset(pairs, 16, seed=1)
    draws = data.EnlargedSampler(2, 4, seed=1).take(12)
    whole = a.batch(draws)
    for i in reversed(range(12)):
        torch.manual_seed(i)
        np.random.seed(i)
        assert torch.equal(b[draws[i]]["gt"], whole["gt"][i])
    numbers = sum(a.random_numbers(list(range(1000))), [])
    assert len(set(numbers)) == 5000  # no sample shares a number with its neighbours
    other = data.TrainDataset(pairs, 16, seed=2).batch(draws)
    assert not torch.equal(other["gt"], whole["gt"])
    assert torch.equal(b[1]["gt"], b[1]["gt"]) and torch.equal(b[-1]["gt"], b[1]["gt"])
    with pytest.raises(IndexError):
        b[2]


def test_default_dataloader_understands_the_samples(pairs):
    dataset = data.TrainDataset(pairs, 16)
    sampler = data.EnlargedSampler(2)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4, sampler=sampler)))
    assert same(batch, dataset.batch(sampler.draws(0, 4)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_bit_exactly(pairs, workers):
    dataset = data.TrainDataset(pairs, 16, seed=3)
    straight = data.TrainLoader(dataset, 3, enlarge_ratio=5)
    wanted = [next(straight) for _ in range(9)]
    before = torch.get_rng_state()
    loader = data.TrainLoader(dataset, 3, enlarge_ratio=5, num_workers=workers)
    for batch in wanted[:4]:
        assert same(next(loader), batch)
    state = json.loads(json.dumps(loader.state_dict()))
    next(loader)  # not part of the state, nor is what workers made ahead
    loader.load_state_dict(state)
    resumed = data.TrainLoader(dataset, 3, enlarge_ratio=5, num_workers=workers)
    resumed.load_state_dict(state)
    for batch in wanted[4:]:
        assert same(next(resumed), batch)
    assert same(next(loader), wanted[4])
    assert resumed.epoch == 2
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's generator was moved
    loader.close()
    resumed.close()
    with pytest.raises(ValueError, match="seed was 3"):
        data.TrainLoader(data.TrainDataset(pairs, 16, seed=4), 3).load_state_dict(state)
    with pytest.raises(ValueError, match="not a state of TrainLoader: sampler or crop_seed"):
        resumed.load_state_dict({"sampler": state["sampler"]})
    with pytest.raises(ValueError, match="batch_size"):
        data.TrainLoader(dataset, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_names_a_file_that_breaks(tmp_path, workers):
    save(tmp_path / "a.png", coordinates(40, 40))
    pairs = data.PairedFolder(tmp_path, 2, cache_dir=False)
    loader = data.TrainLoader(data.TrainDataset(pairs, 16, in_memory=False), 2, num_workers=workers)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="a.png is damaged") as caught:
        next(loader)
    assert "\n" not in str(caught.value)


def test_memory_changes_nothing_but_the_reading(tmp_path, monkeypatch):
    for i in range(2):
        save(tmp_path / f"{i}.png", coordinates(30 + i, 30))
    pairs = data.PairedFolder(tmp_path, 2, cache_dir=False)
    held, fresh = (data.TrainDataset(pairs, 16, in_memory=m) for m in (True, False))
    assert data.TrainDataset(pairs, 16).in_memory
    monkeypatch.setattr("issp.sr.data.datasets.AUTO_MEMORY", 3 * (30 * 30 * 2) * 5 // 4 - 1)
    assert not data.TrainDataset(pairs, 16).in_memory
    draws = data.EnlargedSampler(2).take(6)
    assert same(held.batch(draws), fresh.batch(draws))
    steps = []
    held.preload(lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
    monkeypatch.setattr(pairs, "load", lambda i: pytest.fail("read again"))
    held.batch(draws)


def test_small_images_and_arguments(tmp_path, pairs):
    with pytest.raises(ValueError, match="image b is 32 x 36 pixels, smaller than the crop of 40"):
        data.TrainDataset(pairs, 40)
    dataset = data.TrainDataset(pairs, 40, small="skip")
    assert len(dataset) == 1 and dataset.skipped == ["b"]
    assert dataset.batch([data.Draw(0, 5)])["gt_path"] == ["a"]
    with pytest.raises(ValueError, match="2 of 2"):
        data.TrainDataset(pairs, 64, small="skip")
    for size in (15, 0, 16.0):
        with pytest.raises(ValueError, match="multiple of scale 2"):
            data.TrainDataset(pairs, size)
    with pytest.raises(ValueError, match="small"):
        data.TrainDataset(pairs, 16, small="drop")
    with pytest.raises(ValueError, match="scale"):
        data.PairedArrays({"a": coordinates(8, 8)}, 1)
    with pytest.raises(ValueError, match="too small for scale 4"):
        data.PairedArrays({"a": coordinates(8, 3)}, 4)
    with pytest.raises(TypeError, match="image a"):
        data.PairedArrays({"a": torch.zeros(8, 8, 3)}, 4)


def test_eval_dataset_and_image_folder(tmp_path, pairs):
    dataset = data.EvalDataset(pairs, in_memory=True)
    item = dataset[1]
    assert item["name"] == "b" and item["gt"].shape == (3, 36, 32) and len(list(dataset)) == 2
    lr, hr = dataset.load(1)
    assert np.array_equal(data.to_image(item["gt"]), hr)
    assert np.array_equal(data.to_image(item["lq"]), lr) and dataset.load(1)[0] is lr
    save(tmp_path / "x.png", lr)
    save(tmp_path / "y.png", lr)
    assert [i["name"] for i in data.ImageFolder(tmp_path)] == ["x", "y"]
    (one,) = data.ImageFolder(tmp_path / "y.png")
    assert torch.equal(one["lq"], item["lq"]) and one["lq_path"].endswith("y.png")


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_prepare_whole_images(tmp_path):
    sources = [save(tmp_path / "in" / f"{n}.png", coordinates(30, 41)) for n in "ab"]
    out, steps = tmp_path / "out", []
    result = data.prepare(tmp_path / "in", out, (2, 4), progress=lambda *a: steps.append(a))
    assert (result.sources, result.resumed, result.images) == (2, 0, 2)
    assert steps == [(1, 2), (2, 2)]
    names = [f"{d}/{n}{x}.png" for d, x in DIRS for n in "ab"]
    assert files(out) == sorted([*names, "prepared.jsonl"])
    hr = data.read_image(out / "HR" / "a.png")
    assert np.array_equal(hr, coordinates(30, 41))
    lr, crop = data.PairedFolder(out, 4).load(0)
    assert crop.shape == (28, 40, 3) and np.array_equal(lr, data.imresize(crop, 1 / 4))
    stamps = {f: (out / f).stat().st_mtime_ns for f in files(out)}
    again = data.prepare(tmp_path / "in", out, (2, 4), workers=2)
    assert again.resumed == 2 and again.images == 2
    del stamps["prepared.jsonl"]
    assert all((out / f).stat().st_mtime_ns == t for f, t in stamps.items())
    (out / "LR_bicubic/X4/ax4.png").unlink()
    assert data.prepare(tmp_path / "in", out, (2, 4)).resumed == 1
    save(sources[1], 255 - coordinates(30, 41))
    assert data.prepare(tmp_path / "in", out, (2, 4)).resumed == 1
    assert np.array_equal(data.read_image(out / "HR/b.png"), 255 - coordinates(30, 41))
    assert data.prepare(tmp_path / "in", out, (3,)).resumed == 0
    assert (out / "LR_bicubic/X3/ax3.png").is_file()
    assert data.prepare(tmp_path / "in", out, (2, 3, 4)).resumed == 2


DIRS = [("HR", ""), ("LR_bicubic/X2", "x2"), ("LR_bicubic/X4", "x4")]


def test_prepare_goes_on_after_an_interruption(tmp_path, monkeypatch):
    for n in "abc":
        save(tmp_path / "in" / f"{n}.png", coordinates(24, 24))

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.prepare(tmp_path / "in", tmp_path / "out", (2,), progress=stop)
    journal = tmp_path / "out" / "prepared.jsonl"
    journal.write_text(journal.read_text()[:-9])  # the last line is cut short
    result = data.prepare(tmp_path / "in", tmp_path / "out", (2,))
    assert result.resumed == 1 and result.images == 3
    assert data.prepare(tmp_path / "in", tmp_path / "out", (2,)).resumed == 3


def test_prepare_crops(tmp_path):
    source = save(tmp_path / "in" / "p.png", coordinates(53, 75))
    out = tmp_path / "out"
    result = data.prepare(tmp_path / "in", out, (2, 4), crop_size=24, step=16, thresh_size=4)
    # 52 x 72: rows begin at 0, 16 and 28 (12 left over), columns at 0, 16, 32 and 48
    assert result.images == 12 and len(files(out)) == 12 * 3 + 1
    whole = {s: data.imresize(coordinates(53, 75)[:52, :72], 1 / s) for s in (2, 4)}
    k = 0
    for top in (0, 16, 28):
        for left in (0, 16, 32, 48):
            k += 1
            hr = data.read_image(out / "HR" / f"p_s{k:03d}.png")
            assert np.array_equal(hr, coordinates(53, 75)[top : top + 24, left : left + 24])
            for s, lr in whole.items():
                got = data.read_image(out / f"LR_bicubic/X{s}/p_s{k:03d}x{s}.png")
                window = lr[top // s : (top + 24) // s, left // s : (left + 24) // s]
                assert np.array_equal(got, window)
    dataset = data.TrainDataset(data.PairedFolder(out, 4), 24)
    assert len(dataset) == 12
    with pytest.raises(ValueError, match="prepared with .*24.*32"):
        data.prepare(tmp_path / "in", out, (2, 4), crop_size=32, step=16)
    save(source, coordinates(24, 24))
    result = data.prepare(tmp_path / "in", out, (2, 4), crop_size=24, step=16, thresh_size=4)
    assert result.images == 1 and len(files(out)) == 4  # crops of the old picture are gone


@pytest.mark.parametrize("line", [b"[1]", b"{}", b"3", b'"text"'])
@pytest.mark.parametrize("first", [True, False])
def test_prepare_names_a_damaged_journal(tmp_path, line, first):
    data.write_image(tmp_path / "in" / "a.png", np.zeros((16, 16, 3), np.uint8))
    data.prepare(tmp_path / "in", tmp_path / "out", (2,))
    journal = tmp_path / "out" / "prepared.jsonl"
    settings = journal.read_bytes().splitlines()[0]
    journal.write_bytes(line if first else settings + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match="prepared.jsonl is damaged: remove it"):
        data.prepare(tmp_path / "in", tmp_path / "out", (2,))
    journal.write_bytes(settings + b"\n\xff\xfe")  # no JSON and no UTF-8: a half line
    assert data.prepare(tmp_path / "in", tmp_path / "out", (2,)).images == 1


@pytest.mark.parametrize("crops", [{}, {"crop_size": 8}])
@pytest.mark.parametrize("place", ["HR/a{}.png", "LR_bicubic/X2/a{}x2.png"])
def test_prepare_does_not_overwrite_files_of_others(tmp_path, crops, place):
    data.write_image(tmp_path / "in" / "a.png", np.zeros((16, 16, 3), np.uint8))
    theirs = tmp_path / "out" / place.format("_s001" if crops else "")
    data.write_image(theirs, np.ones((16, 16, 3), np.uint8))
    before = theirs.read_bytes()
    with pytest.raises(ValueError, match=f"{theirs.name} is there already, and not made by"):
        data.prepare(tmp_path / "in", tmp_path / "out", (2,), **crops)
    assert theirs.read_bytes() == before
    theirs.unlink()
    assert data.prepare(tmp_path / "in", tmp_path / "out", (2,), **crops).resumed == 0
    assert data.prepare(tmp_path / "in", tmp_path / "out", (2,), **crops).resumed == 1


def test_prepare_in_place(tmp_path):
    source = save(tmp_path / "HR" / "a.bmp", coordinates(24, 24))
    before = source.read_bytes()
    data.prepare(tmp_path / "HR", tmp_path, (3,))
    assert files(tmp_path) == ["HR/a.bmp", "LR_bicubic/X3/ax3.png", "prepared.jsonl"]
    assert source.read_bytes() == before
    assert data.prepare(tmp_path / "HR", tmp_path, (3,)).resumed == 1
    with pytest.raises(ValueError, match="another out"):
        data.prepare(tmp_path / "HR", tmp_path, (3,), crop_size=12)


def test_prepare_refuses_before_it_writes(tmp_path):
    save(tmp_path / "in" / "a.png", coordinates(24, 24))
    save(tmp_path / "in" / "small.png", coordinates(9, 24))
    out = tmp_path / "out"

    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            data.prepare(tmp_path / "in", out, **{"scales": (2, 4), **options})
        assert not out.exists()

    refused("small.png is 24 x 9", crop_size=12)
    refused("crop_size must be a multiple .* 4", crop_size=14)
    refused("step must be a multiple", crop_size=12, step=6)
    refused("step has no meaning", step=8)
    refused("scale", scales=(1,))
    refused("one scale", scales=())
    refused("workers", workers=0)
    refused("thresh_size", crop_size=12, thresh_size=-1)
    result = data.prepare(tmp_path / "in", out, (2, 4), crop_size=12, small="skip")
    assert len(result.skipped) == 1 and result.skipped[0].endswith("small.png")
    save(tmp_path / "other" / "a.png", coordinates(24, 24))
    with pytest.raises(ValueError, match="same name"):
        data.prepare(tmp_path / "other", out, (2, 4), crop_size=12)
    save(tmp_path / "in" / "a.bmp", coordinates(24, 24))
    with pytest.raises(ValueError, match="a.bmp and a.png"):
        data.prepare(tmp_path / "in", tmp_path / "out2", (2,), small="skip")


def test_prepare_takes_no_setting_that_does_nothing(tmp_path):
    data.write_image(tmp_path / "in" / "a.png", np.zeros((16, 16, 3), np.uint8))
    for options in ({"step": 4}, {"thresh_size": 4}, {"thresh_size": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} has no meaning without crop"):
            data.prepare(tmp_path / "in", tmp_path / "out", (2,), **options)
    with pytest.raises(ValueError, match="smaller than 17 .*; use a smaller scale or leave it out"):
        data.prepare(tmp_path / "in", tmp_path / "out", (17,))
    assert not (tmp_path / "out").exists()


def test_sample_photographs():
    train, test = data.sample_photographs("train"), data.sample_photographs("test")
    assert len(train) == 9 and list(test) == ["chelsea", "coffee", "camera"]
    assert not set(train) & set(test) and set(data.sample_photographs()) == set(train) | set(test)
    for name, img in {**train, **test}.items():
        assert img.dtype == np.uint8 and img.ndim == 3 and img.shape[2] == 3, name
        assert min(img.shape[:2]) >= 300 and len(np.unique(img)) > 100, name
    assert (test["chelsea"][:, :, 0] != test["chelsea"][:, :, 2]).any()
    with pytest.raises(ValueError, match="split"):
        data.sample_photographs("valid")


def test_sample_photographs_need_scikit_image_and_its_files(tmp_path, monkeypatch):
    spec = importlib.machinery.ModuleSpec("skimage", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ImportError, match="sample photographs need scikit-image: pip install"):
        data.sample_photographs()
    spec.submodule_search_locations = [str(tmp_path)]
    with pytest.raises(FileNotFoundError, match="holds none of the train photographs; reinstall"):
        data.sample_photographs("train")


def test_data_and_metrics_import_without_pillow():
    code = (
        "import sys\nfor name in ('PIL', 'skimage', 'yaml'): sys.modules[name] = None\n"
        "import issp.data, issp.metrics, numpy as np\n"
        "img = np.zeros((48, 48, 3), np.uint8)\n"
        "loader = issp.data.TrainLoader("
        "issp.data.TrainDataset(issp.data.PairedArrays({'a': img}, 2), 16), 2)\n"
        "assert next(loader)['gt'].shape == (2, 3, 16, 16)\n"
        "assert issp.metrics.ssim(img, img, 2) == 1\n"
        "try: issp.data.read_image(sys.argv[1])\n"
        "except ImportError as e: assert 'issp[train]' in str(e)\n"
        "else: raise SystemExit('Pillow was used')\n"
    )
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, __file__], check=True, env=env)
