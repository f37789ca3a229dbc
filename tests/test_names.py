"""Names that scripts import from `issp` itself."""

import importlib

import pytest

import issp


@pytest.mark.parametrize("name", ["builders", "checkpoint", "config", "evaluate", "train"])
def test_modules_of_the_application_can_be_imported_from_issp(name):
    assert getattr(issp, name) is importlib.import_module(f"issp.sr.{name}")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="issp.* has no attribute 'builder'"):
        issp.builder  # noqa: B018
