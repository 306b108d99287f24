"""Which parameter goes which way, as a table one can print."""

from __future__ import annotations

import math
import re

from kl_dist.planning.matrices import SMALL_DIM
from kl_dist.planning.plan import Plan

VOCABULARY = 4096  # rows or columns of an embedding or output head, at least; and this many for each of the other side:
VOCABULARY_RATIO = 6
ITS_NAMES = re.compile(
    r"(^|\.)(wte|wpe|lm_head|embed_tokens|tok_embeddings|word_embeddings|position_embeddings)\.weight$"
)


def doubts(plan: Plan) -> list[str]:
    """What to say of parameters that are served as matrices, and by name or shape seem to be something else."""
    units = {unit.parameter: unit for unit in plan.units if not unit.elementwise}
    embeddings, stacks = [], []
    for number, unit in units.items():
        name, shape = plan.parameters[number].name, plan.parameters[number].shape
        if len(shape) == 2 and (ITS_NAMES.search(name) or max(shape) >= max(VOCABULARY, VOCABULARY_RATIO * min(shape))):
            embeddings.append(name)
        elif sum(side > SMALL_DIM for side in unit.reading.shape[1:]) > 2:
            stacks.append(name)
    said = []
    if embeddings:
        said.append(
            f"{_listed(embeddings)} by name or shape an embedding or output head, and served as a matrix: {ASK}"
        )
    if stacks:
        said.append(f"{_listed(stacks)} served as one tensor of three sides or more, experts and all: {ASK}")
    return said


ASK = (
    "give KLShampoo the model, or param_groups(model, output_head=..), which know, or say it in adamw_names or matrices"
)


def _listed(names: list[str]) -> str:
    return f"{', '.join(map(repr, names))} {'is' if len(names) == 1 else 'are'}"


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
        owners = sorted({rank for i in members for rank in plan.keepers(i)})
        ranks = ", ".join(map(str, owners)) if len(owners) <= 4 else f"{owners[0]} to {owners[-1]} ({len(owners)})"
        rows.append((parameter.name, str(parameter.shape), units[0].method, read_as, ranks))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
