"""Asks a trained model one question: an example of a domain, or the user's own text, picture or sound."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import MODALITY_NAMES
from anyexperts_jax.data.batches import pad_rows, stack
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.conversation import Item
from anyexperts_jax.data.decode import decode_audio, decode_picture
from anyexperts_jax.data.example import Example, is_unicode
from anyexperts_jax.data.sequence import padded
from anyexperts_jax.data.turns import chat_template, encode_item
from anyexperts_jax.evaluate.measure import run_at
from anyexperts_jax.evaluate.scoring import predict
from anyexperts_jax.evaluate.trained import Trained, own_window, with_room
from anyexperts_jax.routing.budget import shift_budget
from anyexperts_jax.routing.metrics import by_modality

MAX_NEW_TOKENS = 24
_UNKNOWN = "?"  # placeholder for the answer to the user's question


@dataclasses.dataclass(frozen=True)
class Reply:
    """The model's answer, and the real experts per token over prompt and answer, by modality."""

    answer: str
    real_slots: dict[str, float]  # mean over layers and over the tokens of the modality
    window: tuple[float, float]


def ask(trained: Trained, example: Item, budget: float | None = None, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Reply:
    """Returns the greedy answer to an example's question, or a conversation's last turn. The model does not see the
    example's own answer.

    Args:
      budget: nominal real experts per token (`routing.budget.shift_budget`); None: the window used in training.
      max_new_tokens: largest number of tokens of the answer, including its end.

    Raises:
      UserError: if the example does not fit the model, or the model cannot reach the budget.
    """
    moe = trained.config.model.moe
    if budget is not None:
        moe = shift_budget(moe, budget)
    window = own_window(moe)
    model = with_room(trained.config.model, window[1])
    data, template = trained.config.data, chat_template(trained.config.data, trained.tokenizer)
    sequence = encode_item(example, data.encoding, tokenizer=trained.tokenizer, template=template)
    encoded = stack([padded(sequence, data.encoding)])
    batch = pad_rows(encoded, trained.whole_rows(1), trained.tokenizer)
    answer = predict(trained, model, batch, window, max_new_tokens)[0]
    output = run_at(trained, model, batch, window)
    real_T = np.asarray(output.trace.real_slots_BT)[:, 0].mean(axis=0)
    means_M = np.asarray(by_modality(real_T, batch.modality_BT[0], batch.valid_BT[0]))
    present = {name: float(mean) for name, mean in zip(MODALITY_NAMES, means_M, strict=True) if not np.isnan(mean)}
    return Reply(answer, present, window)


def own_example(question: str, spec: EncodingSpec, *, image: Any = None, audio: Any = None) -> Example:
    """Returns the user's question as an example, with a picture, a sound or neither.

    Args:
      image: a path, a Pillow image, or pixels [H, W, 3]: see `data.decode.decode_picture`.
      audio: a path, or mono samples at SAMPLE_RATE: see `data.decode.decode_audio`.

    Raises:
      UserError: if the question is not valid text, or a file cannot be read or does not fit the run's sequences.
    """
    require(isinstance(question, str), f"the question is a {type(question).__name__}; it must be a str")
    require(bool(question), "the question is empty")
    require(is_unicode(question), f"the question {question!r} is not valid UTF-8; give it in that encoding")
    require(image is None or audio is None, "give --image or --audio, not both")
    media: dict[str, Any] = {}
    if image is not None:
        require(spec.max_patches > 0, "this run reads no images: data.encoding.max_patches=0")
        media["image"] = decode_picture(*_named(image, "the image"))
    if audio is not None:
        media["audio"] = decode_audio(*_named(audio, "the audio"))
    return Example(
        domain="own", question_type="own", level=1, question=question, answer=_UNKNOWN, source="user", **media
    )


def _named(value: Any, name: str) -> tuple[Any, str]:
    """Returns the value and its name for error messages; a path is its own name."""
    path = isinstance(value, str | pathlib.Path)
    return (pathlib.Path(value), str(value)) if path else (value, name)
