"""Where DeepSpeed looks for an optimizer by its name, and which of its methods are wrapped."""

from __future__ import annotations

import torch
from deepspeed.runtime.zero import utils as zero_utils

from deepspeed_integration import wrapping
from deepspeed_integration.optimizer import NAMES


def register() -> None:
    """Idempotent."""
    for name, kind in NAMES.items():
        if getattr(torch.optim, name, kind) is not kind:
            raise RuntimeError(f"torch.optim has another {name!r} already")
        setattr(torch.optim, name, kind)
        if kind not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(kind)
    wrapping.wrap()
