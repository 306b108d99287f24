"""Optimizers' state out of a checkpoint, and a word for another optimizer that is given ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kl_dist import KLShampoo, load_full_state_dict
from lightning_plugin.unwrapping import unwrapped

REMEDY = (
    "To go on from its weights with new optimizer state, give the strategy optimizer_checkpoint='ignore'"
    " (KLShampooStrategy(optimizer_checkpoint='ignore')); 'partial' loads what fits"
)

WORD_TO_ADAMW = (
    b"this checkpoint is of KLShampoo: go on with strategy='kl_shampoo', or load its weights alone"
    b" (LightningModule.load_from_checkpoint)"
)
"""[Note: a word to AdamW] torch's Adam family would take KLShampoo's state without a look. But it reads `step`, and
makes a number of what is no tensor: of these words it cannot, and its error quotes them. They are bytes, for torch
takes strings apart."""


def with_word_to_adamw(state: dict[str, Any]) -> dict[str, Any]:
    """A full state with a word in it for those who should not load it: see [Note: a word to AdamW]."""
    for entries in state.get("state", {}).values():
        entries.setdefault("step", WORD_TO_ADAMW)
    return state


def without_word_to_adamw(state: dict[str, Any]) -> dict[str, Any]:
    """The full state as KLShampoo gave it."""
    entries = {
        name: {key: value for key, value in of_one.items() if not isinstance(value, bytes)}
        for name, of_one in state.get("state", {}).items()
    }
    return {**state, "state": entries}


def restore(optimizers: Sequence[Any], states: Sequence[dict[str, Any]], how: str) -> None:
    """Load full states, which every rank has read, into optimizers; a collective where `how` is "partial".

    Raises:
        ValueError: it is of other optimizers, or of other parameters; with what to do.
    """
    if len(optimizers) != len(states):
        raise ValueError(f"the checkpoint has {len(states)} optimizers, here are {len(optimizers)}. {REMEDY}")
    for wrapper, state in zip(optimizers, states, strict=True):
        optimizer = unwrapped(wrapper)
        if not isinstance(optimizer, KLShampoo):
            optimizer.load_state_dict(state)
            continue
        state = without_word_to_adamw(state)
        try:
            if how == "partial":
                load_full_state_dict(optimizer, state, strict=False)
            else:
                optimizer.load_state_dict(state)
        except ValueError as problem:
            raise ValueError(f"{problem}. {REMEDY}") from problem
