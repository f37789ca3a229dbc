"""Names of the sets that `issp test --data` and `issp train --val` score."""

import os

import pytest

from issp import cli
from issp.cli.common import item_progress, named_folders
from issp.sr import config
from issp.utils.errors import ConfigError


def test_a_set_is_named_after_its_data_set(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "a=b").mkdir()
    for entry, name in (
        ("benchmarks/Set5", "Set5"),
        ("benchmarks/Set5/", "Set5"),
        ("benchmarks/Set5/HR", "Set5"),
        ("benchmarks/Set14/GTmod12/", "Set14"),
        ("Urban100/image_SRF_4", "Urban100"),
        ("DIV2K/DIV2K_valid_HR", "DIV2K_valid_HR"),
        (".", tmp_path.name),
        ("..", tmp_path.parent.name),
        ("Set5/HR/..", "Set5"),
        ("HR", tmp_path.name),
        ("~/Set5/HR", "Set5"),
        ("a=b", "a=b"),
        ("x=y/Set5", "x"),
        ("data/x=y/Set5", "Set5"),
        (os.fsdecode(b"caf\xe9"), "caf\\udce9"),
    ):
        (found,) = named_folders([entry])
        assert found == name, entry
    assert named_folders(["mine=some/HR", "Set5/HR"]) == {"mine": "some/HR", "Set5": "Set5/HR"}


@pytest.mark.parametrize(
    "entries,sentence",
    [
        (["Set5/HR", "other/Set5"], "Set5/HR and other/Set5 are both called 'Set5': write NAME="),
        (["a=x", "a=y"], "x and y are both called 'a'"),
        (["Set5", "Set5"], "both called 'Set5'"),
        (["=x"], "=x has no name: write NAME=DIR"),
        (["..=x"], "..=x has no name"),
        (["/"], "/ has no name"),
    ],
)
def test_unclear_names_are_refused(entries, sentence, capsys, tmp_path):
    with pytest.raises(ValueError) as caught:
        named_folders(entries)
    assert sentence in str(caught.value)
    train = ["train", "--model", "edsr-tiny", "--scale", "2", "--iters", "1", "--val", *entries]
    assert cli.main([*train, "--root", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_name_with_brackets_is_shown_on_a_terminal(monkeypatch, capsys):
    """rich reads [/b] as the end of a style, and [old] as a style."""
    pytest.importorskip("rich", reason="the bar is drawn by rich")
    for name in ("set [/b]", "set [old]"):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        with item_progress(name) as progress:
            progress(1, 2)
        assert name in capsys.readouterr().err


def test_equal_names_in_a_file_are_refused():
    sets = {key: {"name": "Set5", "dataroot_gt": key} for key in ("val_1", "test_2")}
    tree = {"name": "run", "scale": 2, "network_g": {"type": "edsr-tiny"}}
    tree |= {"datasets": {"train": {"type": "SamplePhotographs"}, **sets}}
    with pytest.raises(
        ConfigError, match=r"datasets val_1 and test_2 are both called 'Set5': give"
    ):
        config.parse({**tree, "train": {"total_iter": 1}})
