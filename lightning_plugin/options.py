"""What a strategy is given for the optimizer, apart from what is its parent's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch.nn.parallel import DistributedDataParallel

from kl_dist import METHODS, options
from lightning_plugin import rates

Pair = tuple[float, float]

# for a command line, which says what there is to choose
MethodName = Literal[tuple(METHODS)]  # type: ignore[valid-type]
RecipeName = Literal[options.recipes("adamw")]  # type: ignore[valid-type]


class TakesOptimizerOptions:
    """Mixin of a strategy: the constructor, which takes the optimizer's options beside the parent's arguments.

    What is left at None is as `configure_optimizers` has it, else KLShampoo's default.

    Args:
        lr: learning rate of matrices, and of AdamW unless `adamw_lr` is given. Where the module's optimizer has several
            groups or a schedule, all are scaled by lr over its own. Without it they stay as they are, and `convert_lr`
            says what is made of them.
        convert_lr: what an AdamW's learning rate becomes where `lr` is not given: "rule", five times as much for
            matrices, up to 2e-2 (kl_dist.methods: Method.from_adamw), and two and a half times for AdamW's share, or
            "keep". None: by the rule, unless most of the module is frozen.
        betas: weights of the old momentum and of the old second moments.
        eps: added to denominators; relative to the gradients' scale for matrices under recipe "fresh".
        weight_decay: decoupled; in place of the module's, but for groups it has set to 0 beside others.
        method: "kl_shampoo", "kl_soap", "soap", "shampoo", "muon", or one that was added.
        recipe: "fresh", the project's form, "paper", the released codes' to the letter (torch.optim.Muon's for method
            "muon"), "compact", method "kl_shampoo" with its state in half the bytes, or "normuon", method "muon" with
            its neurons normalised.
        precondition_frequency: T; the eigenbases are refreshed every T steps.
        shampoo_beta: weight of the old Kronecker factors; betas[1] unless given.
        blocking: "square" cuts a matrix along its long side into near-square blocks; "none".
        max_preconditioner_dim: sides longer than this are handled as `long_side` says.
        nesterov: momentum one step ahead.
        final_beta1: what the weight of the old momentum grows to in a long run.
        polar: Newton-Schulz steps that orthogonalise the whitened momentum; "start" is four in the first updates of
            each matrix alone, fading; 0 none.
        stagger: spread the refreshes over the T steps.
        long_side: "cut", "diagonal" or "identity".
        merge_dims: read small trailing dimensions (convolution kernels) as columns.
        matrices: which axes are batch, rows and columns, and equal parts along an axis, of all parameters or by name:
            kl_dist.planning.matrices. It goes before what is known of the modules of libraries.
        shampoo_exponent: p of S_k^-p, with methods "kl_shampoo" and "shampoo".
        adjust_lr_fn: the scale of method "muon": "original" or "match_rms_adamw".
        compute_dtype: what most products are computed in: "float32", "tf32", "bfloat16" or "bf16x3".
        matrix_lr: the matrices' learning rate where the groups have `lr`, or AdamW's.
        adamw_lr: what AdamW serves, likewise.
        adamw_betas: AdamW's betas.
        adamw_names: parameters, by name, that AdamW serves beside embeddings, output head and what is no matrix.
        on_nonfinite: "skip" leaves out a step with a NaN or Inf gradient on all ranks alike; "raise".
        output_head: name of the module that is the model's output head, which AdamW serves; "" where none is one.
        optimizer_checkpoint: "strict" wants a checkpoint of this very optimizer; "partial" loads what fits and starts
            the rest anew; "ignore" loads the weights alone.
        parent: arguments of the strategy this one is built on.
    """

    _parent: ClassVar[type]
    """The strategy this one is built on."""

    def __init__(
        self,
        *,
        lr: float | None = None,
        betas: Pair | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        method: MethodName | None = None,  # type: ignore[valid-type]
        recipe: RecipeName | None = None,  # type: ignore[valid-type]
        precondition_frequency: int | None = None,
        shampoo_beta: float | None = None,
        blocking: Literal["square", "none"] | None = None,
        max_preconditioner_dim: int | None = None,
        nesterov: bool | None = None,
        final_beta1: float | None = None,
        polar: int | Literal["start"] | None = None,
        stagger: bool | None = None,
        long_side: Literal["cut", "diagonal", "identity"] | None = None,
        merge_dims: bool | None = None,
        matrices: dict[str, Any] | None = None,
        shampoo_exponent: float | None = None,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        compute_dtype: Literal["float32", "tf32", "bfloat16", "bf16x3"] | None = None,
        convert_lr: Literal["rule", "keep"] | None = None,
        matrix_lr: float | None = None,
        adamw_lr: float | None = None,
        adamw_betas: Pair | None = None,
        adamw_names: list[str] | None = None,
        on_nonfinite: Literal["skip", "raise"] | None = None,
        output_head: str | None = None,
        optimizer_checkpoint: Literal["strict", "partial", "ignore"] = "strict",
        **parent: Any,
    ) -> None:
        given = locals()
        known = (*options.DEFAULTS, "on_nonfinite", "output_head", "convert_lr")
        self.optimizer_options: dict[str, Any] = {key: given[key] for key in known if given[key] is not None}
        _check(self.optimizer_options)
        if optimizer_checkpoint not in ("strict", "partial", "ignore"):
            raise ValueError(f'optimizer_checkpoint is "strict", "partial" or "ignore", not {optimizer_checkpoint!r}')
        self.optimizer_checkpoint: str = optimizer_checkpoint
        takes = _arguments(self._parent)
        if "kwargs" in takes:  # what a DDP strategy does not know it hands on
            takes |= _arguments(DistributedDataParallel)
        for key in parent:
            if key not in takes:
                raise options.unknown_option(key, [*known, "optimizer_checkpoint", *takes])
        super().__init__(**parent)


def _arguments(kind: Any) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters) - {"self"}


def _check(given: Mapping[str, Any]) -> None:
    """Raises what KLShampoo would for these options, before any process is started."""
    group = {**options.DEFAULTS, **{key: value for key, value in given.items() if key in options.DEFAULTS}}
    options.resolve(group)
    if given.get("on_nonfinite", "skip") not in ("skip", "raise"):
        raise ValueError(f'on_nonfinite is "skip" or "raise", not {given["on_nonfinite"]!r}')
    if given.get("convert_lr", "rule") not in rates.WAYS:
        raise ValueError(f'convert_lr is "rule" or "keep", not {given["convert_lr"]!r}')
    if given.get("convert_lr") == "rule" and given.keys() & {"lr", "matrix_lr"}:
        raise ValueError("convert_lr='rule' makes the matrices' learning rate of AdamW's: leave out lr and matrix_lr")
