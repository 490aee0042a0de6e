"""How many tokens and experts an answer used."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from anyexperts_jax.core.modality import NUM_MODALITIES


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


class Usage(NamedTuple):
    """How many tokens and experts an answer used."""

    prompt_tokens: int
    completion_tokens: int  # including the token that ended the answer
    spent: Spent  # by the tokens of the prompt and of the answer, all but its last

    @property
    def real_by_layer(self) -> tuple[float, ...]:
        """Real experts per token in each MoE layer; () for a dense model."""
        real_L = self.spent.real_LM.sum(axis=1)
        return tuple((real_L / self.spent.tokens_M.sum()).tolist()) if real_L.size else ()

    @property
    def real_experts(self) -> float:
        """Real experts per token, averaged over the MoE layers; nan for a dense model."""
        return sum(self.real_by_layer) / len(self.real_by_layer) if self.real_by_layer else float("nan")
