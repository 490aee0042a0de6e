import pytest

from anyexperts_jax.core.errors import UserError, comma_list, require, require_one_of


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError)


def test_require_raises_the_message_only_if_the_condition_fails():
    require(True, "not raised")
    with pytest.raises(UserError, match=r"^k=0 must be >= 1$"):
        require(False, "k=0 must be >= 1")


def test_require_one_of_names_the_value_and_the_valid_ones():
    require_one_of("iar", "add", ("add", "off"))
    with pytest.raises(UserError, match=r"^iar='ad' is unknown; valid: add, off$"):
        require_one_of("iar", "ad", ("add", "off"))


def test_comma_list():
    assert comma_list([1, "a"]) == "1, a"
