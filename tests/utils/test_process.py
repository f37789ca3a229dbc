"""How the command starts: without torch where it can, its threads waiting patiently."""

import os
import platform
import subprocess
import sys

import pytest

from issp.utils import process

COMMAND = "import sys; sys.argv = ['/usr/bin/issp', *sys.argv[1:]]; from issp import cli; "


def run(code, *words, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    return subprocess.run(
        [sys.executable, "-c", code, *words], env={**clean, **environment},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["-m", "info"], ["python", "-X", "dev", "-m", "issp", "info"], True),
        (["-m"], ["python", "-m", "issp.cli"], False),
        (["-m"], ["python", "-m", "project.train", "issp"], False),
        (["/usr/local/bin/issp", "info"], ["python", "/usr/local/bin/issp", "info"], True),
        (["issp.exe"], ["python", "issp.exe"], True),
        (["train.py", "-m", "issp"], ["python", "train.py", "-m", "issp"], False),
        (["-c"], ["python", "-c", "import issp"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_the_command_is_told_from_a_script(monkeypatch, argv, orig_argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert process.is_issp_command() is expected


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["train", "--help"], ["trian"]])
def test_version_and_help_do_not_import_torch(words):
    code = COMMAND + "cli.main(sys.argv[1:]); print('torch' in sys.modules)"
    assert run(code, *words).splitlines()[-1] == "False"


def test_a_script_that_imports_issp_has_the_ops():
    assert "soft_shrink_" in run("import issp, torch; print(torch.ops.issp.soft_shrink_)")


@pytest.mark.full
def test_the_command_limits_spinning_unless_the_user_chose():
    code = COMMAND + "import os, io, contextlib\n"
    code += "with contextlib.redirect_stdout(io.StringIO()): cli.main(['info'])\n"
    code += "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    assert run(code).split() == ["10000", "None"]
    assert run(code, OMP_WAIT_POLICY="passive").split() == ["None", "passive"]
    assert run(code, GOMP_SPINCOUNT="7").split() == ["7", "None"]
    assert run("import issp, os; print('GOMP_SPINCOUNT' in os.environ)").strip() == "False"


@pytest.mark.full
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_the_command_keeps_freed_memory_unless_the_user_chose():
    code = COMMAND + "import io, contextlib, mmap, numpy, re\n"
    code += "with contextlib.redirect_stdout(io.StringIO()): cli.main(['info'])\n"
    code += "large = numpy.ones(40 << 20, numpy.uint8)\n"
    code += "heap = re.search(r'(\\w+)-(\\w+) .*\\[heap\\]', open('/proc/self/maps').read())\n"
    code += "print(int(heap[1], 16) <= large.ctypes.data < int(heap[2], 16))"
    assert run(code).strip() == "True"  # malloc maps such an array outside of its heap otherwise
    assert run(code, MALLOC_MMAP_MAX_="65536").strip() == "False"


def test_load_is_that_of_other_processes(monkeypatch):
    samples = iter([(10.0, 500.0, 3.0), (12.0, 503.5, 4.5)])
    monkeypatch.setattr(process.LoadMeter, "_sample", staticmethod(lambda: next(samples)))
    assert process.LoadMeter().busy_cores() == 1.0  # 3.5 seconds of all, 1.5 of them ours, in 2


def test_load_is_unknown_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(process.LoadMeter, "_sample", staticmethod(lambda: None))
    assert process.LoadMeter().busy_cores() is None


def test_crowding_names_the_setting_that_helps(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert process.crowded(2.2, 4) == (
        "other processes keep 2.2 of 4 cores busy, and 4 threads wait for each other: "
        "OMP_NUM_THREADS=2 is probably faster"
    )
    assert "OMP_NUM_THREADS=1 " in process.crowded(9.0, 2)
    assert process.crowded(2.2, 2) is None and process.crowded(0.1, 4) is None
    assert process.crowded(4.0, 1) is None and process.crowded(None, 4) is None
