import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Indices of the tests' files lie with them."""
    monkeypatch.setenv("ANYEXPERTS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
