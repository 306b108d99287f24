"""State that an earlier version saved loads: golden/saved_form1.pt, which commit 5f54067 wrote by this file's main().

`python -m tests.test_checkpoint_earlier FILE` writes such a file anew; the one that is kept must not be, but another
put beside it, when inventory.VERSION grows.
"""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from kl_dist import KLShampoo, full_state_dict, load_full_state_dict
from kl_dist.checkpoint import reading
from kl_dist.checkpoint.verify import is_sums
from tests import made_up

SAVED = Path(__file__).parent / "golden" / "saved_form1.pt"
KINDS = [(method, recipe) for recipe in ("fresh", "paper") for method in ("kl_shampoo", "kl_soap", "soap", "shampoo")]
SHAPES = {"matrix": (6, 4), "fused": (12, 4), "long": (20, 4), "embedding": (5, 4), "bias": (4,)}
STEPS = 3


def trained(method: str, recipe: str, group: dist.ProcessGroup | None = None, steps: int = STEPS) -> KLShampoo:
    """An optimizer of every kind of parameter, after some steps on made-up gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    fused = {"params": [("fused", parameters.pop("fused"))], "matrices": {"parts": {0: 3}}}
    options = {"method": method, "recipe": recipe, "adamw_names": ("embedding",), "max_preconditioner_dim": 8}
    optimizer = KLShampoo([{"params": list(parameters.items())}, fused], lr=1e-2, process_group=group, **options)
    for _ in range(steps):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


def main() -> None:
    from tests.world import World

    torch.set_num_threads(1)
    whole = {f"{method} {recipe}": full_state_dict(trained(method, recipe)) for method, recipe in KINDS}
    world = World(2)
    parts = world.run(part_of_two, 2)
    world.stop()
    torch.save({"whole": whole, "parts": parts}, sys.argv[1])


def part_of_two(group: dist.ProcessGroup) -> dict[str, Any]:
    return trained("kl_shampoo", "fresh", group).state_dict()


@cache
def saved() -> dict[str, Any]:
    return torch.load(SAVED, weights_only=True)


def tensors(state: dict[str, Any]) -> Iterator[tuple[Any, str, torch.Tensor]]:
    """All but the checksums, which came later."""
    for name, entries in state["state"].items():
        for key, tensor in entries.items():
            if not is_sums(key):
                yield name, key, tensor.to_local() if hasattr(tensor, "to_local") else tensor


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    return bool(pairs) and all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)


@pytest.mark.parametrize(("method", "recipe"), KINDS)
def test_a_whole_state_of_every_method_loads_to_the_bit(method, recipe, caplog):
    state, optimizer = saved()["whole"][f"{method} {recipe}"], trained(method, recipe, steps=0)
    assert load_full_state_dict(optimizer, state) == []
    assert [record.message[:35] for record in caplog.records] == ["this state came without checksums, b"[:35]]
    assert same(full_state_dict(optimizer), state)
    assert optimizer.param_groups[1]["matrices"] == {"parts": {0: 3}}


def test_a_run_that_was_saved_before_the_exponent_was_another_goes_on_with_its_own():
    """It says None, which was 1/2 in every run, and so stays."""
    state, paths = saved()["whole"]["kl_shampoo fresh"], []
    for exponent in (None, 0.5, 0.7):
        optimizer = trained("kl_shampoo", "fresh", steps=0)
        load_full_state_dict(optimizer, state)
        matrix = optimizer.param_groups[0]["params"][0]
        assert optimizer.param_groups[0]["shampoo_exponent"] is None
        optimizer.param_groups[0]["shampoo_exponent"] = exponent
        with torch.no_grad():
            matrix.zero_()
        matrix.grad = torch.arange(matrix.numel()).sin().view(matrix.shape)
        optimizer.step()
        paths.append(matrix.detach().clone())
    assert torch.equal(paths[0], paths[1]) and not torch.allclose(paths[0], paths[2])


def loads_its_part(group: dist.ProcessGroup, parts: list[dict[str, Any]]) -> bool:
    optimizer = trained("kl_shampoo", "fresh", group, steps=0)
    optimizer.load_state_dict(parts[group.rank()])
    return same(optimizer.state_dict(), parts[group.rank()])


def test_the_parts_of_two_ranks_load_on_two_ranks(world):
    assert world.run(loads_its_part, 2, saved()["parts"]) == [True, True]


if __name__ == "__main__":
    main()


FOLDER = Path(__file__).parent / "golden" / "dcp_form1"
"""What torch.distributed.checkpoint wrote of tests.made_up's parameters after three steps, at commit 1647b5a."""


def test_a_folder_that_an_earlier_version_wrote_loads_by_reading() -> None:
    """Without checksums, and without the options that came since."""
    params = made_up.parameters()
    model = nn.ParameterDict(params)
    optimizer = KLShampoo(model)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    reading.load(state, FOLDER)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    others = made_up.parameters()
    trained = KLShampoo(nn.ParameterDict(others))
    made_up.train(trained, others, range(3))
    for found, wanted in zip(made_up.states(optimizer), made_up.states(trained), strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[key].double(), wanted[key].double(), rtol=1e-9, atol=1e-12) for key in found)
    made_up.train(optimizer, params, range(1))
