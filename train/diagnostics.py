"""What embeddings look like from outside: their rank, spread, dead dimensions and correlation.

Rules:
    Pure functions of tensors: nothing here knows of networks, options or logs, and nothing
    draws a random number or changes what it is given.
    No D x D matrix is built: spectra and sums over C come from Gram matrices of the smaller
    side, so that 128 embeddings of 8,192 dimensions cost tens of milliseconds.
    A measure that its input does not define (the slope of one eigenvalue, the spread or the
    uniformity of one embedding) is NaN.

What the numbers mean for a training is said in words by `train.monitor`.

Sources: RankMe: Garrido et al., arXiv 2210.02885, equation 1. alpha-ReQ: Agrawal et al.,
NeurIPS 2022, section 3. Alignment and uniformity: Wang and Isola, arXiv 2005.10242, section
4. Spread: Chen and He, arXiv 2011.10566, figure 2. C: Zbontar et al., arXiv 2103.03230,
equation 2.

Shapes: N embeddings, D dimensions, K = min(N, D) singular values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from index.evaluation import space_measures
from index.evaluation.space_measures import DEAD_SHARE_OF_SCALE, UNIFORMITY_T

MAX_ROWS = 256
"""Embeddings of a batch that `embedding_diagnostics` looks at: a spectrum costs N^2 D."""


def embedding_diagnostics(features_ND: Tensor, z1_ND: Tensor, z2_ND: Tensor) -> dict[str, float]:
    """Measure one training batch, cheaply enough for every record of a log.

    Args:
        features_ND: (N, D1) what the backbone gives for one view, any floating dtype.
        z1_ND: (N, D2) the projector's embeddings of one view.
        z2_ND: (N, D2) those of the other view, in the same order.

    Returns:
        Of the features: `spread`, `rankme`, `rankme_limit` (what it can reach), `alpha_req`,
        `dead_share`. Of the embeddings: `z_rankme`, `z_rankme_limit`, `z_dead_share`,
        `z_alignment`, `z_uniformity`. The first `MAX_ROWS` rows count; values are NaN where an
        input is not finite. Of C the loss itself knows more: see `train.loss.LossTerms`.
    """
    features_ND, z1_ND, z2_ND = (x[:MAX_ROWS].detach() for x in (features_ND, z1_ND, z2_ND))
    return {
        "spread": spread(features_ND),
        "rankme": rankme(features_ND),
        "rankme_limit": float(min(features_ND.shape)),
        "alpha_req": alpha_req(features_ND),
        "dead_share": dead_share(features_ND),
        "z_rankme": rankme(z1_ND),
        "z_rankme_limit": float(min(z1_ND.shape)),
        "z_dead_share": dead_share(z1_ND),
        "z_alignment": alignment(z1_ND, z2_ND),
        "z_uniformity": uniformity(z1_ND),
    }


def singular_values(z_ND: Tensor) -> Tensor:
    """Give the K singular values of embeddings, largest first, float64.

    They are roots of a Gram matrix's eigenvalues: those below its rounding, about 1e-7 of
    the largest, are 0. NaN throughout where the input is not finite.
    """
    z_ND = z_ND.double()
    if not torch.isfinite(z_ND).all():
        return torch.full((min(z_ND.shape),), math.nan, dtype=torch.float64)
    n, dim = z_ND.shape
    gram_KK = z_ND @ z_ND.T if n <= dim else z_ND.T @ z_ND
    values_K = torch.linalg.eigvalsh(gram_KK).flip(0)
    noise = values_K[0] * torch.finfo(torch.float64).eps * max(n, dim)
    return torch.where(values_K > noise, values_K, 0.0).sqrt()


def rankme(z_ND: Tensor) -> float:
    """Measure how many directions embeddings fill: exp of the entropy of the singular values.

    p = sigma / sum(sigma), of the embeddings as they are, uncentred, as in the paper.

    Returns:
        1 for a constant to min(N, D); 0 where all is zero.
    """
    return entropy_rank(singular_values(z_ND))


def entropy_rank(sigma_K: Tensor) -> float:
    """Give RankMe of singular values that are known already."""
    return space_measures.entropy_rank(sigma_K.double().numpy(force=True))


def alpha_req(z_ND: Tensor) -> float:
    """Fit the power law j^-alpha to the eigenvalues of the covariance.

    The larger half of them counts, since the smaller ones of so few samples fall off by
    chance; every rank j weighs 1/j, so that each octave counts alike.

    Returns:
        alpha: 0 for isotropic noise, about 1 for what generalises best according to the
        paper, more where few directions carry everything. NaN with less than two of them.
    """
    eigenvalues_K = singular_values(z_ND.double() - z_ND.double().mean(dim=0)).square()
    count = int((eigenvalues_K > 0).sum())
    count = max(2, count // 2) if count >= 2 else 0
    if count == 0:
        return math.nan
    y, ranks = eigenvalues_K[:count].log(), torch.arange(1, count + 1, device=z_ND.device).double()
    x, weights = ranks.log(), 1 / ranks
    x = x - (weights * x).sum() / weights.sum()
    return -float((weights * x * y).sum() / (weights * x * x).sum())


def spread(z_ND: Tensor) -> float:
    """Measure how far embeddings of unit length vary over a batch: 1 for noise, 0 collapsed.

    It is the mean deviation of a dimension, times sqrt(D), which isotropic vectors have as 1.
    NaN below two rows.
    """
    if len(z_ND) < 2:
        return math.nan
    return float(_unit(z_ND).std(dim=0).mean() * z_ND.shape[1] ** 0.5)


def dead_share(z_ND: Tensor) -> float:
    """Give the share of dimensions that do not vary, 0 to 1, as `index.evaluate space` does."""
    z_ND = z_ND.float()
    limit = DEAD_SHARE_OF_SCALE * z_ND.square().mean().sqrt()
    if not torch.isfinite(limit):
        return math.nan
    return float((z_ND.std(dim=0, correction=0) <= limit).float().mean())


def alignment(z1_ND: Tensor, z2_ND: Tensor) -> float:
    """Give the mean squared distance of two views on the unit sphere: 0 alike, 2 unrelated."""
    return float((_unit(z1_ND) - _unit(z2_ND)).square().sum(dim=1).mean())


def uniformity(z_ND: Tensor) -> float:
    """Give log E exp(-2 |u - v|^2) over pairs on the unit sphere: 0 collapsed, about -4 even.

    NaN below two rows, which are no pair.
    """
    unit_ND = _unit(z_ND)
    n = len(unit_ND)
    if n < 2:
        return math.nan
    distances_NN = (2 - 2 * unit_ND @ unit_ND.T).clamp(min=0)
    distances_P = distances_NN[torch.triu_indices(n, n, offset=1, device=z_ND.device).unbind()]
    return float(torch.logsumexp(-UNIFORMITY_T * distances_P, dim=0) - math.log(len(distances_P)))


def correlation_summary(z1_ND: Tensor, z2_ND: Tensor) -> tuple[float, float]:
    """Summarise the cross-correlation C of two views without building it.

    Each view is standardised over the batch; a dimension that does not vary correlates with
    nothing. The sum of squares is <A A^T, B B^T> / N^2.

    Returns:
        The mean of C's diagonal, and the RMS of the rest (0 where D is 1).
    """
    a_ND, b_ND = standardise(z1_ND), standardise(z2_ND)
    n, dim = a_ND.shape
    diagonal_D = (a_ND * b_ND).sum(dim=0) / n
    squares = ((a_ND @ a_ND.T) * (b_ND @ b_ND.T)).sum() / n**2
    off_squares = float(squares - diagonal_D.square().sum())
    rms = math.sqrt(max(off_squares, 0.0) / max(dim * (dim - 1), 1))
    return float(diagonal_D.mean()), rms if math.isfinite(off_squares) else math.nan


def standardise(z_ND: Tensor) -> Tensor:
    """Give each dimension zero mean and unit biased variance, float32; zero if it is constant."""
    z_ND = z_ND.float()
    variance_D, mean_D = torch.var_mean(z_ND, dim=0, correction=0)
    is_constant_D = variance_D <= torch.finfo(torch.float32).eps * mean_D.square()
    return torch.where(is_constant_D, 0.0, (z_ND - mean_D) * variance_D.rsqrt())


def _unit(z_ND: Tensor) -> Tensor:
    """Scale each row to unit length, float32; zero rows stay."""
    return nn.functional.normalize(z_ND.float(), dim=1)
