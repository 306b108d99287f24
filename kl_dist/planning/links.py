"""Which links a rank's bytes travel over: those within its node, and those between nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kl_dist.planning.buckets import Bucket
from kl_dist.planning.traffic import Traffic, along_the_column


class Links(NamedTuple):
    """What one rank sends in the buckets of a step, and how often something of them is on its way."""

    within: int  # bytes to ranks of its node
    between: int  # bytes to others
    exchanges: int


def links_of(buckets: Sequence[Bucket], traffics: Sequence[Traffic], rank: int, ranks_per_node: int) -> Links:
    """Of a rank of the first group, whose traffic this is; nodes have consecutive ranks.

    All-to-alls go to each rank of the row itself, all-gathers and broadcasts to the next in the column, as rings do; of
    two levels the first goes to the next node, and the second to the next rank within.
    """
    within = between = exchanges = 0
    for bucket, traffic in zip(buckets, traffics, strict=True):
        sent: list[tuple[int, int]] = []
        if traffic.sharded:
            exchanges += 2
            lengths = zip(traffic.outgoing.lengths, traffic.incoming.lengths, strict=True)
            sent += zip(bucket.row(rank), map(sum, lengths), strict=True)
        if traffic.replicas > 1:
            column, on_node, along = bucket.column(rank), traffic.on_node, along_the_column(traffic)
            exchanges += len(traffic.legs) * (1 if on_node == 1 else 2)
            sent.append((column[(traffic.place + on_node) % len(column)], along.first))
            node, here = divmod(traffic.place, on_node)
            sent.append((column[node * on_node + (here + 1) % on_node], along.sent - along.first))
        for other, numel in sent:
            nbytes = bucket.dtype.itemsize * numel
            if other != rank and other // ranks_per_node == rank // ranks_per_node:
                within += nbytes
            elif other != rank:
                between += nbytes
    return Links(within, between, exchanges)
