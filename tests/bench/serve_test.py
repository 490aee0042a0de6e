"""The smallest load on the server: no request is lost or mixed up, and files record how they were made."""

import json

import pytest

from anyexperts_jax.bench.serve import Load, requests_of
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError

for package in ("safetensors", "tokenizers", "starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from serve.tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("hub") / "tiny")


def test_lengths_follow_the_distribution_and_fit_a_slot():
    load = Load(requests=400, prompt=20, answer=10, length=64, budgets=(1.0, 2.0))
    asked = requests_of(load, 300, 64)
    lengths = sorted(len(one.prompt) for one in asked)
    assert 17 <= lengths[200] <= 23
    assert lengths[0] < 10 < 40 < lengths[-1]
    assert all(one.answer >= 1 and len(one.prompt) + one.answer <= 64 for one in asked)
    assert [one.budget for one in asked[:3]] == [1.0, 2.0, 1.0]
    assert asked == requests_of(load, 300, 64)


@pytest.mark.slow
def test_the_command_loses_and_mixes_up_no_request(folder, tmp_path, capsys):
    sizes = ["--requests", "6", "--prompt-tokens", "6", "--answer-tokens", "4", "--slots", "4", "--length", "96"]
    options = [*sizes, "--clients", "1", "4", "--budget", "1.5", "3", "--out", str(tmp_path)]
    assert main(["bench", "serve", str(folder), *options]) == 0
    assert "throughput" in capsys.readouterr().out
    found = json.loads((tmp_path / "bench_serve.json").read_text())
    assert [speed["clients"] for speed in found["speeds"]] == [1, 4]
    for speed in found["speeds"]:
        assert speed["lost"] == speed["mixed_up"] == 0
        assert speed["requests"] == 6
        assert speed["tokens_per_second"] > 0
        assert speed["first_token_ms"] > 0
    assert found["speeds"][0]["throughput_ratio"] == 1
    assert found["command"].startswith("anyexperts bench serve ")
    again = main([*found["command"].split()[1:-1], str(tmp_path / "again")])
    assert again == 0
    assert json.loads((tmp_path / "again" / "bench_serve.json").read_text())["load"] == found["load"]


@pytest.mark.slow
def test_adapters_in_turn_beside_the_base_alone(tmp_path, capsys):
    from serve.tiny import tiny_adapters, tiny_folder

    base, out = tiny_folder(tmp_path / "tiny"), tmp_path / "out"
    folders = tiny_adapters(base, ("one", "two"))
    sizes = ["--requests", "6", "--prompt-tokens", "6", "--answer-tokens", "4", "--slots", "4", "--length", "64"]
    named = [word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")]
    options = [*sizes, "--clients", "3", "--rounds", "2", *named, "--out", str(out)]
    assert main(["bench", "serve", str(base), *options]) == 0
    assert "adapters in turn; throughput over the base's" in capsys.readouterr().out
    found = json.loads((out / "bench_serve.json").read_text())
    alone, mixed = found["speeds"]
    assert (alone["adapters"], mixed["adapters"]) == (0, 2)
    assert alone["base_ratio"] == 1
    for speed in (alone, mixed):
        assert speed["lost"] == speed["mixed_up"] == 0
    assert " --rounds 2 --adapter " in found["command"]
    assert "Medians of 2 interleaved rounds" in (out / "bench_serve.md").read_text()


def test_numbers_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"clients=\(0,\) must be numbers >= 1"):
        Load(clients=(0,))
    with pytest.raises(UserError, match="requests=0 must be >= 1"):
        Load(requests=0)
    with pytest.raises(UserError, match="rounds=0 must be >= 1"):
        Load(rounds=0)
