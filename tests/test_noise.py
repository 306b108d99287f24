"""The recorded yardsticks are of the runs that tests make now, and none is so wide that it would let faults pass."""

from importlib import import_module

import pytest

from tests.noise import CAP, MODULES, float32_limit, measured, recorded
from tests.test_distributed_sharded import YARDSTICKS


def test_every_yardstick_is_recorded_and_none_is_chaotic():
    names = [name for module in MODULES for name in import_module(f"tests.{module}").YARDSTICKS]
    assert len(set(names)) == len(names) and set(names) == set(recorded()["deviation"])
    assert all(1e-8 < deviation <= CAP for deviation in recorded()["deviation"].values())
    assert all(float32_limit(name) == 3 * recorded()["deviation"][name] for name in names)


@pytest.mark.parametrize("name", ["sharded kl_soap", "sharded shampoo"])
def test_a_yardstick_made_anew_is_about_what_is_recorded(name):
    assert measured(YARDSTICKS[name]) == pytest.approx(recorded()["deviation"][name], rel=0.7)
