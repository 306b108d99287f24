"""Where DeepSpeed looks for an optimizer by its name, and which of its methods are wrapped."""

from __future__ import annotations

import torch
from deepspeed.runtime.zero import utils as zero_utils

from deepspeed_integration import wrapping
from deepspeed_integration.optimizer import TYPES, make_type
from kl_dist.methods import METHODS, for_each_method


def register() -> None:
    """Register the types of every method, those that are added later too."""
    for_each_method(register_method)
    wrapping.wrap()


def register_method(method: str) -> None:
    """Put a method's types where DeepSpeed looks.

    Raises:
        RuntimeError: torch.optim has another optimizer of one of these names.
    """
    if METHODS[method].called not in TYPES:
        make_type(method)
    for name, kind in TYPES.items():
        if getattr(torch.optim, name, kind) is not kind:
            raise RuntimeError(f"torch.optim has another {name!r} already")
        setattr(torch.optim, name, kind)
        if kind not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(kind)
