"""Sharded parameters (FSDP2, HSDP, tensor parallel and both) get the update that one process computes."""

from functools import cache, partial

import torch

from tests.models import METHODS, deviation, same_bits
from tests.noise import NOISE, float32_limit
from tests.products import product
from tests.sharded import LAYOUTS, train_alone, train_sharded

STEPS = 16
PLACES = [(layout, world_size) for layout, sizes in LAYOUTS.items() for world_size in sizes]


@cache
def one_process(method: str, dtype: torch.dtype, seed: int = 0):
    return train_alone(dtype, STEPS, {"lr": 1e-2, "method": method}, NOISE if seed else 0.0, seed)


YARDSTICKS = {f"sharded {method}": partial(one_process, method, torch.float32) for method in METHODS}


def on_ranks(world, layout: str, world_size: int, method: str, dtype: torch.dtype):
    found = world.run(train_sharded, world_size, layout, dtype, STEPS, {"lr": 1e-2, "method": method})
    assert all(same_bits(other, found[0]) for other in found)
    return found[0]


@product(**{"layout,world_size": PLACES, "method": METHODS, "dtype": [torch.float64, torch.float32]})
def test_weights_do_not_depend_on_the_layout(world, layout, world_size, method, dtype):
    """But for rounding: in float32 no more than noise of 1e-7 on the gradients makes of them."""
    weights = on_ranks(world, layout, world_size, method, dtype)
    limit = 1e-9 if dtype == torch.float64 else float32_limit(f"sharded {method}")
    assert deviation(weights, one_process(method, dtype)) <= limit
