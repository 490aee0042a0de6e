import dataclasses
import json

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.registry import Registry
from anyexperts_jax.tokenizers import store
from anyexperts_jax.tokenizers.base import (
    SpecialIds,
    TokenizerRecord,
    require_fits_vocabulary,
    require_same_tokenizer,
)
from anyexperts_jax.tokenizers.bytes import BytesTokenizer
from anyexperts_jax.tokenizers.store import (
    RECORD,
    load_tokenizer,
    open_tokenizer,
    read_record,
    save_tokenizer,
)

BYTES = BytesTokenizer()
RECORDED = TokenizerRecord.of(BYTES)


def trained(**changes):
    pytest.importorskip("tokenizers")
    from anyexperts_jax.tokenizers.train import train_tokenizer

    return train_tokenizer(["a cat sat"], **{"vocab_size": 262, "name": "cats", **changes})


def test_bytes_opens_by_name_and_is_stored_as_a_record(tmp_path):
    assert open_tokenizer("bytes") == BYTES
    save_tokenizer(BYTES, tmp_path / "run" / "tokenizer")
    assert [path.name for path in (tmp_path / "run" / "tokenizer").iterdir()] == [RECORD]
    assert load_tokenizer(tmp_path / "run" / "tokenizer") == BYTES
    assert open_tokenizer(str(tmp_path / "run" / "tokenizer")) == BYTES


def test_a_copy_keeps_name_and_fingerprint(tmp_path):
    tokenizer = trained()
    save_tokenizer(tokenizer, tmp_path)
    copy = open_tokenizer(str(tmp_path))
    assert TokenizerRecord.of(copy) == TokenizerRecord.of(tokenizer) == read_record(tmp_path)
    assert copy.name == "cats"
    require_same_tokenizer(read_record(tmp_path), copy)


def test_a_copy_that_was_changed_is_refused(tmp_path):
    save_tokenizer(trained(), tmp_path)
    trained(vocab_size=261).save(tmp_path)
    with pytest.raises(UserError, match=r"is not 'cats' \(huggingface, 262 ids.* but 'cats' \(huggingface, 261 ids"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("", "is not valid JSON"),
        ("[]", "holds no JSON object"),
        ({"kind": "bytes"}, "must hold kind, name, vocab_size, fingerprint; it holds kind"),
        (dataclasses.asdict(RECORDED) | {"vocab_size": "260"}, "must hold kind, name, vocab_size"),
        (dataclasses.asdict(RECORDED) | {"kind": "words"}, "kind='words' is unknown; valid: bytes, huggingface"),
        (dataclasses.asdict(RECORDED) | {"fingerprint": "0" * 64}, "is not 'bytes' .* but 'bytes'"),
    ],
)
def test_a_broken_record_is_refused_in_one_line(tmp_path, record, message):
    (tmp_path / RECORD).write_text(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / RECORD) in str(caught.value) or str(tmp_path) in str(caught.value)


def test_paths_without_a_tokenizer_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer '.*nowhere' does not exist; give 'bytes' or a path"):
        open_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"there is no tokenizer in .*: give 'bytes', a folder with tokenizer.json, or"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="there is no tokenizer in"):
        open_tokenizer(str(tmp_path / "notes.txt"))


def test_another_tokenizer_than_the_recorded_one_is_refused():
    require_same_tokenizer(RECORDED, BYTES)
    other = trained()
    with pytest.raises(UserError, match=r"the tokenizer is 'cats' .* trained with 'bytes' \(bytes, 260 ids, finger"):
        require_same_tokenizer(RECORDED, other)


def test_ids_that_exceed_the_models_vocabulary_are_refused():
    require_fits_vocabulary(BYTES, 260)
    require_fits_vocabulary(BYTES, 512)
    with pytest.raises(UserError, match=r"'bytes' exceed the model's vocabulary: it has 260 ids, model.vocab_size=259"):
        require_fits_vocabulary(BYTES, 259)


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(UserError, match="needs at least one id that ends an answer"):
        SpecialIds(pad=0, eos=())


def test_another_kind_of_tokenizer_can_be_registered(tmp_path, monkeypatch):
    """A user's package calls `TOKENIZERS.register`."""

    @dataclasses.dataclass(frozen=True)
    class Shouting(BytesTokenizer):
        kind = "shouting"

        def encode(self, text):
            return super().encode(text.upper())

    monkeypatch.setattr(store, "TOKENIZERS", Registry("tokenizer kind", {"bytes": BytesTokenizer}))
    store.TOKENIZERS.register("shouting", Shouting)
    save_tokenizer(Shouting(), tmp_path)
    assert open_tokenizer(str(tmp_path)).decode(open_tokenizer(str(tmp_path)).encode("hi").ids_T) == "HI"
