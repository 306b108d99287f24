"""State saved in one layout at one world size goes on in another: through one canonical form, and across."""

from functools import cache
from typing import Any

from kl_dist import full_state_dict, load_full_state_dict
from tests.checkpoints import FURTHER, LAYOUTS, STOPS, Run, flat, furthest
from tests.models import METHODS, same_bits
from tests.products import product


@cache
def alone(stop: int, method: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """One process: weights and full state at `stop`, and weights and canonical state some steps later."""
    run = Run(None, method=method).train(0, stop)
    weights, full = run.weights(), full_state_dict(run.optimizer)
    run.train(stop, stop + FURTHER)
    return weights, full, run.weights(), run.canonical()


def save_and_go_on(group, layout: str, stop: int, expected, options: dict[str, Any]) -> tuple[float, float, float]:
    """How far this layout's state at `stop` is from that of one process, and how far it gets from a loaded one."""
    weights, full, later_weights, later_state = expected
    whole = flat(full)
    state = Run(group, layout, **options).train(0, stop).canonical()
    made = furthest(state, whole) if group.rank() == 0 else 0.0
    run = Run(group, layout, **{**options, "lr": 0.5})
    run.set_weights(weights)
    load_full_state_dict(run.optimizer, full if group.rank() == 0 else None)
    loaded = run.canonical()
    assert group.rank() != 0 or same_bits(loaded, whole)
    run.train(stop, stop + FURTHER)
    state = run.canonical()
    return made, furthest(run.weights(), later_weights), furthest(state, later_state) if group.rank() == 0 else 0.0


@product(**{"layout,world_size": LAYOUTS, "method": METHODS, "stop": STOPS})
def test_every_layout_makes_and_continues_the_state_of_one_process(world, layout, world_size, method, stop):
    results = world.run(save_and_go_on, world_size, layout, stop, alone(stop, method), {"method": method})
    assert max(value for result in results for value in result) < 1e-9
