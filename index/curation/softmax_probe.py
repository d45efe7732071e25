"""A linear classifier on vectors: multinomial logistic regression, in numpy.

Minimises mean cross-entropy + |W|^2 / (2 C n), the intercept unpenalised, by Nesterov's accelerated
gradient with a step from the largest eigenvalue: convex, so that there is one answer, and no
setting but C. It is meant for the thousands of labels of a selection, not for ImageNet.

Shapes: N vectors, D dimensions, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STRENGTH = 10.0
"""C of the penalty, as scikit-learn counts it: docs/decisions/0020-curation.md."""

MAX_STEPS, TOLERANCE = 3000, 1e-5


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A fitted classifier.

    Attributes:
        weights_DC: (D, C) float64.
        bias_C: (C,) float64.
    """

    weights_DC: NDArray[np.float64]
    bias_C: NDArray[np.float64]

    def probabilities(self, vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give (N, C) probabilities of the classes."""
        logits_NC = vectors_ND @ self.weights_DC.astype(np.float32)
        return _softmax(logits_NC + self.bias_C.astype(np.float32))


def fit_probe(
    vectors_ND: NDArray[np.floating],
    classes_N: NDArray[np.int64],
    n_classes: int,
    *,
    strength: float = STRENGTH,
) -> Probe:
    """Fit the classifier.

    Args:
        vectors_ND: (N, D) float32, at least one.
        classes_N: (N,) class numbers.
        n_classes: how many classes there are.
        strength: C; more trusts the labels more.
    """
    count, dim = vectors_ND.shape
    if count < dim:  # the weights are sums of the vectors: work in those few directions
        basis_DR, _ = np.linalg.qr(vectors_ND.T.astype(float))
        inner = fit_probe(vectors_ND @ basis_DR, classes_N, n_classes, strength=strength)
        return Probe(weights_DC=basis_DR @ inner.weights_DC, bias_C=inner.bias_C)
    inputs_NE = np.concatenate([vectors_ND, np.ones((count, 1))], axis=1).astype(float)
    target_NC = np.eye(n_classes)[classes_N]
    penalty_E1 = np.full((dim + 1, 1), 1 / (strength * count))
    penalty_E1[-1] = 0.0
    # The Hessian of softmax is at most a half: Boehning, Multinomial logistic regression (1992).
    largest = np.linalg.norm(inputs_NE, 2) ** 2 / count
    step = 1 / (largest / 2 + penalty_E1[0, 0])
    weights_EC = ahead_EC = np.zeros((dim + 1, n_classes))
    momentum = 1.0
    for _ in range(MAX_STEPS):
        errors_NC = _softmax(inputs_NE @ ahead_EC) - target_NC
        gradient_EC = inputs_NE.T @ errors_NC / count + penalty_E1 * ahead_EC
        next_EC = ahead_EC - step * gradient_EC
        if (gradient_EC * (next_EC - weights_EC)).sum() > 0:
            momentum = 1.0  # it overshot: O'Donoghue and Candes (arXiv 1204.3982), section 3.2
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead_EC = next_EC + (momentum - 1) / next_momentum * (next_EC - weights_EC)
        weights_EC, momentum = next_EC, next_momentum
        if np.abs(gradient_EC).max() < TOLERANCE:
            break
    return Probe(weights_DC=weights_EC[:-1], bias_C=weights_EC[-1])


def _softmax(logits_NC: NDArray[np.floating]) -> NDArray[np.floating]:
    """Give probabilities of logits, without overflow."""
    powers_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return np.asarray(powers_NC / powers_NC.sum(axis=1, keepdims=True))
