import dataclasses
import json

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.presets import model_preset
from anyexperts_jax.train.config import RunConfig, TrainConfig, from_json, load_config, preset_names, to_json
from anyexperts_jax.train.optim import OptimConfig
from anyexperts_jax.train.strict import differing_keys
from train.stand_in import MODEL, run_config


@pytest.mark.parametrize("name", preset_names())
def test_packaged_configs_load_and_survive_json(name):
    config = load_config(name)
    again = from_json(to_json(config))
    assert again == config
    assert differing_keys(config, again) == {}


def test_the_packaged_configs_are_these():
    assert preset_names() == ["small", "smoke", "tiny"]


def test_overrides_are_toml_values_or_words():
    config = load_config(
        "tiny",
        ["optim.lr=2e-3", "model.moe.switches.iar=off", "data.levels=[3, 2]", "train.steps=5_000", "seed = 7"],
    )
    assert (config.optim.lr, config.model.moe.switches.iar, config.train.steps, config.seed) == (2e-3, "off", 5000, 7)
    assert config.data.levels == (3, 2)


def test_a_file_overrides_parts_of_a_model_preset(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "tiny"\n[model.stack]\nd_model = 64\n[train]\nbatch_size = 4\n')
    config = load_config(path, ["train.batch_size=2"])
    tiny = model_preset("tiny")
    assert config.model == dataclasses.replace(tiny, stack=dataclasses.replace(tiny.stack, d_model=64))
    assert (config.train, config.optim) == (TrainConfig(batch_size=2), OptimConfig())


def test_a_run_with_a_table_of_places_is_refused_with_what_to_do(tmp_path):
    """A config.json of the version that numbered the places of patches with a single index."""
    values = json.loads(to_json(run_config()))
    values["model"]["vision"] = {"max_places": 36}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config\.json: key model\.vision\.max_places is gone: .*trained again$"):
        load_config(path)


def test_a_runs_json_loads_as_a_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(run_config(steps=9)))
    assert load_config(path, ["seed=3"]) == run_config(steps=9, seed=3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], r"^config tiny: unknown key optim\.lrr; did you mean lr\? valid: lr, warmup_steps"),
        (["model.moe.rho_maxx=1"], r"unknown key model\.moe\.rho_maxx; did you mean rho_max\?"),
        (
            ["optm.lr=1"],
            r"unknown key optm; did you mean optim\? valid: model, data, optim, train, mesh, runtime, seed",
        ),
        (["train.steps=many"], r"key train\.steps='many' must be int"),
        (["train.steps=0"], r"train\.steps=0 must be >= 1"),
        (["train.on_nonfinite=halt"], r"key train\.on_nonfinite='halt' must be one of stop, skip"),
        (["model.moe.switches.iar=sideways"], "iar.*sideways.* add, multiply_logits"),
        (["model.moe.k_min=20"], r"k_min=20"),
        (["train.batch_size=6", "train.accumulation=4"], r"train\.accumulation=4 must divide train\.batch_size=6"),
        (["train.eval_every=70", "train.checkpoint_every=50"], "eval_every=70 must be a multiple of"),
        (["optim.warmup_steps=90", "train.steps=90"], r"warmup_steps=90 must be below train\.steps=90"),
        (["preset=tinny"], "model preset='tinny' is unknown; valid: tiny, tiny_dense, small, ling_mini_2"),
        (["model.max_length=64"], r"max_length=\d+ is longer than the model's max_length=64"),
        (["model.vision.max_places=72"], r"key model\.vision\.max_places is gone: a patch has a row and a column now"),
        (
            ["data.packing=first_fit", "model.moe.switches.balance_scope=sequence"],
            r"packing='first_fit' with model\.moe\.switches\.balance_scope='sequence': that balance loss is computed",
        ),
        (["mesh.data=0"], r"mesh\.data=0 must be >= 1"),
        (["seed=-1"], r"key seed=-1 must be int: in \[0, 2\^32\)"),
        (["optim"], "override 'optim' is not key=value"),
        (["optim..lr=1"], "is not key=value"),
    ],
)
def test_wrong_overrides_are_refused_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load_config("tiny", overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "seed = \n", r"a\.toml: not valid TOML: .*line 1"),
        ("a.toml", "[model\n", r"a\.toml: not valid TOML"),
        ("a.toml", "[train]\nstep = 3\n", r"a\.toml: unknown key train\.step; did you mean steps\?"),
        ("a.json", "{", r"a\.json: not valid JSON"),
        ("a.json", "[]", r"a\.json: not a JSON object"),
        ("a.json", '{"sed": 1}', r"a\.json: unknown key sed; did you mean seed\?"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / name)


def test_missing_configs_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read config .*gone\.toml: No such file"):
        load_config(tmp_path / "gone.toml")
    with pytest.raises(UserError, match=r"no config 'tinny'; did you mean tiny\? valid: small, smoke, tiny, or a path"):
        load_config("tinny")


def test_none_switches_a_part_of_the_model_off():
    config = load_config(
        "small", ["model.vision=none", "data.encoding.max_patches=0", "data.domains=['nlp', 'speech']"]
    )
    assert config.model.vision is None
    assert config.model.audio is not None
    assert isinstance(run_config(), RunConfig)
    assert run_config().model is MODEL
