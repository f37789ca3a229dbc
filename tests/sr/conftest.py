"""Pictures and a configuration for tests that train."""

import pytest


@pytest.fixture(scope="session")
def training_photos(tmp_path_factory):
    # Here, so that tests of other modules need no optional package.
    from tests.sr.runs import draw_photos

    return draw_photos(tmp_path_factory.mktemp("hr"))


@pytest.fixture
def tree(training_photos, tmp_path, monkeypatch):
    from tests.sr.runs import tree_of

    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    return tree_of(training_photos, tmp_path / "experiments")
