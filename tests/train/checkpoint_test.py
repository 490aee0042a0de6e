import contextlib
import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.train.checkpoint import Checkpoints, require_same_run
from anyexperts_jax.train.config import TrainConfig
from anyexperts_jax.train.integrity import CHECKSUMS_NAME
from anyexperts_jax.train.optim import OptimConfig, make_optimizer
from anyexperts_jax.train.state import TrainState
from train.stand_in import linear_params, run_config

CONFIG = run_config()


def state_at(step, mesh=None) -> TrainState:
    """A state whose arrays all depend on `step`, with the table's rows split over all mesh axes."""
    params = linear_params(step)
    optimizer = make_optimizer(OptimConfig(), {"table": ("vocab", "embed")})
    state = TrainState(jnp.asarray(step, jnp.int32), params, optimizer.init(params), jnp.full((1, 5), 1.0 * step))
    state = dataclasses.replace(state, opt_state=jax.tree.map(lambda a: a + step, state.opt_state))
    if mesh is None:
        return state
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp") if mesh.shape["fsdp"] > 1 else None))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda a: jax.device_put(a, rows if a.shape == (260, 260) else whole), state)


def abstract(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def assert_same(a, b):
    chex.assert_trees_all_equal(*jax.device_get((a, b)), strict=True)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 to 3 in a directory, the last two kept."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), {"next_index": step}, CONFIG)
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def test_a_state_comes_back_bit_for_bit_with_its_data_state(saved):
    state, data_state = saved.restore(3, abstract(state_at(0)), CONFIG)
    assert_same(state, state_at(3))
    assert data_state == {"next_index": 3}
    assert saved.config(3) == CONFIG
    params, bias = saved.restore_model(2, abstract(state_at(0).params), abstract(state_at(0).router_bias_LC))
    assert_same((params, bias), (state_at(2).params, state_at(2).router_bias_LC))


def test_a_state_moves_to_another_mesh(tmp_path):
    before, after = make_mesh(MeshConfig(data=8)), make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_at(4, before), {}, CONFIG)
    checkpoints.wait()
    target = state_at(0, after)
    state, _ = checkpoints.restore(4, abstract(target), CONFIG)
    assert_same(state, state_at(4))
    assert state.params["table"].sharding == target.params["table"].sharding
    assert {shard.data.shape for shard in state.params["table"].addressable_shards} == {(65, 260)}
    checkpoints.close()


def test_a_save_compiles_nothing_for_small_arrays_that_devices_have_copies_of(tmp_path, caplog):
    """Devices write large arrays in parts, each sliced by its own program."""
    whole = NamedSharding(make_mesh(MeshConfig(data=8)), PartitionSpec())
    for rows, programs in ((256, 0), (2048, 8)):  # rows of 4 KiB, so 8 parts of 128 KiB or of 1 MiB
        state = state_at(rows, whole.mesh)
        state = dataclasses.replace(state, params=jax.device_put({"table": jnp.arange(rows * 1024.0)}, whole))
        checkpoints = Checkpoints(tmp_path / str(rows))
        caplog.clear()
        with jax.log_compiles():
            checkpoints.save(state, {}, CONFIG)
        checkpoints.wait()
        assert caplog.text.count("Finished XLA compilation") == programs
        restored, _ = checkpoints.restore(rows, abstract(state), CONFIG)
        assert_same(restored, state)
        checkpoints.close()


def test_a_checkpoint_of_a_version_that_wrote_all_copies_in_parts_is_read(saved, tmp_path):
    plain = ocp.CheckpointManager(tmp_path / "plain")
    state = state_at(7)
    trees = {
        "params": state.params,
        "router_bias": {"router_bias_LC": state.router_bias_LC},
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }
    plain.save(7, args=ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in trees.items()}))
    plain.close()
    for name in trees:
        shutil.rmtree(saved.directory / "3" / name)
        shutil.copytree(tmp_path / "plain" / "7" / name, saved.directory / "3" / name)
    (saved.directory / "3" / CHECKSUMS_NAME).unlink()  # that version wrote none
    assert_same(saved.restore(3, abstract(state_at(0)), CONFIG)[0], state)


def test_the_last_and_the_best_are_kept_over_restarts(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)):
        checkpoints = Checkpoints(tmp_path, keep_last=2)
        checkpoints.save(state_at(step), {}, CONFIG, *([] if loss is None else [loss]))
        checkpoints.wait()
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert (checkpoints.steps, checkpoints.best, checkpoints.latest) == ([2, 4, 5], 2, 5)
    checkpoints.close()


def test_a_kill_while_an_old_checkpoint_is_removed_damages_none(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    with monkeypatch.context() as killed, contextlib.closing(Checkpoints(folder)) as checkpoints:
        killed.setattr(Checkpoints, "_remove_deleted", lambda self: None)
        for step, loss in ((1, 2.0), (2, 1.0)):
            checkpoints.save(state_at(step), {}, CONFIG, validation_loss=loss)
        checkpoints.wait()
    (half,) = (folder / "deleted").iterdir()
    shutil.rmtree(half / "metrics")  # what the killed process had removed of it
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        assert checkpoints.steps == [2]
    assert half.exists()
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.steps == [2]
        assert_same(checkpoints.restore(2, abstract(state_at(0)), CONFIG)[0], state_at(2))
    assert not half.exists()


def test_a_save_under_way_is_not_touched_by_the_next_step(tmp_path):
    """The step donates its state: the save must hold a copy of its own."""
    size = 4_000_000
    state = dataclasses.replace(state_at(1), params={"table": jnp.arange(size, dtype=jnp.float32)})
    state = dataclasses.replace(state, opt_state=())
    target = abstract(state)
    step = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {}, CONFIG)
    for _ in range(3):
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, target, CONFIG)
    np.testing.assert_array_equal(restored.params["table"], np.arange(size, dtype=np.float32))
    checkpoints.close()


def cut_arrays_short(step_dir):
    for path in (step_dir / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize(
    "damage",
    [
        cut_arrays_short,
        lambda step_dir: shutil.rmtree(step_dir / "optimizer"),
        lambda step_dir: (step_dir / "config" / "metadata").write_text("{"),
        lambda step_dir: (step_dir / "params" / "manifest.ocdbt").unlink(),
        lambda step_dir: (step_dir / "data" / "metadata").unlink(),
        lambda step_dir: (step_dir / "router_bias" / "_METADATA").write_text("[]"),
        lambda step_dir: (step_dir / "metrics" / "metrics").write_text('{"validation_loss": 1'),
        lambda step_dir: (step_dir / "metrics" / "metrics").write_bytes(b""),
        lambda step_dir: (step_dir / "metrics" / "metrics").write_text("{}"),
    ],
    ids=[
        "arrays cut short",
        "no optimizer",
        "config cut short",
        "no manifest",
        "no data state",
        "another's metadata",
        "validation loss cut short",
        "validation loss empty",
        "no validation loss",
    ],
)
@pytest.mark.parametrize("checksums", [True, False], ids=["with checksums", "of a version without checksums"])
def test_a_damaged_checkpoint_is_one_line_that_says_how_to_go_on(saved, damage, checksums, capfd):
    directory = saved.directory
    damage(directory / "3")
    if not checksums:
        (directory / "3" / CHECKSUMS_NAME).unlink()
    message = r"checkpoint 3 in .*checkpoints is unreadable .* move .*/3 away to resume from step 2"
    with pytest.raises(UserError, match=message) as error, opened(directory) as checkpoints:
        checkpoints.restore(3, abstract(state_at(0)), CONFIG)
    assert "\n" not in str(error.value)
    assert f"({directory / '3'}/" in str(error.value), "the line names what is damaged"
    assert capfd.readouterr().err == "", "and nothing else is said"
    (directory / "3").rename(directory.parent / "away")
    with opened(directory) as checkpoints:
        assert checkpoints.latest == 2
        assert_same(checkpoints.restore(2, abstract(state_at(0)), CONFIG)[0], state_at(2))


def opened(directory):
    """Opens the checkpoints as the next process would."""
    return contextlib.closing(Checkpoints(directory, keep_last=2))


def test_a_missing_checkpoint_is_named(saved):
    with pytest.raises(UserError, match=r"checkpoint 7 in .* is unreadable"):
        saved.restore(7, abstract(state_at(0)), CONFIG)


def test_a_checkpoint_of_another_configuration_is_refused_by_key(saved):
    other = run_config(seed=5, optim=OptimConfig(lr=0.5, warmup_steps=2))
    message = r"checkpoint 3 in .* is of another configuration: optim\.lr \(0\.5, was 0\.01\), seed \(5, was 0\)$"
    with pytest.raises(UserError, match=message):
        saved.restore(3, abstract(state_at(0)), other)


def test_what_does_not_change_the_steps_may_differ():
    free = dataclasses.asdict(CONFIG.train) | {"steps": 9, "keep_last": 7, "log_every": 2, "on_nonfinite": "skip"}
    other = dataclasses.replace(CONFIG, train=TrainConfig(**free), mesh=MeshConfig(data=2, fsdp=4))
    assert sorted(require_same_run(other, CONFIG, "the run")) == [
        "mesh.data", "mesh.fsdp", "train.keep_last", "train.log_every", "train.on_nonfinite", "train.steps",
    ]  # fmt: skip
    batch = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=16))
    with pytest.raises(UserError, match=r"^the run is of another configuration: train\.batch_size \(16, was 8\)$"):
        require_same_run(batch, CONFIG, "the run")


def test_many_differences_are_counted_not_listed():
    changes = {"lr": 0.5, "weight_decay": 0.5, "b1": 0.5, "b2": 0.5, "eps": 0.5, "clip_norm": 0.5}
    other = dataclasses.replace(CONFIG, optim=OptimConfig(warmup_steps=3, **changes))
    with pytest.raises(UserError, match=r"clip_norm \(0\.5, was 1\.0\)$|and 1 more$"):
        require_same_run(other, CONFIG, "the run")
