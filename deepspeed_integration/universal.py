"""A checkpoint that other world sizes can load: DeepSpeed's converter, with our folder beside what it makes.

python -m deepspeed_integration.universal CHECKPOINTS/global_step400
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from deepspeed.checkpoint import ds_to_universal

from deepspeed_integration import checkpoint


def convert(source: Path, target: Path, workers: int = 1) -> None:
    checkpoint._check(source / checkpoint.FOLDER)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    shutil.copytree(source / checkpoint.FOLDER, target / checkpoint.FOLDER)
    (target.parent / "latest_universal").write_text(target.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?")
    given = parser.parse_args()
    convert(given.source, given.target or given.source.with_name(given.source.name + "_universal"))
