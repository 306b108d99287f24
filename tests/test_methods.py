"""The engine computes what the equations say: as the released codes do, as the slow references do, as the spec demands.

One table, method x recipe x shape, through shared properties. The weights of each case come from KLShampoo in one
process, the numbers they are held against from tests/reference, which shares no code with the engine.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kl_dist import KLShampoo
from kl_dist.methods import Hyper, rule
from tests.products import product
from tests.reference import METHODS, reference
from tests.test_reference import adam_updates, distance, gradients, last_step_off, run

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
EVERY = sorted(METHODS)
FRESH = [method for method, recipe in EVERY if recipe == "fresh"]
WITH_BASIS = [(method, recipe) for method, recipe in EVERY if method in ("kl_shampoo", "soap")]
# The second gradient fills what the first leaves open of the tall and the wide one; see `share_start`.
SHAPES = [(6, 6), (7, 4), (4, 7), (3, 4, 5), (2, 3, 4, 3), (2, 3, 2, 3, 2)]
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, precondition_frequency=3)
WHOLE = dict(blocking="none", merge_dims=False, stagger=False)
UNIT_LR = dict(lr=1.0, weight_decay=0.0)


def train(grads: Tensor, W: Tensor | None = None, **options) -> Tensor:
    """All weights on the way, (steps + 1, *shape), of one parameter that starts at W (zeros)."""
    return train_many([grads], None if W is None else [W], **options)[0]


def train_many(grads: Sequence[Tensor], W: Sequence[Tensor] | None = None, **options) -> list[Tensor]:
    """`train` for several parameters of one optimizer. A gradient that starts with NaN is missing on that step."""
    params = [nn.Parameter(torch.zeros_like(g[0]) if W is None else W[i].clone()) for i, g in enumerate(grads)]
    opt = KLShampoo(params, **{**OPTIONS, **options})
    paths = [[p.detach().clone()] for p in params]
    for step in zip(*grads, strict=True):
        for p, G in zip(params, step, strict=True):
            p.grad = None if G.flatten()[0].isnan() else G.clone()
        opt.step()
        for path, p in zip(paths, params, strict=True):
            path.append(p.detach().clone())
    return [torch.stack(path) for path in paths]


def follow(method: str, recipe: str, grads: Tensor, W: Tensor | None = None, **options) -> Tensor:
    """The same from the reference."""
    return run(reference(method, recipe, grads.shape[1:], **{**OPTIONS, **options}), grads, W)


def weights(shape: Sequence[int]) -> Tensor:
    """Weights to start from, (shape)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def update_sizes(path: Tensor) -> Tensor:
    """RMS(U) of every step of a path with learning rate 1."""
    return path.diff(dim=0).flatten(1).square().mean(1).sqrt()


# -- the engine against released codes and references ------------------------------------------------------------------


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_paper_recipe_follows_the_released_code(file: Path):
    golden = np.load(file)
    config = json.loads(str(golden["config"]))
    options = {k: config[k] for k in ("method", "lr", "betas", "eps", "weight_decay", "precondition_frequency")}
    snapshots = torch.from_numpy(golden["snapshots"])
    path = train(torch.from_numpy(golden["grads"]), snapshots[0], recipe="paper", **options)
    # The issue allows 1e-4 (KL methods) and 2e-3 (SOAP).
    assert distance(path[golden["snapshot_steps"]].double(), snapshots.double()) < 3e-5


def share_start(opt: KLShampoo, W: nn.Parameter, ref) -> None:
    """Give the engine the reference's start basis.

    The released start is eigenvectors of a singular matrix where the matrix is not square: their null space is
    rounding noise, and no two implementations can agree in it.
    """
    for k, Q in enumerate(getattr(ref, "Q", [])):
        opt.state[W][f"bases.{k}"].copy_(Q)
        opt.state[W][f"factors.{k}"].copy_(Q.T @ ref.S[k] @ Q)


@product(**{"method,recipe": EVERY, "shape": SHAPES, "every": [1, 3]})
def test_engine_agrees_with_the_reference(method, recipe, shape, every):
    options = OPTIONS | dict(
        precondition_frequency=every, eps=1e-6 if (method, recipe) == ("shampoo", "paper") else 1e-8
    )
    grads, start = gradients(shape), weights(shape)
    W = nn.Parameter(start.clone())
    opt = KLShampoo([W], method=method, recipe=recipe, **options, **WHOLE)
    ref = reference(method, recipe, shape, **options)
    expected, path = [start], [start]
    for t, G in enumerate(grads):
        W.grad = G.clone()
        opt.step()
        path.append(W.detach().clone())
        expected.append(ref.step(expected[-1], G))
        if t == 0 and recipe == "paper":
            share_start(opt, W, ref)
    assert distance(torch.stack(path), torch.stack(expected)) < 1e-9


CHANGES = {
    "shampoo_beta": 0.7,
    "nesterov": False,
    "betas": (0.0, 0.5),
    "eps": 1e-2,
    "weight_decay": 0.5,
    "shampoo_exponent": 0.5,
}


@product(**{"method,recipe": EVERY, "option": CHANGES})
def test_every_option_means_what_it_means_in_the_reference(method, recipe, option):
    changed = {option: CHANGES[option]}
    grads, W = gradients((6, 6)), weights((6, 6))
    path = train(grads, W, method=method, recipe=recipe, **WHOLE, **changed)
    assert distance(path, follow(method, recipe, grads, W, **changed)) < 1e-9


@pytest.mark.parametrize(("method", "recipe"), EVERY)
def test_stacked_matrices_go_on_as_if_each_were_alone(method, recipe):
    """Five equal matrices, refreshed in turn; on some steps some of them have no gradient."""
    grads = [gradients((5, 5), seed=i) for i in range(5)]
    for i in range(1, 5):
        grads[i][i :: i + 1] = torch.nan
    paths = train_many(grads, method=method, recipe=recipe, **WHOLE | dict(stagger=True))
    for i, path in enumerate(paths):
        present = ~grads[i].flatten(1)[:, 0].isnan()
        moved = torch.cat([path[:1], path[1:][present]])
        assert distance(moved, follow(method, recipe, grads[i][present], phase=i)) < 1e-9
        assert torch.equal(path[1:][~present], path[:-1][~present])


@pytest.mark.parametrize(
    ("shape", "options", "blocks"),
    [
        ((128, 64), dict(blocking="square"), [(slice(64),), (slice(64, 128),)]),
        ((64, 130), dict(blocking="square"), [(slice(None), slice(65)), (slice(None), slice(65, 130))]),
        ((11, 6), dict(max_preconditioner_dim=6), [(slice(6),), (slice(6, 11),)]),
        ((3, 4, 7), dict(max_preconditioner_dim=4), [(..., slice(4)), (..., slice(4, 7))]),
    ],
    ids=["square tall", "square wide", "long side", "long side of three"],
)
@pytest.mark.parametrize("method", FRESH)
def test_blocks_have_preconditioners_of_their_own(method, shape, options, blocks):
    grads, W = gradients(shape, steps=12), weights(shape)
    path = train(grads, W, method=method, **{**WHOLE, "stagger": True, **options})
    classes: dict[tuple[int, ...], int] = {}
    for block in blocks:
        part = grads[(slice(None), *block)] if block[0] is not ... else grads[block]
        phase = classes.setdefault(part.shape, -1) + 1
        classes[part.shape] = phase
        mine = path[(slice(None), *block)] if block[0] is not ... else path[block]
        assert distance(mine, follow(method, "fresh", part, W[block], phase=phase)) < 1e-9


DECLARED = {
    "fused qkv": ((12, 4), {"parts": {0: 3}}, lambda x: x.chunk(3)),
    "per head": ((12, 4), {"parts": {0: 6}}, lambda x: x.chunk(6)),
    "fused columns": ((4, 10), {"parts": {1: 2}}, lambda x: x.chunk(2, 1)),
    "experts": ((3, 5, 4), {"batch": (0,)}, lambda x: x.unbind()),
    "transposed experts": ((3, 5, 4), {"batch": (0,), "rows": (2,), "columns": (1,)}, lambda x: x.mT.unbind()),
    "experts with a fused gate-up": (
        (2, 6, 4),
        {"batch": (0,), "parts": {1: 2}},
        lambda x: [half for expert in x for half in expert.chunk(2)],
    ),
    "convolution": ((5, 2, 3, 2), {"rows": (0,), "columns": (1, 2, 3)}, lambda x: [x.reshape(5, 12)]),
    "interleaved": (
        (3, 2, 2, 4),
        {"rows": (0, 2), "columns": (1, -1)},
        lambda x: [x.permute(0, 2, 1, 3).reshape(6, 8)],
    ),
    "grouped convolution": (
        (6, 2, 3),
        {"parts": {0: 2}, "rows": (0,), "columns": (1, 2)},
        lambda x: [half.reshape(3, 6) for half in x.chunk(2)],
    ),
}


@pytest.mark.parametrize("case", DECLARED)
@pytest.mark.parametrize("method", FRESH)
def test_declared_matrices_are_what_the_preconditioners_serve(method, case):
    shape, declared, parts = DECLARED[case]
    grads, W = gradients(shape), weights(shape)
    path = train(grads, W, method=method, matrices=declared, blocking="none", stagger=False)
    expected = [
        follow(method, "fresh", torch.stack(G), W0) for *G, W0 in zip(*[parts(G) for G in grads], parts(W), strict=True)
    ]
    found = [torch.stack(mine) for mine in zip(*[parts(x) for x in path], strict=True)]
    assert len(found) == len(expected)
    assert all(distance(mine, theirs) < 1e-9 for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", FRESH)
def test_small_trailing_dimensions_are_merged_by_default(method):
    shape = (8, 4, 3, 3)
    grads, W = gradients(shape), weights(shape)
    path = train(grads, W, method=method, blocking="none", stagger=False).flatten(2)
    assert distance(path, follow(method, "fresh", grads.flatten(2), W.flatten(1))) < 1e-9


@pytest.mark.parametrize("kind", ["diagonal", "identity"])
@pytest.mark.parametrize("method", FRESH)
def test_a_long_side_keeps_a_diagonal_or_nothing(method, kind):
    grads, W = gradients((4, 9), steps=30), weights((4, 9))
    ref = one_sided(reference(method, "fresh", (4, 9), **OPTIONS), kind)
    path = train(grads, W, method=method, max_preconditioner_dim=6, long_side=kind, **WHOLE)
    assert distance(path, run(ref, grads, W)) < 1e-9


def one_sided(ref, kind: str):
    """A reference whose second side has only a diagonal, or nothing."""
    d = ref.shape[1]

    def after(name: str, then: Callable[[], None]) -> None:
        before = getattr(ref, name)

        def both(*args):
            result = before(*args)
            then()
            return result

        setattr(ref, name, both)

    def cut_basis() -> None:
        if hasattr(ref, "Q"):
            ref.Q[1] = torch.eye(d, dtype=torch.float64)
        elif kind == "identity":
            ref.roots[1] = torch.eye(d, dtype=torch.float64)
        else:
            S = ref.S[1].diagonal()
            ref.roots[1] = (S + 1e-4 * S.mean()).pow(-ref.options.exponent).diag()

    def cut_eigenvalues() -> None:
        ref.lam[1] = torch.ones(d, dtype=torch.float64)

    after("start", cut_basis)
    after("refresh", cut_basis)
    if kind == "identity" and hasattr(ref, "learn"):
        after("learn", cut_eigenvalues)
    return ref


# -- the demands on recipe "fresh" -------------------------------------------------------------------------------------


@product(
    **{
        "method": FRESH,
        "shape": [(8, 5), (3, 4, 5), (128, 64)],
        "dtype,bound": [(torch.float64, 1e-10), (torch.float32, 1e-2)],
        "scale": [1e-6, 1e-3, 1e3, 1e6],
    }
)
def test_fresh_does_not_see_the_scale_of_the_gradients(method, shape, dtype, bound, scale):
    """Demand (a)."""
    grads = gradients(shape, steps=50 if math.prod(shape) < 100 else 10).to(dtype)
    path = train(grads, method=method)
    assert distance(train(scale * grads, method=method), path) < bound


@pytest.mark.parametrize("shape", [(6, 6), (40, 6), (6, 40), (128, 64), (3, 4, 5), (2, 3, 4, 3)], ids=str)
@pytest.mark.parametrize("method", FRESH)
def test_fresh_first_step_moves_and_is_bounded(method, shape):
    """Demand (b)."""
    for merge_dims in (False, True):
        path = train(gradients(shape, steps=1), method=method, merge_dims=merge_dims, **UNIT_LR)
        assert 0.05 < update_sizes(path) < 1.5


class Dead(nn.Module):
    """Switches units off: rows of the layer before and columns of the layer after get gradients of exactly zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.arange(x.shape[1]) % 3 > 0)


class LoRA(nn.Module):
    """A frozen layer and a trained pair B A, B starting at zero, so that the first gradient of A is zero."""

    def __init__(self, d: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(d, d).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(rank, d)), nn.Parameter(torch.zeros(d, rank))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + x @ self.A.T @ self.B.T)


def linear(m: int, n: int) -> nn.Linear:
    return nn.Linear(m, n, bias=False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "square": lambda: nn.Sequential(linear(6, 12), nn.Tanh(), linear(12, 12), nn.Tanh(), linear(12, 3)),
    "tall and wide": lambda: nn.Sequential(linear(6, 40), nn.Tanh(), linear(40, 3)),
    "cut into blocks": lambda: nn.Sequential(linear(6, 64), nn.Tanh(), linear(64, 128), nn.Tanh(), linear(128, 3)),
    "dead units": lambda: nn.Sequential(linear(6, 12), nn.Tanh(), Dead(), linear(12, 12), nn.Tanh(), linear(12, 3)),
    "LoRA": lambda: nn.Sequential(LoRA(6, 2), LoRA(6, 2)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 6, 2, bias=False), nn.Tanh(), nn.Conv2d(6, 4, (1, 2), bias=False)
    ),
}


def train_network(name: str, batch: int, noise: str | None, method: str) -> Tensor:
    """All weights after 50 steps on small batches, with relative noise of 1e-15 on every gradient."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    opt = KLShampoo([p for p in model.parameters() if p.requires_grad], lr=1e-2, method=method)
    data, disturb = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    for _ in range(50):
        x = torch.randn(batch, 6, generator=data, dtype=torch.float64)
        opt.zero_grad()
        (model(x).flatten(1)[:, :3] - x.cumsum(1)[:, :3].sin()).square().mean().backward()
        for p in model.parameters() if noise else ():
            if p.grad is not None:
                r = torch.randn(p.shape, generator=disturb, dtype=torch.float64)
                of = p.grad if noise == "of each entry" else p.grad.square().mean().sqrt()
                p.grad += 1e-15 * r.sign() * of
        opt.step()
    return nn.utils.parameters_to_vector(model.parameters())


@product(method=FRESH, network=NETWORKS, batch=[1, 2, 4])
def test_fresh_is_continuous_under_rank_deficient_gradients(method, network, batch):
    """Demand (c), in the closed loop, where a disturbed weight disturbs every later gradient."""
    undisturbed = train_network(network, batch, None, method)
    for noise in ("of each entry", "of the mean square"):
        assert (train_network(network, batch, noise, method) - undisturbed).abs().max() < 1e-10


@pytest.mark.parametrize("method", FRESH)
def test_fresh_starts_at_the_first_gradient_that_is_not_zero(method):
    """Demand (d): until then the weights only decay."""
    grads, W = gradients((8, 5)), weights((8, 5))
    late = train(torch.cat([torch.zeros(4, 8, 5), grads]), W, method=method)
    decayed = W * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) ** 4
    assert torch.allclose(late[4], decayed, rtol=1e-14)
    assert torch.allclose(late[4:], train(grads, decayed, method=method), rtol=1e-12)


def signs(steps: int) -> Tensor:
    """Gradients (steps, 24, 24) of +1 and -1 at random: every entry is as large as every other."""
    return gradients((24, 24), steps=steps).sign()


@pytest.mark.parametrize("first", [1e-6, 1e6])
@pytest.mark.parametrize("method", FRESH)
def test_fresh_is_not_stalled_by_an_odd_first_gradient(method, first):
    """Demand (d): a first gradient a million times smaller, or larger, than all others; RMS(U) within 3 of Adam's."""
    grads = signs(150)
    grads[0] *= first
    U, adam = update_sizes(train(grads, method=method, **UNIT_LR)), adam_updates(grads, *OPTIONS["betas"])
    assert U.max() < 10
    assert ((U / adam < 3) & (adam / U < 3)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", FRESH)
def test_fresh_wakes_up_after_a_long_silence(method, dtype):
    """Gradients of zero until every moving average has left the range of the dtype; then one that is not."""
    grads = torch.cat([signs(20), torch.zeros(60 if dtype == torch.float32 else 350, 24, 24), signs(20)])
    path = train(grads.to(dtype), method=method, **UNIT_LR | dict(betas=(0.1, 0.1)))
    assert path.isfinite().all()
    assert update_sizes(path[-20:]).min() > 0.05 and update_sizes(path[-21:]).max() < 10


@pytest.mark.parametrize("jump", [1e-3, 1e3])
@pytest.mark.parametrize("method", FRESH)
def test_fresh_recovers_from_a_jump_of_scale_when_adam_does(method, jump):
    """Demand (d): RMS(U) below 10, and within a factor 3 of steady no later than entrywise Adam, five steps allowed."""
    grads = signs(400)
    grads[100:] *= jump
    U = update_sizes(train(grads, method=method, **UNIT_LR))
    assert U.max() < 10
    assert last_step_off(U) <= last_step_off(adam_updates(grads, *OPTIONS["betas"])) + 5


# -- eigenbases over many steps ----------------------------------------------------------------------------------------


def orthogonality(method: str, recipe: str, d: int, refreshes: int) -> Tensor:
    """|Q^T Q - I| after each of so many steps with T = 1 on d x d gradients in float32, both sides."""
    rules, hyper = rule(method, recipe), Hyper(betas=(0.9, 0.95), eps=1e-8, precondition_frequency=1)
    state = rules.allocate((d, d), ("full", "full"), 1, torch.empty(()))
    generator, identity = torch.Generator().manual_seed(0), torch.eye(d)
    spectrum = torch.logspace(0, -3, d)[:, None]
    rules.start(state, spectrum * torch.randn(1, d, d, generator=generator), hyper)
    errors = []
    for _ in range(refreshes):
        rules.update(state, spectrum * torch.randn(1, d, d, generator=generator), hyper)
        rules.refresh(state, hyper)
        errors.append(max(float((Q.mT @ Q - identity).abs().max()) for Q in state.bases))
    return torch.tensor(errors)


@pytest.mark.parametrize(("method", "recipe"), WITH_BASIS)
def test_eigenbases_stay_orthogonal(method, recipe):
    """Through 1,200 refreshes of a 32 x 32 the error stays below 1e-4, and does not grow from the second third on.

    So 100,000 refreshes do no more harm. What accumulates grows linearly, 5/3 times from the second third to the last.
    """
    _, second, last = orthogonality(method, recipe, 32, 1200).chunk(3)
    assert last.max() < 1e-4
    assert last.mean() < 1.25 * second.mean()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "recipe"), WITH_BASIS)
def test_eigenbases_stay_orthogonal_over_100_000_refreshes(method, recipe):
    """The claim in full, 64 x 64. Two minutes each; the largest error measured was 2.7e-5."""
    assert orthogonality(method, recipe, 64, 100_000).max() < 1e-4
