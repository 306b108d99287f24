"""What it costs a process to tell the others that it is still there: kl_dist.watch, CPU microseconds.

    OMP_NUM_THREADS=1 python -m benchmarks.watch                  2 and 4 processes, a TCPStore beside them

`sign`: what a thread does in each interval, at most every 5 s; the first rank's is to listen to all. `doing`: what the
training's own thread does once or a few times a step. Medians of rounds, the largest of the ranks.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kl_dist.watch import Watch


def per_call(call: Callable[[], object], calls: int, rounds: int) -> float:
    """CPU microseconds of this thread."""
    found = []
    for _ in range(rounds):
        began = time.thread_time()
        for _ in range(calls):
            call()
        found.append((time.thread_time() - began) / calls * 1e6)
    return median(found)


def measure(rank: int, ranks: int, port: int, folder: str, args: argparse.Namespace) -> None:
    """One rank; what it found goes to a file."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=ranks)
    watch = Watch(dist.PrefixStore("watched", store), rank, ranks, patience=300)
    watch.exchange(time.monotonic())
    dist.barrier()
    sign = per_call(lambda: watch.exchange(time.monotonic()), args.calls, args.rounds)
    doing = per_call(lambda: watch.doing("step 12"), args.calls, args.rounds)
    Path(folder, f"{rank}").write_text(json.dumps({"sign": sign, "doing": doing}))
    dist.barrier()
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a file of JSON lines to add the results to")
    args = parser.parse_args(argv)
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            mp.spawn(measure, (ranks, server.port, folder, args), nprocs=ranks)
            found = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
        record = {"ranks": ranks} | {name: round(max(one[name] for one in found), 1) for name in ("sign", "doing")}
        print("{ranks} ranks: a sign {sign} us, what a rank is doing {doing} us".format(**record))
        if args.out:
            record |= {"torch": torch.__version__, "python": platform.python_version(), "calls": args.calls}
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
