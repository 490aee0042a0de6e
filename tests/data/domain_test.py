import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.domain import DOMAIN_NAMES, Domain, domain, example_generator


@pytest.mark.parametrize("name", DOMAIN_NAMES)
def test_every_name_is_a_domain(name):
    found = domain(name)
    assert isinstance(found, Domain)
    assert found.name == name
    assert found is domain(name)


def test_unknown_domain_lists_the_valid_ones():
    with pytest.raises(UserError, match="domain='vision' is unknown; valid: general, ocr, nlp, speech, video"):
        domain("vision")


def test_a_generator_depends_on_each_argument():
    def numbers(*changes):
        arguments = {"name": "nlp", "split": "train", "index": 5, "seed": 1, "levels": (1, 2, 3)} | dict(changes)
        rng, level = example_generator(**arguments)
        return level, *rng.integers(1 << 30, size=3).tolist()

    first = numbers()
    assert numbers() == first
    assert first == (3, 912566719, 141376455, 147980161)  # the same on every machine
    for change in (("name", "ocr"), ("split", "test"), ("index", 6), ("seed", 2)):
        assert numbers(change)[1:] != first[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "split='dev' is unknown; valid: train, validation, test"),
        ({"index": -1}, "index=-1 must be >= 0"),
        ({"seed": -3}, "seed=-3 must be >= 0"),
        ({"levels": ()}, "levels is empty"),
        ({"levels": (1, 4)}, "level=4 is unknown"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    arguments = {"name": "nlp", "split": "train", "index": 0, "seed": 0, "levels": (1,)} | change
    with pytest.raises(UserError, match=message):
        example_generator(**arguments)
