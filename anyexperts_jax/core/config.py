"""`AnyExpertsConfig`: every switch of the routing policy, checked when it is made."""

import dataclasses
import math
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal, get_args

from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.modality import NUM_MODALITIES

ImportanceMLP = Literal["default", "wide", "deep"]
HsmSite = Literal["block_input", "residual", "off"]
SlotRounding = Literal["round", "floor", "stochastic"]
CapRounding = Literal["round", "floor"]
Iar = Literal["add", "multiply_logits", "multiply_sigmoid", "multiply_softmax", "off"]
Scores = Literal["softmax", "sigmoid"]
Selection = Literal["logits", "scores"]
VirtualLogits = Literal["free", "tied"]
VirtualOutput = Literal["identity", "zero"]
Normalisation = Literal["all", "real", "none", "all_raw_gradient"]
BalanceScope = Literal["batch", "sequence"]
ImportanceRegulariser = Literal["logit_l2", "mean_target", "salience"]
SalienceScope = Literal["batch", "device", "sequence"]
SlotGradient = Literal["none", "straight_through"]
Overflow = Literal["drop", "fallback"]
Router = Literal["linear", "per_modality", "per_modality_shared", "dtr", "dtr_shared"]

_CHOICES = {
    "importance_mlp": ImportanceMLP,
    "hsm_site": HsmSite,
    "slot_rounding": SlotRounding,
    "cap_rounding": CapRounding,
    "iar": Iar,
    "scores": Scores,
    "selection": Selection,
    "virtual_logits": VirtualLogits,
    "virtual_output": VirtualOutput,
    "normalisation": Normalisation,
    "balance_scope": BalanceScope,
    "importance_regulariser": ImportanceRegulariser,
    "salience_scope": SalienceScope,
    "slot_gradient": SlotGradient,
    "overflow": Overflow,
    "router": Router,
}


@dataclasses.dataclass(frozen=True)
class AnyExpertsConfig:
    """The routing policy of one MoE layer (AnyExperts, arXiv 2511.18314; defaults are the paper's main model).

    The slot window [k_min, k_max] may be fractional: a token with importance w gets round(k_min + w (k_max - k_min))
    slots. `expected_real_slots`, the nominal budget, is (1 - rho_max) times the window's middle. What the public text
    leaves open is a switch, marked "reading"; the default is our reading.

    Raises:
      UserError: (a ValueError) naming the value and the rule it breaks.
    """

    num_experts: int = 256  # E, real experts
    num_virtual: int = 64  # V, zero-cost experts: E * rho_max / (1 - rho_max) for a uniform balance loss (reading)
    k_min: float = 8
    k_max: float = 12
    rho_max: float = 0.2  # virtual slots are at most rho_max * K_i (paper)
    alpha: float = 0.01  # h' = h + alpha * w * h (paper)

    importance_mlp: ImportanceMLP = "default"  # wide: hidden width x 4; deep: two more hidden layers
    hsm_site: HsmSite = "block_input"  # where h' replaces h: after the norm, or on the residual stream (reading)
    slot_rounding: SlotRounding = "round"  # half up; stochastic: up with the fraction as probability (reading)
    cap_rounding: CapRounding = "round"  # of rho_max * K_i, half up; floor holds the cap for every token (reading)
    iar: Iar = "add"  # importance-aware routing: how w tilts the logits or scores (reading)
    scores: Scores = "softmax"
    selection: Selection = "logits"  # rank by logits or by scores, after IAR, plus the expert bias (reading)
    virtual_logits: VirtualLogits = "free"  # tied: one column stands V times
    virtual_bias_init: float = 1.0  # initial bias of the virtual logits (reading: centres the IAR gap at w = 0.5)
    virtual_output: VirtualOutput = "identity"
    normalisation: Normalisation = "all"  # of the combine weights; see routing.weights.combine_weights
    scaling_factor: float = 1.0  # on the combine weights (Ling-mini-2.0: 2.5)

    expert_bias: bool = False  # loss-free balancing: a bias on the ranking, moved by rule and not by gradient
    expert_bias_rate: float = 0.001
    num_groups: int = 1  # group-limited routing: real experts in num_groups equal groups,
    groups_kept: int = 1  # of which the best groups_kept by the sum of their top two stay

    balance_weight: float = 0.01
    balance_scope: BalanceScope = "batch"
    importance_weight: float = 0.001
    # Mean z^2, or (mean w - importance_target)^2 (reading); salience, our extension: see routing.salience.
    importance_regulariser: ImportanceRegulariser = "logit_l2"
    importance_target: float = 0.5
    salience_scope: SalienceScope = "batch"  # the tokens that salience ranks one among; see routing.salience
    z_weight: float = 0.0
    slot_gradient: SlotGradient = "none"  # straight_through: our extension, the rounded K_i passes a gradient to w

    capacity_factor: float = 1.25  # rows of an expert's buffer over the budget's expected rows
    overflow: Overflow = "drop"  # what does not fit: dropped and counted, or recomputed exactly

    router: Router = "linear"  # where the logits come from; the others are EvoMoE's: see routing.routers
    router_modalities: int = NUM_MODALITIES  # M of the routers that tell modalities apart
    router_hidden: int = 128  # Z, the width of a hypernetwork's code (reading: hidden x rank fits the added parameters)
    router_rank: int = 16  # Q, of the maps a hypernetwork generates (reading)
    router_gelu: bool = False  # a GELU between a hypernetwork's two maps; EvoMoE's equation (5) has none

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            require_one_of(name, getattr(self, name), get_args(choices))
        self._check_types()
        self._check_groups_fit()
        self._check_window()
        self._check_scores()
        for name in ("router_modalities", "router_hidden", "router_rank"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be >= 1")
        for name in ("balance_weight", "importance_weight", "z_weight", "alpha", "expert_bias_rate"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative; it must be >= 0")
        require(self.scaling_factor > 0, f"scaling_factor={self.scaling_factor} must be > 0")
        require(0 < self.importance_target < 1, f"importance_target={self.importance_target} must be in (0, 1)")

    @classmethod
    def static_top_k(cls, num_experts: int, k: int, **fields: object) -> "AnyExpertsConfig":
        """Plain top-k routing through the same interface: k real slots for every token, importance unused."""
        window = {"num_experts": num_experts, "num_virtual": 0, "k_min": k, "k_max": k, "rho_max": 0.0}
        unused = {"hsm_site": "off", "iar": "off", "importance_weight": 0.0}
        return cls(**{**window, **unused, **fields})  # type: ignore[arg-type]

    @property
    def num_columns(self) -> int:
        """C, the router's columns."""
        return self.num_experts + self.num_virtual

    @property
    def slots_bound(self) -> int:
        """K, the most slots any token can get: the static width of slot arrays."""
        return math.ceil(self.k_max) if self.slot_rounding == "stochastic" else round_half_up(self.k_max)

    @property
    def virtual_caps(self) -> tuple[int, ...]:
        """Virtual slots allowed at each number of slots 0..slots_bound. Exact in rho_max's decimal digits."""
        rho = Fraction(str(self.rho_max))
        half = Fraction(1, 2) if self.cap_rounding == "round" else Fraction(0)
        return tuple(min(math.floor(rho * k + half), self.num_virtual) for k in range(self.slots_bound + 1))

    @property
    def expected_real_slots(self) -> float:
        """The nominal budget: real experts per token at mean importance 0.5 with the cap filled (reading)."""
        return (1 - self.rho_max) * (self.k_min + self.k_max) / 2

    @property
    def uses_importance(self) -> bool:
        """Whether the policy reads importance. Where not, importance has no effect on the output.

        Where it does, the effect may still be none: a tilt that all columns share cancels in the softmax, as with
        iar="add" and no virtual experts, and with alpha=0 nothing is modulated.
        """
        return self.k_min != self.k_max or self.iar != "off" or self.hsm_site != "off"

    @property
    def experts_in_reach(self) -> int:
        """Real experts a token can choose among after group limiting."""
        return self.num_experts // self.num_groups * self.groups_kept

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                require(isinstance(value, bool), f"{field.name}={value!r} must be True or False")
            elif field.type is int:
                whole = isinstance(value, Integral) and not isinstance(value, bool)
                require(whole, f"{field.name}={value!r} must be a whole number")
            elif field.type is float:
                number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
                require(number, f"{field.name}={value!r} must be a finite number")

    def _check_window(self) -> None:
        require(self.num_virtual >= 0, f"num_virtual={self.num_virtual} must be >= 0")
        require(0 <= self.rho_max < 1, f"rho_max={self.rho_max} must be in [0, 1)")
        require(
            not (self.num_virtual == 0 and self.rho_max > 0),
            f"num_virtual=0 leaves nothing for rho_max={self.rho_max}; set rho_max=0 or num_virtual > 0",
        )
        require(self.k_min <= self.k_max, f"k_min={self.k_min} > k_max={self.k_max}; need k_min <= k_max")
        require(self.k_min >= 1, f"k_min={self.k_min} must be >= 1")
        bound, caps = self.slots_bound, self.virtual_caps
        require(
            bound <= self.num_columns,
            f"k_max={self.k_max} exceeds num_experts + num_virtual = {self.num_columns}",
        )
        real_most = max(k - caps[k] for k in range(bound + 1))
        require(
            real_most <= self.experts_in_reach,
            f"k_max={self.k_max} can need {real_most} real experts of {self.experts_in_reach} in reach; "
            "lower k_max, or raise num_experts, groups_kept or rho_max",
        )
        require(self.capacity_factor > 0, f"capacity_factor={self.capacity_factor} must be > 0")
        least = min(k - caps[k] for k in range(math.floor(self.k_min), bound + 1))
        require(
            self.capacity_factor * self.expected_real_slots >= least,
            f"capacity_factor={self.capacity_factor} gives room for "
            f"{self.capacity_factor * self.expected_real_slots:g} real slots per token, fewer than the {least} "
            f"every token gets from k_min={self.k_min}; raise it",
        )

    def _check_groups_fit(self) -> None:
        require(self.num_experts >= 1, f"num_experts={self.num_experts} must be >= 1")
        require(
            self.num_groups >= 1 and self.num_experts % self.num_groups == 0,
            f"num_groups={self.num_groups} must divide num_experts={self.num_experts}",
        )
        require(
            1 <= self.groups_kept <= self.num_groups,
            f"groups_kept={self.groups_kept} must be in [1, num_groups={self.num_groups}]",
        )

    def _check_scores(self) -> None:
        for score in get_args(Scores):
            require(
                self.iar != f"multiply_{score}" or self.scores == score,
                f"iar={self.iar!r} multiplies {score} scores, but scores={self.scores!r}; make them agree",
            )


def round_half_up(x: float) -> int:
    """The package's one rounding of slot counts: halves go up (Python's and NumPy's go to even)."""
    return math.floor(x + 0.5)
