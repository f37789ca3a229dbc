"""Errors that the command line prints as one line."""

import sys

import pytest
import torch

from issp.utils import errors


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r'YAML files need PyYAML: pip install "issp\[train\]"'):
        errors.import_optional("yaml", "PyYAML", "YAML files")
    assert errors.import_optional("json", "json", "objects").dumps(1) == "1"


@pytest.mark.parametrize(
    "error, subject",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "the GPU"),
        (MemoryError(), "the machine"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 3 bytes"), "the machine"),
    ],
)
def test_a_failed_allocation_names_the_remedy(error, subject):
    sentence = f"^{subject} has not enough memory: use --tile$"
    with (
        pytest.raises(errors.OutOfMemoryError, match=sentence),
        errors.explain_out_of_memory("use --tile"),
    ):
        raise error


def test_the_nearest_remedy_for_a_failed_allocation_is_kept():
    with (
        pytest.raises(errors.OutOfMemoryError, match="^the machine has not enough memory: inner$"),
        errors.explain_out_of_memory("outer"),
        errors.explain_out_of_memory("inner"),
    ):
        raise MemoryError


def test_an_error_is_quoted_without_the_frames_of_native_code():
    assert errors.first_line(RuntimeError("overflow\nframe #0: ...")) == "overflow"
    assert errors.first_line(ZeroDivisionError()) == "ZeroDivisionError"


def test_an_error_in_one_line_has_no_number_of_the_system():
    assert errors.one_line(OSError(20, "cannot write a/b:\n Not a directory")) == (
        "cannot write a/b: Not a directory"
    )
    assert errors.one_line(ValueError("[1] is [Errno 2]")) == "[1] is [Errno 2]"
    assert errors.one_line(ValueError()) == "ValueError"


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="^bug$"), errors.explain_out_of_memory("use --tile"):
        raise RuntimeError("bug")
