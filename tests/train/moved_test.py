import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train.config import from_json, load_config
from anyexperts_jax.train.moved import MOVED, move_keys

VALUES = {
    "dispatch": "capacity",
    "expert_mlp": "reference",
    "expert_residuals": "recomputed",
    "exchange_chunks": 2,
    "capacity_factor": 1.5,
    "overflow": "fallback",
    "importance_mlp": "wide",
    "hsm_site": "off",
    "slot_rounding": "floor",
    "cap_rounding": "floor",
    "iar": "off",
    "selection": "scores",
    "virtual_logits": "tied",
    "virtual_bias_init": 0.0,
    "virtual_output": "zero",
    "normalisation": "real",
    "balance_scope": "sequence",
    "importance_regulariser": "salience",
    "importance_target": 0.25,
    "slot_gradient": "straight_through",
    "salience_scope": "device",
    "onset": "learned",
}


def value_at(config, path):
    for name in path:
        config = getattr(config, name)
    return config


def test_every_moved_key_has_a_case():
    assert {old[-1] for old in MOVED} == set(VALUES)


@pytest.mark.parametrize("old", MOVED, ids=".".join)
def test_a_moved_key_is_still_read(old, tmp_path):
    value, new = VALUES[old[-1]], MOVED[old]
    shown = f'"{value}"' if isinstance(value, str) else value
    (tmp_path / "mine.toml").write_text(f"preset = 'tiny'\n[{'.'.join(old[:-1])}]\n{old[-1]} = {shown}\n")
    assert value_at(load_config(tmp_path / "mine.toml"), new) == value
    assert load_config("tiny", [f"{'.'.join(old)}={shown}"]) == load_config("tiny", [f"{'.'.join(new)}={shown}"])


def test_an_older_run_still_loads():
    old = (
        '{"model": {"stack": {"dispatch": "exchange", "expert_mlp": null}, "moe": {"iar": "off", "overflow": "drop"}}}'
    )
    model = from_json(old).model
    assert (model.stack.execution.dispatch, model.moe.switches.iar) == ("exchange", "off")


def test_both_places_are_refused():
    both = {"model": {"moe": {"iar": "off", "switches": {"iar": "add"}}}}
    with pytest.raises(UserError, match=r"key model.moe.iar is now model.moe.switches.iar, and both are given"):
        move_keys(both)
