"""Which values an option may have; what is none of them is an error that says what is."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from kl_dist.methods import METHODS, compact, polar
from kl_dist.methods.products import COMPUTE_DTYPES

ADJUSTMENTS = ("original", "match_rms_adamw")


def longest_memory(dtype: torch.dtype) -> float:
    """The largest b for which b x, rounded to the nearest in this dtype, is less than x: 1 - 2^-8 in bfloat16."""
    return 1 - torch.finfo(dtype).eps / 2


def check_numbers(group: Mapping[str, Any]) -> None:
    """The checks on what schedulers and users may change between steps."""
    for key in ("lr", "eps", "weight_decay"):
        _check_number(key, group[key], 0.0, math.inf)
    for key in ("matrix_lr", "adamw_lr", "base_lr"):
        if group.get(key) is not None:
            _check_number(key, group[key], 0.0, math.inf)
    for key in ("betas", "adamw_betas"):
        pair = group[key]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{key} is a pair of numbers, not {pair!r}")
        for name, beta in zip((f"{key}[0]", f"{key}[1]"), pair, strict=True):
            _check_number(name, beta, 0.0, 1.0)
    if group["shampoo_beta"] is not None:
        _check_number("shampoo_beta", group["shampoo_beta"], 0.0, 1.0)
    _check_memory(group)
    _check_growth(group)
    _check_rounding(group)
    if group["shampoo_exponent"] is not None:
        _check_number("shampoo_exponent", group["shampoo_exponent"], 1e-3, 1.0)
    if group["adjust_lr_fn"] is not None:
        check_choice(group, "adjust_lr_fn", ADJUSTMENTS)
    if group["compute_dtype"] is not None:
        check_choice(group, "compute_dtype", COMPUTE_DTYPES)
    check_integer(group, "precondition_frequency")
    check_flag(group, "nesterov")
    check_flag(group, "stagger")
    _check_polar(group)


def check_flag(group: Mapping[str, Any], key: str) -> None:
    """Raises TypeError for what is neither True nor False."""
    if not isinstance(group[key], bool):
        raise TypeError(f"{key} is True or False (or None for the recipe's), not {group[key]!r}")


def _check_memory(group: Mapping[str, Any]) -> None:
    """Factors that remember one gradient alone have no eigenvalue where the momentum still points."""
    method, recipe = group["method"], group["recipe"]
    if method not in METHODS or METHODS[method].rules[recipe].refresh is None:
        return
    for name, beta in (("betas[1]", group["betas"][1]), ("shampoo_beta", group["shampoo_beta"])):
        if beta is not None and float(beta) == 0:
            raise ValueError(
                f"{name} must be above 0 with method {method!r}: factors of one gradient alone have no eigenvalue in"
                " the directions of the momentum, and updates grow a millionfold"
            )


def _check_growth(group: Mapping[str, Any]) -> None:
    if group["final_beta1"] is None:
        return
    _check_number("final_beta1", group["final_beta1"], 0.0, 1.0)
    recipe = group["recipe"] if group["method"] in METHODS else None
    if float(group["final_beta1"]) > 0 and recipe == "paper":
        raise ValueError('final_beta1 must be 0 or None under recipe "paper", whose momentum keeps betas[0]')


def _check_rounding(group: Mapping[str, Any]) -> None:
    """Averages kept narrow, which lose less in a step than half of their last bit, never forget."""
    if group["method"] not in METHODS or group["recipe"] != "compact":
        return
    factors = "betas[1]" if group["shampoo_beta"] is None else "shampoo_beta"
    betas = {**group, "betas[0]": group["betas"][0], "betas[1]": group["betas"][1]}
    for name, field in (("betas[0]", "exp_avg"), ("final_beta1", "exp_avg"), (factors, "factors")):
        dtype = compact.NARROW[field]
        if betas[name] is not None and float(betas[name]) > longest_memory(dtype):
            raise ValueError(
                f'{name} must be at most {longest_memory(dtype):.4f} under recipe "compact", not {betas[name]!r}: what'
                f" is kept in {str(dtype).removeprefix('torch.')} and is to lose less than half its last bit in a step"
                " is rounded to what it was, and never forgets"
            )


def _check_polar(group: Mapping[str, Any]) -> None:
    steps = group["polar"]
    if steps != polar.START:
        said = f"polar is {polar.START!r} or a whole number of Newton-Schulz steps, not {steps!r}"
        if isinstance(steps, bool) or not isinstance(steps, (int, str)):
            raise TypeError(said)
        if isinstance(steps, str) or steps < 0:
            raise ValueError(said)
    method, recipe = group["method"], group["recipe"]
    if group["polar"] and method in METHODS and not METHODS[method].rules[recipe].polar:
        raise ValueError(
            f"polar must be 0 or None with method {method!r} under recipe {recipe!r}, which has no such step"
        )


def check_choice(group: Mapping[str, Any], key: str, known: tuple[str, ...]) -> None:
    """Raises ValueError for what is not among the known, with the nearest of them."""
    if group[key] not in known:
        raise ValueError(f"unknown {key} {group[key]!r}{nearest(group[key], known)}")


def _check_number(name: str, value: Any, least: float, below: float) -> None:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several elements
        raise TypeError(f"{name} is a number, not {value!r}") from None
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} is a number, not {value!r}")
    if not least <= number < below:  # also refuses NaN
        upper = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{name} must be at least {least:g} and {upper}, not {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raises TypeError or ValueError for an argument that is neither None nor a whole number, at least 1."""
    if value is not None:
        check_integer({name: value}, name)


def check_integer(group: Mapping[str, Any], key: str, least: int = 1) -> None:
    """Raises TypeError or ValueError for what is no whole number, or less than `least`."""
    value = group[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} is a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{key} must be at least {least}, not {value!r}")


def nearest(word: object, known: Iterable[str], spelt: Callable[[str], str] = repr) -> str:
    """The end of an error about a word that is not known: which was probably meant, or else all that there are."""
    known = sorted(known)
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"; did you mean {spelt(close[0])}?" if close else f"; there are {', '.join(map(spelt, known))}"
