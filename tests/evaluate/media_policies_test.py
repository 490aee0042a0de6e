"""Answers about pictures and sounds at budgets by policy, of a published model that sees and hears."""

import json

import numpy as np
import pytest
from PIL import Image
from pretrained.tiny_hub import tiny_checkpoint
from pretrained.tiny_omni import MARKS, TEMPLATE, omni_checkpoint

from anyexperts_jax import load_pretrained
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.wav_file import write_wav
from anyexperts_jax.evaluate.media_policies import measure_records, media_policy_names
from anyexperts_jax.evaluate.records import read_records

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
from anyexperts_jax.tokenizers.train import train_tokenizer

CONTEXTS = ("image", "text", "image+audio", "audio")


def row(answer, *parts):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and records beside it."""
    made = omni_checkpoint(tmp_path_factory.mktemp("hub") / "omni", seed=1)
    train_tokenizer(["Hello world", "cat on the mat; the cat", "A cat sat"], 300, special=MARKS).save(made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (21, 37, 3), np.uint8)).save(made / "a.png")
    write_wav(made / "a.wav", (0.1 * random.standard_normal(4000)).astype(np.float32))
    picture, sound = {"type": "image", "path": "a.png"}, {"type": "audio", "path": "a.wav"}
    words = {"type": "text", "text": "Hello"}
    records = [
        row("cat", picture, words),
        row("A cat sat", words),
        row("mat", picture, sound, words),
        row("the", sound),
    ]
    (made / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return made


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder)


@pytest.fixture(scope="module")
def batches(model, folder):
    return read_records(model, str(folder / "rows.jsonl"), 8, 4)


def test_a_record_is_a_prompt_and_its_answer(model, folder, batches):
    (batch,) = batches
    assert batch.contexts == CONTEXTS
    tokens_T = np.asarray(batch.inputs.tokens_BT)[2]
    ids, shown = model.prepared(
        [{"role": "user", "content": [
            {"type": "image", "image": str(folder / "a.png")},
            {"type": "audio", "audio": str(folder / "a.wav")},
            {"type": "text", "text": "Hello"},
        ]}]
    )  # fmt: skip
    assert tokens_T[: len(ids)].tolist() == ids
    answer = [*model.tokenizer.encode("mat").ids_T.tolist(), model.tokenizer.special.eos[0]]
    assert tokens_T[batch.answer_BT[2]].tolist() == answer
    assert [item.modality for item in shown.items] == [Modality.IMAGE, Modality.AUDIO]


@pytest.mark.slow
def test_losses_are_those_of_each_record_alone(model, folder, batches):
    """By `Pretrained.logits` on the record without padding."""
    found = {one.context: one for one in measure_records(model, batches, [], [])}
    own = read_records(model, str(folder / "rows.jsonl"), 8, 1)
    alone = {one.context: one for one in measure_records(model, own, [], [])}
    assert list(found) == [*CONTEXTS, "all"]
    for context, one in found.items():
        assert one.nats == pytest.approx(alone[context].nats, abs=1e-4)
        assert one.records == (4 if context == "all" else 1)
    ids, shown = model.prepared([{"role": "user", "content": [{"type": "image", "image": str(folder / "a.png")},
                                                             {"type": "text", "text": "Hello"}]}])  # fmt: skip
    answer = [*model.tokenizer.encode("cat").ids_T.tolist(), model.tokenizer.special.eos[0]]
    logits_TY = np.asarray(model.logits([[*ids, *answer]], images=list(shown.items)))[0, len(ids) - 1 : -1]
    logs_TY = logits_TY - np.log(np.exp(logits_TY).sum(axis=1, keepdims=True))
    assert found["image"].nats == pytest.approx(-logs_TY[np.arange(len(answer)), answer].mean(), abs=1e-4)


@pytest.mark.slow
def test_experts_are_told_by_modality(model, batches):
    names = ("static", "static_modality", "top_p", "modes")
    own, *found = (one for one in measure_records(model, batches, [2], names) if one.context == "all")
    assert own.by_modality == {"text": 3.0, "image": 3.0, "audio": 3.0}
    of = {one.policy: one for one in found}
    assert of["static"].by_modality == {"text": 2.0, "image": 2.0, "audio": 2.0}
    assert of["static_modality"].by_modality["text"] > of["static_modality"].by_modality["image"]
    for name in ("top_p", "modes"):
        assert abs(of[name].realised - 2) < 0.2, name
    image = next(one for one in measure_records(model, batches, [], []) if one.context == "image")
    assert set(image.by_modality) == {"text", "image"}


def test_what_is_refused(model, batches, folder, tmp_path):
    assert not {"oracle", "dense"} & set(media_policy_names(model))
    with pytest.raises(UserError, match="policy='oracle'"):
        measure_records(model, batches, [2], ["oracle"])
    with pytest.raises(UserError, match="budget=9 must be from 1 to 7"):
        measure_records(model, batches, [9], ["static"])
    (tmp_path / "rows.jsonl").write_text('{"text": "Hello"}\n')
    with pytest.raises(UserError, match="line 1: the row is a text without a question; measure it with --text"):
        read_records(model, str(tmp_path / "rows.jsonl"), 8, 4)


@pytest.mark.slow
def test_the_command(folder, tmp_path, capsys):
    options = ["--data", f"mine={folder / 'rows.jsonl'}", "--budget", "2", "--policy", "static", "--examples", "2"]
    assert main(["evaluate", str(folder), *options]) == 0
    told = capsys.readouterr().out
    assert "image" in told
    assert "2.000" in told
    plain = tiny_checkpoint(tmp_path / "text", "qwen3_moe", vocab_size=300, eos_token_id=299)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (plain / name).write_bytes((folder / name).read_bytes())
    assert main(["evaluate", str(plain), *options]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "line 1: the prompt holds a part of type 'image', but the model reads text alone" in told[-1]
    assert main(["evaluate", str(folder), *options, "--text", "a.txt"]) == 2
    assert "give --text FILE or --data NAME=PATH" in capsys.readouterr().err
