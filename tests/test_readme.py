"""What the documents tell a newcomer works: code runs, commands exist, links and paths exist.

A snippet may use names that a reader's own program has; `stand_ins` makes them: a small network,
its optimizer and batches, single layers, inputs, and lists of tensors. Every section starts anew.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import issp
from issp import cli

ROOT = Path(__file__).resolve().parents[1]
OWN = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
LINKED = [*OWN, "CHANGELOG.md", "bench/README.md", "tests/golden/README.md"]

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(text, language):
    """The code blocks of a text in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def sections(name):
    """Title -> text of the sections of a document that have Python blocks."""
    text = (ROOT / name).read_text(encoding="utf-8")
    parts = [part.partition("\n") for part in text.split("\n## ")[1:]]
    return {title: body for title, _, body in parts if blocks(body, "python")}


def run_section(name, title, namespace):
    """Runs the Python blocks of a section in order, under the document's line numbers."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for block in blocks(sections(name)[title], "python"):
        tree = ast.parse(block)
        ast.increment_lineno(tree, text[: text.index(block)].count("\n"))
        exec(compile(tree, name, "exec"), namespace)


def train(model, optimizer, steps=2):
    """A loop of a reader's own."""
    for lq, gt in batches(steps):
        loss = (model(lq) - gt).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def batches(count):
    return [(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)) for _ in range(count)]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty working folder, with the cache in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def stand_ins():
    """What a reader's own program has."""
    model = issp.models.build("edsr-tiny", scale=2, num_block=1)
    model.add_module("norm", nn.Identity())  # a layer that exclude=["*norm*"] matches
    weights = [torch.randn(32, 32, 3, 3), torch.randn(64, 64)]
    return {
        "torch": torch,
        "issp": issp,
        "train": train,
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=2e-4),
        "loader": batches(3),
        "lq": torch.rand(1, 3, 8, 8),
        "conv": nn.Conv2d(64, 32, 3, padding=1),
        "x": torch.randn(1, 64, 8, 8, requires_grad=True),
        "linear": nn.Linear(48, 48),
        "tokens": torch.randn(2, 5, 48),
        "weights": weights,
        "moments": [torch.ones_like(w) for w in weights],
        "averages": [torch.ones_like(w) for w in weights],
        "grads": [torch.zeros_like(w) for w in weights],
    }


def prunable(model):
    kinds = (nn.Conv2d, nn.Linear)
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, kinds)}


def assert_sparse(model, sparsity):
    for name, weight in prunable(model).items():
        assert int((weight == 0).sum()) == issp.num_pruned(weight.numel(), sparsity), name


def check_ten_lines(namespace, printed):
    assert_sparse(namespace["model"], 0.95)
    assert "iss-p, step 3, final" in printed
    assert "| layer | shape | sparsity | form | us sparse | us dense | choice | why |" in printed


def check_pruning(namespace, printed):
    assert "iss-p, step 2, pruning" in printed
    checkpoint, pruner = namespace["checkpoint"], namespace["pruner"]
    assert checkpoint["pruner"]["step_count"] == pruner.step_count == 2
    assert namespace["masks"].keys() == prunable(namespace["model"]).keys()


def check_recorder(namespace, printed):
    files = {path.name: path.read_text().splitlines() for path in Path("log").iterdir()}
    names = ["conv_first", "body.0.conv2"]  # the third layer, and the name pattern
    expected = [(str(i), name) for i in (1, 2) for name in names]
    cells = {name: [line.split(",") for line in lines[1:]] for name, lines in files.items()}
    assert [(i, layer) for i, _, layer, *_ in cells["gradients.csv"]] == expected
    assert [(i, layer) for i, layer, *_ in cells["masks.csv"]] == expected


def check_optimizers(namespace, printed):
    assert namespace["pruner"].step_count == 2
    if issp.backends.active("cpu") == "cpp":
        layers = len(prunable(namespace["model"]))
        assert f"group 0: fused, {layers} pruned and {layers} other" in printed


def check_nm(namespace, printed):
    """2:32 with v = 4 where it divides the layer, dense elsewhere."""
    for name, weight in prunable(namespace["model"]).items():
        if weight.shape[0] % 4 or weight.shape[1] % 32:
            assert weight.all(), name
        else:
            rows = (weight != 0).view(-1, 4, weight.shape[1] // 32, 32, 3, 3).any(1)
            assert (rows.sum(2) == 2).all(), name


def check_packing(namespace, printed):
    assert "| conv_first |" in printed
    assert_sparse(namespace["model"], 0.9)
    assert Path("model.safetensors").is_file()


def check_sparse_layers(namespace, printed):
    conv, x = namespace["conv"], namespace["x"]
    weight = issp.ops.nm_prune(conv.weight, namespace["keep"])
    expected = nn.functional.conv2d(x, weight, conv.bias, padding=1)
    torch.testing.assert_close(namespace["y"], expected, rtol=1e-4, atol=1e-5)
    tokens, linear = namespace["tokens"], namespace["linear"]
    expected = nn.functional.gelu(linear(tokens)) + tokens
    torch.testing.assert_close(namespace["z"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(namespace["layer"](x), namespace["y"], rtol=1e-4, atol=1e-5)


def check_ops(namespace, printed):
    weights, masks = namespace["weights"], namespace["masks"]
    for weight, mask, zeros in zip(weights, masks, namespace["zeros"].tolist(), strict=True):
        assert int((~mask).sum()) == zeros == issp.num_pruned(weight.numel(), 0.95)
        assert not weight[~mask].any()
    for moment, mask in zip(namespace["moments"], masks, strict=True):
        assert torch.equal(moment, mask.float())
    assert namespace["tau"].shape == namespace["thresholds"].shape == (2,)
    assert namespace["statistics"].shape == (2, 4)
    kept = (namespace["pruned"] != 0).view(32, 1, 32, 3, 3).sum(2)
    assert (kept <= 2).all()


CHECKS = {
    ("README.md", "Ten lines"): check_ten_lines,
    ("docs/usage.md", "Pruning while training"): check_pruning,
    ("docs/usage.md", "Recording layers"): check_recorder,
    ("docs/usage.md", "Fused optimizers"): check_optimizers,
    ("docs/usage.md", "N:M patterns"): check_nm,
    ("docs/usage.md", "Packing for inference"): check_packing,
    ("docs/usage.md", "Sparse layers, conv and matmul"): check_sparse_layers,
    ("docs/usage.md", "The ops"): check_ops,
}


def test_every_snippet_is_checked():
    assert {(name, title) for name in OWN for title in sections(name)} == CHECKS.keys()


@pytest.mark.parametrize("name, title", CHECKS)
def test_snippets(name, title, folder, capsys):
    namespace = stand_ins()
    if title == "Packing for inference":
        pytest.importorskip("safetensors", reason="the model is saved as safetensors")
        namespace["model"] = issp.models.build("edsr-tiny", scale=2, num_block=1)
        issp.attach(namespace["model"], sparsity=0.9).finalize()
    run_section(name, title, namespace)
    CHECKS[name, title](namespace, capsys.readouterr().out)


def commands():
    """The lines of the shell blocks, as words."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in OWN]
    lines = [line for text in texts for block in blocks(text, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_exist(words, capsys):
    check = {"make": make, "pip": pip, "issp": issp_command, "python": python, "bash": bash}
    tool = "bash" if words[0].endswith(".sh") else words[0]
    assert tool in check, f"no check for {words[0]}"
    check[tool](words, capsys)


def make(words, capsys):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pip(words, capsys):
    extras = re.search(r"\[(.*)\]", words[-1])
    known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in extras[1].split(",") if extras else ():
        assert re.search(rf"^{extra} = \[", known, re.MULTILINE), f"there is no extra {extra}"


def issp_command(words, capsys):
    within = getattr(cli.command_module(words[1]), "COMMANDS", ())
    names = words[1:3] if words[2:] and words[2] in within else words[1:2]
    assert cli.main([*names, "--help"]) == 0
    assert_known(words[1 + len(names) :], capsys.readouterr().out)
    for word in words[2:]:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), word


def python(words, capsys):
    module = words[1] == "-m"
    words = words[2:] if module else words[1:]
    options = [word for word in words[1:] if word.startswith("-")]
    names = [word for word in words[1:] if not word.startswith("-")][:1] if module else []
    if not module and not (ROOT / words[0]).is_file():
        raise AssertionError(f"there is no {words[0]}")
    if not module and not options:
        return
    assert_known(options, help_of(words[0], names, module))


def help_of(name, names, module):
    """What `python [-m] name names --help` prints, in this process."""
    before, printed = sys.argv, io.StringIO()
    sys.argv = [name, *names, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
            if module:
                runpy.run_module(name, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
    finally:
        sys.argv = before
    assert not stop.value.code
    return printed.getvalue()


def bash(words, capsys):
    assert subprocess.run(["bash", "-n", str(ROOT / words[0])]).returncode == 0


def assert_known(words, help_text):
    known = set(re.findall(r"(?<![\w-])--?[\w-]+", help_text))
    for word in words:
        if word.startswith("-"):
            assert word.split("=")[0] in known, f"{word} is not among {sorted(known)}"


@pytest.mark.parametrize("name", LINKED)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in anchors, f"{name}: {target}"


@pytest.mark.parametrize("name", OWN)
def test_paths_exist(name):
    """Paths in backticks that start with one of our folders, build results aside."""
    text = (ROOT / name).read_text(encoding="utf-8")
    ours = r"`((?:issp|bench|docs|tests|csrc|configs|triton_kernels|examples)/[\w./-]*\w/?)`"
    paths = [path for path in re.findall(ours, text) if not path.endswith(".so")]
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
    assert name not in ("docs/architecture.md", "CONTRIBUTING.md") or len(paths) > 10
