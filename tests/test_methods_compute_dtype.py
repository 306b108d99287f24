"""Option `compute_dtype`: what each costs in precision, here by rounding operands, as a CPU does."""

import functools

import pytest
import torch
from torch import Tensor, nn

from benchmarks.precision import gradients, orthogonality, state_after, update_errors
from kl_dist import KLShampoo
from kl_dist.methods import products
from kl_dist.step import engine
from tests.models import METHODS

# relative to an element: half of the last bit that is kept; and of one update against float64
ROUNDING = {"float32": 0.0, "tf32": 2**-11, "bfloat16": 2**-8, "bf16x3": 2**-17}
OF_AN_UPDATE = {"float32": (1e-8, 2e-5), "bf16x3": (1e-6, 2e-4), "tf32": (1e-4, 8e-3), "bfloat16": (1e-3, 6e-2)}


@pytest.mark.parametrize("compute_dtype", products.COMPUTE_DTYPES)
def test_an_operand_keeps_the_bits_it_is_said_to(compute_dtype):
    x = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(0))
    parts = products.operand(x, compute_dtype).parts
    error = ((sum(part.double() for part in parts) - x) / x).abs().max().item()
    assert ROUNDING[compute_dtype] / 2 <= error <= ROUNDING[compute_dtype]
    for part in parts:  # what is rounded is rounded once
        assert torch.equal(products.operand(part, compute_dtype).parts[0], part)


@pytest.mark.parametrize("compute_dtype", products.COMPUTE_DTYPES)
def test_a_product_is_as_near_as_its_operands(compute_dtype):
    x, y = torch.randn(2, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    found = products.product(x, y, compute_dtype, torch.empty_like(x))
    error = (found.double() - x.double() @ y.double()).norm() / (x.double() @ y.double()).norm()
    assert ROUNDING[compute_dtype] / 8 <= error <= max(2 * ROUNDING[compute_dtype], 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_one_update_is_as_near_to_float64_as_is_said(method):
    for compute_dtype, error in update_errors(method).items():
        least, most = OF_AN_UPDATE[compute_dtype]
        assert least < error < most, compute_dtype


@functools.cache
def exact_factors() -> tuple[Tensor, ...]:
    return state_after("kl_shampoo", torch.float64, None, gradients(16, 16), 2000).factors


@pytest.mark.parametrize("compute_dtype", products.COMPUTE_DTYPES)
def test_bases_stay_orthogonal_through_2000_refreshes(compute_dtype):
    """And what the factors say of the gradients stays right: the spectrum is that of a run in float64."""
    grads = gradients(16, 16)
    state = state_after("kl_shampoo", torch.float32, compute_dtype, grads, 2000)
    assert orthogonality(state.bases) < 1e-4
    for factor, expected in zip(state.factors, exact_factors(), strict=True):
        found, said = torch.linalg.eigvalsh(factor.double()), torch.linalg.eigvalsh(expected)
        assert ((found - said).abs() / said).max() < 0.05


def trained(dtype: torch.dtype, **options) -> Tensor:
    W = nn.Parameter(torch.linspace(-1, 1, 12 * 8, dtype=dtype).reshape(12, 8))
    opt = KLShampoo([W], lr=1e-2, **options)
    for grad in gradients(6, 12):
        W.grad = grad[0, :, :8].to(dtype)
        opt.step()
    return W.detach()


@pytest.mark.parametrize("method", METHODS)
def test_without_a_gpu_float32_is_the_default_and_float64_is_never_rounded(method):
    said = trained(torch.float32, method=method, compute_dtype="float32")
    assert torch.equal(trained(torch.float32, method=method), said)
    exact = trained(torch.float64, method=method)
    assert torch.equal(exact, trained(torch.float64, method=method, compute_dtype="bfloat16"))
    for compute_dtype in ("tf32", "bfloat16"):
        rounded = trained(torch.float32, method=method, compute_dtype=compute_dtype)
        assert 1e-7 < (rounded - exact).abs().max() < 1e-2


def test_groups_have_their_own_and_may_change_it_between_steps():
    W = [nn.Parameter(torch.ones(6, 6)) for _ in range(2)]
    opt = KLShampoo([{"params": W[:1]}, {"params": W[1:], "compute_dtype": "bfloat16"}], lr=1e-2)
    for step in range(4):
        for parameter, grad in zip(W, [gradients(4, 6)[step][0].float()] * 2, strict=True):
            parameter.grad = grad.clone()
        if step == 3:
            opt.param_groups[1]["compute_dtype"] = "tf32"
        opt.step()
    assert 1e-7 < (W[0] - W[1]).abs().max() < 1e-2


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="unknown compute_dtype 'bf16'; did you mean 'bf16x3'"):
        KLShampoo([nn.Parameter(torch.ones(3, 3))], compute_dtype="bf16")


def test_the_released_codes_recipe_is_float32_everywhere():
    assert KLShampoo([nn.Parameter(torch.ones(3, 3))], recipe="paper").param_groups[0]["compute_dtype"] == "float32"


def needs_switch() -> None:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the older switches alone")


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_onednn_is_asked_for_bfloat16_where_it_keeps_float32_and_mkl_is_slow(monkeypatch, amd, exact):
    needs_switch()
    monkeypatch.setattr(products, "_mkl_leaves_avx512_unused", lambda: amd)
    monkeypatch.setattr(products, "_is_float32", lambda *switch: exact)
    assert products.of_onednn() == ("bf16" if amd and exact else "ieee")


def test_products_of_rounded_operands_are_not_those_of_float32(monkeypatch):
    needs_switch()
    assert products._is_float32(torch.backends.mkldnn, "ieee")
    exact = torch.bmm

    def rounded(x: Tensor, y: Tensor) -> Tensor:
        narrow = x.dtype == torch.float32
        return exact(x.bfloat16().float(), y.bfloat16().float()) if narrow else exact(x, y)

    monkeypatch.setattr(torch, "bmm", rounded)
    assert not products._is_float32(torch.backends.mkldnn, "ieee")


@pytest.mark.parametrize("method", METHODS)
def test_training_by_onednn_is_as_near_to_float64_as_by_blas(method, monkeypatch):
    needs_switch()
    if not products._is_float32(torch.backends.mkldnn, "bf16"):
        pytest.skip("oneDNN multiplies in bfloat16 on this CPU where it may")
    options = {"method": method, "precondition_frequency": 2}
    exact, deviations = trained(torch.float64, **options), []
    for precision in ("ieee", "bf16"):
        monkeypatch.setattr(engine, "OF_ONEDNN", precision)
        deviations.append((trained(torch.float32, **options) - exact).abs().max())
    assert deviations[1] < 3 * deviations[0] + 1e-7
