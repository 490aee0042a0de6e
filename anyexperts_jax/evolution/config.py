"""What an EvoMoE run is made of: how experts begin, how they evolve, and the three stages."""

import dataclasses
from typing import Literal, get_args

from anyexperts_jax.core.errors import require, require_one_of

ExpertInit = Literal["copy", "noise", "dropout", "random_subset"]
EvolutionMode = Literal["ema", "lag", "literal"]


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """Which layers get experts, how many, and how they differ at the start.

    "copy": not at all, the model computes what the dense one did wherever combine weights sum to one. The others are
    baselines for diversity; expert 1 always is the dense FFN itself (our reading). "noise": normal noise. "dropout":
    single weights at zero, the others scaled up. "random_subset": a random part of the FFN's units drawn anew, with
    the mean and standard deviation of the weights they replace (as in Drop-Upcycling).

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    num_experts: int = 4
    moe_every: int = 2  # alternating layers, the second of each two (EvoMoE does not say which)
    num_dense_layers: int = 0  # leading layers that stay dense
    init: ExpertInit = "copy"
    noise: float = 0.1  # standard deviation over the weights' root mean square
    dropped: float = 0.1  # share of weights at zero
    redrawn: float = 0.5  # share of units drawn anew

    def __post_init__(self) -> None:
        require_one_of("upcycle.init", self.init, get_args(ExpertInit))
        for name in ("num_experts", "moe_every"):
            require(getattr(self, name) >= 1, f"upcycle.{name}={getattr(self, name)} must be >= 1")
        require(self.num_dense_layers >= 0, f"upcycle.num_dense_layers={self.num_dense_layers} must be >= 0")
        require(self.noise >= 0, f"upcycle.noise={self.noise} must be >= 0")
        require(0 <= self.dropped < 1, f"upcycle.dropped={self.dropped} must be in [0, 1)")
        require(0 <= self.redrawn <= 1, f"upcycle.redrawn={self.redrawn} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class EvolutionConfig:
    """How experts 2 to N follow expert 1.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    mode: EvolutionMode = "ema"
    beta_low: tuple[float, ...] = (0.9, 0.8, 0.7)  # of experts 2, 3, 4: beta is drawn anew at each step (paper)
    beta_high: tuple[float, ...] = (0.99, 0.89, 0.79)
    fixed_beta: float | None = None  # one beta for all of them, and no draw
    snapshots: tuple[float, ...] = ()  # share of the stage's steps after which each stays as it is; (): none does

    def __post_init__(self) -> None:
        require_one_of("evolution.mode", self.mode, get_args(EvolutionMode))
        low, high = self.beta_low, self.beta_high
        require(
            len(low) == len(high) and all(0 <= a <= b <= 1 for a, b in zip(low, high, strict=True)),
            f"evolution.beta_low={low} and beta_high={high} must be as many, with 0 <= low <= high <= 1",
        )
        fixed = self.fixed_beta
        require(fixed is None or 0 <= fixed <= 1, f"evolution.fixed_beta={fixed} must be in [0, 1]")
        require(
            all(0 < share <= 1 for share in self.snapshots),
            f"evolution.snapshots={self.snapshots} must be shares of the stage's steps in (0, 1]",
        )

    def check(self, num_experts: int) -> None:
        """Raises UserError unless there is a range of beta, and a snapshot if any, for each of the N - 1 followers."""
        followers = num_experts - 1
        if self.fixed_beta is None:
            require(
                len(self.beta_low) == followers,
                f"evolution has {len(self.beta_low)} ranges of beta for {followers} evolved experts; "
                "give beta_low and beta_high one entry each, or set fixed_beta",
            )
        require(
            len(self.snapshots) in (0, followers),
            f"evolution has {len(self.snapshots)} snapshots for {followers} evolved experts",
        )
