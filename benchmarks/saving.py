"""What a checkpoint of the optimizer costs each rank: bytes it writes, beside what it holds, and seconds.

    OMP_NUM_THREADS=1 python -m benchmarks.saving                    1, 2 and 4 processes under DDP

By torch.distributed.checkpoint, into a temporary folder. `metadata` is what the ranks tell each other to plan the save,
and what the first of them writes of it; all else they write by themselves. The last column is the plan's figure for the
matrices of GPT-2 124M on as many ranks: what each would write.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn

import kl_dist
from benchmarks.gpu import WIDTHS, gpt_shapes
from kl_dist import KLShampoo


def measure(rank: int, ranks: int, folder: str, args: argparse.Namespace) -> None:
    """One rank; what it found goes to a file beside the checkpoint."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    parameters = [nn.Parameter(0.02 * torch.randn(shape)) for shape in gpt_shapes(args.width, args.blocks)]
    optimizer = KLShampoo(parameters, lr=1e-3)
    seconds = []
    for _ in range(args.repeats):
        dist.barrier()
        began = time.perf_counter()
        dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
        seconds.append(time.perf_counter() - began)
    written = sum(path.stat().st_size for path in Path(folder, "checkpoint").glob(f"__{rank}_*"))
    metadata = Path(folder, "checkpoint", ".metadata").stat().st_size
    found = {"held": optimizer.plan.state_bytes[rank], "written": written, "seconds": median(seconds)}
    Path(folder, f"found-{rank}").write_text(json.dumps(found | {"metadata": metadata}))
    dist.barrier()
    dist.destroy_process_group()


def gpt2_share(ranks: int) -> int:
    """State bytes of the fullest rank for the matrices of GPT-2 124M."""
    width, blocks = WIDTHS["gpt2-124m"]
    with torch.device("meta"):
        matrices = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in gpt_shapes(width, blocks))
    return max(kl_dist.plan(matrices, world_size=ranks).state_bytes)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    print("| ranks | held, MB, largest | written, MB, largest | metadata, MB | seconds | GPT-2 124M would hold, MB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (ranks, folder, args), nprocs=ranks)
            found: list[dict[str, Any]] = [
                json.loads(Path(folder, f"found-{rank}").read_text()) for rank in range(ranks)
            ]
        held, written = (max(one[key] for one in found) / 1e6 for key in ("held", "written"))
        metadata, seconds = found[0]["metadata"] / 1e6, max(one["seconds"] for one in found)
        share = gpt2_share(ranks) / 1e6
        print(f"| {ranks} | {held:.1f} | {written:.1f} | {metadata:.2f} | {seconds:.2f} | {share:.0f} |")


if __name__ == "__main__":
    main()
