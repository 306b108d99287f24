"""Which parameter goes which way, as a table one can print."""

from __future__ import annotations

import math
import re

from kl_dist.planning.plan import Plan

VOCABULARY = 4096  # rows or columns of an embedding or output head, at least; and this many for each of the other side:
VOCABULARY_RATIO = 6
ITS_NAMES = re.compile(
    r"(^|\.)(wte|wpe|lm_head|embed_tokens|tok_embeddings|word_embeddings|position_embeddings)\.weight$"
)


def look_like_embeddings(plan: Plan) -> list[str]:
    """The names of parameters that are served as matrices, but by name or shape seem an embedding or an output head."""
    matrices = {unit.parameter for unit in plan.units if not unit.elementwise}
    found = []
    for number, parameter in enumerate(plan.parameters):
        if number in matrices and len(parameter.shape) == 2:
            short, long = sorted(parameter.shape)
            if ITS_NAMES.search(parameter.name) or long >= max(VOCABULARY, VOCABULARY_RATIO * short):
                found.append(parameter.name)
    return found


def routing_table(plan: Plan) -> str:
    """A line per parameter: name, shape, method, how it is read, and the ranks that own a part of it."""
    by_parameter: dict[int, list[int]] = {}
    for index, unit in enumerate(plan.units):
        by_parameter.setdefault(unit.parameter, []).append(index)
    rows = [("parameter", "shape", "method", "as", "ranks")]
    for number, parameter in enumerate(plan.parameters):
        members = by_parameter.get(number, [])
        if not members:
            rows.append((parameter.name, str(parameter.shape), "none", "empty", ""))
            continue
        units = [plan.units[i] for i in members]
        shapes = {"x".join(map(str, unit.block.shape)) for unit in units}
        what = "flat" if units[0].elementwise else " or ".join(sorted(shapes))
        read_as = f"{len(units)} of {what}" if not units[0].elementwise else f"flat, {math.prod(parameter.shape)}"
        owners = sorted({plan.owners[i] for i in members})
        ranks = ", ".join(map(str, owners)) if len(owners) <= 4 else f"{owners[0]} to {owners[-1]} ({len(owners)})"
        rows.append((parameter.name, str(parameter.shape), units[0].method, read_as, ranks))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
