import pytest

from anyexperts_jax.aot.fit import does_not_fit, knobs, require_fits, temporaries_refused
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train.config import load_config

MESH = {"data": 2, "fsdp": 2, "expert": 1, "tensor": 1, "sequence": 1}
GIB = 2**30


def config(*settings):
    return load_config("smoke", ["train.batch_size=16", *settings])


def test_for_dominant_state_more_devices_or_a_smaller_state_are_suggested():
    best = [knob.change for knob in knobs(config(), MESH, 8 * GIB, 1 * GIB)][:2]
    assert best == ["mesh.fsdp=4 with mesh.data=1", 'model.stack.param_dtype="bfloat16"']


def test_for_dominant_temporaries_computing_in_parts_is_suggested():
    best = knobs(config(), MESH, 1 * GIB, 8 * GIB)[0]
    assert best.change == "train.accumulation=2"
    assert best.saves == 4 * GIB
    most = knobs(config("train.batch_size=4"), MESH, 1 * GIB, 8 * GIB)[0]  # one sequence per device
    assert most.change.startswith("data.encoding.max_length=")


def test_a_remat_policy_that_keeps_more_is_a_knob_if_configured():
    changes = lambda remat: [k.change for k in knobs(config(f"model.stack.remat={remat}"), MESH, 1, 1)]  # noqa: E731
    assert 'model.stack.remat="full"' in changes("dots")
    assert 'model.stack.remat="full"' not in changes("full")


def test_the_line_states_the_excess_and_two_knobs():
    message = str(does_not_fit(config(), MESH, "v5e:2x2", 16 * GIB, 2 * GIB, 20 * GIB))
    assert "does not fit a device of v5e:2x2: 6.00 GiB more than its 16 GiB" in message
    assert message.endswith(
        "train.accumulation=2 (about 10.0 GiB less) or mesh.fsdp=4 with mesh.data=1 (about 1.0 GiB less)"
    )
    assert "\n" not in message


def test_a_compiled_step_is_checked_against_the_chip():
    memory = {"state and batch": 10 * GIB, "temporaries": 5 * GIB, "results not in place": 0, "program": GIB}
    require_fits(config(), "v5e:2x2", MESH, memory, 16 * GIB)
    with pytest.raises(UserError, match=r"1\.00 GiB more than its 15 GiB \(state 10\.00 GiB, temporaries 6\.00 GiB\)"):
        require_fits(config(), "v5e:2x2", MESH, memory, 15 * GIB)


def test_the_memory_wanted_is_read_from_the_compilers_error():
    text = "required for HLO temporaries (40.17G) exceeds available HBM (15.75G). HLO module: jit_train_step."
    assert temporaries_refused(text) == pytest.approx(40.17 * GIB)
    assert temporaries_refused("INTERNAL: something else") is None
