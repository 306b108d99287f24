"""Partition groups: ranks that hold all state once among them, and do all work; other groups do the same again.

Updates then travel within a group, inside a node where one is enough. A group has consecutive ranks; where parameters
are sharded, whole replicas. What groups compute twice comes out alike, since all have the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from kl_dist.planning.boxes import Sharding
from kl_dist.planning.ownership import Evenest
from kl_dist.planning.units import Parameter

FEWEST = 8
"""Ranks of a group that is chosen, at least: fewer gain from sharing however uneven it is."""
BALANCE = 1.10
"""Largest cost of a rank over the mean that a group is chosen for."""


class Partition(NamedTuple):
    """How ranks are to be divided into groups."""

    size: int | None = None  # ranks of a group; None: the plan chooses
    max_state_bytes: int | None = None  # of a rank, where the plan chooses
    ranks_per_node: int = FEWEST  # groups that are chosen fill nodes, and updates may travel in two levels

    def of_some(self, ranks: int) -> Partition:
        """For so many ranks that are not all of the job: they are one group.

        Raises:
            ValueError: another size is given.
        """
        if self.size not in (None, ranks):
            raise ValueError(
                "partition_size divides all ranks of the job; this KLShampoo has a process_group of some: leave it"
                f" out, or give {ranks}"
            )
        return self._replace(size=ranks, ranks_per_node=ranks)  # and make no process groups of their own

    def sizes(self, world_size: int, shardings: Iterable[Sharding | None]) -> list[int]:
        """What a group's size may be, ascending.

        Raises:
            ValueError: it is given, and is none of those that are possible.
        """
        sharded = list({id(one): one for one in shardings if one is not None}.values())
        known = [g for g in range(1, world_size + 1) if world_size % g == 0]
        possible = [g for g in known if all(of_group(one, world_size, g) is not None for one in sharded)]
        if self.size is not None:
            if self.size not in possible:
                raise ValueError(
                    f"partition_size is one of {', '.join(map(str, possible))} for {world_size} ranks and these"
                    f" parameters, or None, not {self.size!r}"
                )
            return [self.size]
        chosen = [g for g in possible if g % self.ranks_per_node == 0 and g >= FEWEST]
        return chosen if world_size in chosen else [*chosen, world_size]

    def node_of_group(self, size: int, world_size: int) -> int:
        """How many consecutive ranks of a group of `size` share a node: all, where groups do not lie alike on nodes."""
        return self.ranks_per_node if size == world_size or size % self.ranks_per_node == 0 else size

    def choose(self, sizes: Sequence[int], division: Callable[[int], Evenest]) -> int:
        """The most ranks whose work is balanced, else the fewest; of those with room for the state.

        Args:
            division: of the matrices over so many ranks.

        Raises:
            ValueError: not even all ranks together have room.
        """
        if len(sizes) == 1 and (self.size is not None or self.max_state_bytes is None):
            return sizes[0]
        found = {g: division(g) for g in sizes}
        room = [g for g in sizes if self.max_state_bytes is None or found[g].state_bytes <= self.max_state_bytes]
        if not room:
            raise ValueError(
                f"max_state_bytes is {self.max_state_bytes}, and even of all ranks together one has to hold"
                f" {round(found[sizes[-1]].state_bytes)}"
            )
        return next((g for g in reversed(room) if found[g].balance <= BALANCE), room[0])


CHOSEN = Partition()
"""By the plan alone."""


def of_group(sharding: Sharding, world_size: int, size: int) -> Sharding | None:
    """The sharding within the first group of `size` ranks; None where the others are not the same, further on."""
    rows = size // len(sharding.grid[0])
    first = sharding.grid[:rows]
    if size == world_size:
        return sharding
    if sorted(rank for row in first for rank in row) != list(range(size)):
        return None
    for k in range(world_size // size):
        there = sharding.grid[k * rows : (k + 1) * rows]
        if there != tuple(tuple(rank + k * size for rank in row) for row in first):
            return None
    return replace(sharding, grid=first)


def in_group(parameters: Sequence[Parameter], world_size: int, size: int) -> list[Parameter]:
    """The parameters as they lie within one group."""
    if size == world_size:
        return list(parameters)
    made: dict[int, Sharding | None] = {}
    found = []
    for parameter in parameters:
        sharding = parameter.sharding
        if sharding is not None:
            if id(sharding) not in made:
                made[id(sharding)] = of_group(sharding, world_size, size)
            parameter = replace(parameter, sharding=made[id(sharding)])
        found.append(parameter)
    return found
