"""`Switches`: choices that the AnyExperts paper leaves open, and its ablations."""

import dataclasses
from typing import Literal, get_args

from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.registries import REGULARISERS

ImportanceMLP = Literal["default", "wide", "deep"]
HsmSite = Literal["block_input", "residual", "off"]
SlotRounding = Literal["round", "floor", "stochastic"]
CapRounding = Literal["round", "floor", "off"]
Iar = Literal["add", "multiply_logits", "multiply_sigmoid", "multiply_softmax", "off"]
Selection = Literal["logits", "scores"]
VirtualLogits = Literal["free", "tied", "unbiased"]
VirtualOutput = Literal["identity", "zero"]
Normalisation = Literal["all", "real", "none", "one", "all_raw_gradient"]
BalanceScope = Literal["batch", "sequence"]
SalienceScope = Literal["batch", "device", "sequence"]
SlotGradient = Literal["none", "straight_through"]
Onset = Literal["full", "learned", "learned_importance"]

_CHOICES = {
    "importance_mlp": ImportanceMLP,
    "hsm_site": HsmSite,
    "slot_rounding": SlotRounding,
    "cap_rounding": CapRounding,
    "iar": Iar,
    "selection": Selection,
    "virtual_logits": VirtualLogits,
    "virtual_output": VirtualOutput,
    "normalisation": Normalisation,
    "balance_scope": BalanceScope,
    "salience_scope": SalienceScope,
    "slot_gradient": SlotGradient,
    "onset": Onset,
}


@dataclasses.dataclass(frozen=True)
class Switches:
    """The ablation switches of AnyExperts. Each default is our reading of the paper; docs/method has them side by side.

    Raises:
      UserError: naming the value and the valid ones.
    """

    importance_mlp: ImportanceMLP = "default"  # wide: hidden width x 4; deep: two more hidden layers
    hsm_site: HsmSite = "block_input"  # where h' replaces h: after the norm, or on the residual stream
    slot_rounding: SlotRounding = "round"  # round: halves go up; stochastic: up with the fraction as probability
    # Of rho_max * K_i, half up; floor holds the cap for every token. off: no cap, all slots of a token may be virtual,
    # and rho_max says what share of them is expected to be.
    cap_rounding: CapRounding = "round"
    iar: Iar = "add"  # importance-aware routing: how w tilts the logits or scores
    selection: Selection = "logits"  # rank by logits or by scores, after IAR, plus the expert bias
    virtual_logits: VirtualLogits = "free"  # tied: all virtual experts share one column; unbiased: free, without a bias
    virtual_bias_init: float = 1.0  # initial bias of the virtual logits: centres the IAR gap at w = 0.5
    virtual_output: VirtualOutput = "identity"  # what a virtual expert returns: the block's input, or zero
    normalisation: Normalisation = "all"  # of the combine weights; see routing.weights.combine_weights
    balance_scope: BalanceScope = "batch"  # the tokens over which the balance loss measures the load
    # Mean z^2, or (mean w - importance_target)^2; salience is an extension of ours, see routing.salience.
    importance_regulariser: str = "logit_l2"  # an entry of REGULARISERS: logit_l2, mean_target, salience
    importance_target: float = 0.5  # of the mean importance, for mean_target
    salience_scope: SalienceScope = "batch"  # the tokens among which salience ranks a token; see routing.salience
    slot_gradient: SlotGradient = "none"  # straight_through, an extension of ours: gives the rounded K_i a gradient
    # learned, an extension of ours: the method fades in from nothing; see routing.onset. learned_importance: the same,
    # but for virtual experts, which take part from the beginning.
    onset: Onset = "full"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            require_one_of(name, getattr(self, name), get_args(choices))
        check_field_types(self)
        REGULARISERS.check("importance_regulariser", self.importance_regulariser)
        require(0 < self.importance_target < 1, f"importance_target={self.importance_target} must be in (0, 1)")
