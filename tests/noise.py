"""What relative noise of 1e-7 on the gradients does to a run in float32: the yardstick of "equal but for rounding".

The numbers are in golden/noise.json, made once, so that a change which makes training chaotic fails instead of widening
its own limit. `python -m tests.noise` makes them anew; a change of a run that they are for (its model, steps, options)
needs that. Each test module says its runs: YARDSTICKS, by name, seed -> weights, the seed 0 being without noise.
"""

import json
import platform
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.models import deviation

FILE = Path(__file__).parent / "golden" / "noise.json"
MODULES = (
    "test_cuda",
    "test_deepspeed_checkpoints",
    "test_deepspeed_training",
    "test_distributed",
    "test_distributed_features",
    "test_distributed_reduced",
    "test_distributed_resume",
    "test_distributed_sharded",
    "test_lightning_checkpoints",
    "test_lightning_deepspeed",
    "test_lightning_training",
)
NOISE = 1e-7
SEEDS = range(1, 8)
CAP = 0.005
"""No run is worth comparing that this noise moves further: its limit would pass what is wrong."""


@cache
def recorded() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def float32_limit(name: str) -> float:
    """Three times the largest deviation that noise made of a run."""
    return 3 * recorded()["deviation"][name]


def measured(run: Any) -> float:
    expected = run(0)
    return max(deviation(run(seed), expected) for seed in SEEDS)


def main() -> None:
    torch.set_num_threads(1)
    runs = {name: run for module in MODULES for name, run in import_module(f"tests.{module}").YARDSTICKS.items()}
    found = {name: float(f"{measured(runs[name]):.2e}") for name in tqdm(runs)}
    if wild := {name: x for name, x in found.items() if x > CAP}:
        raise SystemExit(f"chaotic, so no yardstick: {wild}")
    made_with = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    made_with |= {"noise": NOISE, "seeds": len(SEEDS)}
    FILE.write_text(json.dumps({"made_with": made_with, "deviation": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
