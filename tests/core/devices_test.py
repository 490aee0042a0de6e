import jax
import pytest

from anyexperts_jax.core.devices import require_devices
from anyexperts_jax.core.errors import UserError


def test_an_available_device_passes():
    require_devices()


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
def test_a_missing_device_is_a_one_line_error(error, said, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(
        "anyexperts_jax.core.devices.jax.config", type("Config", (), {"values": {"jax_platforms": "cuda"}})
    )
    with pytest.raises(UserError) as refused:
        require_devices()
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)
