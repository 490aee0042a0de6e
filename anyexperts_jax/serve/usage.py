"""How many tokens and experts an answer used."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from anyexperts_jax.core.modality import MODALITY_NAMES, NUM_MODALITIES


@dataclasses.dataclass(frozen=True, eq=False)
class Spent:
    """Sums of real experts, and the tokens that used them."""

    real_LM: Int[ndarray, "L M"]  # by MoE layer and modality
    tokens_M: Int[ndarray, " M"]

    @classmethod
    def nothing(cls, layers: int) -> "Spent":
        return cls(np.zeros((layers, NUM_MODALITIES), np.int64), np.zeros(NUM_MODALITIES, np.int64))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spent):
            return NotImplemented
        return np.array_equal(self.real_LM, other.real_LM) and np.array_equal(self.tokens_M, other.tokens_M)

    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    def plus(self, other: "Spent") -> "Spent":
        return Spent(self.real_LM + other.real_LM, self.tokens_M + other.tokens_M)

    @property
    def by_layer(self) -> tuple[float, ...]:
        """Real experts per token in each MoE layer; () for a dense model or without tokens."""
        return _per_token(self.real_LM.sum(axis=1), int(self.tokens_M.sum()))

    @property
    def by_modality(self) -> dict[str, tuple[float, ...]]:
        """The same for each modality that had tokens, by its name; {} for a dense model."""
        own = {name: _per_token(self.real_LM[:, m], int(self.tokens_M[m])) for m, name in enumerate(MODALITY_NAMES)}
        return {name: real_L for name, real_L in own.items() if real_L}


def _per_token(real_L: Int[ndarray, " L"], tokens: int) -> tuple[float, ...]:
    return tuple((real_L / tokens).tolist()) if tokens else ()


class Usage(NamedTuple):
    """How many tokens and experts an answer used."""

    prompt_tokens: int
    completion_tokens: int  # including the token that ended the answer
    spent: Spent  # by the tokens of the prompt and of the answer, all but its last

    @property
    def real_by_layer(self) -> tuple[float, ...]:
        """Real experts per token in each MoE layer; () for a dense model."""
        return self.spent.by_layer

    @property
    def real_experts(self) -> float:
        """Real experts per token, averaged over the MoE layers; nan for a dense model."""
        return sum(self.real_by_layer) / len(self.real_by_layer) if self.real_by_layer else float("nan")
