"""Optimizers of adapters side by side: launch/compare.py with the task of launch/lora.py.

python -m benchmarks.finetuning --rank 8 --run "--optimizer adamw" --grid lr=1e-3,2e-3,4e-3
benchmarks/finetuning.sh          all that docs/finetuning.md shows
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch import compare
from launch.lora import Finetuning
from launch.runs import TASKS

# At import, so that the processes which make the runs know it too.
TASKS["finetuning"] = Finetuning


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, then the table and the picture; returns the exit status."""
    return compare.main(["--task", "finetuning", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
