"""Configurations as a hurried user writes them: presets with misspelt keys, or with values of a wrong type or range."""

import pathlib
from typing import Any, Literal, get_args, get_origin

import numpy as np

from anyexperts_jax.core.checks import field_types, without_none
from anyexperts_jax.evolution.config import EvolveConfig, load_evolve_config
from anyexperts_jax.train.config import RunConfig, load_config
from anyexperts_jax.train.reference import describe, to_toml, toml_value

RUN_TABLE, EVOLVE_TABLE = describe(RunConfig()), describe(EvolveConfig(), "evolve")
PRESETS = ("tiny", "smoke", "small", "evolve_smoke")
# Texts after "="; each key rejects some of them.
ANYTHING = (
    "true", "false", "0", "1", "-1", "2", "7", "1.5", "-0.5", "nan", "inf", "-inf", "1e-300", "1e300", "2147483647",
    "2147483648", "4294967296", "9223372036854775807", "-9223372036854775808", "9" * 400, '""', '"none"', "none",
    '"a word"', "a word", "''", "[]", "[[]]", "[1, 2]", "[true]", '["nlp"]', '["nlp", "nlp"]', "{}", "{ a = 1 }",
    "1979-05-27", "07:32:00", "[1,", "{", '"', "\\", "=", "#", "\t", "é", "\udcff", "[/red]", "%s", "../..", "-",
)  # fmt: skip


def broken_config(case: int, folder: pathlib.Path) -> tuple[str, list[str]]:
    """A source and overrides for `load_config` or `load_evolve_config`; a file is written into `folder`."""
    rng = np.random.default_rng([7, case])
    preset = str(rng.choice(PRESETS))
    overrides = [_override(rng, preset) for _ in range(rng.integers(0, 5))]
    if rng.random() < 0.5:
        return preset, overrides
    path = folder / "mine.toml"
    if rng.random() < 0.5:  # writes the overrides as lines of a file
        lines = "\n".join([f'preset = "{_model_of(preset)}"', *overrides])
        path.write_bytes(lines.encode("utf-8", errors="surrogateescape"))
        return str(path), []
    path.write_bytes(_damaged(rng, _as_toml(preset).encode()))
    return str(path), overrides


def _override(rng: np.random.Generator, preset: str) -> str:
    keys = _keys(preset)
    name = str(rng.choice(list(keys)))
    values = _near(rng, *keys[name]) if rng.random() < 0.8 else str(rng.choice(ANYTHING))
    return f"{_misspelt(rng, name) if rng.random() < 0.08 else name}={values}"


def _keys(preset: str) -> dict[str, tuple[Any, Any]]:
    """The preset's keys, each with its annotation and value."""
    if not preset.startswith("evolve"):
        return _leaves(load_config(preset))
    run = load_evolve_config(preset)
    return _leaves(run.base) | _leaves(run.evolve, "evolve.")


def _leaves(config: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found = {}
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        if hasattr(value, "__dataclass_fields__"):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = (hint, value)
    return found


def _near(rng: np.random.Generator, hint: Any, value: Any) -> str:
    """Another value of the type, as TOML."""
    kind, _ = without_none(hint)
    if get_origin(kind) is Literal:
        return toml_value(str(rng.choice(get_args(kind))))
    if kind is bool:
        return toml_value(bool(rng.integers(2)))
    if get_origin(kind) is tuple:
        return toml_value(tuple(value or ())[: rng.integers(0, 4)] * int(rng.integers(1, 3)))
    if isinstance(value, int | float):
        changed = rng.choice([0, 1, 2, 3, value - 1, value + 1, 2 * value, 16 * value, 1000 * value, value / 2, -value])
        return toml_value(float(changed) if kind is float else int(changed))
    return toml_value(str(rng.choice(["", "blocks", "linear", "capacity", "xla", "runs/none", "a b", "é"])))


def _misspelt(rng: np.random.Generator, name: str) -> str:
    place = int(rng.integers(len(name)))
    ways = (
        name[:place] + name[place + 1 :],
        name[:place] + name[place] + name[place:],
        name.upper(),
        name.replace("_", "-"),
        name.rpartition(".")[0] or "model",
        f"{name}.{name}",
        f"train.{name}",
        f" {name} ",
    )
    return str(rng.choice(ways))


def _as_toml(preset: str) -> str:
    if preset.startswith("evolve"):
        run = load_evolve_config(preset)
        return to_toml([(run.base, RUN_TABLE), (run.evolve, EVOLVE_TABLE)])
    return to_toml([(load_config(preset), RUN_TABLE)])


def _model_of(preset: str) -> str:
    return {"small": "small", "evolve_smoke": "tiny_dense"}.get(preset, "tiny")


def _damaged(rng: np.random.Generator, text: bytes) -> bytes:
    """The text cut, with a bit flipped, bytes replaced or a part doubled, in another encoding, or unchanged."""
    place, other = sorted(int(number) for number in rng.integers(0, len(text), 2))
    ways = (
        lambda: text,
        lambda: text[:place],
        lambda: text[:place] + bytes([text[place] ^ (1 << int(rng.integers(8)))]) + text[place + 1 :],
        lambda: text[:place] + rng.bytes(5) + text[place + 5 :],
        lambda: text[:place] + text[other:],
        lambda: text + text[place:other],
        lambda: text.decode().encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + text,
        lambda: text.replace(b"\n", b"\r\n"),
    )
    return ways[int(rng.integers(len(ways)))]()
