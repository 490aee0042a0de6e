"""`anyexperts compile` of a published model from its config.json alone."""

import dataclasses
import json

import jax
import pytest
from pretrained.tiny_hub import hub_values
from pretrained.tiny_vl import vl_values

from anyexperts_jax.aot.decode import compile_decode, read_bytes
from anyexperts_jax.aot.published import Slots, is_published_config, published_run
from anyexperts_jax.aot.topology import slice_devices
from anyexperts_jax.cli import main as cli
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import parameter_count
from anyexperts_jax.pretrained.attach import attach
from anyexperts_jax.pretrained.decode import cache_sharding
from anyexperts_jax.pretrained.random_model import random_model
from anyexperts_jax.sharding.mesh import make_mesh
from anyexperts_jax.sharding.placement import Placement

SLOTS = Slots(k_min=2, k_max=4, num_virtual=2)
MOE = hub_values("qwen3_moe", vocab_size=300, eos_token_id=299, torch_dtype="bfloat16")


def write(folder, values):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def test_the_model_equals_the_loaded_one_with_slots_attached(tmp_path):
    found = published_run(write(tmp_path, MOE), ["train.batch_size=4"], SLOTS)
    slots = attach(random_model(MOE), **dataclasses.asdict(SLOTS))
    assert found.model.moe == slots.config.moe
    assert parameter_count(found.model) == parameter_count(slots.config)
    assert found.run.model == found.model
    assert (found.model.stack.dtype, found.model.stack.param_dtype) == ("bfloat16", "float32")
    assert found.run.train.batch_size == 4
    decoded = published_run(write(tmp_path, MOE), trains=False).model
    assert decoded.stack.param_dtype == "bfloat16"
    assert decoded.moe.k_max == 3


def test_of_a_vision_model_only_the_decoder_is_trained(tmp_path):
    found = published_run(write(tmp_path, vl_values()), ["model.stack.remat=full"], SLOTS)
    assert found.run.model.vision_tower is None
    assert found.model.vision_tower is not None
    assert found.model.stack.attention.mrope_section == (2, 2, 2)
    assert found.model.stack.remat == "full"
    assert parameter_count(found.model) > parameter_count(found.run.model)


def test_a_published_configuration_is_recognised(tmp_path):
    folder = write(tmp_path / "hub", MOE)
    assert is_published_config(folder)
    assert is_published_config(f"{folder}/config.json")
    assert not is_published_config("tiny")
    assert not is_published_config(str(tmp_path))
    assert not is_published_config(write(tmp_path / "run", {"model": {}}))
    (tmp_path / "hub/model.safetensors").touch()
    assert not is_published_config(folder), "a checkpoint with its weights is read as one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tiny", "--decode"], "--decode: only with a published model's config.json"),
        (["HUB", "--k-min", "2"], "slots are attached with --k-min and --k-max"),
        (["HUB", "--virtual", "2"], "slots are attached with --k-min and --k-max"),
        (["HUB", "--k-min", "4", "--k-max", "6"], "never gives the 3 experts"),
        (["HUB", "--decode", "--search"], "--decode: not with --search or --slices"),
        (["HUB", "--set", "model.stack.width=3"], "width"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, capsys, options, message):
    folder = write(tmp_path, MOE)
    words = [folder if word == "HUB" else word for word in options]
    assert cli.main(["compile", *words, "--topology", "v5p:2x2x1"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) == 1


def test_a_decode_step_reads_the_experts_that_its_rows_hit(tmp_path):
    model = published_run(write(tmp_path, MOE), trains=False).model
    mesh = make_mesh(published_run(write(tmp_path, MOE)).run.mesh, jax.devices()[:1])
    one, many, twice = (read_bytes(model, mesh, rows, 16) for rows in (1, 2000, 4000))
    stack = model.stack
    expert = 3 * stack.d_model * stack.expert_d_ff * 2 * stack.num_moe_layers
    cache = 2 * stack.num_layers * 16 * stack.attention.num_kv_heads * stack.attention.head_dim * 2
    assert twice - many == pytest.approx(2000 * cache)
    assert many - one == pytest.approx(1999 * cache + (7 - 3) * expert)


def test_a_cache_is_sharded_over_rows_and_heads(tmp_path):
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    run = published_run(write(tmp_path, MOE), ["mesh.tensor=2", "mesh.data=4"], trains=False).run
    placement = Placement(make_mesh(run.mesh))
    assert cache_sharding(placement, (3, 8, 16, 2, 10)).shard_shape((3, 8, 16, 2, 10)) == (3, 2, 16, 1, 10)
    assert cache_sharding(placement, (3, 2, 3, 16, 3, 10)).is_fully_replicated
    alone = Placement(make_mesh(dataclasses.replace(run.mesh, tensor=1, data=1), jax.devices()[:1]))
    assert len(cache_sharding(alone, (1, 8, 16, 2, 10)).device_set) == 1


@pytest.mark.aot
@pytest.mark.usefixtures("schedules")
@pytest.mark.parametrize("values", [MOE, vl_values()], ids=["text", "sees"])
def test_both_steps_compile_from_the_configuration_alone(tmp_path, capsys, values):
    common = ["compile", write(tmp_path, values), "--topology", "v5e:2x2", "--k-min", "2", "--k-max", "4"]
    sizes = ["--set", "data.encoding.max_length=32", "--set", "mesh.data=4", "--set", "train.batch_size=8"]
    assert cli.main([*common, *sizes, "--decode", "--json", str(tmp_path / "step.json")]) == 0
    step = json.loads((tmp_path / "step.json").read_text())
    assert (step["rows"], step["length"], step["devices"]) == (8, 32, 4)
    assert step["free"] == pytest.approx(1 - sum(step["memory"].values()) / step["hbm"])
    assert "A token for each of 8 rows" in capsys.readouterr().out
    assert cli.main([*common, *sizes]) == 0
    assert "Matmuls of a step" in capsys.readouterr().out


@pytest.mark.aot
@pytest.mark.usefixtures("schedules")
def test_rows_that_do_not_split_are_refused(tmp_path):
    found = published_run(write(tmp_path, MOE), ["train.batch_size=6"], trains=False)
    assert len(slice_devices("v5e:2x2")) == 4
    with pytest.raises(UserError, match=r"train\.batch_size=6 does not split over 4"):
        compile_decode(found.run, found.model, "v5e:2x2")
