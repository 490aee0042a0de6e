import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from train.stand_in import MODEL, run_config, text_batch

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.evolution import stages
from anyexperts_jax.evolution.config import (
    EvolutionConfig,
    EvolveConfig,
    EvolveRun,
    StageConfig,
    UpcycleConfig,
    evolve_preset_names,
    load_evolve_config,
)
from anyexperts_jax.evolution.single_expert import single_expert_apply
from anyexperts_jax.evolution.stages import evolve
from anyexperts_jax.models.init import abstract_params, named_leaves
from anyexperts_jax.models.paths import leaves_of
from anyexperts_jax.models.presets import dense_twin
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.train.run_dir import load_run
from anyexperts_jax.train.run_log import read_records

TWO_LAYERS = dataclasses.replace(MODEL.stack, num_layers=2, execution=Execution("exchange"))
DENSE = dense_twin(dataclasses.replace(MODEL, stack=TWO_LAYERS))
STAGE = StageConfig(steps=4, lr=1e-2, batch_size=8, final_lr_fraction=0.5)
TOP_1 = AnyExpertsConfig.static_top_k(
    4, 1, router="dtr", router_hidden=4, router_rank=2, normalisation="all_raw_gradient"
)
MESH = MeshConfig(data=2, fsdp=2, expert=2)


def a_run(mesh=MESH, moe=TOP_1, routing=STAGE, **fields) -> EvolveRun:
    base = run_config(model=DENSE, checkpoint_every=2, eval_every=4, steps=4, mesh=mesh)
    return EvolveRun(
        base, EvolveConfig(**{"moe": moe, "warm_up": STAGE, "evolving": STAGE, "routing": routing, **fields})
    )


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Caches compiled programs, because all runs here compile the same few."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All three stages on a mesh of eight devices, once."""
    root = tmp_path_factory.mktemp("evolve") / "run"
    return root, evolve(a_run(), root, progress=False)


def trained(root, stage):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(load_run(root / stage, "last")[1]).items()}


def chosen(flags):
    return {name for name, flag in named_leaves(flags).items() if flag}


@pytest.mark.slow
def test_parameters_that_a_stage_does_not_train_are_unchanged(done):
    root, results = done
    assert set(results) == {"warm_up", "evolving", "routing"}
    model = a_run().model
    experts, routers = chosen(leaves_of(model, "expert")), chosen(leaves_of(model, "router"))
    assert len(experts) == 3
    assert len(routers) == 7
    dense, evolved, routed = (trained(root, stage) for stage in ("warm_up", "evolving", "routing"))
    for name, leaf in routed.items():
        same = np.array_equal(leaf.view(np.uint8), evolved[name].view(np.uint8))
        assert same == (name not in routers), name
    for name in set(dense) & set(evolved):
        np.testing.assert_array_equal(dense[name], evolved[name])
    block = "decoder/moe_layers/before_0/mlp/up/kernel"
    np.testing.assert_array_equal(evolved[block][0], dense["decoder/dense_0/mlp/up/kernel"])
    for name in experts:
        every = [dense["decoder/dense_1/mlp/{}/kernel".format(name.split("_")[-2])]]
        every += list(evolved[name][0])
        for i in range(5):
            assert all(not np.array_equal(every[i], every[j]) for j in range(i)), name


@pytest.mark.slow
def test_the_optimiser_has_state_only_for_trained_parameters(done):
    root, _ = done
    run = a_run()
    for stage, wanted in (("evolving", leaves_of(run.model, "expert")), ("routing", leaves_of(run.model, "router"))):
        recipe = stages.stage_recipe(run, root, stage)
        params = abstract_params(run.model)
        state = jax.eval_shape(recipe.optimizer.init, params)
        sizes = {name: leaf.size for name, leaf in named_leaves(params).items()}
        count = sum(sizes[name] for name in chosen(wanted)) // (4 if stage == "evolving" else 1)
        moments = sum(leaf.size for leaf in jax.tree.leaves(state) if np.issubdtype(leaf.dtype, np.floating))
        assert moments == 2 * count  # Adam's two, of one expert of four in stage II


def test_stage_three_trains_routers_or_routers_and_experts_or_everything(tmp_path):
    model = a_run().model
    experts, routers = chosen(leaves_of(model, "expert")), chosen(leaves_of(model, "router"))
    for trains, wanted in (("router", routers), ("moe", routers | experts)):
        recipe = stages.stage_recipe(a_run(trains=trains), tmp_path, "routing")
        assert chosen(recipe.trainable) == wanted
    everything = stages.stage_recipe(a_run(trains="all"), tmp_path, "routing")
    assert everything.trainable is None
    assert everything.optimizer is None
    copies = a_run(evolving=dataclasses.replace(STAGE, steps=0))
    with pytest.raises(UserError, match="stage routing starts from the end of stage warm_up"):
        evolve(copies, tmp_path, ("routing",), progress=False)


@pytest.mark.slow
def test_distances_and_each_experts_loss_are_logged(done):
    root, _ = done
    record = [r for r in read_records(root / "evolving" / "metrics.jsonl") if r["kind"] == "validation"][-1]
    experts = record["experts"]
    assert set(experts) == {f"expert_{n}" for n in (1, 2, 3, 4)}
    assert experts["expert_1"]["distance"] == 0
    np.testing.assert_allclose(experts["expert_1"]["loss"], record["loss"], rtol=1e-5)  # stage II runs expert 1
    for n in (2, 3, 4):
        assert 0 < experts[f"expert_{n}"]["distance"] < 0.5
        assert experts[f"expert_{n}"]["loss"] != experts["expert_1"]["loss"]
    assert "experts" in read_records(root / "routing" / "metrics.jsonl")[-1]


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_and_a_stopped_one_resumes(done, tmp_path):
    root, results = done
    again = evolve(a_run(), root, progress=False)
    assert again["routing"].validation == results["routing"].validation
    stopped = tmp_path / "stopped"
    shutil.copytree(root, stopped)
    shutil.rmtree(stopped / "routing")
    shutil.rmtree(stopped / "evolving" / "checkpoints" / "4")  # as if killed after step 2 of stage II
    resumed = evolve(a_run(), stopped, progress=False)
    assert resumed["routing"].validation["loss"] == results["routing"].validation["loss"]
    for name, leaf in trained(root, "routing").items():
        np.testing.assert_array_equal(leaf, trained(stopped, "routing")[name])


@pytest.mark.slow
def test_a_changed_config_or_a_missing_stage_is_a_clear_error(done, tmp_path):
    root, _ = done
    with pytest.raises(
        UserError, match=r"has begun warm_up, evolving, routing with .*evolve.evolution.mode \('lag', was"
    ):
        evolve(a_run(evolution=EvolutionConfig(mode="lag")), root, progress=False)
    with pytest.raises(UserError, match=r"evolve.routing.lr \(1.0, was 0.01\); take another --run"):
        evolve(a_run(routing=dataclasses.replace(STAGE, lr=1.0)), root, progress=False)
    with pytest.raises(UserError, match=r"stage routing starts from the end of stage evolving, step 4 .*no checkpoint"):
        evolve(a_run(), tmp_path / "new", ("routing",), progress=False)
    with pytest.raises(UserError, match="stage='third' is unknown; valid: warm_up, evolving, routing"):
        evolve(a_run(), tmp_path / "new", ("third",), progress=False)
    half = tmp_path / "half"
    shutil.copytree(root, half)
    shutil.rmtree(half / "routing")
    shutil.rmtree(half / "evolving")
    shutil.rmtree(half / "warm_up" / "checkpoints" / "4")
    with pytest.raises(UserError, match=r"stage evolving starts from .* it stopped at step 2; run that stage"):
        evolve(a_run(), half, ("evolving",), progress=False)


@pytest.mark.slow
def test_stage_two_has_the_dense_models_loss_before_its_first_step(done):
    """The model with expert 1 alone is the dense one, and no other expert or router has a gradient."""
    root, _ = done
    _, params, bias = load_run(root / "evolving", "last")
    model = a_run().model
    apply = single_expert_apply(model)
    batch = text_batch()
    grads = jax.jit(jax.grad(lambda p: apply(p, batch, bias, None, None)[0].sum()))(params)
    blocks = grads["decoder"]["moe_layers"]["moe"]
    for name, grad in blocks["experts"].items():
        assert float(np.abs(grad[:, 0]).max()) > 0, name
        np.testing.assert_array_equal(grad[:, 1:], 0.0)
    assert all(float(np.abs(grad).max()) == 0 for grad in jax.tree.leaves(blocks["router"]))


@pytest.mark.slow
def test_stage_three_may_have_another_routing_policy_than_stage_two(done, tmp_path):
    """Stage II uses expert 1 only, so the routers get their usual initial values and everything else is kept."""
    root, _ = done
    linear = dataclasses.replace(TOP_1, router="linear")
    (tmp_path / "warm_up").symlink_to(root / "warm_up")
    (tmp_path / "evolving").symlink_to(root / "evolving")
    mesh = make_mesh(MESH)
    start = stages.stage_recipe(a_run(moe=linear), tmp_path, "routing").start(mesh)
    evolved = trained(root, "evolving")
    fresh = stages.upcycle_params(
        load_run(root / "warm_up", "last", mesh)[1], a_run(moe=linear).model, UpcycleConfig(), jax.random.key(0), mesh
    )
    routers = chosen(leaves_of(a_run(moe=linear).model, "router"))
    assert routers == {"decoder/moe_layers/moe/router/kernel"}
    for name, leaf in named_leaves(start).items():
        wanted = named_leaves(fresh)[name] if name in routers else evolved[name]
        np.testing.assert_array_equal(leaf, wanted, err_msg=name)
    variable = AnyExpertsConfig(num_experts=4, num_virtual=1, k_min=1, k_max=3)
    slots = stages.stage_recipe(a_run(moe=variable), tmp_path, "routing").start(mesh)
    assert any("importance" in name for name in named_leaves(slots))
    more = dataclasses.replace(TOP_1, num_experts=5)
    other = a_run(moe=more, upcycle=UpcycleConfig(num_experts=5), evolution=EvolutionConfig(fixed_beta=0.5))
    with pytest.raises(UserError, match="is a different one: "):
        stages.stage_recipe(other, tmp_path, "routing").start(mesh)


@pytest.mark.slow
def test_experts_can_evolve_in_stage_one_while_everything_else_trains(tmp_path):
    none = dataclasses.replace(STAGE, steps=0)
    run = a_run(mesh=MeshConfig(data=8), evolve_in_warm_up=True, evolving=none, routing=none)
    assert run.stages == ("warm_up",)
    evolve(run, tmp_path, progress=False)
    after = trained(tmp_path, "warm_up")
    begun = stages.stage_recipe(run, tmp_path, "warm_up").start(make_mesh(MeshConfig(data=8)))
    experts, routers = chosen(leaves_of(run.model, "expert")), chosen(leaves_of(run.model, "router"))
    for name, leaf in named_leaves(begun).items():
        assert np.array_equal(after[name], leaf) == (name in routers), name
    for name in experts:
        assert np.array_equal(named_leaves(begun)[name][:, 0], named_leaves(begun)[name][:, 3])
        assert not np.array_equal(after[name][:, 0], after[name][:, 3])
    (record,) = [r for r in read_records(tmp_path / "warm_up" / "metrics.jsonl") if r["kind"] == "validation"]
    assert 0 < record["experts"]["expert_2"]["distance"] < 0.5
    with pytest.raises(UserError, match="evolve_in_warm_up=True leaves nothing"):
        a_run(evolve_in_warm_up=True)


def test_presets_and_their_files_are_strict(tmp_path):
    assert evolve_preset_names() == ["evolve_smoke", "evolve_tiny"]
    for name in evolve_preset_names():
        run = load_evolve_config(name)
        assert run.model.moe.router == "dtr"
        assert run.stage("routing").model.stack.moe_every == 2
        path = tmp_path / "evolve.json"
        path.write_text(json.dumps(dataclasses.asdict(run)))
        assert load_evolve_config(path) == run
    assert load_evolve_config("evolve_smoke", ["evolve.trains=all"]).evolve.trains == "all"
    for override, message in (
        ("evolve.evolution.beta=1", "unknown key evolve.evolution.beta"),
        ("evolve.trains=both", "trains"),
        ("evolve.diversity=noise", "key evolve.diversity='noise' must be one of none, contrastive, local_entropy"),
        ("evolve.upcycle.num_experts=3", "evolve.moe.num_experts=4 is not evolve.upcycle.num_experts=3"),
        ("evolve.warm_up.warmup_steps=-1", "stage warm_up: optim.warmup_steps=-1"),
        ("model.stack.num_dense_layers=1", "starts from a dense model"),
    ):
        with pytest.raises(UserError, match=message):
            load_evolve_config("evolve_smoke", [override])
    with pytest.raises(UserError, match="no evolve config 'evolve_tinny'; did you mean evolve_tiny"):
        load_evolve_config("evolve_tinny")
    (tmp_path / "plain.toml").write_text('preset = "tiny"\n')
    with pytest.raises(UserError, match=r"no table \[evolve\]"):
        load_evolve_config(tmp_path / "plain.toml")


@pytest.mark.parametrize("fields", [{"distillation": 0.5}, {"loss": "dpo"}])
def test_losses_that_compare_with_the_start_are_not_for_evolve(fields):
    base = run_config(model=DENSE, mesh=MESH, start_from="run")
    train = dataclasses.replace(base.train, **fields)
    with pytest.raises(UserError, match="are not for evolve; train a run that starts from its last stage"):
        EvolveRun(dataclasses.replace(base, train=train), EvolveConfig(moe=TOP_1, warm_up=STAGE, evolving=STAGE))
