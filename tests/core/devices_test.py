import jax
import pytest

from anyexperts_jax.core.devices import require_devices
from anyexperts_jax.core.errors import UserError


def test_an_available_device_passes():
    require_devices()


@pytest.fixture
def asked(monkeypatch):
    """Returns a function that pretends that JAX_PLATFORMS is set and that JAX then fails."""

    def devices(error):
        raise error

    def set_to(platforms, error):
        monkeypatch.setattr(jax, "devices", lambda: devices(error))
        config = type("Config", (), {"values": {"jax_platforms": platforms}})
        monkeypatch.setattr("anyexperts_jax.core.devices.jax.config", config)

    return set_to


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            AssertionError(),
            "JAX finds no device of JAX_PLATFORMS=cuda; unset it",
        ),  # JAX 0.12 without a plug-in
        (
            RuntimeError("Unable to initialize backend 'tpu': no libtpu.so\n(set JAX_PLATFORMS='' to choose)"),
            "JAX finds no device of JAX_PLATFORMS=cuda (Unable to initialize backend 'tpu': no libtpu.so); unset it",
        ),
    ],
)
def test_a_missing_device_is_a_one_line_error(error, said, asked):
    asked("cuda", error)
    with pytest.raises(UserError) as refused:
        require_devices()
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("platforms", "advice"),
    [
        ("cuda", "or pip install 'anyexperts-jax[cuda13]'"),
        ("gpu,cpu", "or pip install 'anyexperts-jax[cuda13]'"),
        ("tpu", "or pip install 'anyexperts-jax[tpu]'"),
        ("cdua", "unset it to run on what is here, or correct it"),
    ],
)
def test_the_error_names_the_extra_of_the_platform(platforms, advice, asked):
    asked(platforms, RuntimeError("no such backend"))
    with pytest.raises(UserError) as refused:
        require_devices()
    assert str(refused.value).endswith(advice)
