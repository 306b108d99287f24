"""What an optimizer says of itself: of one rank, and of all together."""

import math

import pytest
import torch

from kl_dist import KLShampoo
from tests.models import METHODS, backward, samples, zoo, zoo_groups


def said(group, method: str, steps: int = 3):
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), lr=0.0, weight_decay=0.0, method=method, process_group=group)
    assert optimizer.stats(all_ranks=True)["update_rms"] is None
    for step in range(steps):
        backward(model, samples(step))
        optimizer.step()
    return optimizer.stats(), optimizer.stats(all_ranks=True)


def measured(method: str, steps: int = 3) -> float:
    """The RMS of the last update of matrices, from what the weights move by."""
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), lr=1.0, adamw_lr=1.0, weight_decay=0.0, method=method)
    for step in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        backward(model, samples(step))
        optimizer.step()
        with torch.no_grad():
            moves = {name: before[name] - p for name, p in model.named_parameters()}
            for name, p in model.named_parameters():
                p.copy_(before[name])  # so that every step starts where the other run's does
    served = {unit.parameter for unit in optimizer.plan.units if unit.method != "adamw"}
    names = [optimizer.plan.parameters[i].name for i in served]
    moved = [moves[name] for name in names if moves[name].any()]
    return math.sqrt(sum(float(x.square().sum()) for x in moved) / sum(x.numel() for x in moved))


@pytest.mark.parametrize("method", METHODS)
def test_all_ranks_together_say_what_one_process_says(world, method):
    (alone,) = world.run(said, 1, method)
    found = world.run(said, 3, method)
    assert all(both[1] == found[0][1] for both in found)
    whole = found[0][1]
    has_eigenvalues = method.startswith("kl_")
    assert (whole["condition"] is not None) is has_eigenvalues
    assert not has_eigenvalues or whole["condition"] == pytest.approx(alone[0]["condition"], rel=1e-9)
    assert whole["update_rms"] == pytest.approx(alone[0]["update_rms"], rel=1e-9)
    assert whole["refreshes"] == alone[0]["refreshes"] == sum(mine["refreshes"] for mine, _ in found)
    assert whole["refresh_seconds"] == max(mine["refresh_seconds"] for mine, _ in found)
    assert whole["refresh_balance"] >= 1 and whole["skipped_steps"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_update_rms_is_that_of_what_the_matrices_move_by(world, method):
    (alone,) = world.run(said, 1, method)
    assert alone[0]["update_rms"] == pytest.approx(measured(method), rel=1e-6)
