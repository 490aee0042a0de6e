"""From a published checkpoint through training and back, by one command each: every parameter keeps its place."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from pretrained.tiny_hub import BFLOAT16, tiny_checkpoint

import anyexperts_jax as ax
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import named_leaves
from anyexperts_jax.serve.model import load_served
from anyexperts_jax.tokenizers.train import train_tokenizer
from anyexperts_jax.train.config import load_config
from anyexperts_jax.train.published import load_published, load_tuned

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

SMALL = {"vocab_size": 300, "num_hidden_layers": 2, "pad_token_id": None, "eos_token_id": 299}
STEPS = ("train.steps=2", "optim.warmup_steps=1", "train.batch_size=8", "train.eval_examples=2", "optim.lr=0.01")
STEPS += (
    "data.held_out=0.3",
    "train.checkpoint_every=1",
    "train.eval_every=1",
    "train.log_every=1",
    "data.encoding.max_length=32",
)
ROUTING = 'train.trainable=["**/router/**", "**/importance/**", "**/strength"]'


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A mixture with a tokenizer, bfloat16 on disk."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("hub") / "moe", "qwen3_moe", dtype=BFLOAT16, **SMALL)
    train_tokenizer(["say one, say two", "what is said: three", "a cat on the mat"], 300).save(folder)
    return folder


@pytest.fixture(scope="module")
def attached(hub):
    out = hub.parent / "attached"
    ax.attach(ax.load_pretrained(hub), k_min=2, k_max=4, num_virtual=2).export(out, form="anyexperts")
    return out


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"question": f"say {i}", "answer": str(i)}) + "\n" for i in range(40)))
    return path


def overrides(*more):
    return [part for one in (*STEPS, *more) for part in ("--set", one)]


def test_the_configuration_of_a_checkpoint_is_its_own_model_and_tokenizer(attached):
    config = load_config(attached, ["optim.lr=0.5"])
    model = ax.load_pretrained(attached)
    assert config.model.moe == model.config.moe
    assert config.model.vocab_size == 300
    assert config.model.stack.param_dtype == "float32"
    assert config.model.vision is None
    assert config.train.start_from == config.data.tokenizer == str(attached)
    assert config.model.eos_id == model.tokenizer.special.eos[0]
    assert config.optim.lr == 0.5
    assert config.data.encoding.max_length == 96  # the model has no more positions


@pytest.mark.parametrize(
    ("source", "override", "message"),
    [
        ("tiny", "train.start_from={}", "leave out preset='tiny', as in: anyexperts train"),
        ("{}", "data.tokenizer=nowhere", "tokenizer 'nowhere' does not exist"),
        ("{}", "data.encoding.max_length=97", "is longer than the model's max_length=96"),
    ],
)
def test_what_does_not_fit_a_checkpoint_is_one_line(attached, source, override, message):
    with pytest.raises(UserError) as error:
        load_config(source.format(attached), [override.format(attached)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_a_tokenizer_is_one_line(tmp_path):
    folder = tiny_checkpoint(tmp_path / "bare", "qwen3_moe", **SMALL)
    with pytest.raises(UserError, match="there is no tokenizer in"):
        load_config(folder)


@pytest.mark.slow
def test_attached_routing_is_trained_exported_and_asked(hub, attached, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gone = shutil.copytree(attached, tmp_path / "attached")
    train = ["train", str(gone), "--data", f"mine={questions}", "--run", "runs/tuned", *overrides(ROUTING)]
    assert main(train) == 0, capsys.readouterr().err
    assert "(frozen)" in capsys.readouterr().err
    shutil.rmtree(gone)  # the run no longer needs it
    assert main(["export", "runs/tuned", "tuned", "--form", "anyexperts", "--checkpoint", "last"]) == 0
    before, after = ax.load_pretrained(attached), ax.load_pretrained("tuned")
    assert after.config.moe == before.config.moe
    moved = []
    for name, value in named_leaves(before.params).items():
        found = np.asarray(named_leaves(after.params)[name])
        if not np.array_equal(np.asarray(value, np.float32), np.asarray(found, np.float32)):
            moved.append(name)
    assert moved
    assert all("/router/" in name or "/importance/" in name or name.endswith("strength") for name in moved)
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["dtype"] == "float32"
    base = ax.detach(after)  # experts and attention are the base's, in float32
    np.testing.assert_array_equal(
        named_leaves(base.params)["decoder/moe_layers/moe/experts/w_up_EDF"],
        np.asarray(named_leaves(ax.load_pretrained(hub).params)["decoder/moe_layers/moe/experts/w_up_EDF"], np.float32),
    )
    capsys.readouterr()
    assert main(["generate", "runs/tuned", "--prompt", "say 3", "--max-new-tokens", "3", "--checkpoint", "last"]) == 0
    from_run = capsys.readouterr().out
    assert main(["generate", "tuned", "--prompt", "say 3", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out == from_run
    assert main(["generate", "runs/tuned", "--domain", "mine"]) == 0
    with pytest.raises(UserError, match="did not start from a published checkpoint"):
        load_tuned(tmp_path)
    assert load_published("runs/tuned").family == "qwen3_moe"
    served, tuned = load_served(pathlib.Path("runs/tuned"), "last"), load_tuned("runs/tuned", "last")
    for name, value in named_leaves(tuned.params).items():
        np.testing.assert_array_equal(named_leaves(served.weights.params)[name], value)
    assert list(served.reader.text("say 3").tokens) == tuned.tokens("say 3")  # as `generate` reads it
    assert served.longest == tuned.config.max_length
    assert set(tuned.stop_ids) <= set(served.stop_ids)
    chat = served.reader.chat([{"role": "user", "content": "say 3"}])  # as the run learned it: there is no template
    special = tuned.tokenizer.special
    said = tuned.tokenizer.encode("say 3").ids_T.tolist()
    assert list(chat.tokens) == [special.begin, *said, special.separator]
    assert chat.batch is None


@pytest.mark.slow
def test_a_split_model_is_trained_and_merged(questions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny_checkpoint(tmp_path / "dense", "llama", **SMALL)
    train_tokenizer(["say one, say two", "what is said: three", "a cat on the mat"], 300).save(folder)
    ax.split(ax.load_pretrained(folder), num_experts=4, num_shared=1, markers=2).export("split", form="anyexperts")
    assert main(["train", "split", "--data", f"mine={questions}", "--run", "runs/s", *overrides()]) == 0
    tuned = load_tuned("runs/s", "last")
    merged = ax.merge(tuned)
    tokens = [[1, 2, 3, 4]]
    np.testing.assert_allclose(merged.logits(tokens), tuned.logits(tokens), atol=2e-5)
    tuned.export("tuned", form="anyexperts")
    np.testing.assert_array_equal(ax.load_pretrained("tuned").logits(tokens), tuned.logits(tokens))
    merged.export("hub")
    more = ["train", "runs/s", "--run", "runs/more", "--set", "train.start_from=runs/s"]
    assert main(more) == 0
    assert load_tuned("runs/more").order_LF is not None
