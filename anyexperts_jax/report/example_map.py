"""`ExampleMap`: the importance of one example's tokens, mapped back onto its question, picture, frames or sound."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.batches import pad_rows, stack
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.encode import encode
from anyexperts_jax.data.example import SAMPLE_RATE, Example
from anyexperts_jax.data.features import HOP
from anyexperts_jax.data.mixture import examples_there, open_source
from anyexperts_jax.data.prepare import prepare
from anyexperts_jax.evaluate.measure import Window, run_at
from anyexperts_jax.evaluate.scoring import predict
from anyexperts_jax.evaluate.trained import Trained, own_window
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.bytes import BYTES


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleMap:
    """One example and the importance of its tokens in each of L layers, in (0, 1)."""

    example: Example
    prediction: str | None  # the model's answer, if it was asked
    question_LQ: Float[ndarray, "L Q"]  # one value per token of the question
    patches_LFRC: Float[ndarray, "L F rows cols"] | None = None  # one value per patch, on each frame's grid
    patch_size: int = 0  # side of a patch in pixels
    chunks_LS: Float[ndarray, "L S"] | None = None  # one value per chunk of sound
    chunk_seconds: float = 0.0
    tokenizer: Tokenizer = BYTES  # the tokenizer of the question

    @property
    def media_L(self) -> Float[ndarray, "L places"]:
        """The importance of the media tokens, flattened; [L, 0] without media."""
        values = self.patches_LFRC if self.patches_LFRC is not None else self.chunks_LS
        if values is None:
            return np.zeros((len(self.question_LQ), 0))
        return values.reshape(len(values), -1)


def map_examples(trained: Trained, domain: str, count: int, rows: int, max_new_tokens: int) -> list[ExampleMap]:
    """The first `count` test examples of a domain, with their importance and the model's answers at its own window.

    A folder with fewer examples gives all of them. The batch is padded to `rows`, at least `count`, or to the next size
    that the mesh splits evenly, so that a program already compiled for that size can be reused.
    """
    config = trained.config
    source = open_source(config.data, domain, "test", examples_there(config.data, domain, "test", count))
    items = [source[i] for i in range(min(count, len(source)))]
    examples = [prepare(item, config.data.encoding) for item in items if isinstance(item, Example)]  # as the model sees
    if not examples:  # conversations have no map yet
        return []
    spec = config.data.encoding
    index = config.data.domain_index(domain)
    tokenizer = trained.tokenizer
    encoded = [encode(example, spec, tokenizer=tokenizer, domain_index=index) for example in examples]
    batch = pad_rows(stack(encoded), trained.whole_rows(rows), tokenizer)
    window: Window = own_window(config.model.moe)
    output = run_at(trained, config.model, batch, window)
    importance_LBT = np.asarray(jax.device_get(output.trace.importance_BT))
    said = predict(trained, config.model, batch, window, max_new_tokens)
    tokens_BT, modality_BT = np.asarray(batch.tokens_BT), np.asarray(batch.modality_BT)
    return [
        lay_out(
            example,
            said[i],
            tokens_T=tokens_BT[i],
            modality_T=modality_BT[i],
            importance_LT=importance_LBT[:, i],
            spec=spec,
            tokenizer=tokenizer,
        )
        for i, example in enumerate(examples)
    ]


def lay_out(
    example: Example,
    prediction: str | None,
    tokens_T: Int[ndarray, " T"],
    modality_T: Int[ndarray, " T"],
    importance_LT: Float[ndarray, "L T"],
    spec: EncodingSpec,
    *,
    tokenizer: Tokenizer = BYTES,
) -> ExampleMap:
    """Maps importance by position back to the places in the prepared example that `data.encode` made the positions
    from."""
    media_T = modality_T != Modality.TEXT
    begin = 1 + int(media_T.sum())  # after BOS and media
    question = int(np.argmax(tokens_T[begin:] == tokenizer.special.separator))
    one = ExampleMap(example, prediction, importance_LT[:, begin : begin + question], tokenizer=tokenizer)
    media_L = importance_LT[:, media_T]
    if example.audio is not None:
        return dataclasses.replace(one, chunks_LS=media_L, chunk_seconds=spec.frames_per_chunk * HOP / SAMPLE_RATE)
    pixels = example.video if example.video is not None else example.image
    if pixels is None:
        return one
    rows, columns = (side // spec.patch_size for side in pixels.shape[-3:-1])
    patches_LFRC = media_L.reshape(len(media_L), -1, rows, columns)
    return dataclasses.replace(one, patches_LFRC=patches_LFRC, patch_size=spec.patch_size)
