"""Which parameter goes which way, as a table one can print."""

from __future__ import annotations

import math

from kl_dist.planning.plan import Plan


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
