"""Slow, plain references of every method and recipe, for one logical tensor of K >= 2 sides.

They are the independent witnesses that the engine is tested against, so they are written from the equations of the
spec alone and never for speed: factors S_k and momentum M stay in the original coordinates, every product is a
tensor contraction on one side, nothing is batched, and the arithmetic is float64 unless asked otherwise.

    ref = reference("kl_shampoo", "fresh", (8, 6), lr=1e-2, betas=(0.95, 0.95), eps=1e-8,
                    weight_decay=0.01, precondition_frequency=2)
    W = ref.step(W, G)          # a new tensor; W and G are left as they are
"""

from collections.abc import Sequence

import torch

from tests.reference import fresh, muon, paper
from tests.reference.options import Options

METHODS: dict[tuple[str, str], type[paper.Reference] | type[fresh.Reference]] = {
    ("kl_shampoo", "paper"): paper.KLShampoo,
    ("kl_soap", "paper"): paper.KLSOAP,
    ("soap", "paper"): paper.SOAP,
    ("shampoo", "paper"): paper.Shampoo,
    ("kl_shampoo", "fresh"): fresh.KLShampoo,
    ("kl_soap", "fresh"): fresh.KLSOAP,
    ("soap", "fresh"): fresh.SOAP,
    ("shampoo", "fresh"): fresh.Shampoo,
    ("muon", "paper"): muon.Released,
    ("muon", "fresh"): muon.Muon,
    ("muon", "normuon"): muon.NorMuon,
}


def reference(
    method: str,
    recipe: str,
    shape: Sequence[int],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    precondition_frequency: int,
    nesterov: bool | None = None,
    final_beta1: float | None = None,
    shampoo_beta: float | None = None,
    phase: int = 0,
    shampoo_exponent: float | None = None,
    adjust_lr_fn: str | None = None,
    polar: Sequence[tuple[float, float, float]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> paper.Reference | fresh.Reference:
    """The reference of `method` under `recipe` for one tensor of `shape`: an object with `.step(W, G) -> W_new`.

    `phase` staggers the refreshes: one follows step t when (t + phase) % precondition_frequency == 0. `nesterov=None`
    is what the recipe does (paper: off, but for Muon; else on), `shampoo_beta=None` is beta2, `shampoo_exponent=None`
    is 0.7 of a fresh KL-Shampoo and 1/(2K) of Shampoo, `adjust_lr_fn=None` the recipe's,
    `final_beta1=None` is 0.99 of a fresh KL-Shampoo and else `betas[0]`.
    `polar` are the coefficients (a, b, c) of a fresh matrix's Newton-Schulz steps, if any; None are none, but of
    KL-Shampoo, KL-SOAP and SOAP a start in the first min(5 / (1 - b), 750) updates, b the memory of what divides.
    """
    if len(shape) < 2:
        raise ValueError(f"a reference serves tensors of two or more sides, not of shape {tuple(shape)}")
    plain = recipe == "paper" and method != "muon"
    if plain and nesterov:
        raise ValueError("the paper recipe has no Nesterov momentum")
    beta1, beta2 = betas
    grown = 0.99 if (method, recipe) == ("kl_shampoo", "fresh") else beta1
    default = 0.7 if (method, recipe) == ("kl_shampoo", "fresh") else 1 / (2 * len(shape))
    factor_beta = beta2 if shampoo_beta is None else shampoo_beta
    divides = factor_beta if method == "kl_shampoo" else beta2
    starts = polar is None and recipe == "fresh" and method in ("kl_shampoo", "kl_soap", "soap")
    options = Options(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        factor_beta=factor_beta,
        eps=eps,
        weight_decay=weight_decay,
        refresh_every=precondition_frequency,
        phase=phase,
        final_beta1=grown if final_beta1 is None else final_beta1,
        nesterov=not plain if nesterov is None else nesterov,
        exponent=default if shampoo_exponent is None else shampoo_exponent,
        adjust_lr_fn=adjust_lr_fn,
        polar=tuple(polar or ()),
        start_updates=round(min(5 / (1 - divides), 750)) if starts else 0,
        dtype=dtype,
    )
    return METHODS[method, recipe](tuple(shape), options)
