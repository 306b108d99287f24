"""A checkpoint that other world sizes can load: DeepSpeed's converter, with our folder beside what it makes.

    python -m deepspeed_integration.universal CHECKPOINTS/global_step400

The result is loaded with `"checkpoint": {"load_universal": true}` in the config.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from deepspeed.checkpoint import ds_to_universal

from deepspeed_integration import checkpoint


def convert(source: Path, target: Path, workers: int = 1) -> None:
    """Make a Universal Checkpoint at `target` of the one at `source`, both <save_dir>/<tag>.

    What an earlier conversion has left at `target` is replaced.

    Raises:
        ValueError: a file of the optimizer's state is missing or damaged; or `source` is of stage 0.
    """
    checkpoint.check(source / checkpoint.FOLDER)
    if not any(source.glob("*zero_pp_rank_*_optim_states.pt")):
        raise ValueError(f"{source} is of ZeRO stage 0, which loads at any world size as it is")
    if (target / checkpoint.FOLDER).is_dir():
        shutil.rmtree(target)
    shutil.copytree(source / checkpoint.FOLDER, target / checkpoint.FOLDER)  # first: DeepSpeed writes the tag last
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # it wants a step count and moments, which are not where it looks
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=convert.__doc__)
    parser.add_argument("source", type=Path, help="<save_dir>/<tag> of a checkpoint")
    parser.add_argument("target", type=Path, nargs="?", help="default: <save_dir>/<tag>_universal")
    given = parser.parse_args()
    source = given.source.resolve()
    try:
        convert(source, given.target or source.with_name(f"{source.name}_universal"))
    except ValueError as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
