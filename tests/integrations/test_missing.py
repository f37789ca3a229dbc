"""Without the frameworks: one sentence with the remedy, and nothing of issp misses them."""

import importlib
import subprocess
import sys

import pytest

from issp.utils.errors import MissingPackageError

PACKAGES = {
    "lightning": ("lightning", "pytorch_lightning"),
    "transformers": ("transformers",),
    "accelerate": ("accelerate",),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_framework_is_named_with_its_extra(name, monkeypatch):
    for package in PACKAGES[name]:
        for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"issp.integrations.{name}", raising=False)
    with pytest.raises(MissingPackageError, match=rf'need {name}: pip install "issp\[{name}\]"'):
        importlib.import_module(f"issp.integrations.{name}")


@pytest.mark.full
def test_attaching_imports_no_framework():
    program = (
        "import sys, torch, issp; m = torch.nn.Linear(8, 8);"
        "issp.attach(m, torch.optim.Adam(m.parameters()));"
        f"print([x for x in {[*PACKAGES, 'issp.integrations']} if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
