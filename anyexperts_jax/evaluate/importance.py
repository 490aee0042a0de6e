"""Measures whether importance finds the answer: its ROC AUC for the tokens that are known to carry the answer.

The papers only show heat maps. Here every example has its evidence marked (`Batch.evidence_BT`), so the maps can be
scored. Evidence can only be on media and question tokens, so only these are compared: BOS, SEP and all later tokens are
left out. The background of a modality is its other tokens, in the sequences that have evidence in that modality.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.modality import MODALITY_NAMES, Modality
from anyexperts_jax.data.batches import before_answers

BOOTSTRAP_DRAWS = 200


@dataclasses.dataclass(frozen=True)
class Separation:
    """How well importance separates evidence from background among the tokens of one modality.

    `auc` uses the mean over layers and pools all sequences; its interval covers 95% of a bootstrap over sequences (the
    tokens of a sequence are not independent). `auc_within` ranks tokens only against others of their own sequence, so
    that a shift in level between sequences cannot help. Undefined figures are NaN.
    """

    modality: str
    sequences: int
    evidence_tokens: int
    background_tokens: int
    auc: float
    auc_low: float
    auc_high: float
    auc_within: float
    auc_by_layer: tuple[float, ...]
    mean_evidence: float
    mean_background: float
    baselines: Mapping[str, float]  # AUC of scores that need no training, by name (`baseline_scores`)
    # Importance's AUC minus the AUC of contrast, paired: both are computed on the same drawn sequences. NaN in files
    # of versions that did not measure it.
    contrast_lead: float = math.nan
    contrast_lead_low: float = math.nan
    contrast_lead_high: float = math.nan


def roc_auc(score_N: Float[ndarray, "N"], positive_N: Bool[ndarray, "N"]) -> float:
    """Returns the chance that a random positive scores above a random negative; ties count half. NaN without both."""
    from scipy.stats import rankdata

    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if positives == 0 or negatives == 0:
        return math.nan
    rank_sum = float(rankdata(score_N)[positive_N].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def candidates(batch: Batch) -> Bool[ndarray, "B T"]:
    """Marks the tokens that can carry evidence: media and question tokens, without the first of the sequence."""
    found_BT = before_answers(batch)
    found_BT[:, 0] = False
    return found_BT


def baseline_scores(batch: Batch, seed: int = 0) -> dict[str, Float[ndarray, "B T"]]:
    """Returns scores that need no training, as baselines for the AUC of importance.

    contrast: standard deviation of a patch's pixels or a chunk's log-mel values (text: 0, so its AUC is 0.5);
    position: earlier tokens higher; random: uniform.
    """
    modality_BT = np.asarray(batch.modality_BT)
    valid_BT = np.asarray(batch.valid_BT)
    patches_BP = np.asarray(batch.patches_BPX, np.float64).std(axis=-1)
    frames_BS = np.asarray(batch.frames_BSX, np.float64).std(axis=-1)
    visual_BT = valid_BT & ((modality_BT == Modality.IMAGE) | (modality_BT == Modality.VIDEO))
    audio_BT = valid_BT & (modality_BT == Modality.AUDIO)
    contrast_BT = _place(patches_BP, visual_BT) + _place(frames_BS, audio_BT)
    position_BT = np.broadcast_to(-np.arange(valid_BT.shape[1], dtype=np.float64), valid_BT.shape)
    random_BT = np.random.default_rng([seed, valid_BT.size]).random(valid_BT.shape)
    return {"contrast": contrast_BT, "position": position_BT, "random": random_BT}


def _place(rows_BP: Float[ndarray, "B P"], where_BT: Bool[ndarray, "B T"]) -> Float[ndarray, "B T"]:
    """Puts row j of a sequence at the sequence's j-th marked position; other positions are 0."""
    if rows_BP.shape[1] == 0:
        return np.zeros(where_BT.shape)
    row_BT = np.minimum(np.cumsum(where_BT, axis=1) - 1, rows_BP.shape[1] - 1)
    return np.where(where_BT, np.take_along_axis(rows_BP, np.maximum(row_BT, 0), axis=1), 0.0)


def separations(
    importance_LBT: Float[ndarray, "L B T"],
    candidate_BT: Bool[ndarray, "B T"],
    evidence_BT: Bool[ndarray, "B T"],
    modality_BT: Int[ndarray, "B T"],
    baselines: Mapping[str, Float[ndarray, "B T"]],
    *,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> tuple[Separation, ...]:
    """Returns a `Separation` for each modality that has evidence; B counts all measured sequences."""
    found = []
    for modality in Modality:
        token_BT = candidate_BT & (modality_BT == modality)
        with_evidence_B = (token_BT & evidence_BT).any(axis=1)
        if with_evidence_B.any():
            token_BT = token_BT & with_evidence_B[:, None]
            found.append(
                _separation(
                    modality,
                    importance_LBT,
                    token_BT,
                    evidence_BT=evidence_BT,
                    baselines=baselines,
                    draws=draws,
                    seed=seed,
                )
            )
    return tuple(found)


def _separation(
    modality: Modality,
    importance_LBT: Float[ndarray, "L B T"],
    token_BT: Bool[ndarray, "B T"],
    evidence_BT: Bool[ndarray, "B T"],
    baselines: Mapping[str, Float[ndarray, "B T"]],
    draws: int,
    seed: int,
) -> Separation:
    mean_BT = importance_LBT.astype(np.float64).mean(axis=0)
    positive_N = evidence_BT[token_BT]
    score_N = mean_BT[token_BT]
    sequence_N = np.nonzero(token_BT)[0]
    contrast_N = baselines["contrast"][token_BT] if "contrast" in baselines else np.full(len(score_N), math.nan)

    def auc_and_lead(rows: ndarray) -> tuple[float, float]:
        auc = roc_auc(score_N[rows], positive_N[rows])
        return auc, auc - roc_auc(contrast_N[rows], positive_N[rows])

    auc, lead = auc_and_lead(np.arange(len(score_N)))
    (low, high), (lead_low, lead_high) = _bootstrap_intervals(auc_and_lead, sequence_N, draws, seed)
    return Separation(
        modality=MODALITY_NAMES[modality],
        sequences=len(np.unique(sequence_N)),
        evidence_tokens=int(positive_N.sum()),
        background_tokens=int((~positive_N).sum()),
        auc=auc,
        auc_low=low,
        auc_high=high,
        auc_within=_auc_within(score_N, positive_N, sequence_N),
        auc_by_layer=tuple(roc_auc(layer_BT[token_BT], positive_N) for layer_BT in importance_LBT),
        mean_evidence=_mean(score_N[positive_N]),
        mean_background=_mean(score_N[~positive_N]),
        baselines={name: roc_auc(value_BT[token_BT], positive_N) for name, value_BT in baselines.items()},
        contrast_lead=lead,
        contrast_lead_low=lead_low,
        contrast_lead_high=lead_high,
    )


def _auc_within(score_N: ndarray, positive_N: ndarray, sequence_N: ndarray) -> float:
    """Returns the mean over sequences of the AUC within each, for sequences with both kinds of token."""
    inside = [roc_auc(score_N[sequence_N == b], positive_N[sequence_N == b]) for b in np.unique(sequence_N)]
    return _mean(np.array([auc for auc in inside if not math.isnan(auc)]))


def _bootstrap_intervals(
    statistics: Callable[[ndarray], tuple[float, ...]], sequence_N: ndarray, draws: int, seed: int
) -> list[tuple[float, float]]:
    """Bootstraps over whole sequences; returns the 2.5th and 97.5th percentile of each of `statistics(rows)`.

    Draws in which a statistic is undefined are left out; if all are, its interval is (NaN, NaN).
    """
    rng = np.random.default_rng([seed, len(sequence_N)])
    rows = [np.nonzero(sequence_N == b)[0] for b in np.unique(sequence_N)]
    found = []
    for _ in range(draws):
        drawn = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        found.append(statistics(drawn))
    return [_middle_95([value for value in values if not math.isnan(value)]) for values in zip(*found, strict=True)]


def _middle_95(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _mean(values: ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
