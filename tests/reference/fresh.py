"""recipe="fresh": started from the first non-zero gradient, independent of its scale, continuous, and fresh.

A matrix sleeps until its first gradient that is not zero: W decays, nothing else moves. From that gradient, brought to
G^ = G / RMS(G), come the first factors S_k = (d_k/N) G^_k G^_k^T and the bases; the step t = 1 follows in the same call
with the same gradient. What divides the momentum in step t has seen the gradient of step t, but for the bases and the
roots. Everywhere the scale is a scalar of its own beside moments of unit mean, and early averages are plain means:

    b(t) = min(beta, 1 - 1/(t+1)),   beta = beta2, for factors and their eigenvalues shampoo_beta where given.
"""

from collections.abc import Sequence

import scipy.optimize
import torch
from torch import Tensor

from tests.reference.algebra import (
    diagonal_in_basis,
    ema,
    into_basis,
    mean_gram,
    on_every_side,
    orthogonal_factor,
    out_of_basis,
    outer,
    rms,
    whitened_except,
)
from tests.reference.options import Options

DAMPING = 0.01  # c of a refresh, relative to the mean eigenvalue
ROOT_DAMPING = 1e-4  # Shampoo's, relative to the mean eigenvalue
SMALLEST_EIGENVALUE = 1e-6  # of lambda_k, whose mean is one
EXPONENT_FLOOR = 0.1  # of lambda_k: below, an exponent other than 1/2 counts no more
SPIKE = 10  # times the scale so far
START = (
    (7.897655, -22.848975, 16.832932),
    (3.406791, -2.554052, 0.51748),
    (2.383019, -1.741878, 0.426726),
    (0, 2.5, -1.5),
)
SMALLEST_MOMENT = 1e-10  # of V, whose mean is one


class Reference:
    """What the fresh methods share: the sleep, the start, and the order of a step."""

    def __init__(self, shape: tuple[int, ...], options: Options):
        self.shape, self.options = shape, options
        self.sides = range(len(shape))
        self.t = 0
        self.M = torch.zeros(shape, dtype=options.dtype)

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        """W_new = W (1 - lr weight_decay) - lr U, both W and G of `shape`."""
        o = self.options
        W, G = W.to(o.dtype) * (1 - o.lr * o.weight_decay), G.to(o.dtype)
        if self.t == 0:
            if not G.any():
                return W
            self.S = [mean_gram(G / rms(G), k) for k in self.sides]
            self.start()
        self.t += 1
        G = self.without_spike(G)
        self.M_before, self.M = self.M, ema(self.M, G, o.beta1_of(self.t))
        W = W - o.lr * self.update(G)
        if o.refresh_due(self.t):
            self.refresh()
        return W

    def factor_share(self) -> float:
        """b, the weight of the old factors in step t."""
        return early_mean(self.options.lasting(self.options.factor_beta, self.t), self.t)

    def shaped(self, U: Tensor) -> Tensor:
        """U, near its polar factor or some of the way there, as step t was asked for."""
        if U.ndim == 2 and self.t <= self.options.start_updates:
            share = 1 - (self.t / (self.options.start_updates + 1)) ** 2
            return (1 - share) * U + share * 1.25 * nearly_orthogonal(U, START)
        return nearly_orthogonal(U, self.options.polar)

    def momentum(self, G: Tensor, change: Tensor | float = 1.0) -> Tensor:
        """N = ((1 - c) M + c G) / (1 - beta1^(t+1)), without Nesterov M / (1 - beta1^t); M has G already.

        Where beta1(t) has grown the M before counts times `change`, s_t / s_(t-1).

        c = 1 - beta1, or where beta1(t) has grown what leaves N the variance that it had, by independent gradients.
        """
        o = self.options
        if o.grown(self.t):
            self.M = ema(change * self.M_before, G, o.beta1_of(self.t))
        if not o.nesterov:
            return self.M / (1 - o.beta1**self.t)
        if not o.grown(self.t):
            c = 1 - o.beta1
        else:
            wanted = variance(1 - o.beta1, o.beta1)
            c = scipy.optimize.brentq(lambda c: variance(c, o.beta1_of(self.t)) - wanted, 0.0, 1.0, xtol=1e-15)
        return ema(self.M, G, 1 - c) / (1 - o.beta1 ** (self.t + 1))

    def without_spike(self, G: Tensor) -> Tensor:
        """G of step t, cut down where it is far beyond the scale of the gradients before."""
        return G

    def start(self) -> None:
        """The rest of the state, before step 1; S_k is there already."""
        raise NotImplementedError

    def update(self, G: Tensor) -> Tensor:
        """U, and the statistics, which include G before U is made of them."""
        raise NotImplementedError

    def refresh(self) -> None:
        """The bases, or the roots, from S_k."""
        raise NotImplementedError


class KLShampoo(Reference):
    """U = Q_a (P t_a t_b^T) Q_b^T, P = N~ / (s sqrt(lambda_a lambda_b^T) (1 + eps)), the scale s^2 ~ v a third factor.

    t_k = max(lambda_k, 0.1)^-(p - 1/2) / its RMS.
    """

    starting_refreshes = 4

    def start(self) -> None:
        """lambda_k = 1, v = 0, Q_k = Q0(d_k) after four refreshes."""
        dtype = self.options.dtype
        self.lam = [torch.ones(d, dtype=dtype) for d in self.shape]
        self.v = torch.zeros((), dtype=dtype)
        self.Q = [starting_basis(S, self.starting_refreshes) for S in self.S]

    def without_spike(self, G: Tensor) -> Tensor:
        """By the RMS of the whitened gradient, which s is of."""
        whitened = into_basis(G, self.Q) / outer(self.lam).sqrt()
        return cut_down(G, rms(whitened), self.v, self.options.beta2, self.t)

    def update(self, G: Tensor) -> Tensor:
        s = self.learn(G)
        denominator = s * outer(self.lam).sqrt() * (1 + self.options.eps)
        t = [lam.clamp(min=EXPONENT_FLOOR) ** (0.5 - self.options.exponent) for lam in self.lam]
        whitened = out_of_basis(into_basis(self.momentum(G, self.change), self.Q) / denominator, self.Q)
        further = outer([one / rms(one) for one in t])
        return out_of_basis(into_basis(self.shaped(whitened), self.Q) * further, self.Q)

    def learn(self, G: Tensor) -> Tensor:
        """The new scale s, and then S_k and lambda_k from H = G / s, all with the old lambdas on the right.

        v <- beta2 v + (1-beta2) mean(G~^2 / prod_k lambda_k),  s = sqrt(v / (1 - beta2^t));
        D_k = (d_k/N) H_k H_k^T with H whitened on every side but k;
        S_k <- (b S_k + (1-b) D_k) / c,  lambda_k <- (b lambda_k + (1-b) diag(Q_k^T D_k Q_k)) / c,  c = mean lambda_k.
        """
        o = self.options
        before, self.v = self.v, ema(self.v, (into_basis(G, self.Q).square() / outer(self.lam)).mean(), o.beta2)
        self.change = (self.v / before).sqrt()
        s = (self.v / (1 - o.beta2**self.t)).sqrt()
        b = self.factor_share()
        D = [mean_gram(whitened_except(G / s, k, self.Q, self.lam), k) for k in self.sides]
        for k in self.sides:
            S = ema(self.S[k], D[k], b)
            lam = ema(self.lam[k], diagonal_in_basis(D[k], self.Q[k]), b)
            self.S[k] = S / lam.mean()
            self.lam[k] = (lam / lam.mean()).clamp(min=SMALLEST_EIGENVALUE)
        return s

    def refresh(self) -> None:
        """Q_k <- the orthogonal factor of QR((S_k + c I) Q_k)."""
        self.Q = [refreshed(S, q) for S, q in zip(self.S, self.Q, strict=True)]


class KLSOAP(KLShampoo):
    """U = Q_a (N~ / (r (sqrt(V) + eps))) Q_b^T in the bases of KL-Shampoo; V does not follow a refresh."""

    starting_refreshes = 1

    def start(self) -> None:
        super().start()
        self.moment = SecondMoment(self.shape, self.options)

    def without_spike(self, G: Tensor) -> Tensor:
        return self.moment.without_spike(super().without_spike(G), self.t)

    def update(self, G: Tensor) -> Tensor:
        self.learn(G)
        self.moment.learn(into_basis(G, self.Q), self.t)
        return self.shaped(
            out_of_basis(into_basis(self.momentum(G, self.moment.change), self.Q) / self.moment.denominator, self.Q)
        )


class SOAP(Reference):
    """U = Q_a (N~ / (r (sqrt(V) + eps))) Q_b^T; V does not follow a refresh."""

    def start(self) -> None:
        """w = 0, V = 1, Q_k = Q0(d_k) after one refresh."""
        self.moment = SecondMoment(self.shape, self.options)
        self.Q = [starting_basis(S, refreshes=1) for S in self.S]

    def without_spike(self, G: Tensor) -> Tensor:
        return self.moment.without_spike(G, self.t)

    def update(self, G: Tensor) -> Tensor:
        """S_k <- b S_k + (1-b) (d_k/N) K_k K_k^T with K = G / r; not whitened, not normalised again."""
        self.moment.learn(into_basis(G, self.Q), self.t)
        self.S = unwhitened(self.S, G / self.moment.r, self.factor_share())
        return self.shaped(
            out_of_basis(into_basis(self.momentum(G, self.moment.change), self.Q) / self.moment.denominator, self.Q)
        )

    def refresh(self) -> None:
        """Q_k <- the orthogonal factor of QR((S_k + c I) Q_k); no sorting."""
        self.Q = [refreshed(S, q) for S, q in zip(self.S, self.Q, strict=True)]


class Shampoo(Reference):
    """U = |A| / |B| B,  B = R_a (N / r) R_b with R_k = S_k^-p,  A = N / (r (sqrt(V) + eps)); all in W's coordinates."""

    def start(self) -> None:
        """w = 0, V = 1, the roots of the first S_k."""
        self.moment = SecondMoment(self.shape, self.options)
        self.refresh()

    def without_spike(self, G: Tensor) -> Tensor:
        return self.moment.without_spike(G, self.t)

    def update(self, G: Tensor) -> Tensor:
        """S_k as SOAP's; the roots are those of the last refresh."""
        self.moment.learn(G, self.t)
        self.S = unwhitened(self.S, G / self.moment.r, self.factor_share())
        N = self.momentum(G, self.moment.change)
        A = N / self.moment.denominator
        B = on_every_side(N / self.moment.r, self.roots)
        return B * (A.norm() / B.norm()) if B.any() else B

    def refresh(self) -> None:
        """R_k = Q diag((max(lambda, 0) + 1e-4 tr(S_k)/d_k)^-p) Q^T, S_k = Q diag(lambda) Q^T."""
        self.roots = []
        for S in self.S:
            lam, q = torch.linalg.eigh(S)
            damped = lam.clamp(min=0) + ROOT_DAMPING * S.diagonal().mean()
            self.roots.append(q @ torch.diag(damped**-self.options.exponent) @ q.T)


class SecondMoment:
    """Adam's second moment as r^2 V: a scalar scale and an elementwise V of unit mean.

    w <- beta2 w + (1-beta2) mean(G^2),  r = sqrt(w / (1 - beta2^t));
    V <- b V + (1-b) (G/r)^2,  V <- max(V / mean(V), 1e-10).
    """

    def __init__(self, shape: tuple[int, ...], options: Options):
        self.options = options
        self.w = torch.zeros((), dtype=options.dtype)
        self.V = torch.ones(shape, dtype=options.dtype)

    def without_spike(self, G: Tensor, t: int) -> Tensor:
        """By the RMS of the gradient as it is, which r is of, in any basis."""
        return cut_down(G, rms(G), self.w, self.options.beta2, t)

    def learn(self, G: Tensor, t: int) -> None:
        """Take up the gradient of step t, in the coordinates that V has."""
        beta2 = self.options.beta2
        before, self.w = self.w, ema(self.w, G.square().mean(), beta2)
        self.change = (self.w / before).sqrt()
        self.r = (self.w / (1 - beta2**t)).sqrt()
        V = ema(self.V, (G / self.r).square(), early_mean(self.options.lasting(beta2, t), t))
        self.V = (V / V.mean()).clamp(min=SMALLEST_MOMENT)

    @property
    def denominator(self) -> Tensor:
        """r (sqrt(V) + eps)."""
        return self.r * (self.V.sqrt() + self.options.eps)


def variance(c: float, beta1: float) -> float:
    """Of (1 - c) M + c G where M is the long-run average, by beta1, of independent gradients of variance 1, G the last.

    G counts c + (1 - c)(1 - beta1), the n-th before it (1 - c)(1 - beta1) beta1^n.
    """
    older = (1 - c) * (1 - beta1)
    return (c + older) ** 2 + (older * beta1) ** 2 / (1 - beta1**2)


def nearly_orthogonal(U: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """U after X <- a X + b X X^T X + c (X X^T)^2 X for each (a, b, c), from U / |(U U^T)^2|^1/4, at U's norm.

    In the original coordinates, where the engine does it in the eigenbasis. Only for two sides.
    """
    if not coefficients or U.ndim != 2 or not U.any():
        return U
    unit = U / U.norm()
    X = unit / (unit @ unit.T @ unit @ unit.T).norm() ** 0.25
    for a, b, c in coefficients:
        cubed = X @ X.T @ X
        X = a * X + b * cubed + c * X @ X.T @ cubed
    return X * (U.norm() / X.norm())


def cut_down(G: Tensor, size: Tensor, square: Tensor, beta2: float, t: int) -> Tensor:
    """G min(1, 10 s' / size) with s' = sqrt(square / (1 - beta2^(t-1))), the scale of the gradients before step t."""
    if t == 1:
        return G
    limit = SPIKE * (square / (1 - beta2 ** (t - 1))).sqrt()
    return G if size <= limit else G * (limit / size)


def early_mean(beta: float, t: int) -> float:
    """b(t) = min(beta, 1 - 1/(t+1)): at first the plain mean of the start and the t gradients since."""
    return min(beta, 1 - 1 / (t + 1))


def unwhitened(S: list[Tensor], K: Tensor, b: float) -> list[Tensor]:
    """S_k <- b S_k + (1-b) (d_k/N) K_k K_k^T."""
    return [ema(S[k], mean_gram(K, k), b) for k in range(K.ndim)]


def starting_basis(S: Tensor, refreshes: int) -> Tensor:
    """Q0(d), a fixed generic orthogonal matrix, after a few refreshes with S.

    Generic, as the identity is an unstable equilibrium of the iteration wherever S has rows of zeros.
    """
    d = len(S)
    generator = torch.Generator().manual_seed(d)
    q = orthogonal_factor(torch.randn(d, d, generator=generator, dtype=torch.float32).to(S.dtype))
    for _ in range(refreshes):
        q = refreshed(S, q)
    return q


def refreshed(S: Tensor, q: Tensor) -> Tensor:
    """The orthogonal factor of QR((S + c I) Q), c = 0.01 tr(S) / d."""
    c = DAMPING * S.diagonal().mean()
    return orthogonal_factor((S + c * torch.eye(len(S), dtype=S.dtype)) @ q)
