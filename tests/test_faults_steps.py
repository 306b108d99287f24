"""Ten thousand hostile steps: whatever gradients are, weights and state stay finite, and what is skipped is untouched.

Each step draws a kind of gradient for each parameter from KINDS. A few hundred steps are made by `make test`, all of
them by `make test-full`.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kl_dist import KLShampoo
from tests.made_up import METHODS, same, states, values

Kind = Callable[[Tensor, torch.Generator], Tensor]
SHAPES = {"square": (12, 12), "twin": (12, 12), "wide": (5, 17), "three": (3, 4, 5), "row": (1, 9), "vector": (7,)}
BOUND = 4.0
"""On RMS(U) of recipe "fresh", in learning rates: an ordinary update has 0.2 to 0.3."""


def with_entry(value: float) -> Kind:
    def change(g: Tensor, draw: torch.Generator) -> Tensor:
        g.view(-1)[int(torch.randint(g.numel(), (), generator=draw))] = value
        return g

    return change


def low_rank(rank: int) -> Kind:
    def change(g: Tensor, draw: torch.Generator) -> Tensor:
        rows = g.flatten(1) if g.ndim > 1 else g[None]
        few = torch.randn(rows.shape[0], rank, generator=draw).to(g) @ rows[:1].expand(rank, -1)
        return few.view(g.shape)

    return change


def rows_of(value: float) -> Kind:
    def change(g: Tensor, draw: torch.Generator) -> Tensor:
        g[torch.rand(len(g), generator=draw) < 0.5] = value
        return g

    return change


def times(size: float) -> Kind:
    return lambda g, draw: g.mul_(size)


KINDS: dict[str, Kind] = {
    "ordinary": lambda g, draw: g,
    "zero": lambda g, draw: g.zero_(),
    "constant": lambda g, draw: g.fill_(1e-3),
    "one sign": lambda g, draw: g.abs_(),
    "signs alone": lambda g, draw: g.sign_(),
    "NaN": lambda g, draw: g.fill_(math.nan),
    "a NaN": with_entry(math.nan),
    "an Inf": with_entry(math.inf),
    "a -Inf": with_entry(-math.inf),
    "an entry of 1e8": with_entry(1e8),
    "an entry of 1e11": with_entry(-1e11),
    "an entry of 1e38": with_entry(1e38),
    "rank one": low_rank(1),
    "rank two": low_rank(2),
    "rows of zero": rows_of(0.0),
    "rows of 1e6": rows_of(1e6),
    "rows of 1e-20": rows_of(1e-20),
    "one entry": lambda g, draw: with_entry(1.0)(g.zero_(), draw),
    "wild scales": lambda g, draw: g.mul_(10 ** torch.empty(g.shape).uniform_(-8, 8, generator=draw).to(g)),
    "wild rows": lambda g, draw: g.mul_(
        10 ** torch.empty(len(g), *[1] * (g.ndim - 1)).uniform_(-6, 6, generator=draw).to(g)
    ),
    **{f"times {size:g}": times(size) for size in (1e-38, 1e-30, 1e-20, 1e-15, 1e-8, 1e-3, 1e3, 1e6, 1e9, 1e11, 1e30)},
}

SKIPPED = {"NaN", "a NaN", "an Inf", "a -Inf", "an entry of 1e38", "times 1e+30"}


def hostile(method: str, recipe: str, dtype: torch.dtype, steps: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    params = {n: nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for n, s in SHAPES.items()}
    opt = KLShampoo(params.items(), lr=1e-2, method=method, recipe=recipe, weight_decay=0.0)
    for step in range(steps):
        names = list(KINDS) if step % 5 == 4 else [kind for kind in KINDS if kind not in SKIPPED]
        quiet = step % 50 < 10  # so that what follows has something to be off from
        for p in params.values():
            kind = "ordinary" if quiet else names[int(torch.randint(len(names), (), generator=draw))]
            p.grad = KINDS[kind](torch.randn(p.shape, generator=draw), draw).to(dtype)
        before, skipped = [values(params), states(opt)], opt.stats()["skipped_steps"]
        opt.step()
        assert all(p.isfinite().all() for p in params.values())
        assert all(x.isfinite().all() for state in states(opt) for x in state.values())
        now = opt.stats()
        if now["skipped_steps"] > skipped:
            assert same([values(params), states(opt)], before)
        elif recipe == "fresh" and dtype != torch.bfloat16:
            for name, p in params.items():
                if name != "vector":
                    moved = (p.detach().double() - before[0][name].double()).square().mean().sqrt()
                    assert moved <= BOUND * 1e-2, (name, step)
    assert steps // 20 < now["skipped_steps"] < steps // 2 and now["restarts"] == 0


CASES = [(method, "fresh", dtype) for method in METHODS for dtype in (torch.float32, torch.bfloat16, torch.float64)]
CASES += [("kl_shampoo", "compact", torch.float32), ("muon", "normuon", torch.float32)]
CASES += [(method, "paper", torch.float32) for method in METHODS if method not in ("adamw", "muon")]


def test_there_are_thirty_one_kinds_and_each_gives_what_a_step_takes():
    assert len(KINDS) == 31
    for kind in KINDS.values():
        found = kind(torch.randn(5, 4), torch.Generator().manual_seed(0))
        assert found.shape == (5, 4) and found.dtype == torch.float32


@pytest.mark.parametrize(("method", "recipe", "dtype"), CASES, ids=str)
def test_hostile_steps_do_no_harm(method, recipe, dtype):
    hostile(method, recipe, dtype, steps=60, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "recipe", "dtype"), CASES, ids=str)
def test_ten_thousand_hostile_steps_do_no_harm(method, recipe, dtype):
    hostile(method, recipe, dtype, steps=math.ceil(10_000 / len(CASES)), seed=1)
