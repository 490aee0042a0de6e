"""`pytest tests/fuzz --fuzz-cases 200` runs 200 cases of each test that takes the fixture `fuzz_case`, a case's number.

A case is made from its number alone, so a failing one can be run by its name. CI runs the first few of each; `make
fuzz` runs them in full.
"""

from serve.conftest import served, service, url  # noqa: F401  fixtures of the server's tests


def pytest_generate_tests(metafunc):
    if "fuzz_case" in metafunc.fixturenames:
        metafunc.parametrize("fuzz_case", range(metafunc.config.getoption("--fuzz-cases")))
