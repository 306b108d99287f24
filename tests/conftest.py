"""Fixtures that every test module may use, and what runs beside what."""

from collections.abc import Iterable, Iterator

import pytest

from tests.gpt2 import GPT2, gpt2_on_meta
from tests.world import World, forget, import_once

POOLS = {"world", "worlds"}
IMPORTED = {
    "test_deepspeed": ("deepspeed",),
    "test_faults_files": ("deepspeed",),
    "test_huggingface": ("transformers.trainer", "accelerate"),
    "test_launch": ("jsonargparse", "lightning.pytorch", "transformers.trainer", "deepspeed", "peft"),
    "test_lightning": ("lightning.pytorch", "pytorch_lightning"),
}
"""By the beginning of a test module's name what its tests import on ranks: kept out of runs that have none of them."""


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Four gloo ranks, started by the first test that runs something on them; see tests/world.py."""
    ranks = World()
    yield ranks
    ranks.stop()
    forget()


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
        item.add_marker(pytest.mark.xdist_group("ranks" if needs_ranks(item) else "one process"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Pools import what the chosen tests will, and no more."""
    modules = {item.path.name for item in session.items if needs_ranks(item)}
    import_once(sorted({name for start, names in IMPORTED.items() for name in names if _any_starts(modules, start)}))


def needs_ranks(item: pytest.Item) -> bool:
    return not POOLS.isdisjoint(getattr(item, "fixturenames", ()))


def _any_starts(names: Iterable[str], start: str) -> bool:
    return any(name.startswith(start) for name in names)
