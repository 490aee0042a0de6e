"""A step of decoding copies no layer of experts, read off the programs for a TPU and a GPU that are not attached."""

import json
import re

import pytest
from pretrained.tiny_hub import hub_values

from anyexperts_jax.aot.decode import lower_decode
from anyexperts_jax.aot.gpu import missing_packages
from anyexperts_jax.aot.published import published_run
from anyexperts_jax.aot.topology import slice_devices
from anyexperts_jax.nn import stack
from anyexperts_jax.sharding.mesh import make_mesh

E, D, F, L = 10, 256, 128, 3  # no number of blocks of rows is E
WIDTHS = {"hidden_size": D, "moe_intermediate_size": F, "num_experts": E, "num_hidden_layers": L, "head_dim": 128}
# A result of an operation with the shape of one layer's experts.
LAYER = re.compile(rf"= bf16\[(1,)?{E},({D},{F}|{F},{D})\]")
# All layers' experts, made anew.
STACK = re.compile(
    rf"= bf16\[({L},{E}|{L * E}),({D},{F}|{F},{D})\]\S* (copy|transpose|convert|fusion|pad|copy-start)\("
)


def program(folder, topology, rows):
    """The text of the compiled step for so many rows."""
    (folder / "config.json").write_text(json.dumps(hub_values("qwen3_moe", **WIDTHS, torch_dtype="bfloat16")))
    found = published_run(str(folder), trains=False)
    mesh = make_mesh(found.run.mesh, slice_devices(topology)[:1])
    return lower_decode(found.model, mesh, rows, 64).compile().as_text()


@pytest.mark.aot
@pytest.mark.usefixtures("schedules")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_of_a_tpu(topology, tmp_path):
    check(program(tmp_path, topology, rows=2), "tpu_custom_call")


@pytest.mark.aot
@pytest.mark.usefixtures("schedules")
def test_the_check_finds_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(stack, "reads_in_place", lambda *how, **also: False)
    assert LAYER.search(program(tmp_path, "v5e:1x1", rows=3))  # another number of rows: the other step is kept


@pytest.mark.aot
@pytest.mark.skipif(bool(missing_packages()), reason=f"not installed: {', '.join(missing_packages())}")
def test_of_a_gpu(tmp_path):
    check(program(tmp_path, "h100:1x1", rows=2), "triton")


def check(text, kernel):
    assert kernel in text
    assert LAYER.findall(text) == []
    assert STACK.findall(text) == []
