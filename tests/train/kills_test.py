"""Two kills at random moments; `make test-kills` does twenty."""

import pytest

from train.kills import Killer, kill_and_resume


@pytest.mark.slow
def test_a_run_that_is_killed_twice_ends_bit_for_bit_like_an_unbroken_one(tmp_path):
    counts, _ = kill_and_resume(Killer(tmp_path, model="linear", steps=100), 2)
    assert counts.total() == 2
