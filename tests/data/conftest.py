import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keeps the indices of test files in a temporary directory."""
    monkeypatch.setenv("ANYEXPERTS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
