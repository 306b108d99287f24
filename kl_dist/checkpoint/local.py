"""The local form of a state dict: what one rank holds, and which rank of how many it is."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from enum import Enum
from typing import Any

from kl_dist.checkpoint.holdings import Holding
from kl_dist.checkpoint.seals import sealed
from kl_dist.checkpoint.shown import own
from kl_dist.checkpoint.sums import with_sums
from kl_dist.ranks import Ranks

ORIGIN = "kl_dist"
"""The entry of a state dict that says which rank of how many it was saved on."""

STEPS = "kl_dist_steps"
"""The entry of a state dict that says how many steps the optimizer had made, the same on all ranks."""


def origin_of(held: Sequence[Holding], ranks: Ranks, called: Mapping[str, str]) -> dict[str, Any]:
    """What a state dict says of where it is from: the rank, and a digest of which rank holds what.

    Of parameters that are `called` otherwise there, under those names.
    """
    said = "\n".join(f"{called.get(x.name, x.name)} {x.entry.key} {x.entry.holders}" for x in held)
    division = hashlib.sha256(said.encode()).hexdigest()
    return {"rank": ranks.rank, "world_size": ranks.size, "division": division}


class Form(Enum):
    """What the tensors of a local state dict are on several ranks."""

    PLAIN = "what this rank holds"
    SHARDED = "`Divided`, pickled as what this rank holds: so are the parameters"
    WHOLE = "`Divided`, not to be pickled: it would be taken for all, as every rank has all of the parameters"


def local_form(
    groups: Sequence[Mapping[str, Any]],
    held: Sequence[Holding],
    ranks: Ranks,
    frozen: Collection[str],
    live: Mapping[Any, Any],
    form: Form,
    steps: int,
) -> dict[str, Any]:
    """A state dict as torch.optim's, by numbers of parameters, with what this rank holds for its state, and its sums.

    The tensors are on one device, as torch.distributed.checkpoint wants them. It loads into them, but hands nothing
    over for what is frozen, and writes constants: those are copies. The user's own in the `live` state comes along, and
    how many steps the optimizer has made.
    """
    numbers = {name: i for i, name in enumerate(name for group in groups for name in group["param_names"])}
    # torch.distributed.checkpoint loads into what it is given, with words for the axes in `matrices`
    packed = [
        {**group, "params": [numbers[name] for name in group["param_names"]], "matrices": deepcopy(group["matrices"])}
        for group in (sealed(group, steps) for group in groups)
    ]
    origin = origin_of(held, ranks, {})
    held = with_sums(held, steps, ranks.rank)
    tensors = [
        holding.value.to(ranks.device, copy=holding.name in frozen or holding.entry.constant is not None)
        for holding in held
    ]
    if ranks.size > 1 and form is not Form.PLAIN:
        from kl_dist.checkpoint.divided import divide  # takes seconds to import

        tensors = divide([holding.entry for holding in held], tensors, ranks, form is Form.SHARDED)
    state: dict[Any, Any] = own(live)
    for holding, tensor in zip(held, tensors, strict=True):
        state.setdefault(numbers[holding.name], {})[holding.entry.key] = tensor
    return {"state": state, "param_groups": packed, ORIGIN: origin, STEPS: steps}
