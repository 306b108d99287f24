"""recipe="paper": the released codes, to the letter, in the plain form.

Every method treats its very first gradient alike: it sets the factors S_k and what is derived from them, and leaves
W, M and t as they are. From then on t = 1, 2, .. and in each step

    U from M and from last step's basis;   W <- (W - lr U)(1 - lr weight_decay);   S_k;   if T divides t, a refresh.
"""

import torch
from torch import Tensor

from tests.reference.algebra import (
    diagonal_in_basis,
    eigenvectors_descending,
    ema,
    into_basis,
    mean_gram,
    on_every_side,
    orthogonal_factor,
    out_of_basis,
    outer,
    total_gram,
    whitened_except,
)
from tests.reference.options import Options

INITIAL_EIGENVALUE = 0.1  # init_factor of the released code


class Reference:
    """What the four methods share: t, M, S_k, the first call and the order of a step."""

    def __init__(self, shape: tuple[int, ...], options: Options):
        self.shape, self.options = shape, options
        self.sides = range(len(shape))
        self.t = 0
        self.M = torch.zeros(shape, dtype=options.dtype)
        self.S: list[Tensor] = []  # empty until the first call

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        """W_new from W and G, both of `shape`."""
        o = self.options
        W, G = W.to(o.dtype), G.to(o.dtype)
        if not self.S:
            self.start(G)
            return W.clone()
        self.t += 1
        self.M = ema(self.M, G, o.beta1)
        W = W - o.lr * self.update(G)
        W = W * (1 - o.lr * o.weight_decay)
        self.learn(G)
        if o.refresh_due(self.t):
            self.refresh()
        return W

    def start(self, G: Tensor) -> None:
        """The first call: S_k and what is derived from it."""
        raise NotImplementedError

    def update(self, G: Tensor) -> Tensor:
        """U, from M (which has G already) and last step's basis and eigenvalues."""
        raise NotImplementedError

    def learn(self, G: Tensor) -> None:
        """S_k, and lambda_k where the method has it."""
        raise NotImplementedError

    def refresh(self) -> None:
        """The basis, or the roots, from S_k."""
        raise NotImplementedError


class KLShampoo(Reference):
    """U = Q_a ((Q_a^T M Q_b) / (sqrt(lambda_a lambda_b^T) + eps)) Q_b^T."""

    def start(self, G: Tensor) -> None:
        """S_k = (1 - beta) (d_k/N) G_k G_k^T, Q_k its eigenvectors, lambda_k = 0.1."""
        o = self.options
        self.S = [(1 - o.factor_beta) * mean_gram(G, k) for k in self.sides]
        self.Q = [eigenvectors_descending(S) for S in self.S]
        self.lam = [torch.full((d,), INITIAL_EIGENVALUE, dtype=o.dtype) for d in self.shape]

    def update(self, G: Tensor) -> Tensor:
        R = into_basis(self.M, self.Q)
        D = outer(self.lam).sqrt()
        return out_of_basis(R / (D + self.options.eps), self.Q)

    def learn(self, G: Tensor) -> None:
        """S_k and lambda_k from G whitened on the other sides by the OLD lambdas (Jacobi), save for K = 3."""
        if len(self.shape) == 3:
            self._learn_three_sides(G)
            return
        whitened = [self._statistic(G, k, self.lam) for k in self.sides]
        self.S = [ema(self.S[k], whitened[k], self.options.factor_beta) for k in self.sides]
        self.lam = [self._eigenvalues(k, whitened[k]) for k in self.sides]

    def _learn_three_sides(self, G: Tensor) -> None:
        """The released code's order: S_3, S_2, lambda_3 see old lambdas only; lambda_2 sees lambda_1 old and lambda_3
        new; S_1 and lambda_1 see lambda_2 new and lambda_3 old."""
        one, two, three = self.lam
        for_3 = self._statistic(G, 2, [one, two, three])
        for_S_2 = self._statistic(G, 1, [one, two, three])
        three_new = self._eigenvalues(2, for_3)
        two_new = self._eigenvalues(1, self._statistic(G, 1, [one, two, three_new]))
        for_1 = self._statistic(G, 0, [one, two_new, three])
        one_new = self._eigenvalues(0, for_1)
        self.S = [ema(S, new, self.options.factor_beta) for S, new in zip(self.S, (for_1, for_S_2, for_3), strict=True)]
        self.lam = [one_new, two_new, three_new]

    def _statistic(self, G: Tensor, k: int, lam: list[Tensor]) -> Tensor:
        """(d_k/N) H_k H_k^T, H being G whitened on every side but k; for two sides X X^T / n and Y^T Y / m."""
        return mean_gram(whitened_except(G, k, self.Q, lam), k)

    def _eigenvalues(self, k: int, statistic: Tensor) -> Tensor:
        """lambda_k <- beta lambda_k + (1-beta) diag(Q_k^T statistic Q_k), at least 1 / max(10, min(d_k, 4000))^2."""
        lam = ema(self.lam[k], diagonal_in_basis(statistic, self.Q[k]), self.options.factor_beta)
        return lam.clamp(min=1 / max(10, min(self.shape[k], 4000)) ** 2)

    def refresh(self) -> None:
        """Q_k <- the orthogonal factor of QR(S_k Q_k); lambda_k keeps its values and its order."""
        self.Q = [orthogonal_factor(S @ q) for S, q in zip(self.S, self.Q, strict=True)]


class KLSOAP(KLShampoo):
    """U = Q_a (m / (sqrt(v) + eps)) Q_b^T, m = Q_a^T M Q_b, no bias correction; v does not follow a refresh."""

    def start(self, G: Tensor) -> None:
        super().start(G)
        self.v = torch.zeros_like(G)

    def update(self, G: Tensor) -> Tensor:
        m = into_basis(self.M, self.Q)
        self.v = ema(self.v, into_basis(G, self.Q).square(), self.options.beta2)
        return out_of_basis(m / (self.v.sqrt() + self.options.eps), self.Q)


class SOAP(Reference):
    """U = sqrt(1-beta2^t)/(1-beta1^t) Q_a (m / (sqrt(v) + eps)) Q_b^T, in a basis kept in order of eigenvalue."""

    def start(self, G: Tensor) -> None:
        """S_k = (1 - beta) G_k G_k^T, Q_k its eigenvectors, v = 0."""
        self.S = [(1 - self.options.factor_beta) * total_gram(G, k) for k in self.sides]
        self.Q = [eigenvectors_descending(S) for S in self.S]
        self.v = torch.zeros_like(G)

    def update(self, G: Tensor) -> Tensor:
        o = self.options
        m = into_basis(self.M, self.Q)
        self.v = ema(self.v, into_basis(G, self.Q).square(), o.beta2)
        correction = (1 - o.beta2**self.t) ** 0.5 / (1 - o.beta1**self.t)
        return correction * out_of_basis(m / (self.v.sqrt() + o.eps), self.Q)

    def learn(self, G: Tensor) -> None:
        """S_k <- beta S_k + (1 - beta) G_k G_k^T."""
        self.S = [ema(self.S[k], total_gram(G, k), self.options.factor_beta) for k in self.sides]

    def refresh(self) -> None:
        """Q_k and v re-ordered by diag(Q_k^T S_k Q_k), descending; then Q_k <- the orthogonal factor of QR(S_k Q_k)."""
        for k in self.sides:
            order = diagonal_in_basis(self.S[k], self.Q[k]).argsort(descending=True)
            self.v = self.v.index_select(k, order)
            self.Q[k] = orthogonal_factor(self.S[k] @ self.Q[k][:, order])


class Shampoo(Reference):
    """U = |A| / |S_a^-p M S_b^-p| S_a^-p M S_b^-p, A being the AdamW update (Adam grafting, Frobenius norms)."""

    def start(self, G: Tensor) -> None:
        """S_k = (1 - beta) G_k G_k^T, its root, v = 0."""
        self.S = [(1 - self.options.factor_beta) * total_gram(G, k) for k in self.sides]
        self.v = torch.zeros_like(G)
        self.refresh()

    def update(self, G: Tensor) -> Tensor:
        o = self.options
        self.v = ema(self.v, G.square(), o.beta2)
        A = (self.M / (1 - o.beta1**self.t)) / ((self.v / (1 - o.beta2**self.t)).sqrt() + o.eps)
        U = on_every_side(self.M, self.roots)
        return U * (A.norm() / U.norm()) if U.any() else U

    def learn(self, G: Tensor) -> None:
        """S_k <- beta S_k + (1 - beta) G_k G_k^T."""
        self.S = [ema(self.S[k], total_gram(G, k), self.options.factor_beta) for k in self.sides]

    def refresh(self) -> None:
        """S_k^-p = Q diag((max(lambda, 0) + eps)^-p) Q^T."""
        self.roots = []
        for S in self.S:
            lam, q = torch.linalg.eigh(S)
            self.roots.append(q @ torch.diag((lam.clamp(min=0) + self.options.eps) ** -self.options.exponent) @ q.T)
