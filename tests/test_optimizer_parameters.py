"""Parameters of every dtype, shape and memory layout, without gradients, tied, frozen or cast, are served."""

import pytest
import torch
from torch import nn

import kl_dist
from kl_dist import KLShampoo
from kl_dist.options import RECIPE_DEFAULTS
from tests.made_up import METHODS, SHAPES, furthest, give_gradients, parameters, same, states, train, values
from tests.models import state_tensors


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64,) * 2,
    ],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_state_is_in_float32_or_float64(method, dtype, kept):
    params, exact = parameters(dtype), parameters(dtype)
    for p in exact.values():
        p.data = p.data.double()
    opt = KLShampoo(params.items(), method=method, lr=0.1, weight_decay=0.0)
    train(opt, params, range(1))
    floating = {x.dtype for state in opt.state.values() for x in state.values() if x.is_floating_point()}
    assert floating == {kept} and {p.dtype for p in params.values()} == {dtype}
    other = KLShampoo(exact.items(), method=method, lr=0.1, weight_decay=0.0)
    for name, p in params.items():
        exact[name].grad = p.grad.double()
    other.step()
    assert furthest(values(params), values(exact)) < 8 * torch.finfo(dtype).eps + 1e-6 * (dtype != torch.float64)


@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
@pytest.mark.parametrize("method", METHODS)
def test_odd_shapes_work(method, recipe):
    shapes = {"0-D": (), "one": (1,), "1x1": (1, 1), "1xN": (1, 7), "Nx1": (7, 1), "1-D of 5": (1, 1, 1, 1, 3)}
    shapes |= {"empty": (0,), "empty matrix": (0, 4), "ones": (1, 4, 1), "2x2": (2, 2)}
    params = parameters(shapes=shapes)
    before = values(params)
    opt = KLShampoo(params.items(), method=method, recipe=recipe)
    train(opt, params, range(5))
    for name, p in params.items():
        assert p.isfinite().all()
        assert p.numel() == 0 or not torch.equal(p, before[name])
    assert same(KLShampoo(params.items()).state_dict()["state"].keys(), opt.state_dict()["state"].keys())


@pytest.mark.parametrize("blocking", ["square", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_memory_layout_is_immaterial(method, blocking):
    """channels_last convolutions, transposed weights, gradients with other strides than their parameter's."""
    shapes = {"convolution": (8, 4, 3, 3), "long": (130, 3), "cut": (128, 64), "three": (4, 5, 6)}
    plain, strided = parameters(shapes=shapes), parameters(shapes=shapes)
    strided["convolution"].data = strided["convolution"].data.to(memory_format=torch.channels_last)
    for name in ("long", "cut"):
        strided[name].data = strided[name].data.T.contiguous().T
    strided["three"].data = strided["three"].data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not any(p.is_contiguous() for p in strided.values())
    opts = [KLShampoo(params.items(), method=method, blocking=blocking) for params in (plain, strided)]
    strides = {name: p.stride() for name, p in strided.items()}
    for step in range(6):
        for opt, params in zip(opts, (plain, strided), strict=True):
            give_gradients(params, step)
            if params is strided and step % 2:
                for p in params.values():
                    p.grad = torch.empty_like(p).copy_(p.grad)
            opt.step()
    assert furthest(values(plain), values(strided)) < 1e-11
    assert {name: p.stride() for name, p in strided.items()} == strides


def test_a_parameter_without_gradient_is_left_alone_for_the_step():
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, range(3))
    for name in SHAPES:
        index = list(SHAPES).index(name)
        before = [values(params)[name], states(opt)[index]]
        give_gradients(params, 3)
        params[name].grad = None
        opt.step()
        assert same([values(params)[name], states(opt)[index]], before)
        others = [other for other in SHAPES if other != name]
        assert not any(torch.equal(values(params)[other], before[0]) for other in others)


@pytest.mark.parametrize("method", METHODS)
def test_of_a_batch_those_start_that_have_a_gradient(method):
    """Of three matrices of one shape the one between has its first gradient later."""
    shapes = {"first": (5, 4), "between": (5, 4), "last": (5, 4)}
    params = parameters(shapes=shapes)
    opt = KLShampoo(params.items(), method=method, stagger=False)
    alone = {name: parameters(shapes=shapes)[name] for name in shapes}
    each = {name: KLShampoo([(name, p)], method=method, stagger=False) for name, p in alone.items()}
    for step in range(6):
        give_gradients(params, step)
        if step < 2:
            params["between"].grad = None
        for name, p in params.items():
            alone[name].grad = None if p.grad is None else p.grad.clone()
            each[name].step()
        opt.step()
    for name in shapes:
        assert torch.allclose(params[name], alone[name], rtol=1e-12, atol=1e-14), name
        assert not torch.equal(params[name], parameters(shapes=shapes)[name])


@pytest.mark.parametrize("method", kl_dist.METHODS)
@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
def test_an_expert_without_tokens_keeps_weights_and_state(method, recipe):
    """The gradient of a stack is one tensor; the entry of an expert that saw nothing is exactly zero."""
    params = parameters(shapes={"experts": (3, 4, 5)})
    opt = KLShampoo([{"params": params.items(), "matrices": {"batch": (0,)}}], method=method, recipe=recipe)
    (state,) = opt.state.values()
    for step in range(9):
        idle, before = step % 4, values(params)["experts"]  # 3: none is idle
        kept = {key: x.clone() for key, x in state.items()}
        give_gradients(params, step)
        if idle < 3:
            params["experts"].grad[idle] = 0
        opt.step()
        for expert in range(3):
            touched = {
                key for key, x in state.items() if key.startswith(f"[{expert}]") and not torch.equal(x, kept[key])
            }
            assert bool(touched) == (expert != idle)
            assert expert != idle or torch.equal(params["experts"][expert], before[expert])
    assert not any(torch.equal(params["experts"][i], before[i]) for i in range(3) if i != idle)


def test_weights_that_are_moved_between_steps_are_found_where_they_are():
    """Another memory of the same kind: an average put in for a validation, say."""
    params, alone = parameters(), parameters()
    optimizers = [KLShampoo(one.items()) for one in (params, alone)]
    for step in range(6):
        for one, optimizer in zip((params, alone), optimizers, strict=True):
            give_gradients(one, step)
            optimizer.step()
        left = {name: p.data for name, p in params.items()}
        for name, p in params.items():
            p.data = p.data.clone()
            left[name].fill_(7.0)
    assert same(values(params), values(alone))


def test_tied_parameters_are_served_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    opt = KLShampoo(model.named_parameters())
    assert sorted(opt.plan.owner) == ["0.bias", "0.weight", "1.bias"]


def test_frozen_parameters_are_left_alone_and_can_be_freed():
    """A parameter that is frozen, then trained, then frozen again, keeps its state, and is nothing to the others."""
    params, alone = parameters(), parameters()
    params["square"].requires_grad_(False)
    opt = KLShampoo(params.items(), stagger=False)
    others = {name: p for name, p in alone.items() if name != "square"}
    other = KLShampoo(others.items(), stagger=False)
    for step in range(9):
        before = values(params)
        if step in (3, 6):
            params["square"].requires_grad_(step == 3)
        frozen = not params["square"].requires_grad
        state = {key: x.clone() for key, x in opt.state.get(params["square"], {}).items()}
        for opt_, all_ in ((opt, params), (other, alone)):
            give_gradients(all_, step)
            if frozen:
                params["square"].grad = None
            opt_.step()
        assert torch.equal(params["square"], before["square"]) == frozen
        assert not frozen or same(dict(opt.state.get(params["square"], {})), state)
        assert bool(opt.state.get(params["square"])) == (step >= 3)
    assert furthest({name: p.detach() for name, p in params.items() if name != "square"}, others) < 1e-13


def test_all_parameters_may_be_frozen():
    params = parameters()
    for p in params.values():
        p.requires_grad_(False)
    opt = KLShampoo(params.items())
    opt.step()
    assert opt.plan.owner == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_model_may_change_its_dtype_on_the_way(method):
    params, still = parameters(torch.float32), parameters(torch.float32)
    opt, other = (KLShampoo(p.items(), method=method) for p in (params, still))
    for step in range(8):
        if step == 4:
            for p in params.values():
                p.data = p.data.double()
        train(opt, params, [step])
        train(other, still, [step])
    assert furthest(values(params), values(still)) < 1e-4
    assert {x.dtype for s in opt.state.values() for x in s.values() if x.is_floating_point()} == {torch.float64}
    assert opt.plan.state_bytes == (sum(x.nbytes for x in state_tensors(opt)),)
