import json
import math
from types import SimpleNamespace

import jax
import pytest

from anyexperts_jax.aot import step as step_module
from anyexperts_jax.aot.gpu import missing_packages
from anyexperts_jax.aot.step import compile_step, placed_batch
from anyexperts_jax.aot.topology import slice_devices
from anyexperts_jax.cli import main as cli
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import parameter_count
from anyexperts_jax.sharding.mesh import make_mesh
from anyexperts_jax.train.config import load_config

# Set before libtpu is loaded, so that it also writes schedules for the tests that run after these.
needs_libtpu = pytest.mark.usefixtures("schedules")
EXCHANGE = ["mesh.data=-1", "mesh.expert=4", "model.stack.execution.dispatch=exchange"]


def test_the_placed_batch_matches_the_pipelines():
    config = load_config("smoke", [])
    batch = placed_batch(config.data.encoding, 8, make_mesh(config.mesh))
    assert batch.tokens_BT.shape == (8, config.data.encoding.max_length)
    assert batch.patches_BPX.shape[1:] == (config.data.encoding.max_patches, config.data.encoding.patch_features)
    assert batch.domain_B.shape == (8,)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e", "v5e:4", "v5p:4x4", "v5e:axb", "v5e:0x4", "h100:8", "h100:1x2x4"])
def test_an_invalid_topology_is_refused_with_the_known_chips(name, capsys):
    assert cli.main(["compile", "smoke", "--topology", name]) == 2
    message = capsys.readouterr().err
    assert f"topology {name!r} is not of the form CHIP:SHAPE with CHIP of v5e, v5p, v6e, tpu7x, h100" in message


def test_more_slices_than_the_mesh_has_are_refused(capsys):
    assert cli.main(["compile", "smoke", "--topology", "v5e:2x2", "--slices", "2"]) == 2
    message = "there are 2 slices, but mesh.dcn_data x mesh.dcn_fsdp = 1; set mesh.dcn_data=2"
    assert message in capsys.readouterr().err


@pytest.mark.aot
@needs_libtpu
def test_the_step_compiles_for_a_slice_and_exchanges_rows_over_the_expert_axis(tmp_path, capsys):
    settings = [argument for setting in EXCHANGE for argument in ("--set", setting)]
    path = tmp_path / "step.json"
    assert cli.main(["compile", "smoke", "--topology", "v5e:2x4", *settings, "--json", str(path)]) == 0
    step = json.loads(path.read_text())
    assert step["devices"] == 8
    assert step["mesh"] == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1, "sequence": 1}
    sent = {(row["kind"], *row["axes"]): row for row in step["collectives"]}
    # Two MoE layers: rows, ids and weights travel there, rows back, and then the gradients of all but the ids.
    assert sent["all-to-all", "expert"]["count"] == 2 * 7
    assert sent["all-to-all", "expert"]["bytes"] == 2 * exchanged_bytes(load_config("smoke", EXCHANGE))
    assert ("all-reduce", "data", "expert") in sent
    assert 0 < step["free"] < 1
    bounds = step["bounds"]
    assert step["bound"] == max(bounds["arithmetic"], bounds["hbm"], bounds["network"]) > 0
    assert len(bounds["collectives"]) == len(step["collectives"])
    assert 0 < bounds["mfu"] < 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("all-to-all", "expert padding", "arithmetic", "MFU"))


@pytest.mark.aot
@needs_libtpu
def test_by_default_no_row_travels_and_each_device_runs_the_kernels(monkeypatch):
    programs, describe = [], step_module.describe_step

    def note(*figures, program, **more):
        programs.append(program)
        return describe(*figures, program=program, **more)

    monkeypatch.setattr(step_module, "describe_step", note)
    step = compile_step(load_config("smoke", ["mesh.data=8"]), "v5e:2x4")
    assert {(row.kind, row.axes) for row in step.collectives} == {("all-reduce", ("data",))}  # gradients, statistics
    assert "tpu_custom_call" in programs[0]


def exchanged_bytes(config):
    """The bytes of one layer and device, by hand: four times the rows of every pair of devices, their ids once, their
    weights twice."""
    moe, tokens = config.model.moe, config.data.encoding.max_length  # one sequence per device
    budget = (1 - moe.rho_max) * (moe.k_min + moe.k_max) / 2
    low, high = (
        4 * (1 - math.comb(moe.num_experts * 3 // 4, k) / math.comb(moe.num_experts, k))
        for k in (math.floor(budget), math.floor(budget) + 1)
    )
    devices = low + (budget - math.floor(budget)) * (high - low)
    rows = 4 * min(tokens, math.ceil(config.model.stack.execution.capacity_factor * devices * tokens / 4))
    return rows * 4 * (4 * config.model.stack.d_model + 3 * moe.slots_bound)  # float32, int32


@pytest.mark.aot
@needs_libtpu
def test_traffic_between_slices_goes_over_dcn():
    """Every slice has all parameters, so each gradient is summed once between slices."""
    settings = [
        "mesh.data=1",
        "mesh.fsdp=2",
        "mesh.expert=2",
        "mesh.dcn_data=2",
        "model.stack.execution.dispatch=exchange",
    ]
    settings += ["model.stack.execution.implementation=xla", "model.stack.num_layers=2"]
    config = load_config("smoke", settings)
    step = compile_step(config, "v5e:2x2", slices=2)
    assert step.devices == 8
    assert step.mesh == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1, "sequence": 1}
    sent = {(row.kind, row.axes): row for row in step.collectives}
    between, size = sent["all-reduce", ("dcn",)], 4 * parameter_count(config.model)
    # Each device sends its part of the gradient, arrays filled up to tiles of 8 x 128.
    assert size / 4 <= between.bytes <= size + 4 * 8 * 128 * between.count
    assert step.bounds.between_slices > 0
    assert not any("data" in axes for _, axes in sent)


@pytest.mark.aot
def test_gpu_nodes_can_be_compiled_for():
    if missing_packages():
        pytest.skip("the GPU compilers are not installed (extra `aot-gpu`)")
    devices = slice_devices("h100:2x8")
    assert [device.process_index for device in devices] == [0] * 8 + [1] * 8
    assert devices[0].device_kind.startswith("NVIDIA H100")


def test_out_of_memory_while_compiling_is_one_line(monkeypatch):
    def refuse():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(40.17G) exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(step_module, "slice_devices", lambda topology, slices: jax.devices())
    monkeypatch.setattr(step_module, "lower_step", lambda *_: SimpleNamespace(compile=refuse))
    with pytest.raises(UserError, match=r"does not fit a device of v5e:2x4: 24\.1\d GiB more than its 16 GiB") as error:
        compile_step(load_config("smoke", []), "v5e:2x4")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mesh.data=3"], "mesh data=3 needs 3 devices, there are 8"),
        (["mesh.data=1", "mesh.fsdp=8", "model.stack.d_model=20"], "embed=20 does not split over fsdp of 8 devices"),
        (
            ["mesh.data=1", "mesh.expert=8", "model.moe.num_experts=12"],
            "expert=12 does not split over expert of 8 devices",
        ),
        (["train.batch_size=12"], r"train\.batch_size=12 does not split over 8 batch shards"),
        (["train.batch_size=8", "train.accumulation=2"], "over 8 batch shards and train.accumulation=2"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_in_one_line(settings, message, monkeypatch):
    monkeypatch.setattr(step_module, "slice_devices", lambda topology, slices: jax.devices())
    with pytest.raises(UserError, match=message) as error:
        compile_step(load_config("smoke", settings), "v5e:2x4")
    assert "\n" not in str(error.value)


@pytest.mark.aot
@needs_libtpu
def test_batches_that_do_not_split_are_refused_before_compiling():
    with pytest.raises(UserError, match=r"train\.batch_size=8 does not split over 16 batch shards"):
        compile_step(load_config("smoke", EXCHANGE), "v5e:4x4")
