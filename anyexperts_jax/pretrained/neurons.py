"""Groups the neurons of a dense network into experts of equal size, by their activations on a calibration text."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Method = Literal["activations", "random", "contiguous"]
_ROUNDS = 3  # of clustering; few neurons change groups after the second
_ACTIVE = 0.1  # share of a token's neurons that count as active


@dataclasses.dataclass(frozen=True)
class Network:
    """The SwiGLU of one layer and its inputs on the calibration text, float32."""

    x_ND: Float[np.ndarray, "N D"]
    gate_DF: Float[np.ndarray, "D F"]
    up_DF: Float[np.ndarray, "D F"]
    down_FD: Float[np.ndarray, "F D"]

    def hidden(self) -> Float[np.ndarray, "N F"]:
        gate_NF = self.x_ND @ self.gate_DF
        return gate_NF / (1 + np.exp(-np.clip(gate_NF, -80, 80))) * (self.x_ND @ self.up_DF)


@dataclasses.dataclass(frozen=True)
class Groups:
    """A layer's neurons by expert, and the markers by which the router scores each expert."""

    experts_EX: Int[np.ndarray, "E X"]
    shared_S: Int[np.ndarray, "S"]
    markers_EM: Int[np.ndarray, "E M"]
    scale_E: Float[np.ndarray, "E"]  # the norm of an expert's output over the mean size of its markers

    @property
    def order_F(self) -> Int[np.ndarray, "F"]:
        """The neurons' indices in the dense layer, those of the experts first, then the shared ones."""
        return np.concatenate([self.experts_EX.ravel(), self.shared_S])


def group_neurons(
    network: Network, num_experts: int, num_shared: int, *, markers: int, method: Method, seed: int
) -> Groups:
    """Cuts the F neurons into `num_experts` groups of equal size, of which `num_shared` serve every token.

    "activations": the neurons that are active on most tokens are shared; the others are clustered by the tokens on
    which they are active, into clusters of equal size (after CMoE, arXiv 2502.04416). A neuron is active on a token if
    its output is among the largest tenth. The baselines "random" and "contiguous" use the text only for markers and
    scales, not to form the groups.
    """
    hidden_NF = network.hidden()
    size_NF = np.abs(hidden_NF) * np.linalg.norm(network.down_FD, axis=1)
    F = size_NF.shape[1]
    width = F // num_experts
    most = max(1, round(_ACTIVE * F))
    threshold_N1 = np.partition(size_NF, F - most, axis=1)[:, F - most, None]
    active_FN = (size_NF >= threshold_N1).astype(np.float32).T
    if method == "activations":
        by_rate_F = np.argsort(-active_FN.mean(axis=1), kind="stable")
    elif method == "random":
        by_rate_F = np.random.default_rng(seed).permutation(F)
    else:
        by_rate_F = np.arange(F)
    shared_F, routed_F = np.split(by_rate_F, [num_shared * width])
    routed = num_experts - num_shared
    group_F = np.repeat(np.arange(routed), width)
    if method == "activations":
        group_F = balanced_clusters(active_FN[routed_F], routed)
    experts_EX = np.stack([np.sort(routed_F[group_F == e]) for e in range(routed)])
    marked = [_markers(active_FN, own_F, min(markers, width)) for own_F in experts_EX]
    # An expert with fewer neurons than markers repeats some of them.
    markers_EM = np.stack([np.resize(own_M, markers) for own_M in marked])
    return Groups(experts_EX, np.sort(shared_F), markers_EM, _scales(network, hidden_NF, experts_EX, markers_EM))


def balanced_clusters(rows_XN: Float[np.ndarray, "X N"], clusters: int) -> Int[np.ndarray, "X"]:
    """Assigns each row to a cluster, all of equal size: k-means with an optimal matching in place of nearest centres.

    The initial centres are evenly spaced rows.
    """
    from scipy.optimize import linear_sum_assignment

    X = rows_XN.shape[0]
    size = X // clusters
    centre_EN = rows_XN[:: max(1, size)][:clusters]
    found_X = np.full(X, -1)
    for _ in range(_ROUNDS):
        squares_XE = (rows_XN**2).sum(axis=1)[:, None] - 2 * rows_XN @ centre_EN.T + (centre_EN**2).sum(axis=1)[None]
        _, place_X = linear_sum_assignment(np.repeat(squares_XE, size, axis=1))
        before_X, found_X = found_X, place_X // size
        if np.array_equal(before_X, found_X):
            break
        centre_EN = np.stack([rows_XN[found_X == e].mean(axis=0) for e in range(clusters)])
    return found_X


def _markers(active_FN: Float[np.ndarray, "F N"], own_F: Int[np.ndarray, "X"], count: int) -> Int[np.ndarray, "M"]:
    """Returns the neurons whose activity is closest to their group's mean."""
    rows_XN = active_FN[own_F]
    distance_X = ((rows_XN - rows_XN.mean(axis=0)) ** 2).sum(axis=1)
    return own_F[np.argsort(distance_X, kind="stable")[:count]]


def _scales(
    network: Network,
    hidden_NF: Float[np.ndarray, "N F"],
    experts_EX: Int[np.ndarray, "E X"],
    markers_EM: Int[np.ndarray, "E M"],
) -> Float[np.ndarray, "E"]:
    """Fits, by least squares, the factor from the mean size of an expert's markers to the norm of its output."""
    scales = []
    for own_F, markers_M in zip(experts_EX, markers_EM, strict=True):
        norm_N = np.linalg.norm(hidden_NF[:, own_F] @ network.down_FD[own_F], axis=1)
        size_N = np.abs(hidden_NF[:, markers_M]).mean(axis=1)
        scales.append((norm_N @ size_N + 1e-30) / (size_N @ size_N + 1e-30))
    return np.asarray(scales, np.float32)
