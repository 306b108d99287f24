"""The tables of docs/learning.md over batch and length, from the lines that benchmarks/batches.sh makes.

    python -m benchmarks.arenas                     Markdown: a row for each setting, a column for each arena
    python -m benchmarks.arenas 1024x400 8192x400   bytes a step x steps

A cell has the final validation loss by learning rate, of seeds 0, 1, .. where there are several; in bold the best mean
of those rates that have three seeds, or as many as any has. tests/test_benchmarks_arenas.py holds the page to it.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import results as records

RESULTS = Path(__file__).parent / "results" / "batches.jsonl"
ARENAS = ["1024x150", "8192x150", "1024x400", "8192x400", "32768x400", "1024x2000", "1024x10000"]
WIDTH = 64

ENOUGH = 3  # seeds

THREE_STEPS = "start, three steps"  # what `polar="start"` was before it had a fourth, that leaves rounding alone

KL = {"shampoo_exponent": (0.7,), "final_beta1": (0.99,), "betas": ([0.9, 0.9],)}
NEVER_GROWN = {"final_beta1": (None, 0), "betas": ([0.9, 0.9],)}
HALF = {"shampoo_exponent": (0.5,), **NEVER_GROWN}
SOAPS = {"betas": ([0.95, 0.95],)}
MUONS = {"betas": ([0.85, 0.95],)}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "**KL-Shampoo**": ("kl_shampoo", {"polar": ("start",), **KL}),
    "KL-Shampoo, a start of three steps": ("kl_shampoo", {"polar": (THREE_STEPS,), **KL}),
    "KL-Shampoo, polar=0": ("kl_shampoo", {"polar": (0,), **KL}),
    "KL-Shampoo, polar=3": ("kl_shampoo", {"polar": (3,), **KL}),
    "KL-Shampoo, final_beta1=0 polar=0": ("kl_shampoo", {"polar": (0,), "shampoo_exponent": (0.7,), **NEVER_GROWN}),
    "KL-Shampoo, the same at an exponent of 1/2": ("kl_shampoo", {"polar": (None, 0), **HALF}),
    "KL-Shampoo, that and polar=3": ("kl_shampoo", {"polar": (3,), **HALF}),
    "KL-SOAP": ("kl_soap", {"polar": ("start",), **SOAPS}),
    "KL-SOAP, a start of three steps": ("kl_soap", {"polar": (THREE_STEPS,), **SOAPS}),
    "KL-SOAP, polar=0": ("kl_soap", {"polar": (0,), **SOAPS}),
    "SOAP": ("soap", {"polar": ("start",), **SOAPS}),
    "SOAP, a start of three steps": ("soap", {"polar": (THREE_STEPS,), **SOAPS}),
    "SOAP, polar=0": ("soap", {"polar": (0,), **SOAPS}),
    'Muon, square blocks (`method="muon"`)': ("kl_muon", {"final_beta1": (None, 0), **MUONS}),
    "Muon, square blocks, final_beta1=0.99": ("kl_muon", {"final_beta1": (0.99,), **MUONS}),
    "Muon, whole matrices (torch's)": ("muon", {}),
    "AdamW": ("adamw", {"betas": ([0.9, 0.95],)}),
}
"""By what they are called: the optimizer of launch/train.py, and its options in effect, one of several each. Lines from
before an option existed have none."""

Losses = Mapping[float, Mapping[int, float]]
"""By learning rate and seed."""


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the matrices, which come first where a group has several methods; pairs stay pairs."""
    found = dict(group)
    for key, value in group.items():
        is_pair = key.endswith("betas") and value and not isinstance(value[0], list)
        found[key] = value[0] if isinstance(value, list) and value and not is_pair else value
    return found


def is_of(line: Mapping[str, Any], group: Mapping[str, Any], optimizer: str, options: Mapping[str, Any]) -> bool:
    """Whether a run is of this optimizer with these options, a twentieth of its steps to warm up, and T = 2."""
    settings = line["settings"]
    return (
        settings["optimizer"] == optimizer
        and settings["width"] == WIDTH
        and settings["warmup"] == settings["steps"] // 20
        and "recipe" not in line["label"]
        and group.get("precondition_frequency") in (None, 2)
        and all(group.get(key) in values for key, values in options.items())
    )


def losses(lines: Sequence[Mapping[str, Any]], arena: str, optimizer: str, options: Mapping[str, Any]) -> Losses:
    """Of the last run of each learning rate and seed."""
    tokens, steps = map(int, arena.split("x"))
    found: dict[float, dict[int, float]] = defaultdict(dict)
    for line in lines:
        settings = line["settings"]
        group = options_of(settings["groups"][0])
        if (settings["tokens_per_step"], settings["steps"]) == (tokens, steps) and is_of(
            line, group, optimizer, options
        ):
            found[group.get("base_lr") or group["lr"]][settings["seed"]] = line["evaluations"][-1][2]
    return found


def cell(found: Losses) -> str:
    enough = min(ENOUGH, max(map(len, found.values()), default=0))
    means = {lr: statistics.mean(by_seed.values()) for lr, by_seed in found.items() if len(by_seed) >= enough}
    best = min(means, key=lambda lr: means[lr], default=0.0)
    said = []
    for lr, by_seed in sorted(found.items()):
        values = ", ".join(f"{by_seed[seed]:.3f}" for seed in sorted(by_seed))
        said.append(
            f"{f'**{values}**' if lr == best else values} at {f'{lr:.1e}'.replace('e-0', 'e-').replace('.0', '')}"
        )
    return "; ".join(said)


def read(results: Path) -> list[dict[str, Any]]:
    """Finished runs."""
    return [line for line in records.read(results) if line.get("evaluations")]


def table(lines: Sequence[Mapping[str, Any]], arenas: Sequence[str]) -> list[str]:
    """Markdown, of those settings that were run in any of the arenas."""
    rows = [f"| | {' | '.join(arenas)} |", "|---" * (len(arenas) + 1) + "|"]
    for name, (optimizer, options) in SETTINGS.items():
        cells = [cell(losses(lines, arena, optimizer, options)) for arena in arenas]
        if any(cells):
            rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arenas", nargs="*", default=ARENAS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    print("\n".join(table(read(asked.results), asked.arenas)))


if __name__ == "__main__":
    main()
