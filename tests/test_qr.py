"""QR of damped factors, by reflections and by Cholesky: what it is called, on hard spectra, and in training."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kl_dist import KLShampoo
from kl_dist.methods import fallbacks, linalg, qr
from tests.paths import WHOLE, train
from tests.products import product
from tests.test_methods_fresh import orthogonality
from tests.test_reference import gradients, low_rank_gradients

WAYS: dict[str, Callable[[Tensor], qr.Factored]] = {
    "reflections": qr.by_reflections,
    "once in float64": qr.by_cholesky,
    "twice": lambda A: qr.by_scaled_cholesky(A, 2),
    "three times": lambda A: qr.by_scaled_cholesky(A, 3),
}
FOR_A_START = ("reflections", "once in float64", "three times")


def spectrum(name: str, d: int) -> Tensor:
    """Eigenvalues (d,) of a factor, float64."""
    some = torch.arange(d) < max(1, d // 2)
    return {
        "condition 1e12": torch.logspace(0, -12, d, dtype=torch.float64),
        "rank one": (torch.arange(d) == 0).double(),
        "half the rank": some.double(),
        "all equal": torch.ones(d, dtype=torch.float64),
        "two values": torch.where(some, 1.0, 1e-3).double(),
        "denormal": torch.logspace(0, -3, d, dtype=torch.float64) * 1e-37,
        "huge": torch.logspace(0, -3, d, dtype=torch.float64) * 1e30,
    }[name]


SPECTRA = ("condition 1e12", "rank one", "half the rank", "all equal", "two values", "denormal", "huge")


def damped(name: str, d: int, batch: int = 2) -> Tensor:
    """S + 0.01 mean(diag S) I, (batch, d, d), in float32 and in a basis that knows nothing of S."""
    noise = torch.randn(batch, d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q
    S = basis * spectrum(name, d) @ basis.mT
    return (S + S.mT).div(2).add(0.01 * linalg.mean_diagonal(S)[..., None] * torch.eye(d)).float()


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def unorthogonality(rotation: Tensor) -> float:
    exact = rotation.double()
    return float((exact.mT @ exact - torch.eye(exact.shape[-1])).abs().max())


@product(**{"way": FOR_A_START, "name": SPECTRA, "d": [1, 2, 7, 64, 256]})
def test_of_any_damped_spectrum_it_is_qr(way, name, d, monkeypatch):
    """O P = A, P upper triangular, O as orthogonal as reflections leave it, and theirs but for signs."""
    monkeypatch.setattr(qr, "ELEMENTS_AT_ONCE", d * d)  # a part for each
    A = damped(name, d)
    rotation, upper, failed = WAYS[way](A)
    assert failed is None or not failed.any()
    assert unorthogonality(rotation) < 1.2e-6
    assert off(rotation.double() @ upper.double(), A) < 2e-6 and torch.equal(upper, upper.triu())
    exact = torch.linalg.qr(A.double())
    signs = exact.R.diagonal(dim1=1, dim2=2).sign() * upper.diagonal(dim1=1, dim2=2).sign()
    assert off(exact.Q * signs[:, None, :], rotation) < 2e-3  # rounding, times a condition of 100 d


@pytest.mark.parametrize("name", SPECTRA)
def test_two_passes_bear_what_three_are_for(name):
    """Of a basis that knows nothing of the factor two passes leave 1e-5 or so, less than a refresh may add. No NaN."""
    rotation, upper, failed = qr.by_scaled_cholesky(damped(name, 256), 2)
    assert failed is not None and not failed.any()
    assert unorthogonality(rotation) < 3e-5 and off(rotation @ upper, damped(name, 256)) < 2e-6


@pytest.mark.parametrize("d", [16, 256])
def test_two_passes_are_as_good_as_reflections_where_the_basis_is_near(d):
    S = torch.diag_embed(spectrum("condition 1e12", d)).float()
    noise = torch.randn(4, d, d, generator=torch.Generator().manual_seed(0))
    root = S.diagonal().sqrt()
    A = S + 0.2 / d**0.5 * root[:, None] * (noise + noise.mT) * root + 0.01 * S.diagonal().mean() * torch.eye(d)
    assert unorthogonality(qr.by_scaled_cholesky(A, 2).rotation) < 2 * unorthogonality(qr.by_reflections(A).rotation)


@pytest.mark.parametrize("way", ["once in float64", "twice", "three times"])
def test_what_has_no_factorisation_is_marked_and_harms_no_other(way):
    A = torch.stack([torch.zeros(6, 6), damped("two values", 6)[0], torch.full((6, 6), torch.nan)])
    rotation, upper, failed = WAYS[way](A)
    assert failed is not None and failed.tolist() == [True, False, True]
    assert off(rotation[1] @ upper[1], A[1]) < 1e-6


@pytest.fixture
def counted():
    fallbacks.clear()
    yield fallbacks.read
    fallbacks.clear()


def by(way: str) -> Callable[..., qr.Factored]:
    """In the place of `qr.factorize`: one way for all, but three passes at a start in the place of two."""

    def factorize(symmetric: Tensor, damped: bool, first: bool) -> qr.Factored:
        return WAYS["three times" if first and way == "twice" else way](symmetric)

    return factorize


def test_a_refresh_that_cannot_be_made_leaves_the_matrix_as_it_is(monkeypatch, counted):
    """And is counted, unless the matrix is zero, which has nothing to refresh."""
    S = torch.stack([damped("half the rank", 5)[0], torch.zeros(5, 5), torch.full((5, 5), torch.inf)])
    monkeypatch.setattr(qr, "factorize", by("twice"))
    rotation, rotated = linalg.orthogonal_iteration(S, 0.01)
    assert all(torch.equal(rotation[i], torch.eye(5)) and torch.equal(rotated[i], S[i]) for i in (1, 2))
    assert off(rotated[0], rotation[0].mT @ S[0] @ rotation[0]) < 2e-6
    assert counted() == {"refresh left out": 1}


@product(method=["kl_shampoo", "kl_soap", "soap"], way=["once in float64", "twice"], rank=[1, 3, 24])
def test_training_is_the_same_by_whichever_way(method, way, rank, monkeypatch, counted):
    """40 steps with gradients of any rank, to what noise of 1e-7 on the gradients does to the run by reflections."""
    options = {"method": method, "precondition_frequency": 2, **WHOLE}
    grads = low_rank_gradients(24, 20, rank, 40).float()
    expected = train(grads, **options)
    noise = torch.randn(grads.shape, generator=torch.Generator().manual_seed(3))
    noisy = train(grads * (1 + 1e-7 * noise), **options)
    monkeypatch.setattr(qr, "factorize", by(way))
    found = train(grads, **options)
    size = (expected - expected[0]).abs().max()
    assert (found - expected).abs().max() / size < max(1e-5, 10 * float((noisy - expected).abs().max() / size))
    assert counted() == {}


def test_the_scale_of_the_gradients_is_not_seen_by_cholesky(monkeypatch):
    """Demand (a), where the smallest gradients have squares that are no normal numbers."""
    monkeypatch.setattr(qr, "factorize", by("twice"))
    grads = gradients((12, 8), 20).float()
    paths = [train(scale * grads, **WHOLE) for scale in (1.0, 2.0**-40, 2.0**30)]
    assert all(path.isfinite().all() for path in paths)
    assert all((path - paths[0]).abs().max() / paths[0].abs().max() < 1e-3 for path in paths[1:])


def test_bases_stay_orthogonal_through_many_refreshes_by_cholesky(monkeypatch):
    monkeypatch.setattr(qr, "factorize", by("twice"))
    _, second, last = orthogonality("kl_shampoo", "fresh", 16, 900).chunk(3)
    assert last.max() < 1e-4 and last.mean() < 1.25 * second.mean()


def test_counts_of_a_device_are_in_the_stats(monkeypatch, counted):
    """Of an optimizer whose every refresh fails, and whose bases stay what they were at the start."""
    W = torch.nn.Parameter(torch.zeros(6, 6))
    opt = KLShampoo([W], precondition_frequency=1)
    W.grad = gradients((6, 6), 1)[0].float()
    opt.step()
    before = opt.state[W]["bases.0"].clone()

    def failing(symmetric: Tensor, damped: bool, first: bool) -> qr.Factored:
        rotation, upper, _ = qr.by_reflections(symmetric)
        return qr.Factored(rotation, upper, torch.ones(len(symmetric), dtype=torch.bool))

    monkeypatch.setattr(qr, "factorize", failing)
    for _ in range(3):
        opt.step()
    assert torch.equal(opt.state[W]["bases.0"], before)
    assert opt.stats()["fallbacks"] == {"refresh left out": 6}
