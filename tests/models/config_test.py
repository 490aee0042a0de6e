import dataclasses

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.config import AudioConfig, ModelConfig, VisionConfig


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (ModelConfig, {"vocab_size": 0}, "vocab_size=0 must be >= 1"),
        (ModelConfig, {"max_length": 0}, "max_length=0 must be >= 1"),
        (ModelConfig, {"pad_id": 260}, r"pad_id=260 must be in \[0, vocab_size=260\)"),
        (ModelConfig, {"eos_id": -1}, r"eos_id=-1 must be in \[0, vocab_size=260\)"),
        (VisionConfig, {"place_frequencies": 0}, "vision.place_frequencies=0 must be >= 1"),
        (VisionConfig, {"num_layers": -1}, "vision.num_layers=-1 must be >= 0"),
        (VisionConfig, {"num_layers": 10**6}, "vision.num_layers=1000000 must be <= 1000"),
        (AudioConfig, {"frame_features": 0}, "audio.frame_features=0 must be >= 1"),
    ],
)
def test_bad_values_are_named(make, fields, message):
    with pytest.raises(UserError, match=message):
        make(**fields)


def test_configurations_compare_and_hash_by_value():
    a, b = ModelConfig(), ModelConfig()
    assert a == b
    assert hash(a) == hash(b)
    assert dataclasses.replace(a, max_length=64) != b
