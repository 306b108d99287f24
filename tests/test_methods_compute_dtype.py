"""Option `compute_dtype`: what each costs in precision, here by rounding operands, as a CPU does."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.precision import gradients, orthogonality, state_after, update_errors
from kl_dist import KLShampoo
from kl_dist.methods import products
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


class ByOneDNN(TorchDispatchMode):
    """Counts the products that oneDNN makes."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.aten.mkldnn_linear.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_amd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever multiplies faster here, by one thread, and from 4 rows on."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_mkl_leaves_avx512_unused", lambda: True)
    monkeypatch.setattr(products, "SMALLEST_FOR_ONEDNN", 4)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("on_amd")
@pytest.mark.parametrize(("keep", "share"), [(0.0, 1.0), (0.0, 0.3), (1.0, 0.3), (0.9, 0.1)])
def test_onednn_adds_products_of_matrices_however_they_lie_in_memory(keep, share):
    generator = torch.Generator().manual_seed(0)
    for left_lies, right_lies, total_lies in itertools.product(("rows", "columns", "part"), repeat=3):
        left, right, total = (
            _lying(torch.randn(2, *shape, generator=generator), lies)
            for shape, lies in (((6, 9), left_lies), ((9, 5), right_lies), ((6, 5), total_lies))
        )
        expected = keep * total.double() + share * left.double() @ right.double()
        with ByOneDNN() as seen:
            products.add_product(
                total, products.operand(left, "float32"), products.operand(right, "float32"), keep, share
            )
        assert seen.products == 2
        assert (total - expected).abs().max() < 1e-5


def _lying(x: Tensor, how: str) -> Tensor:
    """x (B, m, n) row by row, column by column, or within a larger matrix."""
    if how == "columns":
        return x.mT.contiguous().mT
    return nn.functional.pad(x, (1, 2, 3, 1))[:, 3:-1, 1:-2] if how == "part" else x


@pytest.mark.usefixtures("on_amd")
def test_mkl_multiplies_what_is_small_or_float64_and_all_where_onednn_is_off_or_threads_are_several(monkeypatch):
    square = torch.ones(3, 8, 8)
    with ByOneDNN() as seen:
        for narrow in (square[:, :3], square[:, :, :3]):
            products.exact(narrow, narrow.mT)
        products.exact(square.double(), square.double())
        with monkeypatch.context() as off:
            off.setattr(torch.backends.mkldnn, "enabled", False)
            products.exact(square, square)
        torch.set_num_threads(2)
        products.exact(square, square)
        torch.set_num_threads(1)
        assert seen.products == 0
        assert torch.equal(products.exact(square, square), torch.full((3, 8, 8), 8.0))
        assert seen.products == 3


@pytest.mark.usefixtures("on_amd")
@pytest.mark.parametrize("method", METHODS)
def test_training_by_onednn_is_as_near_to_float64_as_by_mkl(method, monkeypatch):
    exact = trained(torch.float64, method=method, precondition_frequency=2)
    with ByOneDNN() as seen:
        by_onednn = trained(torch.float32, method=method, precondition_frequency=2)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    by_mkl = trained(torch.float32, method=method, precondition_frequency=2)
    assert seen.products > 0
    assert (by_onednn - exact).abs().max() < 3 * (by_mkl - exact).abs().max() + 1e-7
