"""`AnyExpertsConfig`: the method of one MoE layer, validated on construction."""

import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args

from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.modality import NUM_MODALITIES
from anyexperts_jax.core.registries import POLICIES, ROUTERS
from anyexperts_jax.core.switches import Switches

T = TypeVar("T")
Scores = Literal["softmax", "sigmoid"]


SWITCH_NAMES = frozenset(field.name for field in dataclasses.fields(Switches))


def _takes_flat_switches(cls: type[T]) -> type[T]:
    """Lets the constructor and `dataclasses.replace` take switches by name: `iar="off"` instead of
    `switches=Switches(iar="off")`."""
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def with_flat_switches(self: Any, *values: Any, **fields: Any) -> None:
        flat = {name: fields.pop(name) for name in SWITCH_NAMES & fields.keys()}
        if flat:
            fields["switches"] = dataclasses.replace(fields.get("switches", Switches()), **flat)
        init(self, *values, **fields)

    cls.__init__ = with_flat_switches  # type: ignore[misc, method-assign]
    return cls


@_takes_flat_switches
@dataclasses.dataclass(frozen=True)
class AnyExpertsConfig:
    """The method of one MoE layer: AnyExperts (arXiv 2511.18314); the defaults are the paper's main model.

    A token of importance w gets K = round(k_min + w (k_max - k_min)) slots, of which at most rho_max K are virtual. The
    window [k_min, k_max] may be fractional. `expected_real_slots`, the nominal budget, is (1 - rho_max) times the
    middle of the window. `switches` holds what the paper leaves open; the constructor also takes them directly, as in
    `AnyExpertsConfig(iar="off")`. How a layer is executed is not part of the method: see `dispatch.Execution`.

    Raises:
      UserError: (a ValueError) naming the value and the rule it breaks.
    """

    num_experts: int = 256  # E, real experts
    num_virtual: int = 64  # V, zero-cost experts: E * rho_max / (1 - rho_max) for a uniform balance loss (reading)
    k_min: float = 8  # slots of a token of importance 0
    k_max: float = 12  # slots of a token of importance 1
    rho_max: float = 0.2  # virtual slots are at most rho_max * K_i (paper)
    alpha: float = 0.01  # h' = h + alpha * w * h (paper)
    balance_weight: float = 0.01  # of the load-balance loss (paper)
    importance_weight: float = 0.001  # of the importance regulariser (paper)
    z_weight: float = 0.0  # of ST-MoE's z-loss on the router logits; not part of the paper

    scores: Scores = "softmax"  # of the router's logits
    scaling_factor: float = 1.0  # on the combine weights (Ling-mini-2.0: 2.5)
    expert_bias: bool = False  # loss-free load balancing: a selection bias, updated by a rule instead of a gradient
    expert_bias_rate: float = 0.001  # step size of the expert bias
    num_groups: int = 1  # group-limited routing: the real experts are split into this many equal groups
    groups_kept: int = 1  # groups a token may choose from: the best by the sum of their top two

    router: str = "linear"  # what computes the logits, an entry of ROUTERS; the dtr ones are EvoMoE's
    policy: str = "importance"  # what decides a token's slots: importance, as in the paper, or an entry of POLICIES
    policy_dial: float = 1.0  # the one number that an entry of POLICIES takes; it gives at most k_max slots

    router_modalities: int = NUM_MODALITIES  # M, of routers with per-modality weights
    router_of_modality: tuple[int, ...] = ()  # for text, image, audio and video, which of the M; empty: each its own
    bias_by_modality: bool = False  # with expert_bias: each of the M has a bias of its own, [M, C]
    router_hidden: int = 128  # Z, the width of a hypernetwork's code (reading: hidden x rank fits the added parameters)
    router_rank: int = 16  # Q, the rank of the maps a hypernetwork generates (reading)
    router_markers: int = 4  # neurons of an expert by which the router "markers" estimates its output
    router_gelu: bool = False  # a GELU between a hypernetwork's two maps; EvoMoE's equation (5) has none

    switches: Switches = dataclasses.field(default_factory=Switches)  # what the paper leaves open, and ablations

    def __post_init__(self) -> None:
        require_one_of("scores", self.scores, get_args(Scores))
        check_field_types(self)
        ROUTERS.check("router", self.router)
        self._check_groups_fit()
        self._check_window()
        self._check_scores()
        self._check_onset()
        self._check_policy()
        self._check_modalities()
        for name in ("router_modalities", "router_hidden", "router_rank", "router_markers"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be >= 1")
        for name in ("balance_weight", "importance_weight", "z_weight", "alpha", "expert_bias_rate"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative; it must be >= 0")
        require(self.scaling_factor > 0, f"scaling_factor={self.scaling_factor} must be > 0")

    @classmethod
    def static_top_k(cls, num_experts: int, k: int, **fields: object) -> "AnyExpertsConfig":
        """Standard top-k routing through the same interface: every token gets k real slots; importance is unused."""
        window = {"num_experts": num_experts, "num_virtual": 0, "k_min": k, "k_max": k, "rho_max": 0.0}
        unused = {"hsm_site": "off", "iar": "off", "importance_weight": 0.0}
        return cls(**{**window, **unused, **fields})  # type: ignore[arg-type]

    def with_switches(self, **switches: Any) -> "AnyExpertsConfig":
        """A copy with these switches replaced."""
        return dataclasses.replace(self, switches=dataclasses.replace(self.switches, **switches))

    @property
    def num_columns(self) -> int:
        """C, the number of router columns."""
        return self.num_experts + self.num_virtual

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Of the expert bias: [C], or [M, C]."""
        return (self.router_modalities, self.num_columns) if self.bias_by_modality else (self.num_columns,)

    @property
    def slots_bound(self) -> int:
        """K, the most slots a token can get, and so the static width of slot arrays."""
        return math.ceil(self.k_max) if self.switches.slot_rounding == "stochastic" else round_half_up(self.k_max)

    @property
    def virtual_caps(self) -> tuple[int, ...]:
        """The cap on virtual slots for each number of slots 0..slots_bound."""
        return tuple(map(self.virtual_cap, range(self.slots_bound + 1)))

    def virtual_cap(self, slots: int) -> int:
        """The cap on virtual slots of a token with this many slots."""
        if self.switches.cap_rounding == "off":
            return min(slots, self.num_virtual)
        # Exact arithmetic on the decimal digits: in binary floating point 0.3 * 5 + 0.5 may land on either side of 2.
        half = Fraction(1, 2) if self.switches.cap_rounding == "round" else Fraction(0)
        return min(math.floor(Fraction(str(self.rho_max)) * slots + half), self.num_virtual)

    @property
    def expected_real_slots(self) -> float:
        """The nominal budget: real experts per token if the mean importance is 0.5 and the cap is filled (reading)."""
        return (1 - self.rho_max) * (self.k_min + self.k_max) / 2

    @property
    def uses_importance(self) -> bool:
        """Whether the method reads importance. If False, importance has no effect on the output.

        If True, the effect can still be zero: a tilt that all columns share cancels in the softmax (iar="add" without
        virtual experts), and alpha=0 modulates nothing.
        """
        return self.k_min != self.k_max or self.switches.iar != "off" or self.switches.hsm_site != "off"

    @property
    def experts_in_reach(self) -> int:
        """Real experts that group limiting leaves a token to choose from."""
        return self.num_experts // self.num_groups * self.groups_kept

    def _check_window(self) -> None:
        require(self.num_virtual >= 0, f"num_virtual={self.num_virtual} must be >= 0")
        require(0 <= self.rho_max < 1, f"rho_max={self.rho_max} must be in [0, 1)")
        require(
            not (self.num_virtual == 0 and self.rho_max > 0),
            f"num_virtual=0 leaves nothing for rho_max={self.rho_max}; set rho_max=0 or num_virtual > 0",
        )
        require(self.k_min <= self.k_max, f"k_min={self.k_min} > k_max={self.k_max}; need k_min <= k_max")
        require(self.k_min >= 1, f"k_min={self.k_min} must be >= 1")
        bound = self.slots_bound
        require(
            bound <= self.num_columns,
            f"k_max={self.k_max} exceeds num_experts + num_virtual = {self.num_columns}",
        )
        real_most = bound - self.virtual_cap(bound)  # checking k_max is enough: k - cap(k) never falls
        require(
            real_most <= self.experts_in_reach,
            f"k_max={self.k_max} can need {real_most} real experts of {self.experts_in_reach} in reach; "
            "lower k_max, or raise num_experts, groups_kept or rho_max",
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
                self.switches.iar != f"multiply_{score}" or self.scores == score,
                f"iar={self.switches.iar!r} multiplies {score} scores, but scores={self.scores!r}; make them agree",
            )

    def _check_modalities(self) -> None:
        own, count = self.router_of_modality, self.router_modalities
        require(
            not own or (len(own) == NUM_MODALITIES and min(own) >= 0 and max(own) < count),
            f"router_of_modality={own} must be {NUM_MODALITIES} numbers from 0 to below router_modalities={count}",
        )
        require(
            self.expert_bias or not self.bias_by_modality,
            "bias_by_modality=True without expert_bias=True: there is no bias; set both",
        )

    def _check_policy(self) -> None:
        require_one_of("policy", self.policy, ("importance", *POLICIES.names()))
        require(math.isfinite(self.policy_dial), f"policy_dial={self.policy_dial} must be finite")
        require(
            self.policy == "importance" or self.k_min == self.k_max,
            f"policy={self.policy!r} reads no importance: set k_min={self.k_min} to k_max={self.k_max}, the most slots",
        )

    def _check_onset(self) -> None:
        onset = self.switches.onset
        if onset == "full":
            return
        iar, site = self.switches.iar, self.switches.hsm_site
        require(iar in ("add", "off"), f"onset={onset!r} fades in iar='add' or 'off', not iar={iar!r}")
        require(site != "residual", f"onset={onset!r} fades in hsm_site='block_input' or 'off', not 'residual'")


def round_half_up(x: float) -> int:
    """Rounds halves up, as all slot counts in this package are; Python and NumPy round halves to even."""
    return math.floor(x + 0.5)
