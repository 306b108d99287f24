"""A layout that is added as three functions trains and saves as one process does: here columns, unevenly divided."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kl_dist import KLShampoo, full_state_dict, load_full_state_dict
from kl_dist.layouts.layout import Layout, LocalSharding
from kl_dist.layouts.placement import add_layout
from tests.models import deviation, same_bits

SHAPES = {"square": (9, 8), "wide": (5, 12), "served by adamw": (7, 8)}
STEPS = 12


class Columns(Tensor):
    """All rows and some columns of a tensor, whose shape it has."""

    local: Tensor
    first: int

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], local: Tensor, first: int) -> "Columns":
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device, requires_grad=True)
        made.local, made.first = local, first
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise TypeError(f"{func} on columns")


def local_sharding(parameter: Columns, ranks) -> LocalSharding:
    if parameter.first < 0:
        raise ValueError("its columns begin before the first")
    columns = (parameter.first, parameter.first + parameter.local.shape[1])
    return LocalSharding(tuple(range(ranks.size)), (((0, parameter.shape[0]), columns),))


COLUMNS = Layout(local_sharding, lambda tensor: tensor.local, lambda parameter, gradient: gradient.local)


def known() -> None:
    """To this process, once: a rank has kept what an earlier test told it."""
    if not getattr(known, "done", False):
        add_layout(lambda tensor: isinstance(tensor, Columns), COLUMNS)
        known.done = True


def made_up(step: int) -> dict[str, Tensor]:
    """Weights (step -1) and the gradients of a step."""
    generator = torch.Generator().manual_seed(step + 1)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def part(full: Tensor, rank: int, ranks: int) -> Columns:
    """A rank's columns: fewer on the first, none on it where there are many ranks."""
    stops = [full.shape[1] * (i * (i + 1)) // (ranks * (ranks + 1)) for i in range(ranks + 1)]
    return Columns(full.shape, full[:, stops[rank] : stops[rank + 1]].clone(), stops[rank])


def optimizer_of(weights: dict[str, Tensor], group: dist.ProcessGroup | None) -> KLShampoo:
    return KLShampoo(list(weights.items()), lr=1e-2, adamw_names=("served by adamw",), process_group=group)


def in_columns(group: dist.ProcessGroup, steps: range, state: dict | None = None) -> tuple[dict[str, Tensor], dict]:
    """The weights after some steps, whole, and all of the optimizer's state."""
    known()
    rank, ranks = group.rank(), group.size()
    parameters = {name: part(x, rank, ranks) for name, x in made_up(-1).items()}
    optimizer = optimizer_of(parameters, group)
    if state is not None:
        load_full_state_dict(optimizer, state if rank == 0 else None)
    for step in steps:
        for name, gradient in made_up(step).items():
            parameters[name].grad = part(gradient, rank, ranks)
        optimizer.step()
    shards: list = [None] * ranks
    dist.all_gather_object(shards, {name: p.local for name, p in parameters.items()}, group=group)
    whole = {name: torch.cat([shard[name] for shard in shards], 1) for name in SHAPES}
    return whole, full_state_dict(optimizer)


def alone(steps: range, state: dict | None = None) -> tuple[dict[str, Tensor], dict]:
    weights = {name: torch.nn.Parameter(x) for name, x in made_up(-1).items()}
    optimizer = optimizer_of(weights, None)
    if state is not None:
        load_full_state_dict(optimizer, state)
    for step in steps:
        for name, gradient in made_up(step).items():
            weights[name].grad = gradient
        optimizer.step()
    return {name: p.detach() for name, p in weights.items()}, full_state_dict(optimizer)


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_an_added_layout_trains_as_one_process(world, world_size):
    found = world.run(in_columns, world_size, range(STEPS))
    assert all(same_bits(weights, found[0][0]) for weights, _ in found)
    assert deviation(found[0][0], alone(range(STEPS))[0]) <= 1e-9


def test_its_state_is_what_one_process_has_and_loads_there(world):
    _, saved = world.run(in_columns, 3, range(STEPS))[0]
    (_, expected), later = alone(range(STEPS)), range(STEPS, 2 * STEPS)
    for name, entries in expected["state"].items():
        for key, tensor in entries.items():
            torch.testing.assert_close(saved["state"][name][key], tensor, rtol=1e-9, atol=1e-12)
    assert deviation(world.run(in_columns, 4, later, expected)[0][0], alone(later, saved)[0]) <= 1e-9


def misplaced(group: dist.ProcessGroup, where: int) -> None:
    """One rank's columns begin elsewhere than where the others leave off."""
    known()
    full = torch.ones(4, 6)
    one = part(full, group.rank(), group.size())
    if group.rank() == 1:
        one.first = where
    KLShampoo([("odd", one)], process_group=group)


def test_what_it_says_is_checked_and_refused_on_every_rank(world):
    for where, why in ((-1, "its columns begin before the first"), (0, "its shards overlap or leave a part out")):
        errors = world.run_expecting_errors(misplaced, 3, where)
        assert all(isinstance(error, ValueError) and f"parameter 'odd': {why}" in str(error) for error in errors)
