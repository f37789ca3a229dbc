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
from tests.integrations import basicsr_model

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


def run_section(name, title, namespace, containing=""):
    """Runs the Python blocks of a section in order, under the document's line numbers.

    Only those with the text `containing`.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    chosen = [block for block in blocks(sections(name)[title], "python") if containing in block]
    assert chosen
    for block in chosen:
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
    assert "of 20 layers are sparse" in printed or "The model is dense throughout" in printed
    assert namespace["fine_tuner"].step_count == 4
    assert_sparse(namespace["net"], 0.95)


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
    found = {(name, title) for name in OWN for title in sections(name)}
    assert found == CHECKS.keys() | {("docs/usage.md", "Frameworks")}
    snippets = blocks(sections("docs/usage.md")["Frameworks"], "python")
    assert [sum(name in snippet for name in FRAMEWORKS) for snippet in snippets] == [1] * 4


@pytest.mark.parametrize("name, title", CHECKS)
def test_snippets(name, title, folder, capsys):
    namespace = stand_ins()
    if title == "Packing for inference":
        pytest.importorskip("safetensors", reason="the model is saved as safetensors")
        namespace["model"] = issp.models.build("edsr-tiny", scale=2, num_block=1)
        issp.attach(namespace["model"], sparsity=0.9).finalize()
    run_section(name, title, namespace)
    CHECKS[name, title](namespace, capsys.readouterr().out)


# A text in the snippet of each framework.
FRAMEWORKS = (
    "issp.integrations.lightning",
    "issp.integrations.transformers",
    "issp.integrations.accelerate",
    "PrunedSRModel",
)


def lightning_module():
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = issp.models.build("edsr-tiny", scale=2, num_block=1)

        def training_step(self, batch, _):
            return (self.net(batch[0]) - batch[1]).abs().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=2e-4)

    return Module()


def language_model():
    import transformers

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return transformers.BertForSequenceClassification(config)


@pytest.mark.full
@pytest.mark.parametrize("package", ["lightning", "transformers", "accelerate"])
def test_snippets_of_frameworks(package, folder, capsys):
    pytest.importorskip(package, reason=f"{package} is not installed")
    namespace = {**stand_ins(), "steps": 6}
    if package == "lightning":
        namespace["lightning_module"] = lightning_module()
        namespace["loader"] = torch.utils.data.DataLoader(batches(3), batch_size=None)
    if package == "transformers":
        namespace["language_model"] = language_model()
        tokens = torch.randint(1, 50, (48, 8))
        namespace["dataset"] = [{"input_ids": x, "labels": int(x[0]) % 2} for x in tokens]
    run_section("docs/usage.md", "Frameworks", namespace, f"issp.integrations.{package}")
    printed = capsys.readouterr().out
    if package == "lightning":
        assert_sparse(namespace["lightning_module"].net, 0.95)
        assert "iss-p, step 6, final" in printed
    if package == "transformers":
        assert_sparse(namespace["language_model"].bert, 0.95)
        assert Path("run/sparse/model.safetensors").is_file()
    if package == "accelerate":
        assert_sparse(namespace["model"], 0.95)
        assert Path("state/custom_checkpoint_0.pkl").is_file()


def train_in_basicsr(namespace, first, last, resume=None):
    """What BasicSR's train.py does with the model of the snippet."""
    options = {
        "train": {"sparsity": {"sparsity": 0.95, "freeze_at": 4}},
        "path": {"training_states": "states", "models": "models"},
        "rank": 0,
    }
    model = namespace["PrunedSRModel"](options)
    if resume is not None:
        saved = torch.load(f"models/net_g_{resume}.pth")
        model.net_g.load_state_dict(saved["params"])
        model.net_g_ema.load_state_dict(saved["params_ema"])
        model.resume_training(torch.load(f"states/{resume}.state"))
    torch.manual_seed(2)
    for current_iter, (model.lq, model.gt) in enumerate(batches(8), 1):
        if first < current_iter <= last:
            model.optimize_parameters(current_iter)
            model.save(0, current_iter)
    model.save(-1, -1)
    return model


def test_the_example_of_the_papers_numbers_makes_tables(folder, capsys):
    (text,) = blocks((ROOT / "docs" / "formats.md").read_text(encoding="utf-8"), "csv")
    (folder / "typed.csv").write_text(text)
    assert cli.main(["table", "--paper", "typed.csv"]) == 0
    tables = capsys.readouterr().out
    assert [f"(the paper's table {n})" in tables for n in (1, 2, 3)] == [True] * 3
    assert all(score in tables for score in ("25.92", "28.40", "26.32", "0.7260", "misprints"))


def test_recipe_for_basicsr(folder, monkeypatch):
    """On a stand-in with BasicSR's methods, since the package needs torchvision."""
    modules = basicsr_model.modules(lambda: issp.models.build("edsr-tiny", scale=2, num_block=1))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    Path("states").mkdir()
    Path("models").mkdir()
    namespace = {}
    run_section("docs/usage.md", "Frameworks", namespace, "PrunedSRModel")
    whole = train_in_basicsr(namespace, 0, 8)
    for net in (whole.net_g, whole.net_g_ema):
        assert_sparse(net, 0.95)
    assert whole.pruner.step_count == 8 and not Path("states/-1.pruner").exists()
    saved = torch.load("models/net_g_latest.pth")["params"]
    for step in (2, 6):
        train_in_basicsr(namespace, 0, step)
        resumed = train_in_basicsr(namespace, step, 8, resume=step)
        for name, x in resumed.net_g.state_dict().items():
            assert torch.equal(x, saved[name]), name
        for name, x in resumed.net_g_ema.state_dict().items():
            assert torch.equal(x, whole.net_g_ema.state_dict()[name]), name


def commands():
    """The lines of the shell blocks, as words."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in OWN]
    lines = [line for text in texts for block in blocks(text, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_exist(words, capsys):
    check = {"make": make, "pip": pip, "issp": issp_command, "python": python, "bash": bash}
    check["torchrun"] = lambda words, _: issp_command(words[words.index("-m") + 1 :], capsys)
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
