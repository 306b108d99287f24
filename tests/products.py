"""Products of parameters, of which `make test` runs some cases and `make test-full` runs all.

@product(method=METHODS, world_size=[2, 4], feature=FEATURES)
def test_weights_are_those_of_one_process(world, method, world_size, feature): ...
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

PARTNERS = 2
"""So many values of every other parameter meet each value in the cases of `make test`, or all where there are fewer."""

SPEAKING = (str, int, float, tuple, torch.dtype)
"""Values that name a case by themselves."""

Case = tuple[int, ...]  # by parameter, which of its values


def product(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over all combinations, those that `few` leaves out marked `full`.

    Values that belong together are one parameter, whose name has commas: `product(**{"layout,ranks": PAIRS})`.
    """
    lists = [list(of_one) for of_one in values.values()]
    names = [name for key in values for name in key.split(",")]
    some, params = set(few([len(of_one) for of_one in lists])), []
    for case in itertools.product(*(range(len(of_one)) for of_one in lists)):
        flat: list[Any] = []
        for key, of_one, index in zip(values, lists, case, strict=True):
            flat += of_one[index] if "," in key else [of_one[index]]
        told = "-".join(map(str, flat)) if all(isinstance(x, SPEAKING) for x in flat) else None
        params.append(pytest.param(*flat, id=told, marks=() if case in some else pytest.mark.full))
    return pytest.mark.parametrize(names, params)


def few(sizes: Sequence[int]) -> list[Case]:
    """Cases in which every value meets PARTNERS values of every other parameter.

    Greedy: of all cases the first that brings most meetings that are still wanted, until none is.
    """
    cases = list(itertools.product(*map(range, sizes)))
    met: dict[tuple[int, int, int], set[int]] = {}  # (parameter, its value, other parameter) -> the values it met

    def gain(case: Case) -> int:
        """How many meetings of `case` are new to one that has too few."""
        return sum(
            theirs not in (seen := met.get((one, mine, other), set())) and len(seen) < min(PARTNERS, sizes[other])
            for (one, mine), (other, theirs) in itertools.permutations(enumerate(case), 2)
        )

    chosen: list[Case] = cases if len(sizes) < 2 else []
    while len(sizes) > 1 and gain(best := max(cases, key=gain)):
        chosen.append(best)
        for (one, mine), (other, theirs) in itertools.permutations(enumerate(best), 2):
            met.setdefault((one, mine, other), set()).add(theirs)
    return chosen
