"""What a rank tells of itself, and what follows for one that listens to all. Times are seconds of its own clock."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

LONG = 10
"""How many times `patience` an unhurried rank, or one that has not started yet, is waited for."""


@dataclass(frozen=True)
class Sign:
    """What a rank tells of itself."""

    beat: int
    mark: int = 0  # how many steps it has begun
    counts: dict[str, int] = field(default_factory=dict)  # by process group, collectives begun since
    doing: str = "starting"
    unhurried: bool = True
    where: str = ""  # its main thread
    who: str = ""  # its host and process
    left: bool = False


@dataclass
class Heard:
    """A rank's last sign, or none yet, and when the listener had the last news of it and of its progress."""

    since: float
    moved: float
    sign: Sign | None = None

    def hear(self, sign: Sign, now: float) -> None:
        before = self.sign
        if before is None or sign.beat != before.beat:
            self.since = now
        if before is None or (sign.mark, sign.counts) != (before.mark, before.counts):
            self.moved = now
        self.sign = sign


@dataclass(frozen=True)
class Verdict:
    """What the first rank finds; not `final`: to be said, while all wait on."""

    words: str
    final: bool


def verdict(heard: Mapping[int, Heard], now: float, patience: float) -> Verdict | None:
    """Which ranks have stopped, if any; times in seconds, by one clock."""
    here = {rank: one for rank, one in heard.items() if one.sign is None or not one.sign.left}
    silent = [rank for rank, one in here.items() if now - one.since > patience * (LONG if one.sign is None else 1)]
    if silent:
        return Verdict("; ".join(_silent(rank, here[rank], now) for rank in silent), final=True)
    signs = {rank: one.sign for rank, one in here.items() if one.sign is not None}
    if not signs or len(signs) < len(here) or any(now - one.moved <= patience for one in here.values()):
        return None
    late = behind(signs)
    if not late:
        return None
    told = [
        # its last sign cannot say where it is now
        (_silent if now - here[rank].since > patience / 2 else _late)(rank, here[rank], now)
        for rank in late
    ]
    over = any(now - here[rank].moved > patience * LONG for rank in late)
    return Verdict("; ".join(told), final=over or not all(signs[rank].unhurried for rank in late))


def verdict_on_the_first(heard: Heard, now: float, patience: float) -> Verdict | None:
    """What another rank can tell of the first: whether it is silent. The first judges all else, itself included."""
    found = verdict({0: heard}, now, patience * (1 + 1 / 4))  # later than it would find others so
    return found if found and found.final else None


def behind(signs: Mapping[int, Sign]) -> list[int]:
    """The ranks that others wait for: at an earlier mark, or with fewer collectives in a group that they share."""
    front = max(sign.mark for sign in signs.values())
    earlier = [rank for rank, sign in signs.items() if sign.mark < front]
    if earlier:
        return earlier
    most: dict[str, int] = {}
    for sign in signs.values():
        for group, count in sign.counts.items():
            most[group] = max(count, most.get(group, 0))
    return [rank for rank, sign in signs.items() if any(count < most[group] for group, count in sign.counts.items())]


def _silent(rank: int, heard: Heard, now: float) -> str:
    return f"{_name(rank, heard)} has not been heard of since {at(heard.since, now)}"


def _late(rank: int, heard: Heard, now: float) -> str:
    where = heard.sign.where if heard.sign else ""
    return (
        f"{_name(rank, heard)} has not come to what the others wait for since {at(heard.moved, now)}: it is at {where}"
    )


def _name(rank: int, heard: Heard) -> str:
    sign = heard.sign
    return f"rank {rank}" if sign is None else f"rank {rank} ({sign.who}, {sign.doing})"


def at(moment: float, now: float) -> str:
    """A time of the listener's clock, for people."""
    return f"{time.strftime('%H:%M:%S', time.localtime(time.time() - (now - moment)))}, {now - moment:.0f} s ago"
