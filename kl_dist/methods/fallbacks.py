"""How often a decomposition had to be computed another way, by the reason; read by ``KLShampoo.stats()``.

What is known on a device alone is counted there: a refresh waits for no answer.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

_counts: dict[tuple[str, torch.device | None], int | Tensor] = {}


def count(reason: str, times: int | Tensor = 1) -> None:
    """Add to the count of a reason; a tensor (0-D, integer) stays on its device."""
    key = (reason, times.device if isinstance(times, Tensor) else None)
    _counts[key] = _counts.get(key, 0) + times


def read() -> dict[str, int]:
    """The counts of this process, those of zero left out; waits for the devices that have any."""
    found: Counter[str] = Counter()
    for (reason, _), times in _counts.items():
        found[reason] += int(times)
    return {reason: times for reason, times in found.items() if times}


def clear() -> None:
    """Begin at zero."""
    _counts.clear()
