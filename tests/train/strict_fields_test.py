"""Every field of every configuration, with right and wrong values made from its annotation."""

import copy
import dataclasses
import functools
import json
import math
from typing import Annotated, Literal, get_args, get_origin

import pytest

from anyexperts_jax.core.checks import field_types, without_none
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.evaluate.evaluate import Options
from anyexperts_jax.evolution.config import EvolveRun, load_evolve_config
from anyexperts_jax.train.config import RunConfig, load_config, to_json
from anyexperts_jax.train.strict import build, flatten, merge


def leaves(cls, prefix=""):
    """(dotted key, annotation) of every field that is not a table, and (dotted key, class) of every table."""
    for name, hint in field_types(cls).items():
        kind, _ = without_none(hint)
        if dataclasses.is_dataclass(kind):
            yield f"{prefix}{name}", hint
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


RUN_FIELDS = dict(leaves(RunConfig))
EVOLVE_FIELDS = {key: hint for key, hint in leaves(EvolveRun) if key.startswith("evolve.")}
FIELDS = {**RUN_FIELDS, **EVOLVE_FIELDS}
UNTRAINED = ("model.vision_tower.", "model.audio_tower.")  # of published models; no run has them
LATENT = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "latent": {"plain_dim": 12, "rope_dim": 4}}
NEEDS = {  # beside a table, or in it
    "model.stack.lora": {"train": {"trainable": ["**/*_lora_*"]}},
    "model.stack.attention.latent": {"model": {"stack": {"attention": LATENT}}},
}
BASES = {"run": load_config("smoke"), "evolve": load_evolve_config("evolve_smoke")}
FLOAT32_MAX = 3.4028234663852886e38


@functools.cache
def base_of(key):
    """The preset that has the key. An optional table that is none there, and to which the key belongs, gets its
    defaults."""
    base = BASES["evolve" if key in EVOLVE_FIELDS else "run"]
    table, _, _ = key.rpartition(".")
    if table in FIELDS and without_none(FIELDS[table])[1]:
        changes = merge(nested(table, {}), NEEDS.get(table, {}))
        base = build(type(base), merge(dataclasses.asdict(base), changes))
    return base


def class_of(key):
    return EvolveRun if key in EVOLVE_FIELDS else RunConfig


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def built(key, value):
    """The preset's configuration with one value replaced, in the form of a file or an override."""
    return build(type(base_of(key)), merge(dataclasses.asdict(base_of(key)), nested(key, value)))


def scalar_errors(kind):
    """TOML values that do not fit a scalar type."""
    if get_origin(kind) is Literal:
        return ["no such word", 3, True, 1.5, ["x"]]
    if get_origin(kind) is Annotated:
        return ["many", 1.5, True, -1, 2**32, 10**400]
    errors = {
        bool: ["yes", 0, 1, 0.0],
        int: ["many", 1.5, True, 2**31, -(2**31) - 1, 2**63, 10**400],
        float: ["fast", True, math.nan, math.inf, 1e39, 1e-39, 10**400],
        str: [3, 1.5, True, "a\0b", "\udcff"],
    }
    return errors[kind]


def wrong_values(hint):
    kind, optional = without_none(hint)
    if dataclasses.is_dataclass(kind):
        wrong = [3, "x", True, [1], [{"no_such_key": 1}], {"no_such_key": 1}]
    elif get_origin(kind) is tuple:
        items = scalar_errors(get_args(kind)[0])
        wrong = [*([item] for item in items), *(item for item in items if item != []), {"a": 1}, [["x"]], [{"a": 1}]]
    else:
        wrong = [*scalar_errors(kind), [], [[]], {"a": 1}]
    if optional:
        return wrong
    takes_words = kind is str or get_args(kind)[:1] == (str,)
    return [*wrong, None] if takes_words else [*wrong, "none", None]


@pytest.mark.parametrize("key", FIELDS)
def test_a_value_of_another_type_is_refused_in_one_line_that_names_the_key(key):
    for value in wrong_values(FIELDS[key]):
        if get_origin(FIELDS[key]) is Literal and value == "none" and "none" in get_args(FIELDS[key]):
            continue
        with pytest.raises(UserError) as error:
            build(class_of(key), nested(key, value))
        said = str(error.value)
        assert key in said, (value, said)
        assert "\n" not in said


@pytest.mark.parametrize("key", [key for key in FIELDS if not key.startswith(UNTRAINED)])
def test_the_field_takes_its_own_value_as_toml_and_json_write_it(key):
    own = base_of(key)
    for part in key.split("."):
        own = getattr(own, part)
        if own is None:
            break
    written = dataclasses.asdict(own) if dataclasses.is_dataclass(own) else own
    assert built(key, json.loads(json.dumps(written))) == base_of(key), "tuples as lists"
    if isinstance(own, float) and own.is_integer():
        assert built(key, int(own)) == base_of(key)
    if own is None:
        assert built(key, "none") == base_of(key)


SINGLE = {
    "data.domains": "nlp",
    "data.folders": "nlp=somewhere",
    "data.fingerprints": "nlp=0123",
    "data.metrics": "nlp=cer",
    "plugins": "json",
    "data.levels": 2,
    "data.weights": 2,
    "runtime.profile": None,  # needs two
    "train.trainable": None,  # a pattern must match something
    "train.learning_rates": None,
    "train.budgets": None,  # as many as a window has
    "model.stack.lora.patterns": None,
    "model.stack.attention.mrope_section": None,  # of published models, as the next
    "model.vision_tower.deep_layers": None,
    "model.moe.router_of_modality": None,  # one for each modality
    "evolve.moe.router_of_modality": None,
    "evolve.evolution.beta_low": None,  # as many as beta_high has
    "evolve.evolution.beta_high": None,
    "evolve.evolution.snapshots": None,  # one for each follower
}


def test_these_fields_are_lists():
    """A field that becomes a list must be tested below."""
    lists = {key for key, hint in FIELDS.items() if get_origin(without_none(hint)[0]) is tuple}
    assert lists == set(SINGLE)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, value in SINGLE.items() if value is not None])
def test_a_single_value_stands_for_a_list_of_one(key, value):
    base = ["data.domains=nlp", "data.weights=1"] if key != "data.domains" else []
    config = load_config("smoke", [*base, f"{key}={value}"])
    found = flatten(config)[key]
    assert found == (value,)
    assert type(found[0]) is type(1.0 if key == "data.weights" else value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.domains=npl", "data.domains entry='npl' is unknown; valid: general, ocr, nlp"),
        ("data.levels=easy", "key data.levels='easy' must be int: a whole number"),
        ("data.levels=[1, true]", "key data.levels[1]=True must be int: a whole number"),
        ("data.domains={nlp=1}", "key data.domains={'nlp': 1} must be list of str"),
        ("runtime.profile=3", "runtime.profile=[3] must be [first, last] with 1 <= first <= last"),
        ("seed=4294967296", "key seed=4294967296 must be int: in [0, 2^32)"),
        ("seed=9223372036854775807", "key seed=9223372036854775807 must be int: in [0, 2^32)"),
        ("train.steps=2147483648", "key train.steps=2147483648 must be int: in [-2^31, 2^31)"),
        ("optim.lr=inf", "key optim.lr=inf must be float: a finite number"),
        ("optim.eps=1e-50", "key optim.eps=1e-50 must be float: 0, or between 1.2e-38 and 3.4e38 in size (float32)"),
        ("model=3", "key model=3 must be a table"),
        ("model.vision=true", "key model.vision=True must be VisionConfig or none: a table of patch_features, place_"),
        ("preset=[]", "model preset='[]' is unknown; valid: tiny"),
        ("optim.lr=1\n[train]", "has several lines"),
        (f"seed={'9' * 5000}", "override seed: Exceeds the limit"),
        (f"seed={'[' * 5000}", "override seed: maximum recursion depth exceeded"),
    ],
)
def test_what_a_wrong_override_says(override, message):
    with pytest.raises(UserError) as error:
        load_config("smoke", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_seed_that_jax_tells_apart_is_taken():
    assert load_config("smoke", [f"seed={2**32 - 1}", f"data.seed={2**32 - 1}"]).seed == 2**32 - 1


def parts(config):
    """The dataclass and all inside it."""
    yield config
    for name in field_types(type(config)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from parts(value)


PARTS = {type(part).__name__: part for base in (*BASES.values(), Options()) for part in parts(base)}


@pytest.mark.parametrize("name", PARTS)
def test_the_dataclass_itself_refuses_a_value_of_another_type(name):
    """In Python there is no conversion: a list is not a tuple, a word is not None. The tests' own check of annotations
    is bypassed, because it would refuse the call before the dataclass does."""
    part = PARTS[name]
    for field, hint in field_types(type(part)).items():
        kind, _ = without_none(hint)
        wrong = [3, "x", []] if dataclasses.is_dataclass(kind) else [[], {}, object()]
        if get_origin(kind) is tuple:
            wrong += [([],), (object(),), "nlp"]
        elif not dataclasses.is_dataclass(kind):
            wrong += scalar_errors(kind)
        for value in wrong:
            wrong_one = copy.copy(part)
            object.__setattr__(wrong_one, field, value)
            with pytest.raises(UserError, match=field) as error:
                wrong_one.__post_init__()
            assert "\n" not in str(error.value)


def test_files_in_any_text_but_utf8_are_refused_and_a_byte_order_mark_is_not(tmp_path):
    path = tmp_path / "mine.toml"
    text = 'preset = "tiny"\n[train]\nsteps = 200 # soviel wie nötig\n'
    path.write_bytes(text.encode("utf-8-sig"))
    assert load_config(path).train.steps == 200
    for encoding in ("utf-16", "latin-1"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=r"mine\.toml is not UTF-8 text \(.*\); save it as UTF-8"):
            load_config(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "model = 3\npreset = 'tiny'", r"a\.toml: key model=3 must be a table"),
        ("a.toml", "seed = " + "9" * 5000, r"a\.toml: not valid TOML: Exceeds the limit"),
        ("a.toml", "seed = " + "[" * 5000, r"a\.toml: not valid TOML: maximum recursion"),
        ("a.json", "[" * 100_000, r"a\.json: not valid JSON: maximum recursion"),
        ("a.json", '{"seed": NaN}', r"a\.json: key seed=nan must be int: a whole number"),
    ],
)
def test_files_that_no_parser_reads_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / name)


@pytest.mark.parametrize("text", ['{"base": 3}', '{"base": {}, "evolve": []}', "[1]", "{"])
def test_an_evolve_json_of_another_shape_is_refused_by_name(tmp_path, text):
    (tmp_path / "evolve.json").write_text(text)
    for source in (tmp_path / "evolve.json", tmp_path):
        with pytest.raises(UserError, match=r"evolve\.json: "):
            load_evolve_config(source)


def test_a_runs_directory_stands_for_its_configuration(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(to_json(BASES["run"]))
    assert load_config(tmp_path / "tiny") == BASES["run"]
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny") != BASES["run"], "a preset's name is the preset, whatever lies here"
    with pytest.raises(UserError, match=r"cannot read config .*config\.json: No such file"):
        load_config(tmp_path)
