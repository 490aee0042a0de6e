"""A user's own package adds to the registries, without a change to ours."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anyexperts_jax as ax
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.plugins import load_plugins
from anyexperts_jax.core.registry import Registry, registers

PLUGINS = pathlib.Path(__file__).parent / "plugins"


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.syspath_prepend(PLUGINS)
    load_plugins(["my_experts"])
    return sys.modules["my_experts"]


def test_a_dispatcher_of_ones_own_gives_the_oracles_values(plugin):
    config = ax.AnyExpertsConfig(num_experts=4, num_virtual=1, k_min=1, k_max=3, importance_regulariser="near_half")
    keys = jax.random.split(jax.random.key(0), 5)
    x_ND, logits_NC = jax.random.normal(keys[0], (6, 8)), jax.random.normal(keys[1], (6, 5))
    weights = [jax.random.normal(key, (4, 8, 8)) for key in keys[2:]]
    plan = ax.route(config, logits_NC, jnp.ones(6))
    assert float(plan.losses["importance"]) == pytest.approx(6 * (1 / (1 + np.exp(-1.0)) - 0.5), rel=1e-5)
    mine = ax.moe_apply(x_ND, plan, *weights, dispatch="loop_over_experts", implementation="mine")
    np.testing.assert_allclose(mine, ax.moe_apply(x_ND, plan, *weights, dispatch="dense"), rtol=1e-4, atol=1e-4)


def _pairs(folder):
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.csv").write_text("".join(f"say {word},{word}\n" for word in ("one", "two", "six", "ten")))
    return folder


@pytest.mark.slow
def test_ten_steps_through_the_command_line(plugin, tmp_path):
    mine = [
        "model.moe.router=by_size",
        "model.moe.switches.importance_regulariser=near_half",
        "model.stack.execution.dispatch=loop_over_experts",
        "model.stack.execution.implementation=mine",
        'data.domains=["coins", "pairs"]',
        f"data.folders=pairs={_pairs(tmp_path / 'pairs')}",
        "train.steps=10",
        "train.eval_examples=4",
    ]
    settings = [word for setting in mine for word in ("--set", setting)]
    run = tmp_path / "run"
    assert main(["train", "smoke", "--plugin", "my_experts", "--run", str(run), *settings]) == 0
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["plugins"] == ["my_experts"]
    assert recorded["model"]["moe"]["router"] == "by_size"
    assert main(["evaluate", str(run), "--examples", "2", "--calibration-examples", "2"]) == 0
    domains = json.loads((run / "evaluation.json").read_text())["budgets"][0]["scores"]
    assert [score["domain"] for score in domains] == ["coins", "pairs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plugin", "no_such_module"], "plugin 'no_such_module' cannot be imported: No module named"),
        (["--set", "model.moe.router=nobody"], "router='nobody' is unknown; valid: linear, per_modality"),
        (["--set", "model.stack.execution.dispatch=nobody"], "dispatch='nobody' is unknown; valid: blocks, capacity"),
        (["--set", "model.stack.execution.implementation=nobody"], "implementation='nobody' is unknown; valid: refer"),
    ],
)
def test_an_unknown_name_is_refused_before_there_is_a_run(arguments, message, tmp_path, capsys):
    assert main(["train", "smoke", "--run", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_plugin_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_plugin.py").write_text("import anyexperts_jax as ax\nax.ROUTERS.register('linear', None)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["train", "smoke", "--run", str(tmp_path / "run"), "--plugin", "broken_plugin"]) == 2
    assert "router 'linear' is registered already; choose another name" in capsys.readouterr().err


def test_a_registry_loads_what_it_names_when_it_is_asked_for():
    things = Registry("thing", {"here": 1, "there": "math:pi", "gone": "no_such_module:x", "bare": "math:nothing"})
    assert (things["here"], things["there"]) == (1, pytest.approx(3.14159, abs=1e-5))
    assert registers(things, "new")(2) == 2
    assert things.names() == ("here", "there", "gone", "bare", "new")
    for name, message in {
        "else": "thing='else' is unknown; valid: here, there, gone, bare, new",
        "gone": "thing 'gone' cannot be loaded from no_such_module:x: No module named 'no_such_module'",
        "bare": "thing 'bare': module math defines no 'nothing'",
    }.items():
        with pytest.raises(ax.UserError) as error:
            things[name]
        assert str(error.value) == message
