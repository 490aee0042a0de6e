"""The data with which the page's script follows a question's tokens through the layers: text, media and routing.

Everything comes from the sequence that the model reads, so the page shows what the model sees: pictures at the model's
size, sounds as log-mel frames. The figures of a question are one array of 16-bit numbers, compressed.
"""

import base64
import dataclasses
import io
import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8, UInt16
from numpy import ndarray

from anyexperts_jax.core.modality import MODALITY_NAMES, Modality
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.conversation import question_and_answer
from anyexperts_jax.data.example import SAMPLE_RATE
from anyexperts_jax.data.features import HOP
from anyexperts_jax.data.sequence import EncodedSequence
from anyexperts_jax.report.followed import FollowedItem
from anyexperts_jax.tokenizers.base import Tokenizer

MOST_BYTES = 1_000_000  # how much of the page all questions together may take
UNITS = 10_000  # importance and combine weights are whole numbers of 1 / UNITS
DROPPED = 1 << 15  # added to an expert's index if its buffer had no room for the token
_LONGEST_TEXT = 200  # characters of a question or answer shown above the tokens, which show all of it


@dataclasses.dataclass(frozen=True)
class Explorer:
    """The data of the page's script, the number of questions in them, and of those that did not fit in `MOST_BYTES`."""

    data: Mapping[str, Any]
    shown: int
    left_out: int


def explore(
    followed: Mapping[str, Sequence[FollowedItem]], num_experts: int, spec: EncodingSpec, tokenizer: Tokenizer
) -> Explorer:
    """Collects the first question of every domain, then the second of every domain, and so on, while they fit."""
    items = [one for of_domain in followed.values() for one in of_domain]
    kept, room = [], MOST_BYTES
    for one in sorted(items, key=lambda item: item.number):
        data = question_data(one, num_experts, spec, tokenizer)
        size = sum(len(text) for text in [data["figures"], *(block.get("png", "") for block in data["blocks"])])
        if size <= room:
            kept.append((list(followed).index(one.domain), data))
            room -= size
    questions = [data for _, data in sorted(kept, key=lambda pair: pair[0])]
    layers = len(items[0].routing.importance_LBT) if items else 0
    data = {"layers": layers, "experts": num_experts, "units": UNITS, "dropped": DROPPED, "questions": questions}
    return Explorer(data, len(questions), len(items) - len(questions))


def question_data(one: FollowedItem, num_experts: int, spec: EncodingSpec, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the data of one question."""
    question, answer = question_and_answer(one.item)
    sequence = one.sequence
    text_T = sequence.modality_T == Modality.TEXT
    pieces = tokenizer.pieces(sequence.tokens_T.tolist())
    return {
        "domain": one.domain,
        "number": one.number,
        "question": _short(question),
        "answer": _short(answer),
        "said": None if one.prediction is None else _short(one.prediction),
        "tokens": [piece if is_text else "" for piece, is_text in zip(pieces, text_T.tolist(), strict=True)],
        "evidence": np.flatnonzero(sequence.evidence_T).tolist(),
        "blocks": _blocks(one, spec),
        "figures": _packed(figures(one, num_experts)),
    }


def figures(one: FollowedItem, num_experts: int) -> UInt16[ndarray, " n"]:
    """Packs the routing into one array of uint16.

    It has L x T values each of importance, real experts, virtual experts and the virtual weight; then, layer by layer
    and token by token, the index and weight of each real expert.
    """
    routing = one.routing
    ids_LTK, weights_LTK = routing.expert_ids_LBTK[:, 0], routing.weights_LBTK[:, 0]
    real_LTK = ids_LTK < num_experts
    by_token = (
        _units(routing.importance_LBT[:, 0]),
        real_LTK.sum(axis=-1),
        routing.virtual_slots_LBT[:, 0],
        _units(routing.virtual_weight_LBT[:, 0]),
    )
    order_LTK = np.argsort(np.where(real_LTK, -weights_LTK, 1.0), axis=-1, kind="stable")  # largest weight first
    marked_LTK = ids_LTK + DROPPED * routing.dropped_LBTK[:, 0]
    by_expert = [
        np.take_along_axis(values, order_LTK, axis=-1)[np.take_along_axis(real_LTK, order_LTK, axis=-1)]
        for values in (marked_LTK, _units(weights_LTK))
    ]
    parts = [*(values.reshape(-1) for values in by_token), np.stack(by_expert, axis=-1).reshape(-1)]
    return np.concatenate(parts).astype("<u2")


def _units(values: ndarray) -> ndarray:
    return np.clip(np.rint(values.astype(np.float64) * UNITS), 0, 2**16 - 1).astype(np.uint16)


def _packed(values: ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"


def _blocks(one: FollowedItem, spec: EncodingSpec) -> list[dict[str, Any]]:
    """Cuts the sequence into blocks of given text, learned text and media, each with its positions."""
    sequence, learned_T, media_T = one.sequence, one.learned_T, one.media_T
    modality_T = sequence.modality_T
    kinds = np.stack([modality_T, media_T, learned_T & (modality_T == Modality.TEXT)])
    edges = [0, *(np.flatnonzero((np.diff(kinds, axis=1) != 0).any(axis=0)) + 1).tolist(), len(modality_T)]
    found = []
    for start, stop in itertools.pairwise(edges):
        block: dict[str, Any] = {"kind": MODALITY_NAMES[modality_T[start]], "start": start, "stop": stop}
        if modality_T[start] == Modality.TEXT:
            block["learned"] = bool(learned_T[start])
        elif modality_T[start] == Modality.AUDIO:
            features = sequence.frames_SX[sequence.frame_item_S == media_T[start]]
            block |= {"seconds": spec.frames_per_chunk * HOP / SAMPLE_RATE, "png": png(spectrogram(features, spec))}
        else:
            frames = frames_of(sequence, int(media_T[start]), sequence.time_T[start:stop], spec)
            size = spec.patch_size
            block |= {"frames": len(frames), "rows": frames.shape[1] // size, "columns": frames.shape[2] // size}
            block["png"] = png(np.concatenate(list(frames), axis=1))
        found.append(block)
    return found


def frames_of(sequence: EncodedSequence, item: int, time_P: ndarray, spec: EncodingSpec) -> UInt8[ndarray, "F H W 3"]:
    """Reassembles the frames of a picture (one) or video from its patches."""
    own_P, size = sequence.patch_item_P == item, spec.patch_size
    row_P, column_P = sequence.patch_row_P[own_P], sequence.patch_column_P[own_P]
    pixels = np.rint((sequence.patches_PX[own_P] + 1) * 127.5).clip(0, 255).astype(np.uint8)
    frames = np.zeros((time_P.max() + 1, row_P.max() + 1, size, column_P.max() + 1, size, 3), np.uint8)
    frames[time_P, row_P, :, column_P] = pixels.reshape(-1, size, size, 3)
    count, rows, _, columns, _, _ = frames.shape
    return frames.reshape(count, rows * size, columns * size, 3)


def spectrogram(features_SX: Float32[ndarray, "S X"], spec: EncodingSpec) -> UInt8[ndarray, "bands frames"]:
    """Returns log-mel frames as a grey picture, with low frequencies at the bottom; dark is loud."""
    frames = features_SX.reshape(-1, spec.mel_bands)
    low, high = float(frames.min()), float(frames.max())
    shade = 255 * (1 - (frames - low) / max(high - low, 1e-6))
    return np.ascontiguousarray(shade.astype(np.uint8).T[::-1])


def png(pixels: UInt8[ndarray, "..."]) -> str:
    """Encodes a picture as PNG in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
