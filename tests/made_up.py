"""Parameters of every kind and gradients that are a function of the step alone, for runs of an optimizer on them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import kl_dist

SHAPES = {
    "wide": (4, 7),
    "square": (5, 5),
    "twin": (5, 5),
    "three": (3, 4, 2),
    "row": (1, 6),
    "vector": (6,),
    "scalar": (),
}
METHODS = (*kl_dist.METHODS, "adamw")
Named = dict[str, nn.Parameter]


def parameters(dtype: torch.dtype = torch.float64, shapes: dict = SHAPES) -> Named:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: nn.Parameter(value.to(dtype)) for name, value in values.items()}


def give_gradients(params: Named, step: int) -> None:
    for i, p in enumerate(params.values()):
        generator = torch.Generator().manual_seed(1000 * i + step)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(opt: torch.optim.Optimizer, params: Named, steps: Iterable[int], after: Callable = lambda: None) -> None:
    for step in steps:
        give_gradients(params, step)
        opt.step()
        after()


def values(params: Named) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def states(opt: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Copies of the state of every parameter, in the order of the groups."""
    ordered = [opt.state.get(p, {}) for group in opt.param_groups for p in group["params"]]
    return [{key: x.clone() for key, x in state.items()} for state in ordered]


def same(a, b) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name].detach().double() - b[name].detach().double()).abs().max()) for name in a)
