"""Optimizers' state out of a checkpoint, and a word for another optimizer that is given ours."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from kl_dist import KLShampoo, load_full_state_dict
from kl_dist.checkpoint.inventory import FORM, VERSION
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


_STEP_BESIDE_IT = "step of the matrix"


def with_word_to_adamw(state: dict[str, Any]) -> dict[str, Any]:
    """A full state with a word in it for those who should not load it: see [Note: a word to AdamW]."""
    return {**state, "state": {name: _warning(entries) for name, entries in state["state"].items()}} if state else state


def _warning(entries: dict[str, Any]) -> dict[str, Any]:
    if any(key.startswith(f"{FORM}{VERSION}.adamw") for key in entries):
        return entries
    beside = {_STEP_BESIDE_IT: entries["step"]} if "step" in entries else {}
    return {**entries, **beside, "step": WORD_TO_ADAMW}


def without_word_to_adamw(state: dict[str, Any]) -> dict[str, Any]:
    """The full state as KLShampoo gave it."""
    found = {name: dict(entries) for name, entries in state.get("state", {}).items()}
    for entries in found.values():
        if isinstance(entries.get("step"), bytes):
            del entries["step"]
            if _STEP_BESIDE_IT in entries:
                entries["step"] = entries.pop(_STEP_BESIDE_IT)
    return {**state, "state": found}


def _without_frozen(state: dict[str, Any], optimizer: KLShampoo) -> dict[str, Any]:
    """A full state without what is frozen here from the start: Lightning's finetuning callbacks resume so."""
    served = {parameter.name for parameter in optimizer.plan.parameters}
    pairs = (zip(group["param_names"], group["params"], strict=True) for group in optimizer.param_groups)
    frozen = {name for group in pairs for name, p in group if not p.requires_grad} - served
    dropped = sorted(frozen & state["state"].keys())
    if dropped:
        warnings.warn(f"state of parameters that are frozen now is left out: {', '.join(dropped)}", stacklevel=2)
    return {**state, "state": {name: entries for name, entries in state["state"].items() if name not in frozen}}


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
        state = _without_frozen(without_word_to_adamw(state), optimizer)
        try:
            if how == "partial":
                load_full_state_dict(optimizer, state, strict=False)
            else:
                optimizer.load_state_dict(state)
        except ValueError as problem:
            raise ValueError(f"{problem}. {REMEDY}") from problem
