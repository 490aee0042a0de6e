"""lm-eval's own classes on a tiny checkpoint: a local task, likelihoods, answers, and the experts they used."""

import json
import math

import numpy as np
import pytest
from serve.tiny import tiny_folder

from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.harness.run import TaskOptions, evaluate_tasks
from anyexperts_jax.harness.score import Pair, Used, log_likelihoods
from anyexperts_jax.harness.scores import layer_table, policy_name, score_table
from anyexperts_jax.pretrained.load import load_pretrained
from anyexperts_jax.serve.slots import row_budget

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("lm_eval")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["the"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROWS = [
    {"question": "Hello", "choices": ["world", "cat"], "answer": 0},
    {"question": "A cat", "choices": ["sat", "mat"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    from anyexperts_jax.serve.model import load_served

    return load_served(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


def expected(model, context, continuation, budget=None):
    """Log likelihood, and whether the continuation is greedy, from one plain forward pass of constant shape."""
    pretrained = load_pretrained(model.path)
    ids = [*context, *continuation]
    tokens_BT, last = np.zeros((1, 96), np.int32), len(ids) - 1
    tokens_BT[0, :last] = ids[:-1]
    logits_TY = np.asarray(pretrained.logits(tokens_BT, np.arange(96)[None] < last, budget))[0]
    logprobs_TY = logits_TY - np.logaddexp.reduce(logits_TY, axis=1, keepdims=True)
    places = range(len(context) - 1, last)
    own = [logprobs_TY[t, ids[t + 1]] for t in places]
    return float(np.sum(own)), all(logprobs_TY[t].argmax() == ids[t + 1] for t in places)


@pytest.mark.parametrize("budget", [None, 1.5])
def test_likelihoods_equal_those_of_a_forward_pass(model, budget):
    own = row_budget(model.base, model.weights.config, budget)
    used = Used(3)
    pairs = [Pair((5, 3), (8, 9, 7)), Pair((1,), (2,)), Pair(tuple(range(25)), (3, 4))]
    found = log_likelihoods(model.weights, pairs, own, rows=4, longest=96, used=used)
    for pair, (logprob, likeliest) in zip(pairs, found, strict=True):
        wanted = expected(model, *pair, budget)
        assert logprob == pytest.approx(wanted[0], abs=1e-4)
        assert likeliest == wanted[1]
    assert used.by_layer == pytest.approx([budget or 3] * 3, abs=0.05 if budget else 1e-6)


def test_a_pair_longer_than_the_model_is_cut_at_its_beginning(model):
    own = row_budget(model.base, model.weights.config, None)
    long = Pair(tuple(i % 50 for i in range(120)), (3, 4))
    (cut,) = log_likelihoods(model.weights, [long], own, rows=4, longest=96, used=Used(3))
    kept = (*long.context, *long.continuation)[-97:]
    assert cut[0] == pytest.approx(expected(model, kept[:-2], kept[-2:])[0], abs=1e-4)


def test_the_users_own_tasks_at_two_budgets(model, tasks):
    told = []
    options = TaskOptions(include=(tasks,), rows=4)
    found = evaluate_tasks(model, ["tiny_choice", "tiny_answer"], [None, 2.0], options, told.append)
    assert [(one.task, one.metric, one.budget, one.examples) for one in found] == [
        ("tiny_choice", "acc", None, 2),
        ("tiny_choice", "acc", 2.0, 2),
        ("tiny_answer", "exact_match", None, 2),
        ("tiny_answer", "exact_match", 2.0, 2),
    ]
    assert len(told) == 4
    tokenizer = model.tokenizer
    for one in found:
        assert one.by_layer == pytest.approx([one.budget or 3] * 3)
        assert one.policy == "static"
        assert one.seconds > 0
        assert one.higher_is_better is True
    right = 0
    for row in ROWS:
        question = tokenizer.encode(row["question"]).ids_T.tolist()
        whole = [tokenizer.encode(f"{row['question']} {choice}").ids_T.tolist() for choice in row["choices"]]
        scores = [expected(model, question, ids[len(question) :])[0] for ids in whole]
        right += int(np.argmax(scores)) == row["answer"]
    assert found[0].score == right / 2
    assert score_table(found, "a").rows[1][:3] == ("tiny_choice", "acc", "2")
    assert layer_table(found).rows[1] == ("tiny_choice", "2", "2.00", "2.00", "2.00")


def test_a_long_text_is_scored_in_windows(model):
    from lm_eval.api.instance import Instance

    from anyexperts_jax.harness.lm import HarnessLM

    lm = HarnessLM(model, None, rows=4, length=8)
    text = "Hello world cat on the mat; the cat"
    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids = model.tokenizer.encode(text).ids_T.tolist()
    first = expected(model, [lm.prefix_token_id], ids[:8])[0]
    rest = sum(
        expected(model, ids[end - 1 - 8 : begin], ids[begin:end])[0]
        for begin, end in [(begin, min(begin + 8, len(ids))) for begin in range(8, len(ids), 8)]
    )
    assert found == pytest.approx(first + rest, abs=1e-3)


def test_answers_end_before_a_stop_text(model):
    from lm_eval.api.instance import Instance

    from anyexperts_jax.harness.lm import HarnessLM

    lm = HarnessLM(model, None, rows=4)
    ask = lambda **how: lm.generate_until([Instance("generate_until", {}, ("Hello world", how), 0)])[0]  # noqa: E731
    free = ask(max_gen_toks=12)
    assert free == load_pretrained(model.path).generate("Hello world", max_new_tokens=12)
    assert ask(max_gen_toks=12, until=[free[3:6]]) == free[: free.index(free[3:6])]
    with pytest.raises(UserError, match="asks for num_beams in generation_kwargs"):
        ask(max_gen_toks=3, num_beams=4)


def test_conversations_are_rendered_with_the_chat_template(model):
    from anyexperts_jax.harness.lm import HarnessLM

    lm = HarnessLM(model, None)
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "A cat"}]
    assert lm.apply_chat_template(history[:1]) == "<user>Hello\n<a>"
    assert lm.apply_chat_template(history, add_generation_prompt=False) == "<user>Hello\n<assistant>A cat"
    assert lm.chat_template(True).startswith("{% for m in messages %}")
    assert lm.tokenizer_name.endswith(model.tokenizer.fingerprint)


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_a_similar_name(model, tasks):
    with pytest.raises(UserError, match=r"'tiny_chioce' is not known to lm-eval.*near it: tiny_choice"):
        evaluate_tasks(model, ["tiny_chioce"], options=TaskOptions(include=(tasks,)))


def test_invalid_budgets_folders_and_options_are_refused(model, tasks, folder, capsys):
    with pytest.raises(UserError, match=r"budget=9 must be from 1 to 7"):
        evaluate_tasks(model, ["tiny_choice"], [9.0])
    with pytest.raises(UserError, match=r"--include .*nowhere is no folder"):
        evaluate_tasks(model, ["tiny_choice"], options=TaskOptions(include=(tasks / "nowhere",)))
    assert main(["evaluate", str(folder), "--limit", "3"]) == 2
    assert "--limit: only with --tasks" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--tasks", "tiny_choice", "--metric", "a=cer"]) == 2
    assert "--metric: not with --tasks" in capsys.readouterr().err


def test_the_command_prints_and_writes_scores(folder, tasks, tmp_path, capsys):
    out = tmp_path / "scores.json"
    options = ["--tasks", "tiny_choice", "--include", str(tasks), "--budget", "2", "--limit", "1", "--out", str(out)]
    assert main(["evaluate", str(folder), *options]) == 0
    said = capsys.readouterr()
    assert "tiny_choice" in said.out
    written = json.loads(out.read_text())
    assert written["command"].endswith(f"--tasks tiny_choice --checkpoint best --budget 2 --include {tasks} --limit 1")
    (row,) = written["scores"]
    assert row["budget"] == 2
    assert row["realised"] == 2
    assert row["examples"] == 1
    assert row["standard_error"] is None or math.isfinite(row["standard_error"])


def test_policy_name(model):
    assert policy_name(model.base, None) == policy_name(model.base, 2.0) == "static"
    assert policy_name(model.base, 2.5) == "static, mixed by position"
