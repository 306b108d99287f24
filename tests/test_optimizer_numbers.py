"""Gradients that are not finite, or of any size, and products in lower precision, do no harm."""

import logging
import multiprocessing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kl_dist import KLShampoo
from kl_dist.options import RECIPE_DEFAULTS
from tests.made_up import METHODS, SHAPES, give_gradients, parameters, same, states, train, values
from tests.world import patience

SECONDS = 30.0  # for a few steps in a process of their own


@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
def test_a_gradient_that_is_not_finite_skips_the_whole_step(recipe, value, where, caplog):
    params = parameters(torch.float32)
    opt = KLShampoo(params.items(), recipe=recipe)
    for step in range(6):
        before = [values(params), states(opt)]
        give_gradients(params, step)
        if step % 2:
            params[where].grad.view(-1)[-1] = value
        with caplog.at_level(logging.WARNING):
            opt.step()
        unchanged = same([values(params), states(opt)], before)
        assert unchanged if step % 2 else not unchanged
    assert opt.stats()["skipped_steps"] == 3
    (warning,) = [record for record in caplog.records if record.name.startswith("kl_dist")]
    assert where in warning.getMessage() and warning.levelno == logging.WARNING


@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
@pytest.mark.parametrize("method", METHODS)
def test_state_that_is_zeroed_in_place_starts_anew(method, recipe):
    params = parameters()
    opt = KLShampoo(params.items(), method=method, recipe=recipe)
    train(opt, params, range(4))
    fresh = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    for entries in opt.state.values():
        for tensor in entries.values():
            tensor.zero_()
    train(opt, params, range(4, 8))
    train(KLShampoo(fresh.items(), method=method, recipe=recipe), fresh, range(4, 8))
    assert same(values(params), values(fresh))


def test_steps_that_find_no_gradient_say_so_once(caplog):
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, range(2))
    opt.zero_grad()
    for _ in range(5):
        opt.step()
    (record,) = caplog.records
    assert "3 steps in a row found no gradient on any parameter" in record.getMessage()


@pytest.mark.parametrize("step", [0, 3])
def test_a_gradient_that_is_not_finite_is_an_error_where_asked(step):
    params = parameters()
    opt = KLShampoo(params.items(), on_nonfinite="raise")
    train(opt, params, range(step))
    before = [values(params), states(opt)]
    give_gradients(params, step)
    params["twin"].grad[2, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="'twin'"):
        opt.step()
    assert same([values(params), states(opt)], before)
    train(opt, params, range(step, 5))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-12, 1e8, 1e11])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_any_finite_size_keep_everything_finite(method, size):
    params = parameters(torch.float32)
    opt = KLShampoo(params.items(), method=method)
    for step in range(6):
        give_gradients(params, step)
        for p in params.values():
            p.grad *= size if step % 3 else 1.0
        opt.step()
    assert all(p.isfinite().all() for p in params.values())
    assert all(x.isfinite().all() for state in opt.state.values() for x in state.values())


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e13), (torch.float32, 1e25), (torch.float64, 1e120)], ids=str
)
def test_a_gradient_too_large_to_square_is_as_one_that_is_not_finite(dtype, size):
    params = parameters(dtype)
    opt = KLShampoo(params.items())
    train(opt, params, range(3))
    before = [values(params), states(opt)]
    give_gradients(params, 3)
    params["square"].grad.view(-1)[3] = size
    opt.step()
    assert same([values(params), states(opt)], before) and opt.stats()["skipped_steps"] == 1


def legacy() -> None:
    torch.set_float32_matmul_precision("medium")


def new() -> None:
    torch.backends.fp32_precision = "tf32"


def of_one_backend() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def step_with_lower_precision(turn_down: Callable[[], None]) -> None:
    def weights() -> Tensor:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(64, 64))
        opt = KLShampoo([("p", p)], lr=0.1)
        for _ in range(3):
            p.grad = torch.randn(64, 64)
            opt.step()
        return p.detach()

    def product() -> Tensor:
        torch.manual_seed(1)
        return torch.randn(64, 64) @ torch.randn(64, 64)

    plain = weights()
    turn_down()
    before = product()
    assert torch.equal(weights(), plain)
    assert torch.equal(product(), before)


@pytest.mark.parametrize("turn_down", [legacy, new, of_one_backend])
def test_a_lower_matmul_precision_of_the_user_is_set_aside_for_the_step_and_kept_after(turn_down):
    """bfloat16 products would move the weights by 1e-3. In a process of its own: torch refuses to mix the switches.

    A new one: in a forked one threads may be waited for that are not there.
    """
    if turn_down is not legacy and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the older switches alone")
    process = multiprocessing.get_context("spawn").Process(
        target=step_with_lower_precision, args=(turn_down,), daemon=True
    )
    process.start()
    process.join(SECONDS * patience())
    assert process.exitcode == 0
