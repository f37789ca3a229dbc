"""Logs of several runs, and the choice of layers."""

import pytest

from issp.sr.plots import records
from tests.sr.plots.conftest import EDSR, GRADIENTS, SWINIR, gradients, make_run, write_log

pytest.importorskip("yaml", reason="runs keep their configuration as YAML")
KEY = "logger.grad_stats_freq=100"


def read(run, columns=("norm",)):
    return records.read_record(run, "gradients.csv", columns, KEY)


def plain(record):
    """Layer -> column -> values."""
    return {
        layer: {column: values.tolist() for column, values in series.items()}
        for layer, series in record.layers.items()
    }


def network_of(folder):
    run = records.read_run("a", folder)
    return records.read_network(run, records.Record("a", None, {}))


def test_rows_by_layer_and_the_freeze_of_the_configuration(tmp_path):
    run = records.read_run("a", make_run(tmp_path / "a"))
    values = {("x", 5): 1.5, ("y", 5): 2.5, ("x", 25): 3.5, ("y", 25): 4.5}
    path = run.log / "gradients.csv"
    write_log(path, GRADIENTS, gradients("xy", (5, 25), lambda layer, i: values[layer, i]))
    record = read(run)
    assert plain(record) == {
        "x": {"iteration": [5, 25], "norm": [1.5, 3.5]},
        "y": {"iteration": [5, 25], "norm": [2.5, 4.5]},
    }
    assert (record.freeze, record.last) == (20, 25)
    write_log(path, GRADIENTS, gradients("x", (19,)))
    assert read(run).freeze is None  # it has not happened yet


def test_a_folder_of_logs_alone(tmp_path):
    """What `issp.Recorder` writes: no configuration, the stage is a column."""
    write_log(tmp_path / "gradients.csv", GRADIENTS, gradients(["b.0", "a"], (10, 20, 30)))
    run = records.read_run("a", tmp_path)
    record = read(run)
    network = records.read_network(run, record)
    assert record.freeze == 20 and network.order == ["b.0", "a"]
    assert records.choose_layers(["b", "2"], network, 1) == ["b.0", "a"]
    assert records.describe("a", network, 1) == "a: 2nd layer"


def test_the_columns_before_the_stage_was_recorded(tmp_path):
    run = records.read_run("a", make_run(tmp_path / "a"))
    columns = tuple(c for c in GRADIENTS if c != "stage")
    rows = [(i, "x", 1.0, 2.0, 3.0, 4.0) for i in (5, 25)]
    write_log(run.log / "gradients.csv", columns, rows)
    record = read(run, ("norm", "variance"))
    assert record.freeze == 20
    assert plain(record) == {
        "x": {"iteration": [5, 25], "norm": [1.0, 1.0], "variance": [2.0, 2.0]}
    }


def test_layers_by_name_pattern_and_index(tmp_path):
    network = network_of(make_run(tmp_path / "edsr", EDSR))
    assert network.order == [
        "conv_first", "body.0.conv1", "body.0.conv2", "body.1.conv1", "body.1.conv2",
        "conv_after_body", "upsample.0", "conv_last",
    ]  # fmt: skip
    for words, base, chosen in (
        (["1", "8"], 1, ["conv_first", "conv_last"]),
        (["0", "7"], 0, ["conv_first", "conv_last"]),
        (["body.*.conv1", "2"], 1, ["body.0.conv1", "body.1.conv1"]),  # each once
        (["body.1", "conv_first"], 1, ["body.1.conv1", "body.1.conv2", "conv_first"]),
        (["re:conv_(first|last)"], 1, ["conv_first", "conv_last"]),
    ):
        assert records.choose_layers(words, network, base) == chosen
    for words, base, said in (
        (["0"], 1, "there is no layer 0; the network has 8, which --index-base 1 counts from 1 to"),
        (["8"], 0, "no layer 8; the network has 8, which --index-base 0 counts from 0 to 7"),
        (["nothing"], 1, 'layers: "nothing" matches no module'),
    ):
        with pytest.raises(ValueError, match=said):
            records.choose_layers(words, network, base)


def test_the_papers_indices_in_swinir_light(tmp_path):
    """docs/method.md, section 1.6: the names for both bases."""
    light = (
        "{type: SwinIR, img_size: 64, window_size: 8, depths: [6, 6, 6, 6], embed_dim: 60, "
        "num_heads: [6, 6, 6, 6], mlp_ratio: 2, upsampler: pixelshuffledirect}"
    )
    network = network_of(make_run(tmp_path / "a", light))
    assert len(network.order) == 103
    names = [name.replace(".residual_group", "") for name in network.order]
    chosen = {base: [names[i - base] for i in (1, 3, 36, 80)] for base in (0, 1)}
    assert chosen[1] == [
        "conv_first", "layers.0.blocks.0.attn.proj", "layers.1.blocks.2.attn.proj",
        "layers.3.blocks.0.mlp.fc2",
    ]  # fmt: skip
    assert chosen[0] == [
        "layers.0.blocks.0.attn.qkv", "layers.0.blocks.0.mlp.fc1", "layers.1.blocks.2.mlp.fc1",
        "layers.3.blocks.1.attn.qkv",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="selects 103 layers, and a picture has room for 24"):
        records.choose_layers(["*"], network, 1)
    assert records.ordinal(103) == "103rd" and records.ordinal(112) == "112th"
    assert records.describe("conv_first", network, 0) == "conv_first: 0th layer, Conv2d 60x3x3x3"


def test_excluded_layers_have_no_index(tmp_path):
    network = network_of(make_run(tmp_path / "a", sparsity="exclude: ['body.0*'], "))
    assert network.order[:2] == ["conv_first", "body.1.conv1"]


def test_layers_that_runs_have_in_common(tmp_path):
    folders = make_run(tmp_path / "a", EDSR), make_run(tmp_path / "b", SWINIR)
    networks = [network_of(folder) for folder in folders]
    first = records.Record("a", None, {"conv_first": {}, "conv_last": {}})
    second = records.Record("b", None, {"conv_first": {}})
    assert records.common_layers([first, second], [networks[0]] * 2) == ["conv_first"]
    with pytest.raises(ValueError, match="b did not record the layer conv_last; it recorded 1: co"):
        records.check_layers(["conv_last"], [first, second], [networks[0]] * 2)
    # Both networks have eight channels: this layer is the same in them.
    assert records.common_layers([first, second], networks) == ["conv_first"]
    wide = network_of(make_run(tmp_path / "c", EDSR.replace("8", "16")))
    with pytest.raises(ValueError, match="a, b have no recorded layer in common"):
        records.common_layers([first, second], [networks[0], wide])
    with pytest.raises(ValueError, match="Conv2d 8x3x3x3 in a and Conv2d 16x3x3x3 in b"):
        records.check_layers(["conv_first"], [first, second], [networks[0], wide])


@pytest.mark.parametrize(
    "text, said",
    [
        ("iteration,layer,norm\n", "has no rows yet"),
        ("", "is not a log"),
        ("iteration,norm\n5,1.0\n", "has no column layer"),
        ("iteration,layer\n5,x\n", "has no column norm"),
        ("iteration,layer,norm\n5,x,1.0\n10,x,1.0e-\n", "norm of x at iteration 10 is '1.0e-'"),
        ("iteration,layer,norm\n5,x,\n", "norm of x at iteration 5 is None"),
    ],
)
def test_damaged_logs_are_named(tmp_path, text, said):
    run = records.read_run("a", make_run(tmp_path / "a"))
    (run.log / "gradients.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read(run)


def test_a_log_cut_in_the_middle_of_a_row(tmp_path):
    run = records.read_run("a", make_run(tmp_path / "a"))
    path = write_log(run.log / "gradients.csv", GRADIENTS, gradients("x", (5, 10)))
    text = path.read_text()
    path.write_text(text[:-20])
    assert plain(read(run)) == {"x": {"iteration": [5], "norm": [1.0]}}


@pytest.mark.parametrize("sparsity, prunes", [("ratio: 0.5, ", True), ("method: dense, ", False)])
def test_a_dense_run_has_no_freeze(tmp_path, sparsity, prunes):
    run = records.read_run("a", make_run(tmp_path / "a", sparsity=sparsity))
    write_log(run.log / "gradients.csv", GRADIENTS, gradients("x", (5, 25)))
    assert run.prunes == prunes and read(run).freeze == (20 if prunes else None)


def test_a_damaged_configuration_is_named(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "config.yml").write_text("name: a\nscale: 1\nnetwork_g: {type: EDSR}\n")
    with pytest.raises(ValueError, match="a/config.yml: scale is 1"):
        records.read_run("a", folder)


def test_what_is_no_run_or_recorded_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run of `issp train`"):
        records.read_run("a", tmp_path)
    with pytest.raises(FileNotFoundError, match="train it with --set logger.grad_stats_freq=100"):
        read(records.read_run("a", make_run(tmp_path / "a")))
