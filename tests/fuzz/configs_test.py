"""Configurations at random: each is printed and would be trained, or is refused in one line."""

import pathlib

import pytest

from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.evolution.config import describes_evolution, load_evolve_config
from anyexperts_jax.train import loop
from anyexperts_jax.train.config import load_config
from fuzz.mutations import broken_config


class StartedError(Exception):
    """Raised when a run has passed every check and would start."""


def start(config, run_dir, monkeypatch) -> None:
    """Runs `train` up to that point."""

    def begin(*what, **how):
        raise StartedError

    monkeypatch.setattr(loop, "_Run", begin)
    with pytest.raises((StartedError, UserError)) as ended:
        loop.train(config, run_dir, progress=False)
    if isinstance(ended.value, UserError):
        assert "\n" not in str(ended.value)
        assert not pathlib.Path(run_dir).exists(), "a run that is refused leaves nothing behind"


@pytest.mark.timeout(60)
def test_a_broken_configuration_ends_in_one_line(fuzz_case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source, overrides = broken_config(fuzz_case, tmp_path)
    code = main(["config", source, *(f"--set={override}" for override in overrides)])
    printed = capsys.readouterr()
    if code:
        assert code == 2, printed.err
        assert printed.err.startswith("anyexperts: ")
        assert printed.err.count("\n") == 1
        return
    (tmp_path / "printed.toml").write_text(printed.out, errors="surrogatepass")
    if describes_evolution(source):
        run = load_evolve_config(source, overrides)
        assert load_evolve_config(tmp_path / "printed.toml") == run
        config = run.stage("routing")
    else:
        config = load_config(source, overrides)
        assert load_config(tmp_path / "printed.toml") == config
    start(config, tmp_path / "run", monkeypatch)
