"""Gradients that lie otherwise than their parameters: brought there by all ranks together, or by none.

[Note: redistribution] Under sequence parallelism the gradient of a norm's weight is partial sums. To add them up is a
collective of the parameter's device mesh, and a rank that has no such gradient, or an error of its own, would leave the
others waiting in it. So nobody begins before all have said what they have. A rank that finds such gradients says so in
the agreement, which then is made anew; from then on each step opens with one more all-reduce, of two numbers a
parameter. Where there are none, as with plain FSDP2, nothing is added.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from kl_dist.layouts.local import LocalShards
from kl_dist.ranks import Ranks

NO_GRADIENT, IN_PLACE, ELSEWHERE = 0, 1, 2
CODES = 2**22  # whole numbers that float32 holds


class Redistribution:
    """Takes a step's gradients into view, and knows whether some have to be brought to their parameters for it."""

    def __init__(self, shards: LocalShards, names: Sequence[str], ranks: Ranks) -> None:
        self.shards, self.names, self.ranks = shards, names, ranks
        self.expected = False  # the same on all ranks

    def look(self, in_trouble: bool = False) -> bool:
        """`LocalShards.look`, and whether gradients lie elsewhere though none were expected to: they are left out then.

        A collective where they are expected; and then of this rank too, if it is `in_trouble` and takes no step.

        Raises:
            ValueError: a gradient lies in one way here and in another there; on all ranks.
        """
        without: set[int] = set()
        if self.expected:
            without = self._left_out(in_trouble)
        elif self.shards.may_redistribute:
            without = {number for number, place in enumerate(self.shards.places()) if place}
        if not in_trouble:
            self.shards.look(without)
        return bool(without) and not self.expected

    def look_together(self) -> None:
        """The same apart from a step, without an agreement to tell of an error: it is raised on all ranks here."""
        if not (self.expected or self.shards.may_redistribute):
            self.shards.look()
            return
        if not self.expected:
            try:
                elsewhere = any(self.shards.places())
            except Exception:  # `look` meets it again, and then all ranks are about to hear of it
                elsewhere = True
            self.expected = self.ranks.any(elsewhere)
        with self.ranks.together():
            self.look()

    def _left_out(self, in_trouble: bool) -> set[int]:
        """The parameters whose gradients cannot be brought to them now, as some ranks lack theirs; a collective.

        A rank in trouble says that it has none.
        """
        places: list[str | None] = [None] * len(self.names)
        problem: Exception | None = None
        try:
            places = places if in_trouble else self.shards.places()
        except Exception as error:  # raised once the others do not wait for what this rank has to say
            problem = error
        codes = [code(place) for place in places]
        told = torch.tensor([*codes, *(-x for x in codes)], dtype=torch.float32, device=self.ranks.device)
        said = self.ranks.largest(told)
        if problem is not None:
            raise problem
        without = set()
        for number, (most, least) in enumerate(zip(said[: len(codes)], said[len(codes) :], strict=True)):
            if most < ELSEWHERE or most == -least:
                continue
            if -least != NO_GRADIENT:
                raise ValueError(
                    f"the gradient of {self.names[number]!r} has the placements"
                    f" {places[number] or 'of its parameter'} on this rank, and others on another: the backward was not"
                    " the same on all ranks"
                )
            without.add(number)
        return without


def code(place: str | None) -> int:
    """A place, as `LocalShards.places` has it, as a number."""
    if not place:
        return NO_GRADIENT if place is None else IN_PLACE
    return ELSEWHERE + zlib.crc32(place.encode()) % CODES
