"""Reading and writing tiny checkpoints: both directions, types, layouts and files."""

import json
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from anyexperts_jax import MeshConfig, load_pretrained, make_mesh
from anyexperts_jax.models.init import named_leaves
from anyexperts_jax.pretrained.load import open_checkpoint
from anyexperts_jax.pretrained.read import _aligned, _copy
from anyexperts_jax.pretrained.write import export
from pretrained.tiny_hub import BFLOAT16, hub_values, random_tensors, tensors_in, tiny_checkpoint, write_checkpoint

pytest.importorskip("safetensors")
LAYOUTS = (  # cases with different tensor names
    *("llama tied", "qwen3", "qwen3_moe pattern", "olmoe", "mixtral", "glm4_moe", "sarvam_moe"),
    *("deepseek_v3", "deepseek_v3 full queries"),
)


def same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def same_leaves(found, expected):
    found, expected = named_leaves(found), named_leaves(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value), err_msg=name)


@pytest.mark.parametrize("case", LAYOUTS)
def test_an_export_equals_the_checkpoint_bit_for_bit(tmp_path, case):
    folder = tiny_checkpoint(tmp_path / "hub", case, dtype=BFLOAT16, files=2)
    model = load_pretrained(folder)
    model.export(tmp_path / "out")
    same_tensors(tensors_in(tmp_path / "out"), tensors_in(folder))
    again = load_pretrained(tmp_path / "out")
    same_leaves(again.params, model.params)
    assert again.config == model.config


def test_a_kernel_is_the_tensor_transposed(tmp_path):
    folder = tiny_checkpoint(tmp_path / "hub", "qwen3_moe")
    tensors, leaves = tensors_in(folder), named_leaves(load_pretrained(folder).params)
    query = leaves["decoder/moe_layers/self_attention/attention/query/kernel"]
    theirs = tensors["model.layers.2.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(query[2].reshape(28, 40), theirs.T)
    down = leaves["decoder/moe_layers/moe/experts/w_down_EFD"]
    np.testing.assert_array_equal(down[1, 5], tensors["model.layers.1.mlp.experts.5.down_proj.weight"].T)


@pytest.mark.parametrize("case", ["qwen3_moe", "olmoe", "mixtral", "sarvam_moe"])
def test_stacked_experts_give_the_same_model(tmp_path, case):
    """transformers stacks the experts, gate before up, and saves adapted models that way."""
    values = hub_values(case)
    stacked = random_tensors(values, stacked=True)
    model = load_pretrained(write_checkpoint(tmp_path / "stacked", values, stacked))
    model.export(tmp_path / "hub")
    own = load_pretrained(tmp_path / "hub")
    same_leaves(own.params, model.params)
    gates = [name for name in stacked if name.endswith("gate_up_proj")]
    assert gates
    assert not any("gate_up" in name for name in tensors_in(tmp_path / "hub"))
    gate_EFD = stacked[gates[-1]][:, : stacked[gates[-1]].shape[1] // 2]
    ours_EDF = named_leaves(own.params)["decoder/moe_layers/moe/experts/w_gate_EDF"][-1]
    np.testing.assert_array_equal(ours_EDF, gate_EFD.swapaxes(1, 2))


def test_the_routers_bias_stays_float32(tmp_path):
    """Rounded to bfloat16, the biases of a trained model have eight values, and most tokens choose other experts."""
    folder = tiny_checkpoint(tmp_path / "hub", "sarvam_moe", dtype=BFLOAT16)
    model = load_pretrained(folder)
    assert model.router_bias_LC.dtype == np.float32
    expected = tensors_in(folder)["model.layers.1.mlp.gate.expert_bias"]
    np.testing.assert_array_equal(model.router_bias_LC[0], expected)
    assert model.config.stack.dtype == "bfloat16"
    assert named_leaves(model.params)["tokens/table"].dtype == BFLOAT16


def test_every_tensor_keeps_its_type(tmp_path):
    values = hub_values("qwen3_moe")
    tensors = random_tensors(values, dtype=BFLOAT16)
    wide = [name for name in tensors if name.endswith("mlp.gate.weight")]
    tensors |= {name: tensors[name].astype(np.float32) for name in wide}
    model = load_pretrained(write_checkpoint(tmp_path / "hub", values, tensors))
    leaves = named_leaves(model.params)
    assert leaves["decoder/moe_layers/moe/router/kernel"].dtype == np.float32
    assert leaves["decoder/moe_layers/moe/experts/w_up_EDF"].dtype == BFLOAT16
    export(model, tmp_path / "out", shard_bytes=4000)
    same_tensors(tensors_in(tmp_path / "out"), tensors)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())


def test_parameters_on_a_mesh_equal_those_on_one_device(tmp_path):
    folder = tiny_checkpoint(tmp_path / "hub", "mixtral")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    split, whole = load_pretrained(folder, mesh), load_pretrained(folder)
    same_leaves(split.params, whole.params)
    experts = named_leaves(split.params)["decoder/moe_layers/moe/experts/w_up_EDF"]
    assert experts.addressable_shards[0].data.shape == (3, 3, 14, 20)
    assert len(experts.sharding.device_set) == 8


def test_further_prediction_heads_are_ignored(tmp_path):
    values = hub_values("sarvam_moe", num_nextn_predict_layers=1)
    tensors = random_tensors(values)
    further = {"model.layers.3.eh_proj.weight": np.zeros((2, 2), np.float32)}
    model = load_pretrained(write_checkpoint(tmp_path / "hub", values, tensors | further))
    assert model.config.stack.num_layers == 3


def test_a_dry_run_prints_tensors_and_parameters(tmp_path):
    folder = tiny_checkpoint(tmp_path / "hub", "sarvam_moe", dtype=BFLOAT16)
    found = open_checkpoint(folder)
    plan = found.plan(make_mesh(MeshConfig(data=2, fsdp=2, expert=2)))
    rows = {row[0]: row[1:] for row in plan.table(found.source).rows}
    assert rows["decoder/moe_layers/moe/experts/w_up_EDF"] == (
        "model.layers.1.mlp.experts.0.up_proj.weight and 15 more",
        "BF16",
        "bfloat16",
        "2 x 8 x 28 x 12",
        "(None, 'expert', 'fsdp', 'tensor')",
    )
    assert rows["router_bias"][2] == "float32"
    assert rows.keys() - {"router_bias"} == set(named_leaves(load_pretrained(folder).params))


def test_rope_settings_are_written_under_both_keys(tmp_path):
    tiny_checkpoint(tmp_path / "hub", "llama llama3")
    load_pretrained(tmp_path / "hub").export(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5000.0
    assert written["rope_scaling"]["rope_type"] == written["rope_parameters"]["rope_type"] == "llama3"
    assert written["rope_scaling"]["factor"] == written["rope_parameters"]["factor"] == 4.0


@pytest.mark.parametrize(
    "moved",
    [
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_scaling": {"type": "default"}},
    ],
)
def test_theta_is_found_under_every_key(tmp_path, moved):
    folder = tiny_checkpoint(tmp_path / "hub", "llama", **moved)
    assert open_checkpoint(folder).plan().config.stack.attention.rope_theta == 5000.0


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_the_number_of_experts_has_three_names(tmp_path, name):
    values = {**hub_values("qwen3_moe"), "num_experts": None, name: 7}
    write_checkpoint(tmp_path / "hub", values, random_tensors(hub_values("qwen3_moe")))
    assert open_checkpoint(tmp_path / "hub").plan().config.moe.num_experts == 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (0,), (70,), (3, 0), (63, 130), (130, 64), (2, 129, 70)])
def test_copy_copies_transposed_tensors(shape, dtype):
    own = np.asarray(jax.random.normal(jax.random.key(0), shape[::-1], dtype)).T
    for room_dtype in (own.dtype, np.dtype(np.float32)):
        room = _aligned(shape, room_dtype)
        room[...] = np.nan
        _copy(own, room)
        np.testing.assert_array_equal(room, own.astype(room_dtype))


def test_a_cpu_takes_over_the_memory_that_was_read_into():
    """Otherwise a model is in memory twice while it is read."""
    room = _aligned((7, 100_000), np.dtype(np.float32))
    placed = jax.device_put(room, jax.devices("cpu")[0])
    assert placed.unsafe_buffer_pointer() == room.ctypes.data


def test_several_threads_read_the_same_values(tmp_path):
    folder = tiny_checkpoint(tmp_path / "hub", "qwen3_moe", files=3)
    source = open_checkpoint(folder).source
    with source.opened() as reader, ThreadPoolExecutor(4) as threads:
        found = dict(zip(source.tensors, threads.map(reader.read, source.tensors), strict=True))
    same_tensors(found, tensors_in(folder))
