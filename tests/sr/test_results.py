"""Results files: what is written is read, what is damaged is named, older rows stay."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from issp import models
from issp.sr import checkpoint, config, results
from issp.sr.results import Result

ROW = Result("iss-p", "edsr-tiny", 2, 0.95, 1, "Set5", "y", 1 / 3 + 30, 0.1 + 0.2)
BICUBIC = Result("bicubic", "", 2, None, None, "Set5", "y", 33.66, None, images=5, lr="made")
EXACT = replace(ROW, set='a "b", c', psnr=float("inf"), crop_border=0, zeros=0.924, model="ü.pth")
HEADER = "method,arch,scale,sparsity,seed,set,channel,psnr,ssim"


def test_rows_come_back_with_the_same_bits(tmp_path):
    results.write(tmp_path / "results.csv", [ROW, BICUBIC, EXACT])
    assert results.read(tmp_path / "results.csv") == [ROW, BICUBIC, EXACT]
    assert results.read(tmp_path) == [ROW, BICUBIC, EXACT]  # the folder of a study
    assert (tmp_path / "results.csv").read_text().startswith(f"{HEADER},images,lr,crop_border,")


def test_the_columns_of_a_study_suffice_in_any_order(tmp_path):
    path = tmp_path / "r.csv"
    text = f"\ufeff{HEADER}\r\niss-p,edsr-tiny,2,0.95,1,Set5,y,30.5, 0.9\r\n\r\n"
    path.write_bytes(text.encode())
    assert results.read(path) == [replace(ROW, psnr=30.5, ssim=0.9)]
    path.write_text("psnr,ssim,set,channel,method,arch,scale,sparsity,seed\n33.66,,Set5,y,x,,2,,\n")
    assert results.read(path) == [Result("x", "", 2, None, None, "Set5", "y", 33.66, None)]


def test_adding_replaces_the_row_of_the_same_model_alone(tmp_path):
    path = tmp_path / "sub" / "r.csv"
    results.add(path, [ROW, BICUBIC])
    other = [replace(ROW, seed=2), replace(ROW, channel="rgb"), replace(ROW, model="b")]
    other += [replace(ROW, crop_border=0), replace(ROW, set="Set14")]
    results.add(path, [replace(ROW, psnr=31.0), *other])
    assert results.read(path) == [replace(ROW, psnr=31.0), BICUBIC, *other]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("iss-p,a,2,95,1,S,y,30,0.9", "sparsity is 95.0: it must be a share from 0 to 1"),
        ("iss-p,a,2,nan,1,S,y,30,0.9", "sparsity is nan"),
        ("iss-p,a,2.5,0.9,1,S,y,30,0.9", "scale is '2.5': it must be a whole number"),
        ("iss-p,a,,0.9,1,S,y,30,0.9", "scale is '': it must be a whole number"),
        ("iss-p,a,0,0.9,1,S,y,30,0.9", "scale is 0"),
        ("iss-p,a,2,0.9,one,S,y,30,0.9", "seed is 'one'"),
        ("iss-p,a,2,0.9,1,,y,30,0.9", "set is empty"),
        (",a,2,0.9,1,S,y,30,0.9", "method is empty"),
        ("iss-p,a,2,0.9,1,S,Y,30,0.9", "channel is 'Y': did you mean 'y'?"),
        ("iss-p,a,2,0.9,1,S,luma,30,0.9", "channel is 'luma': known: y, rgb"),
        ("iss-p,a,2,0.9,1,S,y,,0.9", "psnr is '': it must be a number"),
        ("iss-p,a,2,0.9,1,S,y,nan,0.9", "psnr is nan"),
        ("iss-p,a,2,0.9,1,S,y,-inf,0.9", "psnr is -inf: it must be a number from 0, or inf"),
        ("iss-p,a,2,0.9,1,S,y,30,90", "ssim is 90.0"),
        ("iss-p,a,2,0.9,1,S,y,30", "has 8 values for 9 columns"),
    ],
)
def test_a_damaged_row_is_named_with_its_line(tmp_path, line, sentence):
    path = tmp_path / "r.csv"
    path.write_text(f"{HEADER}\niss-p,a,2,0.9,1,S,y,30,0.9\n{line}\n")
    with pytest.raises(ValueError, match="r.csv, line 3") as error:
        results.read(path)
    assert sentence in str(error.value)


@pytest.mark.parametrize(("column", "value"), [("images", 0), ("images", -3), ("crop_border", -2)])
def test_counts_that_are_impossible_are_refused(column, value):
    with pytest.raises(ValueError, match=f"{column} is {value}: it must be [01] or more"):
        replace(ROW, **{column: value})


def test_rows_that_are_added_at_once_are_all_there(tmp_path, monkeypatch):
    def slow_read(path, read=results.read):
        rows = read(path)
        time.sleep(0.01)  # long enough for the others to read the same rows
        return rows

    monkeypatch.setattr(results, "read", slow_read)
    path, seeds = tmp_path / "new" / "results.csv", range(12)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: results.add(path, [replace(ROW, seed=seed)]), seeds))
    assert sorted(row.seed for row in results.read(path)) == list(seeds)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"iteration,loss\n1,2\n", "is not a results file: its first line lacks method, arch"),
        (f"{HEADER},sead\n".encode(), "unknown column 'sead': did you mean"),
        (f"{HEADER},seed\n".encode(), "has the column seed twice"),
        (b"\xff\xfe\x00", "is not a CSV file in UTF-8"),
    ],
)
def test_another_file_is_refused_and_left_as_it_was(tmp_path, content, sentence):
    path = tmp_path / "r.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="r.csv") as error:
        results.add(path, [ROW])
    assert sentence in str(error.value) and path.read_bytes() == content
    with pytest.raises(FileNotFoundError):
        results.read(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("section", "facts"),
    [
        (None, {"method": "dense", "ratio": 0.0}),
        ({"method": "dense", "freeze_iter": 5}, {"method": "dense", "ratio": 0.0}),
        ({"ratio": 0.9, "method": "iht", "freeze_iter": 5}, {"method": "iht", "ratio": 0.9}),
        ({"keep": {"n": 2, "of": 32}, "freeze_iter": 5}, {"method": "iss-p", "ratio": 0.9375}),
        ({"from_zeros": True}, {}),
    ],
)
def test_a_trained_model_says_method_ratio_and_seed(section, facts, tmp_path):
    tree = {"name": "run", "scale": 2, "manual_seed": 5, "network_g": {"type": "EDSR"}}
    tree |= {"datasets": {"train": {"dataroot_gt": str(tmp_path)}}, "train": {"total_iter": 9}}
    tree["path"] = {"pretrain_network_g": "m.safetensors"}
    settings = config.parse(tree if section is None else tree | {"sparsity": section})
    assert results.training_facts(settings) == facts | {"seed": 5}


def test_what_a_model_file_says_and_what_the_user_knows_better(tmp_path):
    model = models.build("edsr-tiny", 2, num_feat=8, num_block=1)
    with torch.no_grad():
        for layer in (model.body[0].conv1, model.body[0].conv2, model.conv_after_body):
            layer.weight[:6] = 0
    path = str(tmp_path / "m.safetensors")
    trained = {"method": "srp", "ratio": 0.75, "seed": 4}
    checkpoint.save(model, path, training=trained)
    zeros = checkpoint.sparsity(model)["ratio"]
    facts = {"arch": "edsr-tiny", "scale": 2, "zeros": zeros, "model": path}
    said = {"method": "srp", "sparsity": 0.75, "seed": 4}
    assert results.facts_of_model(model, path) == facts | said
    better = {"method": "l1", "sparsity": 0.5, "seed": 0}
    assert results.facts_of_model(model, path, **better) == facts | better
    checkpoint.save(model, path)
    with pytest.raises(ValueError, match="does not say how it was pruned"):
        results.facts_of_model(model, path)
    checkpoint.save(model, path, training={"method": 3, "ratio": "x", "seed": None})
    rounded = {"method": "l1", "sparsity": round(zeros, 2), "seed": None}
    assert results.facts_of_model(model, path, "l1") == facts | rounded
