"""Fixtures that every test module may use, and what runs beside what."""

from collections.abc import Iterator

import pytest

from tests.gpt2 import GPT2, gpt2_on_meta
from tests.world import World

POOLS = {"world", "worlds"}


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Four gloo ranks, started by the first test that runs something on them; see tests/world.py."""
    ranks = World()
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def worlds(world: World) -> Iterator[dict[int, World]]:
    """Pools of 1 to 4 ranks, for what takes the default process group for its own; each starts when first used.

    A pool costs a dozen seconds with all that is imported there: let `make test` do with 2 and 4.
    """
    found = {1: World(1), 2: World(2), 3: World(3), 4: world}
    yield found
    for size in (1, 2, 3):
        found[size].stop()


@pytest.fixture(scope="session")
def gpt2() -> GPT2:
    return gpt2_on_meta()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Two workers side by side (pytest-xdist, --dist loadgroup): one has the pools, the other all the rest."""
    for item in items if config.pluginmanager.hasplugin("xdist") else ():
        on_ranks = not POOLS.isdisjoint(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("ranks" if on_ranks else "one process"))
