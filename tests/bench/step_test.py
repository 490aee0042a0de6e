import json

import numpy as np
import pytest

from anyexperts_jax.bench import step
from anyexperts_jax.bench.step import StepSize
from anyexperts_jax.core.errors import UserError

TINY = StepSize(width=16, hidden=8, layers=1, experts=16, slots=5, heads=2, vocabulary=260, batch=2, length=8)


@pytest.mark.slow
def test_forms_have_rows_and_files_are_written(monkeypatch, tmp_path):
    forms = dict(list(step.step_forms(TINY).items())[:1])  # each takes six seconds to compile
    monkeypatch.setattr(step, "step_forms", lambda size: forms)
    monkeypatch.setattr(step, "has_transformers", lambda: False)
    bench = step.bench_step(TINY, rounds=1)
    assert [one.form for one in bench.steps] == list(forms)
    assert all(one.tokens_per_second > 0 and one.ratio is None for one in bench.steps)
    paths = step.write_bench(bench, tmp_path, "anyexperts bench step")
    assert json.loads(paths[0].read_text())["environment"]["size"]["width"] == 16
    assert "| tokens/s | tokens/s over transformers |" in paths[2].read_text(), (
        "a step's ratio is of memory, not of time as a layer's"
    )


@pytest.mark.parity
def test_transformers_has_as_many_parameters_except_the_modality_table():
    pytest.importorskip("transformers")
    from anyexperts_jax.bench.peers import transformers_step

    tokens_BT = np.zeros((TINY.batch, TINY.length), np.int32)
    peer, parameters = transformers_step(TINY, tokens_BT)
    config = next(iter(step.step_forms(TINY).values()))
    _, own, _ = step.own_step(config, tokens_BT, {})
    assert own - parameters == 4 * TINY.width
    assert np.isfinite(peer().tensor.item())


def test_an_unknown_size_is_refused():
    with pytest.raises(UserError, match=r"^size='7B' is unknown; valid: 40M, 800M$"):
        step.bench_step("7B")
