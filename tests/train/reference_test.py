import dataclasses

import pytest

from anyexperts_jax.cli.main import main
from anyexperts_jax.core.checks import field_types, without_none
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.field_docs import class_summary, field_docs
from anyexperts_jax.evaluate.evaluate import Options
from anyexperts_jax.evolution.config import EvolveConfig, EvolveRun, evolve_preset_names, load_evolve_config
from anyexperts_jax.train.config import RunConfig, load_config, preset_names
from anyexperts_jax.train.reference import describe, to_toml, toml_value
from anyexperts_jax.train.strict import flatten


def dataclasses_in(cls):
    yield cls
    for hint in field_types(cls).values():
        kind, _ = without_none(hint)
        if dataclasses.is_dataclass(kind):
            yield from dataclasses_in(kind)


CLASSES = {cls.__name__: cls for root in (RunConfig, EvolveRun, Options) for cls in dataclasses_in(root)}


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_has_a_meaning_in_words(name):
    cls = CLASSES[name]
    assert len(class_summary(cls).split()) > 1
    for field, hint in field_types(cls).items():
        if not dataclasses.is_dataclass(without_none(hint)[0]):
            meaning = field_docs(cls).get(field, "")
            assert len(meaning.split()) > 1, f"{name}.{field} needs a comment that says what it means"


def test_comments_above_and_beside_a_field_are_its_meaning():
    assert field_docs(Documented) == {
        "above": "One line, and another.",
        "both": "Above. beside",
        "long": "of several lines",
        "inherited": "from the base",
    }
    assert class_summary(Documented) == "A class for this test, in two lines"


class Base:
    inherited: int = 1  # from the base


class Documented(Base):
    """A class for this test,
    in two lines. And more.

    Much more.
    """

    # One line,
    # and another.
    above: int = 0
    # Not of the next field.

    nothing: int = 0
    # Above.
    both: str = "# not a comment"  # beside
    long: tuple[int, ...] = (
        1,
        2,
    )  # of several lines


def written(name, *arguments, capsys):
    assert main(["config", name, *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", preset_names())
def test_what_is_printed_reads_back_as_the_same_configuration(name, tmp_path, capsys):
    changes = ["data.folders=['own=/tmp/a \"b\\\\c']", "runtime.profile=[1, 2]", "model.audio=none"]
    changes += ["data.encoding.max_frames=0", "data.domains=['own', 'nlp']", "data.weights=[1, 2]", "optim.eps=3e-38"]
    changes = [f"--set={change}" for change in changes]
    for arguments in ([], changes):
        path = tmp_path / "printed.toml"
        path.write_text(written(name, *arguments, capsys=capsys))
        assert load_config(path) == load_config(name, [one.removeprefix("--set=") for one in arguments])


@pytest.mark.parametrize("name", evolve_preset_names())
def test_the_same_of_an_evolving_run(name, tmp_path, capsys):
    path = tmp_path / "printed.toml"
    path.write_text(written(name, capsys=capsys))
    assert load_evolve_config(path) == load_evolve_config(name)
    assert written(str(path), capsys=capsys) == path.read_text()


def test_every_key_is_printed_with_type_default_and_meaning(capsys):
    text = written("tiny", capsys=capsys)
    keys = {key.name: key for key in describe(RunConfig()).every_key()}
    latent = ("attention.num_kv_heads=4", "attention.latent.plain_dim=8", "attention.latent.rope_dim=8")
    tables = ["model.stack.attention.rope_scaling.factor=1", "model.stack.lora.rank=2"]
    tables += [f"model.stack.{one}" for one in latent]
    with_every_table = load_config("tiny", [*tables, 'train.trainable=["**/*_lora_*"]'])
    towers = ("model.vision_tower", "model.audio_tower")  # of published models; no run has them
    for tower in towers:
        assert {key for key in keys if key.startswith(f"{tower}.")}
    inside = {key for key in keys if key.startswith(tuple(f"{tower}." for tower in towers))}
    assert set(keys) - inside == set(flatten(with_every_table)) - set(towers)
    assert keys["train.steps"] == keys["train.steps"].__class__("train.steps", "int", 1000, "optimiser steps")
    assert "# optimiser steps [int; default 1000]\nsteps = 2500\n" in text
    words = " ".join(text.replace("\n# ", " ").split())
    assert all(key.meaning for key in keys.values())
    for name in set(keys) & set(flatten(load_config("tiny"))):  # of a table that is none, the table alone is printed
        key = keys[name]
        assert f"{key.meaning} [{key.type}; default {toml_value(key.default)}]" in words
    assert all(len(line) <= 80 for line in text.splitlines())


def test_some_keys_alone_and_without_a_file(capsys):
    text = written("tiny", "--only", "train.steps", "model.audio", capsys=capsys)
    assert [line for line in text.splitlines() if line and not line.startswith("#")] == [
        "[model.audio]", "frame_features = 160", "num_layers = 0", "d_ff = 128", "[train]", "steps = 2500",
    ]  # fmt: skip
    assert main(["config", "--set", "train.steps=700", "--only", "train.steps"]) == 0
    assert "steps = 700" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "no config 'tinny'; did you mean tiny?"),
        (["tiny", "--only", "optm"], "no key or table optm; near: optim"),
        (["tiny", "--only", "zzz"], "no key or table zzz; `anyexperts config` lists all"),
        (["tiny", "--set", "train.step=1"], "unknown key train.step; did you mean steps?"),
        (["--set", "train.step=1"], "the defaults: unknown key train.step"),
        (["no/such.toml"], "cannot read config no/such.toml: No such file"),
    ],
)
def test_what_is_not_there_is_one_line(arguments, message, capsys):
    assert main(["config", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_table_of_several_parts_is_told_apart():
    run = load_evolve_config("evolve_smoke")
    parts = [(run.base, describe(RunConfig())), (run.evolve, describe(EvolveConfig(), "evolve"))]
    assert to_toml(parts, ["evolve.routing.steps"]).splitlines()[-1] == "steps = 4"
    with pytest.raises(UserError, match=r"near: evolve\.routing"):
        to_toml(parts, ["evolve.rooting.steps"])
