"""A user's own package adds to the registries, without a change to ours."""

import dataclasses
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
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.pipeline import train_iterator
from anyexperts_jax.data.scores import chance_score, metric_label, score

PLUGINS = pathlib.Path(__file__).parent / "plugins"


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.syspath_prepend(PLUGINS)
    load_plugins(["my_experts"])
    return sys.modules["my_experts"]


def test_a_registered_dispatcher_gives_the_oracles_values(plugin):
    config = ax.AnyExpertsConfig(num_experts=4, num_virtual=1, k_min=1, k_max=3, importance_regulariser="near_half")
    keys = jax.random.split(jax.random.key(0), 5)
    x_ND, logits_NC = jax.random.normal(keys[0], (6, 8)), jax.random.normal(keys[1], (6, 5))
    weights = [jax.random.normal(key, (4, 8, 8)) for key in keys[2:]]
    plan = ax.route(config, logits_NC, jnp.ones(6))
    assert float(plan.losses["importance"]) == pytest.approx(6 * (1 / (1 + np.exp(-1.0)) - 0.5), rel=1e-5)
    mine = ax.moe_apply(x_ND, plan, *weights, dispatch="loop_over_experts", implementation="mine")
    np.testing.assert_allclose(mine, ax.moe_apply(x_ND, plan, *weights, dispatch="dense"), rtol=1e-4, atol=1e-4)


def test_a_registered_policy_gives_the_slots(plugin):
    fields = {"policy": "more_for_the_unsure", "policy_dial": 1.0}
    config = ax.AnyExpertsConfig.static_top_k(4, 3, **fields)
    plan = ax.route(config, jnp.asarray([[9.0, 0, 0, 0], [1.0, 1, 0, 0]]), jnp.zeros(2))
    assert plan.slots_N.tolist() == [1, 2]
    plan = ax.route(config, jnp.asarray([[9.0, 0, 0, 0], [1.0, 1, 0, 0]]), jnp.zeros(2), window=(2.0, 2))
    assert plan.slots_N.tolist() == [2, 2]


def test_a_registered_metric_scores_answers(plugin):
    config = DataConfig(domains=("nlp",), metrics=("nlp=first_letter",))
    metric = config.metric_names()["nlp"]
    assert [score(metric, said, "seven") for said in ("six", "nine")] == [1, 0]
    assert chance_score(metric, ["six", "seven", "nine"]) == pytest.approx(2 / 3)
    assert metric_label(metric) == "first letter"


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
        (["--set", "model.stack.execution.dispatch=nobody"], "dispatch='nobody' is unknown; valid: auto, blocks"),
        (["--set", "model.stack.execution.implementation=nobody"], "implementation='nobody' is unknown; valid: refer"),
    ],
)
def test_an_unknown_name_is_refused_before_the_run_starts(arguments, message, tmp_path, capsys):
    assert main(["train", "smoke", "--run", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


BROKEN = {
    "import anyexperts_jax as ax\nax.ROUTERS.register('linear', None)\n": (
        "broken_plugin.py:2: router 'linear' is registered already; choose another name"
    ),
    "\nint('x')\n": "broken_plugin.py:2: ValueError: invalid literal for int() with base 10: 'x'",
    "import os\nos.nothing\n": "broken_plugin.py:2: AttributeError: module 'os' has no attribute 'nothing'",
    "{}['key']\n": "broken_plugin.py:1: KeyError: 'key'",
    "assert 1 > 2, 'two\\nlines'\n": "broken_plugin.py:1: AssertionError: two lines",
    "open('/no/such/file')\n": "broken_plugin.py:1: FileNotFoundError: [Errno 2] No such file or directory: '/no/su",
    "class Own(Exception): pass\n\nraise Own('mine')\n": "broken_plugin.py:3: Own: mine",
    "import sys\nsys.exit(3)\n": "broken_plugin.py:2: SystemExit: 3",
    "x = (\n": "broken_plugin.py:1: SyntaxError: '(' was never closed",
    "import no_such_module\n": "broken_plugin.py:1: ModuleNotFoundError: No module named 'no_such_module'",
    "import numpy\nnumpy.zeros(-1)\n": "broken_plugin.py:2: ValueError: negative dimensions are not allowed",
    "import json\njson.loads('{')\n": "broken_plugin.py:2: JSONDecodeError: Expecting property name",
    "import broken_helper\n": "broken_helper.py:3: ZeroDivisionError: division by zero",
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_helper.py").write_text("\n\n1 / 0\n")
    yield tmp_path
    for name in ("broken_plugin", "broken_helper"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("source", "message"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_plugin_that_fails_is_one_line(broken, source, message, capsys):
    (broken / "broken_plugin.py").write_text(source)
    assert main(["train", "smoke", "--run", str(broken / "run"), "--plugin", "broken_plugin"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"anyexperts: config smoke: plugin 'broken_plugin' fails at {broken}/{message}")
    assert said.count("\n") == 1
    assert not (broken / "run").exists()


def test_an_error_in_a_registered_module_names_its_line(broken):
    with pytest.raises(ax.UserError) as error:
        Registry("thing", {"late": "broken_helper:x"})["late"]
    said = f"thing 'late' fails at {broken}/broken_helper.py:3: ZeroDivisionError: division by zero"
    assert str(error.value) == said


def test_worker_processes_import_the_plugins(plugin):
    """A worker process knows only the domains that its own imports register."""
    config = DataConfig(domains=("coins",), encoding=EncodingSpec(max_patches=0, max_frames=0), threads=0)
    iterators = [
        train_iterator(dataclasses.replace(config, workers=workers), 2, plugins=["my_experts"]) for workers in (0, 1)
    ]
    ours, theirs = (next(iterator) for iterator in iterators)
    np.testing.assert_array_equal(ours.tokens_BT, theirs.tokens_BT)
    iterators[1].close()


def test_a_registry_imports_an_entry_when_it_is_used():
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
