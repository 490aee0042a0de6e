"""`ExampleMap`: the importance of one example's tokens, mapped back onto its question, picture, frames or sound."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.example import SAMPLE_RATE, Example
from anyexperts_jax.data.features import HOP
from anyexperts_jax.evaluate.trained import Trained
from anyexperts_jax.report.followed import FollowedItem, follow
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
    """The maps of those of the first `count` test items of a domain that are examples: see `followed.follow`."""
    spec = trained.config.data.encoding
    return maps_of(follow(trained, domain, count, rows, max_new_tokens), spec, trained.tokenizer)


def maps_of(items: Sequence[FollowedItem], spec: EncodingSpec, tokenizer: Tokenizer) -> list[ExampleMap]:
    """The maps of those items that are examples; the page's script draws the others, from `explorer`."""
    return [
        lay_out(
            one.item,
            one.prediction,
            tokens_T=one.sequence.tokens_T,
            modality_T=one.sequence.modality_T,
            importance_LT=one.routing.importance_LBT[:, 0],
            spec=spec,
            tokenizer=tokenizer,
        )
        for one in items
        if isinstance(one.item, Example)
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
