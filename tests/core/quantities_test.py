import pytest

from anyexperts_jax.core.quantities import bytes_text, count_text, flops_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (584, "584"),
        (22_120, "22,120"),
        (99_999, "99,999"),
        (100_000, "0.1M"),
        (587_000, "0.6M"),
        (9_949_999, "9.9M"),
        (9_950_000, "10M"),
        (134_515_008, "135M"),
        (999_499_999, "999M"),
        (999_500_000, "1.0B"),
        (30_532_122_624, "30.5B"),
        (1_026_408_232_448, "1.0T"),
    ],
)
def test_a_count_has_the_unit_that_fits_it(count, text):
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (511, "511 bytes"),
        (512, "0.5 KiB"),
        (88_480, "86.4 KiB"),
        (600 * 2**10, "0.6 MiB"),
        (270 * 10**6, "257.5 MiB"),
        (61 * 10**9, "56.8 GiB"),
        (4 * 10**12, "3,725.3 GiB"),
        (-3 * 2**20, "-3.0 MiB"),
    ],
)
def test_a_size_has_the_unit_that_fits_it(size, text):
    assert bytes_text(size) == text


def test_a_size_has_the_decimals_that_are_asked_for():
    assert bytes_text(16 * 2**30, 0) == "16 GiB"
    assert bytes_text(1.5 * 2**30, 2) == "1.50 GiB"


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0, "0 FLOP"), (999_999, "999,999 FLOP"), (3.4e6, "3.4 MFLOP"), (5e10, "50.0 GFLOP"), (1.2e15, "1,200.0 TFLOP")],
)
def test_operations_have_the_unit_that_fits_them(flops, text):
    assert flops_text(flops) == text
