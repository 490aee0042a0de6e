import pathlib

import pytest

from anyexperts_jax.train.config import load_config

PODS = pathlib.Path(__file__).parents[2] / "experiments" / "pods"


@pytest.mark.parametrize("path", sorted(PODS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_pods_configuration_loads_and_splits_over_its_mesh(path):
    config = load_config(path)
    assert config.model.stack.dispatch == "exchange"
    sizes = config.mesh.sizes(256)
    assert config.model.moe.num_experts % sizes["expert"] == 0
    assert config.train.batch_size % (sizes["data"] * sizes["fsdp"] * sizes["expert"]) == 0
