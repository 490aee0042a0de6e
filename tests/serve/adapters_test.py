"""Several adapters on one base behind one address: chosen by the request's model, and answered in one batch."""

import concurrent.futures
import importlib.util

import pytest

from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.serve.engine import Prompt
from serve.app_test import send
from serve.tiny import BUDGETS, LENGTHS, PROMPTS, SLOTS, job, tiny_adapters, tiny_folder, tokens_of

for package in ("safetensors", "tokenizers", "starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

NAMES = (None, "one", "two")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("adapters") / "tiny")


@pytest.fixture(scope="module")
def folders(base):
    """Two adapters of the base."""
    return tiny_adapters(base, NAMES[1:])


@pytest.fixture(scope="module")
def several(base, folders):
    from anyexperts_jax.serve.model import load_served

    return load_served(base, adapters=folders)


def test_adapters_share_the_bases_arrays(several):
    from anyexperts_jax.models.init import named_leaves

    own = named_leaves(several.weights.params)
    for weights in several.adapters.values():
        held = named_leaves(weights.params)
        assert all(held[name] is leaf for name, leaf in own.items())
        assert len(held) > len(own)
    assert several.with_adapter("two").weights is several.adapters["two"]


def test_an_adapter_of_another_base_is_refused(base, folders, tmp_path, capsys):
    other = tiny_folder(tmp_path / "tiny", seed=1)
    assert main(["serve", str(other), "--port", "0", "--adapter", f"law={folders['one']}"]) == 2
    said = capsys.readouterr().err
    assert "the adapter law was trained on another base: its fingerprint is" in said
    assert len(said.splitlines()) == 1
    (tmp_path / "text.txt").write_text("A cat sat on the mat")
    commands = [["generate", "--prompt", "a"], ["evaluate", "--text", str(tmp_path / "text.txt")]]
    commands += [["evaluate", "--tasks", "any"]] if importlib.util.find_spec("lm_eval") else []
    for command, *how in commands:
        assert main([command, str(other), *how, "--adapter", str(folders["one"])]) == 2
        assert "was trained on another base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["one"], "--adapter entry 'one' must read NAME=PATH"),
        (["one=nowhere"], "adapter nowhere has no anyexperts_adapter.json"),
        (["tiny={one}"], "--adapter: tiny is the name of the model itself"),
        (["a={one}", "a={two}"], "--adapter names 'a' twice"),
    ],
)
def test_adapters_that_cannot_be_had(base, folders, entries, said, capsys):
    given = [word for entry in entries for word in ("--adapter", entry.format(**folders))]
    assert main(["serve", str(base), "--port", "0", *given]) == 2
    assert said in capsys.readouterr().err


def test_a_run_of_its_own_model_takes_no_adapter(folders, tmp_path, capsys):
    from anyexperts_jax.serve.model import load_served

    with pytest.raises(UserError, match="did not start from a published checkpoint; adapters fit those alone"):
        load_served(tmp_path, adapters={"one": folders["one"]})
    assert main(["generate", str(tmp_path), "--question", "a", "--adapter", str(folders["one"])]) == 2
    assert "--adapter goes with --prompt and a published checkpoint" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--adapter", str(folders["one"])]) == 2
    assert "--adapter: " in capsys.readouterr().err


@pytest.mark.slow
def test_answers_of_several_adapters_in_one_batch_are_those_alone(several):
    from anyexperts_jax.serve.engine import Engine

    ignored = lambda name, amount: None  # noqa: E731
    how = {"slots": SLOTS, "length": 96, "watch": ignored}
    engine = Engine(several.weights, several.tokenizer, several.stop_ids, adapters=several.adapters, **how)
    cases = [(*case, NAMES[i % 3]) for i, case in enumerate(zip(PROMPTS, LENGTHS, BUDGETS, strict=True))]

    def answers(engine, cases):
        events = [[] for _ in cases]
        for own, (prompt, length, budget, adapter) in zip(events, cases, strict=True):
            engine.submit(job(several, Prompt(prompt), length, budget, own, adapter=adapter))
        while engine.step():
            continue
        return events

    together = answers(engine, cases)
    for case, events in zip(cases, together, strict=True):
        served = several if case[3] is None else several.with_adapter(case[3])
        alone = Engine(served.weights, served.tokenizer, served.stop_ids, **how)
        (only,) = answers(alone, [(*case[:3], None)])
        assert tokens_of(events) == tokens_of(only)
        assert events[-1] == only[-1]
    same = [answers(engine, [(PROMPTS[0], 8, None, name)])[0] for name in NAMES]
    assert len({tuple(tokens_of(events)) for events in same}) == 3


@pytest.mark.slow
def test_a_request_chooses_by_its_model(several, base, folders, capsys):
    from anyexperts_jax.serve.run import in_thread, make_service

    body = {"prompt": "A cat", "max_tokens": 6, "temperature": 0}
    with in_thread(make_service(several, slots=4, length=96)) as url:
        models = send(url, "GET", "/v1/models")[2]["data"]
        assert [model["id"] for model in models] == ["tiny", "one", "two"]
        assert send(url, "GET", "/v1/models/two")[2]["id"] == "two"
        ask = lambda name: send(url, "POST", "/v1/completions", {**body, "model": name})  # noqa: E731
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, ("tiny", "one", "two", "tiny", "one", "two")))
        status, _, refused = ask("three")
    assert (status, refused["error"]["message"]) == (404, "the model 'three' is not served here; valid: tiny, one, two")
    texts = [answer["choices"][0]["text"] for _, _, answer in answers]
    assert [answer["model"] for _, _, answer in answers[:3]] == ["tiny", "one", "two"]
    assert texts[:3] == texts[3:]
    how = ["generate", str(base), "--prompt", "A cat", "--max-new-tokens", "6"]
    for name, text in zip(NAMES, texts[:3], strict=True):
        assert main([*how, *(["--adapter", str(folders[name])] if name else [])]) == 0
        assert capsys.readouterr().out == f"{text}\n"
