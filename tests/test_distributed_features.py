"""What FSDP2 and torch offer around sharded training leaves the update as it is.

Each run keeps the whole gradient of every step, as it was when the optimizer saw it; one process that is given the
same gradients must end with the same weights. So what is compared is the optimizer, also where a feature rounds.
"""

import itertools
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from kl_dist import KLShampoo, clip_grad_norm_
from tests.models import METHODS, Weights, deviation, same_bits
from tests.noise import NOISE, float32_limit
from tests.sharded import groups_of, lay_out, layers, loss_of, tokens_of, weights_of, whole

STEPS = 12
FSDP: dict[str, dict[str, Any]] = {
    "bf16 compute": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "cpu offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "kept unsharded": {"reshard_after_forward": False},
}
FEATURES = (*FSDP, "accumulation", "torch's clipping", "our clipping", "activation checkpointing", "compile")
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if set(pair) != {"torch's clipping", "our clipping"}]
RING = [{FEATURES[i - 3], feature} for i, feature in enumerate(FEATURES)]
"""Two partners for each feature, never the one kind of clipping for the other."""
ALONE = [(feature, 2, METHODS[1 + i % 3]) for i, feature in enumerate(FEATURES)]
"""A feature sees gradients and no method, and in two pairs it meets four ranks and KL-Shampoo."""


def train(
    group, layout: str, features: tuple[str, ...], method: str, dtype: torch.dtype
) -> tuple[Weights, list[Weights]]:
    """The weights at the end, and the gradients of every step, whole."""
    model = layers(dtype)
    if "activation checkpointing" in features:
        for module in (model.up, model.down):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    fsdp = {key: value for name in features for key, value in FSDP.get(name, {}).items()}
    part, parts = lay_out(model, layout, group, **fsdp)
    optimizer = KLShampoo(groups_of(model), lr=1e-2, method=method, process_group=group)
    called: nn.Module = torch.compile(model, backend="aot_eager") if "compile" in features else model
    gradients = []
    for step in range(STEPS):
        optimizer.zero_grad()
        if "accumulation" in features:
            model.set_requires_gradient_sync(False)
            loss_of(called, tokens_of(step + 100).chunk(parts)[part]).backward()
            model.set_requires_gradient_sync(True)
        loss_of(called, tokens_of(step).chunk(parts)[part]).backward()
        if "torch's clipping" in features:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if "our clipping" in features:
            clip_grad_norm_(optimizer, 0.1)
        gradients.append({name: whole(p.grad).clone() for name, p in model.named_parameters()})
        optimizer.step()
    return weights_of(model), gradients


def replay(gradients: list[Weights], method: str, seed: int = 0) -> Weights:
    """One process on the same gradients; with a seed, under relative noise on them."""
    model = layers(gradients[0]["odd.weight"].dtype)
    optimizer = KLShampoo(groups_of(model), lr=1e-2, method=method)
    generator = torch.Generator().manual_seed(seed)
    for of_step in gradients:
        for name, parameter in model.named_parameters():
            factor = 1 + (NOISE if seed else 0.0) * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
            parameter.grad = (of_step[name] * factor).to(parameter.dtype)
        optimizer.step()
    return weights_of(model)


@cache
def gradients_alone() -> list[Weights]:
    """Those of every step of a run in float32 on one process."""
    model, gradients = layers(torch.float32), []
    optimizer = KLShampoo(groups_of(model), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, tokens_of(step)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return gradients


def replayed(method: str, seed: int) -> Weights:
    return replay(gradients_alone(), method, seed)


YARDSTICKS = {f"replayed {method}": partial(replayed, method) for method in METHODS}


def check(
    world, world_size: int, layout: str, features: tuple[str, ...], method: str, dtype: torch.dtype = torch.float64
) -> None:
    dtype = torch.float32 if "bf16 compute" in features else dtype
    found = world.run(train, world_size, layout, features, method, dtype, timeout=120)
    weights, gradients = found[0]
    assert all(same_bits(other, weights) for other, _ in found)
    limit = 1e-9 if dtype == torch.float64 else float32_limit(f"replayed {method}")
    assert deviation(weights, replay(gradients, method)) <= limit
    if "clipping" in " ".join(features):
        norms = [torch.stack([x.norm() for x in of_step.values()]).norm() for of_step in gradients]
        assert max(norms) <= 0.1001 and norms[0] >= 0.0999


@pytest.mark.parametrize(
    ("feature", "world_size", "method"),
    [
        pytest.param(*case, marks=() if case in ALONE else pytest.mark.full)
        for case in itertools.product(FEATURES, (2, 4), METHODS)
    ],
)
def test_a_feature_alone_leaves_the_update_the_same(world, feature, world_size, method):
    check(world, world_size, "fsdp", (feature,), method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "bf16 compute"])
def test_a_feature_alone_in_float32_changes_no_more_than_noise_of_1e_7_does(world, feature, world_size, method):
    check(world, world_size, "fsdp", (feature,), method, torch.float32)


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=() if set(pair) in RING else pytest.mark.full) for pair in PAIRS],
    ids=[" and ".join(pair) for pair in PAIRS],
)
def test_two_features_together_leave_the_update_the_same(world, pair):
    layout = ("fsdp", "hsdp")[PAIRS.index(pair) % 2]
    check(world, 4, layout, pair, "kl_shampoo")


@pytest.mark.parametrize("feature", ["our clipping", "accumulation", "activation checkpointing"])
def test_a_feature_leaves_the_update_the_same_where_layers_are_divided_too(world, feature):
    check(world, 4, "fsdp+tp", (feature,), "kl_shampoo")
