"""Inverse roots: the power of the damped factor, by eigh and by products alone, on hard spectra and in training."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from kl_dist.methods import fallbacks, linalg, roots, shampoo
from tests.paths import WHOLE, train
from tests.products import product
from tests.test_linalg import DTYPES, error, factor
from tests.test_methods_fresh import train_network
from tests.test_qr import SPECTRA, spectrum
from tests.test_reference import gradients, low_rank_gradients

DAMPING = shampoo.DAMPING


@pytest.fixture
def counted():
    fallbacks.clear()
    yield fallbacks.read
    fallbacks.clear()


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1 / 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_root_is_the_power_of_the_damped_factor(dtype, exponent):
    S = factor(8)
    root = roots.inverse_root(S.to(DTYPES[dtype][0]), exponent, 1e-2)
    for found, one in zip(root, S, strict=True):
        expected = torch.from_numpy(scipy.linalg.fractional_matrix_power(one.numpy() + 1e-2 * np.eye(8), -exponent))
        assert error(found.double(), expected) < 10 * DTYPES[dtype][1]


def test_inverse_root_of_a_singular_factor_is_finite():
    root = roots.inverse_root(torch.zeros(2, 4, 4), 0.5, torch.tensor([[1e-2], [4.0]]))
    assert torch.allclose(root, torch.tensor([10.0, 0.5])[:, None, None] * torch.eye(4))


def test_an_inverse_root_leaves_the_factor_alone():
    S = factor(5)
    before = S.clone()
    roots.by_eigh(S, 0.5, 1e-3)
    roots.by_products(S, 2, 1e-3, 1e-4)
    assert torch.equal(S, before)


def shifted(name: str, d: int) -> tuple[Tensor, Tensor]:
    """S (2, d, d) in float64, and c, as Shampoo damps it."""
    noise = torch.randn(2, d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q
    S = basis * spectrum(name, d) @ basis.mT
    return (S + S.mT) / 2, DAMPING * linalg.mean_diagonal(S)


@product(name=[name for name in SPECTRA if name != "denormal"], d=[1, 2, 7, 64, 200], order=[2, 4, 6, 8])
def test_by_products_it_is_that_of_eigh_in_float64(name, d, order, counted):
    """To rounding times the condition, in float64 and in float32."""
    S, c = shifted(name, d)
    expected = roots.by_eigh(S, 1 / order, c)
    condition = float((torch.linalg.eigvalsh(S).amax(-1) / c[:, 0]).max())
    assert error(roots.by_products(S, order, c, DAMPING), expected) < 1e-14 * max(condition, 100)
    found = roots.by_products(S.float(), order, c.float(), DAMPING).double()
    assert error(found, expected) < 3e-7 * max(condition, 10)
    assert counted() == {}


@pytest.mark.parametrize("order", [2, 4, 8])
def test_the_steps_bring_all_of_the_spectrum_to_one(order):
    smallest = DAMPING / 4096
    m = torch.logspace(np.log10(smallest), 0, 1001, dtype=torch.float64)
    for a, b in roots.coefficients(order, smallest):
        m = m * (a - b * m).pow(order)
        assert m.max() < 1 + 1e-9
    assert (m - 1).abs().max() < 1e-12
    assert len(roots.coefficients(order, smallest)) <= 14


def test_where_it_does_not_converge_eigh_does_it_and_is_counted(counted):
    """The second's smallest eigenvalue is far below what was said."""
    S = torch.diag_embed(torch.stack([torch.logspace(0, end, 12) for end in (-0.1, -12, -0.2)]))
    found = roots.by_products(S, 4, 1e-14, 0.5)
    assert error(found[1], roots.by_eigh(S, 0.25, 1e-14)[1]) == 0
    assert counted() == {"inverse root by eigh": 1}


def test_not_a_number_comes_back_as_an_error_not_as_an_answer(counted):
    S = factor(4).float()
    S[0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="eigh"):
        roots.by_products(S, 4, 1e-3, DAMPING)


@pytest.fixture
def by_products(monkeypatch):
    """As on a GPU in float32, whatever the device and dtype."""

    def inverse_root(S: Tensor, exponent: float, shift: Tensor, damping: float = 0.0) -> Tensor:
        return roots.by_products(S, round(1 / exponent), shift, damping)

    def switch() -> None:
        monkeypatch.setattr(roots, "inverse_root", inverse_root)

    return switch


@pytest.mark.parametrize("case", ["rank one", "rank two", "full rank", "three sides"])
def test_shampoo_trains_the_same_by_products(case, by_products, counted):
    """In float64."""
    options = {"method": "shampoo", "precondition_frequency": 2, **WHOLE}
    ranks = {"rank one": 1, "rank two": 2, "full rank": 20}
    grads = low_rank_gradients(24, 20, ranks[case], 30) if case in ranks else gradients((5, 4, 6), 30)
    expected = train(grads, **options)
    by_products()
    assert (train(grads, **options) - expected).abs().max() / expected.abs().max() < 1e-8
    assert counted() == {}


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_shampoo_by_products_does_not_see_the_scale_of_the_gradients(scale, by_products):
    """Demand (a)."""
    by_products()
    grads = gradients((8, 5), 50)
    paths = [train(factor * grads, method="shampoo") for factor in (1.0, scale)]
    assert (paths[1] - paths[0]).abs().max() / paths[0].abs().max() < 1e-8


@pytest.mark.parametrize("network", ["dead units", "LoRA"])
def test_shampoo_by_products_is_continuous_under_rank_deficient_gradients(network, by_products):
    """Demand (c)."""
    by_products()
    undisturbed = train_network(network, 2, None, "shampoo")
    disturbed = train_network(network, 2, "of each entry", "shampoo")
    assert (disturbed - undisturbed).abs().max() < 1e-10


def test_shampoo_by_products_wakes_up_after_a_long_silence(by_products):
    """Demand (d), in float32: factors of zero have roots too."""
    by_products()
    signs = gradients((24, 24), 40).sign().float()
    grads = torch.cat([signs[:20], torch.zeros(60, 24, 24), signs[20:]])
    path = train(grads, method="shampoo", lr=1.0, weight_decay=0.0, betas=(0.1, 0.1))
    sizes = path.diff(dim=0).flatten(1).square().mean(1).sqrt()
    assert path.isfinite().all() and sizes[-20:].min() > 0.05 and sizes[-21:].max() < 10
