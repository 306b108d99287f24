"""What a saved group says of itself: the steps made until then, and a CRC-32 of each option.

The checksums of tensors, kl_dist.checkpoint.sums, are of the same number of steps.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kl_dist.options import CAME_LATER

SAVED = "saved"
"""The entry of a saved group with the steps made and the checksums of its options."""


def sealed(group: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A group as it is saved: with the steps made, and a CRC-32 of each option by its name, as one text."""
    kept = {key: _kept(x) for key, x in group.items()}
    return {**kept, SAVED: {"steps": steps, "options": json.dumps(_digests(kept))}}


def _kept(value: Any) -> Any:
    """An option as it is now: a schedule may write into its tensor, or leave numpy's float there."""
    if isinstance(value, Tensor):
        return value.clone()
    return float(value) if isinstance(value, float) else value


def resealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose groups somebody was asked to change before it is saved."""
    groups = [sealed(group, group[SAVED]["steps"]) if SAVED in group else group for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def changed_option(group: Mapping[str, Any]) -> str | None:
    """Which option of a saved group is another than it was sealed with; what is not there any more counts for none.

    Raises:
        ValueError: the seal itself is damaged.
    """
    digests = _sealed_with(group)
    found = _digests(without_what_came_later(group))
    return next((key for key, digest in found.items() if digests.get(key) != digest), None)


def without_what_came_later(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved group without options that are younger than its seal.

    torch.distributed.checkpoint, asked to load in part, leaves there what the optimizer had that it loads for.

    Raises:
        KeyError, TypeError, ValueError: the seal is damaged.
    """
    later = set(CAME_LATER) - _sealed_with(group).keys()
    return {key: x for key, x in group.items() if key not in later}


def _sealed_with(group: Mapping[str, Any]) -> dict[str, int]:
    digests = json.loads(group[SAVED]["options"])
    if not isinstance(digests, dict):
        raise ValueError("no digests")
    return digests


def _digests(group: Mapping[str, Any]) -> dict[str, int]:
    """Of what parameters are called torch makes other lists."""
    kept = {str(key): x for key, x in group.items() if key not in ("params", "param_names", SAVED)}
    return {key: zlib.crc32(_said(as_read(x)).encode()) for key, x in kept.items()}


def as_read(value: Any) -> Any:
    """An option with lists for tuples and strings for keys, as torch.distributed.checkpoint hands things back.

    It puts those keys beside what is read into: of 1 and "1" the latter, which was read, comes last and is meant.
    """
    if isinstance(value, Mapping):
        return {str(key): as_read(x) for key, x in value.items()}
    return [as_read(x) for x in value] if isinstance(value, (list, tuple)) else value


def _said(value: Any) -> str:
    """A plain value `as_read`, in the same words whatever became of its scalar tensors; of others nothing."""
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{key}:{_said(x)}" for key, x in value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_said, value)) + "]"
    if isinstance(value, Tensor):
        return _said(value.tolist())
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else "?"
