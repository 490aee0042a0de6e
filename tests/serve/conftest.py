"""A tiny model, its service, and the service's URL on a real local port."""

import pytest


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    for package in ("safetensors", "tokenizers", "starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from serve.tiny import served_tiny

    return served_tiny(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(scope="session")
def service(served):
    from anyexperts_jax.serve.app import Limits
    from anyexperts_jax.serve.run import make_service

    return make_service(served, slots=4, length=96, limits=Limits(body_bytes=100_000, queue=32, seconds=600))


@pytest.fixture(scope="session")
def url(service):
    from anyexperts_jax.serve.run import in_thread

    with in_thread(service) as address:
        yield address
