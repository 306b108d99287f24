"""Decompositions are what they say, on batches, and give way to a slower one where the solver gives up."""

import pytest
import torch
from torch import Tensor

from kl_dist import KLShampoo
from kl_dist.methods import fallbacks, linalg

DTYPES = {"float64": (torch.float64, 1e-12), "float32": (torch.float32, 2e-5)}


def factor(d: int, rank: int | None = None, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Symmetric positive semi-definite matrices (batch, d, d) with a spread spectrum."""
    generator = torch.Generator().manual_seed(d)
    half = torch.randn(batch, d, rank or 2 * d, generator=generator, dtype=torch.float64)
    half = half * torch.logspace(0, -2, d, dtype=torch.float64)[:, None]
    return (half @ half.mT).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("d", [1, 2, 7, 32, 2 * linalg.SLAB["cpu"] + 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_orthogonal_iteration_rotates_the_factor_it_is_given(dtype, d, damping):
    """O is orthogonal, S' = O^T S O is symmetric, and O is the orthogonal factor of QR(S + c I)."""
    S, tolerance = factor(d, dtype=DTYPES[dtype][0]), DTYPES[dtype][1]
    rotation, rotated = linalg.orthogonal_iteration(S, damping)
    identity = torch.eye(d, dtype=S.dtype)
    assert error(rotation.mT @ rotation, identity) < tolerance
    assert error(rotated, rotation.mT @ S @ rotation) < tolerance
    assert torch.equal(rotated, rotated.mT)
    shifted = S + damping * S.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * identity
    assert float((rotation.mT @ shifted).tril(-1).abs().max() / S.abs().max()) < tolerance


def test_orthogonal_iteration_converges_to_the_eigenvectors():
    S = factor(6)
    rotated = S
    for _ in range(300):
        _, rotated = linalg.orthogonal_iteration(rotated, 0.0)
    assert error(rotated, torch.diag_embed(torch.linalg.eigvalsh(S).flip(-1))) < 1e-12


def test_damped_iteration_is_continuous_where_the_factor_is_singular():
    """Noise of 1e-13 in the null space moves the rotation by no more than that over the damping."""
    S = factor(12, rank=2)
    noise = 1e-13 * torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = linalg.orthogonal_iteration(S + noise + noise.T, 0.01)[0] - linalg.orthogonal_iteration(S, 0.01)[0]
    assert moved.abs().max() < 1e-9


@pytest.mark.parametrize("d", [2, 16])
def test_reorthogonalizing_squares_the_error(d):
    Q = linalg.start_basis(d, torch.empty((), dtype=torch.float64))
    noise = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / d
    identity = torch.eye(d, dtype=torch.float64)
    for size in (1e-2, 1e-4, 1e-6):
        near = Q + size * noise
        before, after = (torch.linalg.matrix_norm(x.mT @ x - identity, 2) for x in (near, linalg.reorthogonalize(near)))
        assert after < before**2


@pytest.mark.parametrize("d", [1, 5, 64])
def test_start_basis_is_orthogonal_generic_and_always_the_same(d):
    torch.manual_seed(d)
    like = torch.empty((), dtype=torch.float64)
    Q, state = linalg.start_basis(d, like), torch.get_rng_state()
    assert error(Q.T @ Q, torch.eye(d, dtype=torch.float64)) < 1e-13
    assert torch.equal(Q, linalg.start_basis(d, like)) and torch.equal(state, torch.get_rng_state())
    assert (Q != 0).all()
    assert error(linalg.start_basis(d, torch.empty(())).double(), Q) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_eigenbasis_is_in_descending_order(dtype):
    S, tolerance = factor(9, dtype=DTYPES[dtype][0]), DTYPES[dtype][1]
    Q = linalg.descending_eigenbasis(S)
    values = (Q.mT @ S @ Q).diagonal(dim1=1, dim2=2)
    assert error(Q @ torch.diag_embed(values) @ Q.mT, S) < tolerance
    assert (values.diff() <= tolerance * values.max()).all()


def test_functions_change_none_of_their_arguments():
    S = factor(5)
    before = S.clone()
    linalg.orthogonal_iteration(S, 0.01)
    linalg.descending_eigenbasis(S)
    linalg.reorthogonalize(S)
    assert torch.equal(S, before)


class Fragile:
    """torch.linalg.eigh that gives up on its first `failures` calls: raises, or returns NaN as LAPACK may."""

    def __init__(self, failures: int, raises: bool) -> None:
        self.failures, self.raises, self.real = failures, raises, torch.linalg.eigh

    def __call__(self, A: Tensor):
        self.failures -= 1
        if self.failures < 0:
            return self.real(A)
        if self.raises:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return torch.full(A.shape[:-1], torch.nan, dtype=A.dtype), torch.full_like(A, torch.nan)


@pytest.fixture
def counted():
    fallbacks.clear()
    yield fallbacks.read
    fallbacks.clear()


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "returns NaN"])
@pytest.mark.parametrize("failures", [0, 1, 2])
def test_eigh_that_gives_up_is_replaced_and_counted(failures, raises, monkeypatch, counted):
    S = factor(6, dtype=torch.float32)
    monkeypatch.setattr(torch.linalg, "eigh", Fragile(failures, raises))
    values, Q = linalg.eigh(S)
    assert error(Q @ torch.diag_embed(values) @ Q.mT, S) < 1e-5
    assert values.dtype == Q.dtype == torch.float32
    assert sum(counted().values()) == failures


def test_eigh_that_always_gives_up_is_an_error(monkeypatch, counted):
    monkeypatch.setattr(torch.linalg, "eigh", Fragile(10, raises=True))
    with pytest.raises(RuntimeError, match="eigh"):
        linalg.eigh(factor(3))


def test_fallbacks_are_in_the_stats(monkeypatch, counted):
    W = torch.nn.Parameter(torch.zeros(4, 3))
    opt = KLShampoo([W], method="shampoo")
    assert opt.stats()["fallbacks"] == {}
    monkeypatch.setattr(torch.linalg, "eigh", Fragile(1, raises=True))
    W.grad = torch.randn(4, 3)
    opt.step()
    assert sum(opt.stats()["fallbacks"].values()) == 1
    assert W.isfinite().all() and W.abs().max() > 0
