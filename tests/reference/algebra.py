"""The contractions of the spec for a tensor G with sides d_1 .. d_K, N = d_1 * .. * d_K.

A x_k G          the matrix A applied to side k                     (on_side)
Q_a^T G Q_b      G in the eigenbases, here for any number of sides  (into_basis, out_of_basis)
d_k/N H_k H_k^T  the mean Gram matrix of side k                     (mean_gram)
G on which every side j != k is multiplied by Q_j diag(lambda_j)^-1/2, i.e. whitened there  (whitened_except)
"""

import torch
from torch import Tensor


def on_side(G: Tensor, A: Tensor, k: int) -> Tensor:
    """out[.., i, ..] = sum_j A[i, j] G[.., j, ..], the index being that of side k."""
    return torch.tensordot(A, G, dims=([1], [k])).movedim(0, k)


def on_every_side(G: Tensor, matrices: list[Tensor]) -> Tensor:
    """G with A_k applied to each side k; for two sides A_1 G A_2^T."""
    for k, A in enumerate(matrices):
        G = on_side(G, A, k)
    return G


def into_basis(G: Tensor, Q: list[Tensor]) -> Tensor:
    """G~: for two sides Q_a^T G Q_b."""
    return on_every_side(G, [q.T for q in Q])


def out_of_basis(G: Tensor, Q: list[Tensor]) -> Tensor:
    """The inverse of into_basis: for two sides Q_a G~ Q_b^T."""
    return on_every_side(G, Q)


def mean_gram(H: Tensor, k: int) -> Tensor:
    """(d_k / N) H_k H_k^T, H_k (d_k x N/d_k) being the mode-k unfolding; for two sides H H^T / n and H^T H / m."""
    others = [j for j in range(H.ndim) if j != k]
    return torch.tensordot(H, H, dims=(others, others)) * (H.shape[k] / H.numel())


def total_gram(H: Tensor, k: int) -> Tensor:
    """H_k H_k^T, not normalised; for two sides H H^T and H^T H."""
    return mean_gram(H, k) * (H.numel() / H.shape[k])


def whitened_except(G: Tensor, k: int, Q: list[Tensor], lam: list[Tensor]) -> Tensor:
    """G with diag(lambda_j)^-1/2 Q_j^T applied to every side j != k; for two sides X or Y^T of the spec."""
    for j in range(G.ndim):
        if j != k:
            G = on_side(G, lam[j].rsqrt()[:, None] * Q[j].T, j)
    return G


def outer(vectors: list[Tensor]) -> Tensor:
    """out[i_1, .., i_K] = prod_k vectors[k][i_k]."""
    out = vectors[0]
    for vector in vectors[1:]:
        out = out[..., None] * vector
    return out


def diagonal_in_basis(S: Tensor, q: Tensor) -> Tensor:
    """diag(Q^T S Q)."""
    return (q.T @ S @ q).diagonal()


def eigenvectors_descending(S: Tensor) -> Tensor:
    """The eigenvectors of S as columns, that of the largest eigenvalue first."""
    return torch.linalg.eigh(S).eigenvectors.flip(-1)


def orthogonal_factor(A: Tensor) -> Tensor:
    """O of A = O P, P upper triangular. The signs of O's columns are arbitrary, and no method depends on them."""
    return torch.linalg.qr(A).Q


def ema(old: Tensor, new: Tensor, beta: float) -> Tensor:
    """beta old + (1 - beta) new."""
    return beta * old + (1 - beta) * new


def rms(G: Tensor) -> Tensor:
    """sqrt(mean(G^2))."""
    return G.square().mean().sqrt()
