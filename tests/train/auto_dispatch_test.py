import pytest

from anyexperts_jax.train.auto_dispatch import auto_choice, with_dispatch
from anyexperts_jax.train.config import load_config

ONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "sequence": 1}


def config(dispatch, batch_size=4):
    return load_config("tiny", [f"model.stack.execution.dispatch={dispatch}", f"train.batch_size={batch_size}"])


@pytest.mark.parametrize(("mesh", "expected"), [({}, "blocks"), ({"expert": 4}, "exchange"), ({"data": 4}, "blocks")])
def test_the_configuration_gets_the_choice(mesh, expected):
    assert with_dispatch(config("auto"), {**ONE, **mesh}).model.stack.execution.dispatch == expected


def test_a_large_batch_has_more_rows_than_the_experts_have_numbers():
    assert with_dispatch(config("auto", 4096), {**ONE, "expert": 4}).model.stack.execution.dispatch == "blocks"


def test_a_named_dispatch_stays():
    given = config("capacity")
    assert auto_choice(given, ONE) is None
    assert with_dispatch(given, ONE) is given


def test_the_choice_follows_the_tokens_of_a_device():
    sizes = {**ONE, "expert": 4}
    once, wide = auto_choice(config("auto", 4), sizes), auto_choice(config("auto", 64), sizes)
    assert wide.rows == pytest.approx(16 * once.rows, rel=0.02)
    assert wide.weights == once.weights
