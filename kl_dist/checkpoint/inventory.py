"""What a checkpoint holds: every tensor of state, by parameter and key, and which ranks have what of it.

[Note: canonical state] Keys and shapes say nothing of ranks or layouts. A block of a matrix has the fields of its
method's state, under its ranges of the parameter where there are several ("[0:64, :].factors.0"); a parameter under
AdamW has `step`, and `exp_avg` and `exp_avg_sq` in its own shape. So what any number of ranks saved in any layout is
the same set of tensors, differently held, and loads everywhere. Scalars are stored as one element, (1,).

[Note: form] Every parameter also has a key that says what its state means: the version of all this, the method, the
recipe (of a recipe that differs in dtypes alone, that which it goes by: `Rule.form`), the shape, and a digest of how
the shape is read and cut ("form1.kl_shampoo.fresh.128x64.0b7a3c5e"). A stranger lacks the key, and so is recognised
before anything of it is read, by torch.distributed.checkpoint too. It is no state: only what is saved has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as declared
from functools import lru_cache

import torch

from kl_dist.methods import ELEMENTWISE, exchangeable, rule
from kl_dist.methods import form as form_of
from kl_dist.methods.state import Side, state_dtype
from kl_dist.planning.boxes import Box, whole
from kl_dist.planning.plan import Plan

FORM = "form"
VERSION = 1
"""Of the keys, shapes and meanings."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the state."""

    parameter: int  # into Plan.parameters
    key: str
    field: str  # what a unit's state calls it
    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: int | None  # into Plan.units; None where nobody holds anything
    plan: Plan = declared(repr=False, compare=False)
    constant: int | None = None  # the value of what nobody holds and nothing changes
    dtypes: tuple[tuple[str, torch.dtype], ...] = ()  # (recipe, dtype) that it may be saved in

    @property
    def is_form(self) -> bool:
        """See [Note: form]."""
        return self.key.startswith(FORM)

    def boxes(self, rank: int) -> tuple[Box, ...]:
        """What a rank holds, in the order of its memory."""
        if self.unit is None:
            return ()
        if self._is_cut:
            return tuple(self.plan.held_boxes(self.unit, rank))
        return (whole(self.shape),) if rank in self.plan.keepers(self.unit) else ()

    @property
    def holders(self) -> tuple[tuple[Box, tuple[int, ...]], ...]:
        """Every box with the ranks that hold it."""
        if self.unit is None:
            return ()
        keepers: dict[Box, list[int]] = {}
        for rank in self.plan.keepers(self.unit):
            for box in self.plan.held_boxes(self.unit, rank) if self._is_cut else (whole(self.shape),):
                keepers.setdefault(box, []).append(rank)
        return tuple((box, tuple(ranks)) for box, ranks in keepers.items())

    @property
    def _is_cut(self) -> bool:
        """Ranks hold different parts; of a matrix one has all, and all slices of AdamW's step together."""
        return self.unit is not None and self.plan.units[self.unit].elementwise and self.field != "step"


def inventory(plan: Plan) -> tuple[Entry, ...]:
    """All entries, in the order of parameters and units; the same on every rank."""
    units: dict[int, list[int]] = {i: [] for i in range(len(plan.parameters))}
    for i, unit in enumerate(plan.units):
        units[unit.parameter].append(i)
    return tuple(entry for number, indices in units.items() for entry in _entries(plan, number, indices))


def _entries(plan: Plan, number: int, indices: Sequence[int]) -> Iterator[Entry]:
    # what has no element has no unit, and a step count all the same
    first = plan.units[indices[0]] if indices else None
    method, recipe = (first.method, first.recipe) if first is not None else (ELEMENTWISE, "")
    shape = "x".join(map(str, plan.parameters[number].shape))
    cut = "" if method == ELEMENTWISE else repr([(plan.units[i].reading, plan.units[i].block) for i in indices])
    digest = hashlib.sha256(cut.encode()).hexdigest()[:8] if cut else ""
    means = form_of(method, recipe)
    form = ".".join(word for word in (f"{FORM}{VERSION}", method, means, shape, digest) if word)
    yield Entry(number, form, form, (1,), torch.int64, None, plan, 1)
    yield from (_of_adamw if method == ELEMENTWISE else _of_matrix)(plan, number, indices)


def _of_matrix(plan: Plan, number: int, indices: Sequence[int]) -> Iterator[Entry]:
    for i in indices:
        unit = plan.units[i]
        suffix = unit.name.removeprefix(plan.parameters[number].name)
        fields_under = {
            recipe: _fields(unit.method, recipe, unit.block.shape, unit.block.sides, unit.dtype)
            for recipe in exchangeable(unit.method, unit.recipe)
        }
        for place, (field, shape, dtype) in enumerate(fields_under[unit.recipe]):
            key = f"{suffix}.{field}" if suffix else field
            dtypes = tuple((recipe, found[place][2]) for recipe, found in fields_under.items())
            yield Entry(number, key, field, shape, dtype, i, plan, dtypes=dtypes)


def _of_adamw(plan: Plan, number: int, indices: Sequence[int]) -> Iterator[Entry]:
    parameter = plan.parameters[number]
    if not indices:
        yield Entry(number, "step", "step", (1,), torch.int64, None, plan, 0)
        return
    (i,) = indices
    yield Entry(number, "step", "step", (1,), torch.int64, i, plan)
    for name in ("exp_avg", "exp_avg_sq"):
        yield Entry(number, name, name, parameter.shape or (1,), state_dtype(parameter.dtype), i, plan)


@lru_cache(maxsize=1024)
def _fields(
    method: str, recipe: str, shape: tuple[int, ...], sides: tuple[Side, ...], dtype: torch.dtype
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """(name, shape, dtype) of a matrix's state, as its method allocates it."""
    state = rule(method, recipe).allocate(shape, sides, 1, torch.empty((), dtype=state_dtype(dtype), device="meta"))
    return tuple((name, tuple(x.shape) or (1,), x.dtype) for name, x in state.row(0).items())
