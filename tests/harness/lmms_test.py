"""lmms-eval's own classes on a tiny model that sees: a local task with two pictures, answers and likelihoods.

`make test-lmms` runs it in the environment that has lmms-eval.
"""

import json

import numpy as np
import pytest
from PIL import Image
from pretrained.tiny_omni import MARKS, TEMPLATE
from pretrained.tiny_vl import vl_checkpoint
from serve.tiny import tiny_folder

from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError

pytest.importorskip("lmms_eval")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # lmms-eval and what it imports warn
UTILS = """
import pathlib
from PIL import Image

FOLDER = pathlib.Path(__file__).parent

def visual(doc):
    return [Image.open(FOLDER / doc["picture"]).convert("RGB")]

def scored(doc, results):
    return {"kept": float(bool(results[0])), "same": float(results[0] == doc["answer"])}
"""
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
"""
ANSWER = """
task: tiny_pictures
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 6, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false, until: ["the"]}}
process_results: !function utils.scored
metric_list:
  - {{metric: kept, aggregation: mean, higher_is_better: true}}
  - {{metric: same, aggregation: mean, higher_is_better: true}}
"""
CHOICE = """
task: tiny_choices
output_type: multiple_choice
doc_to_choice: ["cat", "world"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = ("Hello world", "A cat sat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from anyexperts_jax.tokenizers.train import train_tokenizer

    made = vl_checkpoint(tmp_path_factory.mktemp("hub") / "seeing")
    train_tokenizer(["Hello world", "cat on the mat; the cat", "A cat sat"], 300, special=MARKS).save(made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (2, 21, 37, 3), np.uint8)


@pytest.fixture(scope="module")
def expected(folder, pictures):
    """The answers of `generate`, and the choices that are likelier per token by a forward pass."""
    from anyexperts_jax import load_pretrained

    model = load_pretrained(folder)
    texts, likelier = [], []
    for question, picture in zip(QUESTIONS, pictures, strict=True):
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        how = {"max_new_tokens": 6, "budget": 2.0, "stop": ["the"]}
        texts.append(model.generate(asked, images=[picture], **how))
        prompt, scores = model.tokens(asked, images=[picture]), []
        for choice in (" cat", " world"):
            ids = [*prompt, *model.tokenizer.encode(choice).ids_T.tolist()]
            logits_TY = np.asarray(model.logits([ids], budget=2.0, images=[picture]))[0]
            logprobs_TY = logits_TY - np.logaddexp.reduce(logits_TY, axis=1, keepdims=True)
            scores.append(np.mean([logprobs_TY[t, ids[t + 1]] for t in range(len(prompt) - 1, len(ids) - 1)]))
        likelier.append(int(np.argmax(scores)))
    return texts, likelier


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, pictures, expected):
    made = tmp_path_factory.mktemp("tasks")
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(made / f"{number}.png")
    for name, text, answers in (("answer", ANSWER, expected[0]), ("choice", CHOICE, expected[1])):
        rows = [
            {"question": question, "picture": f"{number}.png", "answer": answers[number]}
            for number, question in enumerate(QUESTIONS)
        ]
        data = made / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (made / f"{name}.yaml").write_text((COMMON + text).format(data=data))
    (made / "utils.py").write_text(UTILS)
    return made


def run(folder, tasks, capsys, *options, code=0):
    argv = ["evaluate", str(folder), "--harness", "lmms-eval", "--include", str(tasks), *options]
    assert main(argv) == code
    return capsys.readouterr()


def test_the_users_own_tasks_at_two_budgets(folder, tasks, tmp_path, capsys):
    out = tmp_path / "scores.json"
    names = "tiny_pictures,tiny_choices"
    said = run(folder, tasks, capsys, "--tasks", names, "--budget", "2", "3", "--out", str(out)).out
    assert "real experts per token, by modality and MoE layer" in said
    scores = json.loads(out.read_text())["scores"]
    same = {(one["task"], one["metric"], one["budget"]): one for one in scores}
    assert same["tiny_pictures", "same", 2.0]["score"] == 1  # what `generate` says alone, at this budget
    assert same["tiny_choices", "acc", 2.0]["score"] == 1  # what a forward pass prefers
    for one in scores:
        assert one["examples"] == 2
        assert one["by_layer"] == pytest.approx([one["budget"]] * 3)
        assert set(one["by_modality"]) == {"text", "image"}
        assert one["policy"] == "static"
        assert one["seconds"] > 0


def test_lmms_eval_finds_the_model_by_its_entry_point(folder, tasks, expected):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        "anyexperts",
        model_args=f"pretrained={folder},budget=2",
        batch_size=2,
        tasks=["tiny_pictures"],
        task_manager=manager,
        log_samples=True,
    )
    assert [sample["filtered_resps"][0] for sample in found["samples"]["tiny_pictures"]] == [
        text.strip() for text in expected[0]
    ]
    assert found["throughput"]["avg_real_experts_image"] == pytest.approx(2)
    assert found["throughput"]["avg_real_experts_layer_0"] == pytest.approx(2)
    assert found["throughput"]["avg_budget"] == 2


def test_errors_are_one_line(folder, tasks, tmp_path, capsys):
    said = run(folder, tasks, capsys, "--tasks", "tiny_picture", code=2).err
    assert "the task 'tiny_picture' is not known to lmms-eval" in said
    assert "tiny_pictures" in said
    said = run(tiny_folder(tmp_path / "blind"), tasks, capsys, "--tasks", "tiny_pictures", code=2).err
    assert "blind reads text alone, but lmms-eval's tasks show pictures, videos and sounds" in said
    said = run(folder, tasks, capsys, "--tasks", "tiny_pictures", "--chat", code=2).err
    assert "--chat: not with --harness lmms-eval" in said
    (tmp_path / "gone.yaml").write_text((COMMON + ANSWER).format(data="nowhere.jsonl").replace("tiny_", "lost_"))
    (tmp_path / "utils.py").write_text(UTILS)
    said = run(folder, tmp_path, capsys, "--tasks", "lost_pictures", code=2).err
    assert "the task 'lost_pictures' cannot be r" in said
    assert "nowhere.jsonl" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("budget=2", "needs pretrained=PATH"),
        ("pretrained=a,smell=1", "'smell'.*valid: pretrained, budget"),
        ("pretrained=a,device=cuda", "JAX takes the devices it finds"),
        ("pretrained=a,batch_size=auto", "batch_size=auto must be a whole number > 0"),
        ("pretrained=a,length=0", "length=0 must be a"),
        ("pretrained=a,budget=many", "budget=many must be a number > 0"),
        ("pretrained=a,budget=-1", "budget=-1.0 must be a number > 0"),
        ("pretrained", "--model_args 'pretrained' must read NAME=VALUE"),
        ("pretrained=nowhere", "nowhere"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    from anyexperts_jax.harness.lmms import HarnessLMM

    with pytest.raises(UserError, match=message):
        HarnessLMM.create_from_arg_string(arguments)
