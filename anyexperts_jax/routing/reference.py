"""The oracle: routing as the equations state it, token by token in float64 NumPy. Slow; for tests only.

It shares only the configuration with the fast path, and sorts all columns of every token.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from anyexperts_jax.core.config import AnyExpertsConfig


def route_reference(
    config: AnyExpertsConfig,
    logits_NC: Float[ndarray, "N C"],
    importance_logits_N: Float[ndarray, "N"],
    valid_N: Bool[ndarray, "N"] | None = None,
    bias_C: Float[ndarray, "C"] | None = None,
    *,
    window: tuple[float, float] | None = None,
    num_sequences: int = 1,
    uniform_N: Float[ndarray, "N"] | None = None,
) -> dict[str, Any]:
    """The expected result of `route`, as a dict of its fields. `uniform_N` are the draws for stochastic rounding."""
    N, C = logits_NC.shape
    valid_N = np.ones(N, bool) if valid_N is None else valid_N
    bias_C = np.zeros(C) if bias_C is None else bias_C.astype(np.float64)
    uniform_N = np.full(N, np.nan) if uniform_N is None else uniform_N.astype(np.float64)
    window = (config.k_min, config.k_max) if window is None else window
    tokens = [
        _Token(
            config,
            logits_NC[i].astype(np.float64),
            float(importance_logits_N[i]),
            bias_C=bias_C,
            window=window,
            uniform=uniform_N[i],
        )
        for i in range(N)
    ]
    K = config.slots_bound
    plan: dict[str, Any] = {
        "expert_ids_NK": np.full((N, K), config.num_experts),
        "weights_NK": np.zeros((N, K)),
        "virtual_weight_N": np.zeros(N),
        "importance_N": np.array([token.w if ok else 0.5 for token, ok in zip(tokens, valid_N, strict=True)]),
        "slots_N": np.zeros(N, int),
        "real_slots_N": np.zeros(N, int),
        "virtual_slots_N": np.zeros(N, int),
    }
    for i, token in enumerate(tokens):
        if valid_N[i]:
            plan["expert_ids_NK"][i, : len(token.real)] = token.real
            plan["weights_NK"][i, : len(token.real)] = token.real_weights
            plan["virtual_weight_N"][i] = token.virtual_weight
            plan["slots_N"][i] = len(token.real) + len(token.virtual)
            plan["real_slots_N"][i] = len(token.real)
            plan["virtual_slots_N"][i] = len(token.virtual)
    groups = num_sequences if config.switches.balance_scope == "sequence" else 1
    sequences = [
        [token for token, ok in zip(tokens[start : start + N // groups], valid_N[start:], strict=False) if ok]
        for start in range(0, N, max(N // groups, 1))
    ]
    valid_tokens = [token for sequence in sequences for token in sequence]
    plan["losses"] = _losses(config, sequences, valid_tokens)
    entropy_N = np.array([_entropy(token) if ok else 0.0 for token, ok in zip(tokens, valid_N, strict=True)])
    plan["metrics"] = {**_metrics(config, valid_tokens), "router_entropy_N": entropy_N}
    return plan


class _Token:
    """One token's routing."""

    def __init__(
        self,
        config: AnyExpertsConfig,
        logits_C: Float[ndarray, "C"],
        z: float,
        bias_C: Float[ndarray, "C"],
        window: tuple[float, float],
        uniform: float,
    ) -> None:
        E, C = config.num_experts, config.num_columns
        self.logits_C, self.z = logits_C, z
        self.w = w = 1 / (1 + math.exp(-z))
        score = _softmax if config.scores == "softmax" else lambda logits_C: 1 / (1 + np.exp(-logits_C))
        self.scores_C = score(logits_C)
        self.probabilities_C = self.scores_C / self.scores_C.sum()

        sign_C = np.array([1.0] * E + [-1.0] * (C - E))
        if config.switches.iar == "add":
            tilted_C = logits_C + sign_C * w
            scores_C = score(tilted_C)
        elif config.switches.iar == "multiply_logits":
            tilted_C = logits_C * (1 + sign_C * w)
            scores_C = score(tilted_C)
        elif config.switches.iar == "off":
            tilted_C, scores_C = logits_C, self.scores_C
        else:
            tilted_C = scores_C = self.scores_C * (1 + sign_C * w)
        rank_C = (tilted_C if config.switches.selection == "logits" else scores_C) + bias_C

        slots = _slots(config, window, w, uniform)
        allowed = set(_experts_in_kept_groups(config, rank_C)) | set(range(E, C))
        order = sorted(allowed, key=lambda c: (-rank_C[c], c))
        chosen = order[:slots]
        surplus = len([c for c in chosen if c >= E]) - _cap(config, slots)
        refill = [c for c in order[slots:] if c < E]
        for _ in range(surplus):
            chosen.remove([c for c in chosen if c >= E][-1])
            chosen.append(refill.pop(0))
        self.chosen = sorted(chosen, key=lambda c: (-rank_C[c], c))
        self.real = [c for c in self.chosen if c < E]
        self.virtual = [c for c in self.chosen if c >= E]

        over_all = scores_C[self.chosen].sum() + 1e-20
        over_real = scores_C[self.real].sum() + 1e-20
        if config.switches.normalisation == "none":
            over_all = over_real = 1.0
        divisor = over_real if config.switches.normalisation == "real" else over_all
        self.real_weights = config.scaling_factor * scores_C[self.real] / divisor
        self.virtual_weight = config.scaling_factor * scores_C[self.virtual].sum() / over_all
        if config.switches.normalisation == "one":
            self.real_weights = np.full(len(self.real), config.scaling_factor)
            self.virtual_weight = config.scaling_factor * len(self.virtual)


def _softmax(logits_C: Float[ndarray, "C"]) -> Float[ndarray, "C"]:
    e_C = np.exp(logits_C - logits_C.max())
    return e_C / e_C.sum()


def _slots(config: AnyExpertsConfig, window: tuple[float, float], w: float, uniform: float) -> int:
    bound = config.slots_bound
    slots = min(max(window[0] + w * (window[1] - window[0]), 1), bound)
    if config.switches.slot_rounding == "round":
        whole = math.floor(slots + 0.5)
    elif config.switches.slot_rounding == "floor":
        whole = math.floor(slots)
    else:
        whole = math.ceil(slots) if uniform < slots % 1 else math.floor(slots)
    return min(max(whole, 1), bound)


def _cap(config: AnyExpertsConfig, slots: int) -> int:
    if config.switches.cap_rounding == "off":
        return min(slots, config.num_virtual)
    share = Fraction(str(config.rho_max)) * slots
    cap = math.floor(share + Fraction(1, 2)) if config.switches.cap_rounding == "round" else math.floor(share)
    return min(cap, config.num_virtual)


def _experts_in_kept_groups(config: AnyExpertsConfig, rank_C: Float[ndarray, "C"]) -> list[int]:
    size = config.num_experts // config.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.num_groups)]
    best = [sum(sorted((rank_C[c] for c in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(config.num_groups), key=lambda g: (-best[g], g))[: config.groups_kept]
    return [c for g in kept for c in groups[g]]


def _load(config: AnyExpertsConfig, tokens: list[_Token]) -> Float[ndarray, "C"]:
    E = config.num_experts
    load_C = np.zeros(config.num_columns)
    for token in tokens:
        for c in token.chosen:
            load_C[c] += 1
    if config.switches.virtual_logits == "tied" and config.num_virtual:
        load_C[E:] = sum(load_C[E:]) / config.num_virtual
    return load_C


def _losses(config: AnyExpertsConfig, sequences: list[list[_Token]], tokens: list[_Token]) -> dict[str, float]:
    if not tokens:
        return {"balance": 0.0, "importance": 0.0, "z": 0.0}
    balance = []
    for sequence in sequences:
        if sequence:
            load_C = _load(config, sequence)
            mean_C = np.mean([token.probabilities_C for token in sequence], axis=0)
            balance.append(config.num_columns * float((load_C / load_C.sum()) @ mean_C))
    if config.switches.importance_regulariser == "logit_l2":
        regulariser = float(np.mean([token.z**2 for token in tokens]))
    elif config.switches.importance_regulariser == "mean_target":
        regulariser = (float(np.mean([token.w for token in tokens])) - config.switches.importance_target) ** 2
    else:  # salience: its ranks exist in the backward pass only, and the forward value uses 1/2 for each
        regulariser = float(np.mean([(token.w - 0.5) ** 2 for token in tokens]))
    z = float(np.mean([np.log(np.exp(token.logits_C).sum()) ** 2 for token in tokens]))
    return {"balance": float(np.mean(balance)), "importance": regulariser, "z": z}


def _entropy(token: _Token) -> float:
    return float(-sum(p * math.log(p) for p in token.probabilities_C))


def _metrics(config: AnyExpertsConfig, tokens: list[_Token]) -> dict[str, Any]:
    load_C = _load(config, tokens)
    names = ("router_entropy", "mean_slots", "mean_real_slots", "virtual_share", "mean_importance")
    if not tokens:
        return {"load_C": load_C, "load_max_over_mean": 0.0, **dict.fromkeys(names, 0.0)}
    real_E = load_C[: config.num_experts]
    slots = sum(len(token.chosen) for token in tokens)
    return {
        "load_C": load_C,
        "load_max_over_mean": real_E.max() / real_E.mean() if real_E.any() else 0.0,
        "router_entropy": float(np.mean([_entropy(token) for token in tokens])),
        "mean_slots": slots / len(tokens),
        "mean_real_slots": sum(len(token.real) for token in tokens) / len(tokens),
        "virtual_share": sum(len(token.virtual) for token in tokens) / slots,
        "mean_importance": float(np.mean([token.w for token in tokens])),
    }
