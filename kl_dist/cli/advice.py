"""Which option would help: the same model planned with one option changed, and what that changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from kl_dist.cli.forecast import Forecast

WORTH = 0.05
"""What an option must save, of a step's time or a rank's state, to be named."""


class Change(NamedTuple):
    """Options in the place of those that were asked for, and what is known of learning with them."""

    options: Mapping[str, Any]
    learning: str

    @property
    def said(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class Advice(NamedTuple):
    change: Change
    forecast: Forecast
    faster: float  # a step's time over today's
    smaller: float  # a rank's state over today's


SAME = "the same update"


def changes(given: Mapping[str, Any], group: Mapping[str, Any], forecast: Forecast) -> Iterator[Change]:
    """What may be tried, of options that are not given.

    Args:
        given: options as they were asked for.
        group: these, resolved.
        forecast: of the plan that they make.
    """
    for ranks in {2 * forecast.partition_size, forecast.partition_size // 2} - {0}:
        if "partition_size" not in given and ranks <= forecast.world_size and forecast.world_size % ranks == 0:
            yield Change({"partition_size": ranks}, SAME)
    for side in (4096, 2048, 1024):
        if "max_preconditioner_dim" not in given and side < group["max_preconditioner_dim"]:
            yield Change({"max_preconditioner_dim": side}, "not known")
    every = 2 * group["precondition_frequency"]
    if "precondition_frequency" not in given:
        yield Change({"precondition_frequency": every}, "a little worse (docs/learning.md: T)")
    if not given.keys() & {"recipe", "method"}:
        yield Change({"recipe": "compact"}, "alike (docs/algorithm.md)")


def advise(
    given: Mapping[str, Any],
    group: Mapping[str, Any],
    today: Forecast,
    planned: Callable[[Mapping[str, Any]], Forecast],
) -> list[Advice]:
    """What saves time or state, the fastest first.

    Args:
        planned: the forecast with other options; raises ValueError where these cannot be.
    """
    found = []
    for change in changes(given, group, today):
        try:
            other = planned({**given, **change.options})
        except ValueError:  # a size of groups that the layout does not allow
            continue
        faster, smaller = other.step_seconds / today.step_seconds, other.state_bytes / today.state_bytes
        if min(faster, smaller) <= 1 - WORTH:
            found.append(Advice(change, other, faster, smaller))
    return sorted(found, key=lambda one: one.faster)
