"""Multinomial logistic regression on fixed features, by L-BFGS.

Minimised, in float64, over weights W and biases b:

    1/N sum_n -log softmax(W^T x_n + b)[y_n]  +  ||W||^2 / (2 C N)

with x centred and scaled; biases are free. C is scaled as in scikit-learn and LIBLINEAR. The
problem is convex, so the largest entry of the gradient says how far a solution is from the
optimum; every model carries it.

Rules:
    Features are centred by the mean of the rows that are fitted on, and, unless `statistics` say
    otherwise, divided by one number, the root of the mean of their variances, so that C means
    the same for every encoder. What an encoder made smaller stays smaller: a deviation for
    every dimension, known from few rows alone, makes as much of noise as of what tells
    classes apart.
    Features stay float32 in memory; they become float64 a block at a time.
    L-BFGS works on V with W = L^-T V, where L L^T is about the Hessian: the features'
    covariance times the variance of a uniform class, plus the regularisation. The optimum is
    the same, and correlated features no longer make hundreds of iterations of it.
    Where C is chosen, it is by accuracy on held-out rows alone: strongest regularisation
    first, each fit starting from the one before, and no further once the held-out loss has
    stopped falling `PATIENCE` times. (Accuracy says nothing of when to end: as long as
    weights are small, scaling them changes no prediction.)

Shapes: N images, D dimensions, C classes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.command import progress
from train.errors import TrainError

BLOCK_ROWS = 512
"""Rows that become float64 at a time; twice the speed of 4,096, as 2 MB stay in the cache."""

COVARIANCE_ROWS = 4096

HISTORY = 20
"""Pairs of steps that L-BFGS keeps."""

GRADIENT_TOLERANCE = 1e-4
"""Largest entry of a finished fit's gradient over V, by mean loss an image."""

CHOICE_TOLERANCE = 1e-3
"""The same where only the accuracy on held-out rows is wanted."""

MAX_ITERATIONS = 1000
"""Of one fit; there it ends in any case."""

PATIENCE = 2
LEAST_FALL = 1e-3
"""Share of the held-out loss; a smaller fall is none."""


@dataclass(frozen=True, kw_only=True)
class SoftmaxModel:
    """A fitted linear classifier.

    Attributes:
        mean_D, scale_D: of the features, float64.
        weights_DC, biases_C: on centred and scaled features, float64.
        c: strength of the regularisation; None for a model of SGD.
        iterations: of L-BFGS, or epochs of SGD.
        gradient_max: largest absolute entry of the gradient at the end; None for SGD.
    """

    mean_D: Tensor
    scale_D: Tensor
    weights_DC: Tensor
    biases_C: Tensor
    c: float | None
    iterations: int
    gradient_max: float | None

    def scores(self, features_ND: Tensor) -> Tensor:
        """Give the logits, (N, C) float64."""
        blocks = [
            self._scale(block) @ self.weights_DC + self.biases_C
            for block in torch.split(features_ND, BLOCK_ROWS)
        ]
        return torch.cat(blocks)

    def _scale(self, features_ND: Tensor) -> Tensor:
        return (features_ND.double() - self.mean_D) / self.scale_D


@dataclass(frozen=True, kw_only=True)
class CChoice:
    """What choosing C by held-out rows gave.

    Attributes:
        c: the chosen one.
        top1: its accuracy on the held-out rows.
        tried: (C, accuracy) of every fit, in their order.
    """

    c: float
    top1: float
    tried: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What fits on the same rows share, all float64.

    Attributes:
        mean_D, scale_D: of the features; the scale is 1 for what does not vary.
        covariance_DD: of the scaled features; None where there are more dimensions
            than rows, since factorising it would take longer than it saves.
    """

    mean_D: Tensor
    scale_D: Tensor
    covariance_DD: Tensor | None

    @classmethod
    def of(cls, features_ND: Tensor, *, by_dimension: bool = False) -> Statistics:
        """Compute them.

        Args:
            features_ND: float32 or float64.
            by_dimension: whether each dimension has a scale of its own, its deviation.

        Raises:
            TrainError: features are not finite.
        """
        n, dim = features_ND.shape
        mean_D, variance_D = _moments(features_ND)
        if by_dimension:
            scale_D = _deviation(mean_D.abs(), variance_D)
        else:
            scale_D = _deviation(mean_D.abs().max(), variance_D.mean()).expand(dim)
        require_finite(mean_D, scale_D)
        if dim > n:
            return cls(mean_D=mean_D, scale_D=scale_D, covariance_DD=None)
        covariance_DD = torch.zeros(dim, dim, dtype=torch.float64)
        for block in torch.split(features_ND, COVARIANCE_ROWS):
            x_ND = (block.double() - mean_D) / scale_D
            covariance_DD.addmm_(x_ND.T, x_ND)
        return cls(mean_D=mean_D, scale_D=scale_D, covariance_DD=covariance_DD.div_(n))

    def factor(self, *, n: int, n_classes: int, c: float) -> Tensor:
        """Give the lower L of L L^T, about the Hessian of one class's weights, (D, D).

        The ridge is at least what rounding can take from an eigenvalue of the covariance,
        whose trace is D at most: any C has a factor, since L decides the way alone.
        """
        dim = len(self.mean_D)
        if self.covariance_DD is None:
            return torch.eye(dim, dtype=torch.float64)
        curvature = (1 - 1 / n_classes) / n_classes
        ridge = max(1 / (c * n), torch.finfo(torch.float64).eps * dim)
        ridge_DD = ridge * torch.eye(dim, dtype=torch.float64)
        lower_DD: Tensor = torch.linalg.cholesky(curvature * self.covariance_DD + ridge_DD)
        return lower_DD


def standardisation(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and deviation of every dimension, float64; 1 for one that does not vary."""
    mean_D, variance_D = _moments(features_ND)
    return mean_D, _deviation(mean_D.abs(), variance_D)


def _moments(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and variance of every dimension, float64."""
    n, dim = features_ND.shape
    mean_D = sum_blocks(features_ND, lambda block: block.sum(dim=0), dim) / n
    return mean_D, sum_blocks(features_ND, lambda x: (x - mean_D).square().sum(dim=0), dim) / n


def _deviation(size: Tensor, variance: Tensor) -> Tensor:
    """Take roots; 1 for what is constant, up to the rounding of float32 numbers of that size."""
    deviation = variance.sqrt()
    return torch.where(deviation > torch.finfo(torch.float32).eps * size, deviation, 1.0)


def sum_blocks(features_ND: Tensor, part: Callable[[Tensor], Tensor], dim: int) -> Tensor:
    """Sum a function of float64 blocks of rows, (dim,) each."""
    total_D = torch.zeros(dim, dtype=torch.float64)
    for block in torch.split(features_ND, BLOCK_ROWS):
        total_D += part(block.double())
    return total_D


def fit_softmax(
    features_ND: Tensor,
    labels_N: Tensor,
    *,
    n_classes: int,
    c: float,
    start: SoftmaxModel | None = None,
    statistics: Statistics | None = None,
    tolerance: float = GRADIENT_TOLERANCE,
    after_step: Callable[[], None] = lambda: None,
) -> SoftmaxModel:
    """Fit by L-BFGS.

    Args:
        features_ND: float32 or float64.
        labels_N: int64 of 0 to `n_classes` - 1.
        n_classes: how many classes there are, also where some have no row.
        c: larger is weaker regularisation.
        start: a model of the same rows to start from.
        statistics: of the same rows, where they are known already.
        tolerance: the largest entry of the gradient over V that is good enough.
        after_step: called after each pass over the rows, of which a fit takes hundreds.

    Raises:
        TrainError: features are not finite.
    """
    known = statistics or Statistics.of(features_ND)
    n, dim = features_ND.shape
    lower_DD = known.factor(n=n, n_classes=n_classes, c=c)
    free = torch.zeros(dim + 1, n_classes, dtype=torch.float64)
    if start is not None:
        free = torch.cat([lower_DD.T @ start.weights_DC, start.biases_C[None]])

    def solution_of(free: Tensor) -> Tensor:
        weights_DC = torch.linalg.solve_triangular(lower_DD.T, free[:-1], upper=True)
        return torch.cat([weights_DC, free[-1:]])

    def gradient_at(solution: Tensor) -> tuple[Tensor, Tensor]:
        return loss_and_gradient(
            features_ND, labels_N, solution, mean_D=known.mean_D, scale_D=known.scale_D, c=c
        )

    def evaluate() -> Tensor:
        value, gradient = gradient_at(solution_of(free))
        inner = torch.linalg.solve_triangular(lower_DD, gradient[:-1], upper=False)
        free.grad = torch.cat([inner, gradient[-1:]])
        after_step()
        return value

    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    with one_thread():
        optimizer.step(evaluate)  # type: ignore[no-untyped-call]  # torch has no types here
    solution = solution_of(free)
    return SoftmaxModel(
        mean_D=known.mean_D,
        scale_D=known.scale_D,
        weights_DC=solution[:-1],
        biases_C=solution[-1],
        c=c,
        iterations=int(optimizer.state[free]["n_iter"]),
        gradient_max=float(gradient_at(solution)[1].abs().max()),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: blocks that fit the cache are too small to share.

    On two cores that others used, too, sharing them took five to ten times as long: 60,000
    rows of 128 dimensions 45 ms a pass on one thread, 350 on two.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def counting(what: str, *, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show the progress of what is no loop: gives a function that counts so many units as done.

    It is called with 0, too, so that a unit that takes long is seen to be at work.
    """
    counts: deque[int | None] = deque()
    shown = progress(iter(counts.popleft, None), what=what, total=total, unit=unit, size=int)

    def count(n: int | None) -> None:
        counts.append(n)
        next(shown, None)

    yield count
    count(None)


def loss_and_gradient(
    features_ND: Tensor,
    labels_N: Tensor,
    solution: Tensor,
    *,
    mean_D: Tensor,
    scale_D: Tensor,
    c: float,
) -> tuple[Tensor, Tensor]:
    """Give the objective and its gradient at (D + 1, C): weights, and biases as last row."""
    n = len(features_ND)
    weights_DC, biases_C = solution[:-1], solution[-1]
    loss = weights_DC.square().sum() / (2 * c)
    gradient = torch.zeros_like(solution)
    gradient[:-1] = weights_DC / c
    for block, labels in zip(
        torch.split(features_ND, BLOCK_ROWS), torch.split(labels_N, BLOCK_ROWS), strict=True
    ):
        x_ND = (block.double() - mean_D) / scale_D
        log_p_NC = torch.log_softmax(torch.addmm(biases_C, x_ND, weights_DC), dim=1)
        loss -= log_p_NC.gather(1, labels[:, None]).sum()
        residual_NC = log_p_NC.exp_()
        residual_NC[torch.arange(len(labels)), labels] -= 1
        gradient[:-1].addmm_(x_ND.T, residual_NC)
        gradient[-1] += residual_NC.sum(dim=0)
    return loss / n, gradient / n


def choose_c(
    features_ND: Tensor,
    labels_N: Tensor,
    held_features_ND: Tensor,
    held_labels_N: Tensor,
    *,
    n_classes: int,
    grid: Sequence[float],
    what: str = "features",
) -> CChoice:
    """Choose C of a grid by the accuracy on held-out rows; of equals the smallest.

    The progress that is shown names `what`.

    Raises:
        TrainError: features are not finite.
    """
    statistics = Statistics.of(features_ND)
    model: SoftmaxModel | None = None
    tried: list[tuple[float, float]] = []
    least_loss, n_vain = math.inf, 0
    with counting(f"choosing C for {what}", unit="value", total=len(grid)) as count:
        for c in sorted(grid):
            model = fit_softmax(
                features_ND,
                labels_N,
                n_classes=n_classes,
                c=c,
                start=model,
                statistics=statistics,
                tolerance=CHOICE_TOLERANCE,
                after_step=lambda: count(0),
            )
            scores_NC = model.scores(held_features_ND)
            top1 = float((scores_NC.argmax(dim=1) == held_labels_N).double().mean())
            tried.append((c, top1))
            count(1)
            loss = float(nn.functional.cross_entropy(scores_NC, held_labels_N))
            n_vain = 0 if loss < (1 - LEAST_FALL) * least_loss else n_vain + 1
            least_loss = min(loss, least_loss)
            if n_vain == PATIENCE:
                break
    best_c, best_top1 = max(tried, key=lambda one: one[1])  # of equals the first
    return CChoice(c=best_c, top1=best_top1, tried=tuple(tried))


def require_finite(mean_D: Tensor, scale_D: Tensor) -> None:
    """Refuse features that hold a NaN or an infinity.

    Raises:
        TrainError: they do.
    """
    if not bool((mean_D.isfinite() & scale_D.isfinite()).all()):
        raise TrainError(
            "features",
            expected="finite numbers",
            found="NaN or infinity",
            mend="look at the run's curves: the network has diverged",
        )
