"""Which learning rates a converted AdamW becomes: its own, or by the rule that docs/learning.md found.

By the rule matrices train at what `Method.from_adamw` makes of AdamW's learning rate, for KL-Shampoo five times as much
but not more than 2e-2 by that, and what AdamW goes on serving at half of five times. Of a schedule it is the highest
rate that counts. `lr` of the groups stays AdamW's, so that schedules, callbacks and programs that set it by hand go on
as they are: `matrix_lr` and `adamw_lr` keep their ratio to it, which is found once, when a module is converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from kl_dist import METHODS
from kl_dist.methods import Transfer
from kl_dist.modules import shape_of

WAYS = ("rule", "keep")
"""What `convert_lr` may be, beside None: by the rule unless most of the module is frozen."""


def go_by_rule(module: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether the rule holds for a module as it is now; groups that are added later go by what was found first."""
    if {"lr", "matrix_lr"} & given.keys() or given.get("convert_lr") == "keep":
        return False
    return given.get("convert_lr") == "rule" or not _mostly_frozen(module)


def of_group(method: str, begins: float, peak: float) -> dict[str, float]:
    """A group's options, where `begins` is the learning rate that its schedule begins from, and `peak` its highest."""
    transfer = _transfer(method)
    if transfer.ratio == 1:
        return {}
    base = begins or 1.0  # of AdamW(lr=0), whose rate is set later, the ratio is all there is
    return {"base_lr": base, "matrix_lr": transfer.factor(peak) * base, "adamw_lr": transfer.ratio / 2 * base}


def about(before: Optimizer, lr: float, peak: float, module: nn.Module, given: Mapping[str, Any]) -> str | None:
    """One line on the rates, where the strategy's options do not say them themselves."""
    if {"lr", "matrix_lr"} & given.keys() or given.get("convert_lr") == "keep":
        return None
    kind, transfer = type(before).__name__, _transfer(given.get("method", "kl_shampoo"))
    if not go_by_rule(module, given) or transfer.ratio == 1:
        frozen = ", since most of the module is frozen" if _mostly_frozen(module) else ""
        return f"learning rates are {kind}'s own, {lr:g}{frozen}" + (
            ": convert_lr='rule' takes those for whole models" if frozen else ""
        )
    factor = transfer.factor(peak)
    share = f"{given['adamw_lr']:g}" if "adamw_lr" in given else f"{transfer.ratio / 2 * lr:g}"
    limit = "" if factor == transfer.ratio else f" (the rule lifts no rate beyond {transfer.ceiling:g})"
    return (
        f"learning rates by the rule for whole models: {factor * lr:g} for matrices{limit} and {share} for what"
        f" AdamW serves, in proportion to {kind}'s {lr:g}, which groups and schedules keep; convert_lr='keep' trains"
        " all at that"
    )


def _transfer(method: str) -> Transfer:
    return METHODS[method].from_adamw if method in METHODS else Transfer()  # none is AdamW for all


def _mostly_frozen(module: nn.Module) -> bool:
    """Adapters, a new head on a backbone: AdamW's learning rate suits these as it is (docs/finetuning.md)."""
    sizes = [(shape_of(p).numel(), p.requires_grad) for p in module.parameters()]
    return 2 * sum(size for size, trained in sizes if trained) < sum(size for size, _ in sizes)
