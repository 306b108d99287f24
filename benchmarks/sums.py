"""What checksums of the state cost: making and comparing them beside saving and loading, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.sums              two GPT blocks of width 384 and an embedding
    OMP_NUM_THREADS=1 python -m benchmarks.sums --width 768 --blocks 2 --vocabulary 16384
    OMP_NUM_THREADS=1 python -m benchmarks.sums --width 768 --blocks 12 --vocabulary 50257      GPT-2 124M

Process CPU seconds, medians: of making them (for a save), of looking at them again within a load of the full state by
torch.load (`verify_share` of the load), and of loads with and without. By torch.distributed.checkpoint into a temporary
folder, whose files are in the page cache, and by torch.save of the full state.

A job that resumes reads a disk: `disk_` is of wall time, of the same file, sent out of the page cache before each load,
beside looking at the checksums by that clock (`disk_verify_share`) and plainly reading the file. That the disk was
asked for all of it is checked by the kernel's count of the bytes that this process had fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import kl_dist
from benchmarks.gpu import gpt_shapes
from kl_dist import KLShampoo
from kl_dist.checkpoint import sums, verify
from kl_dist.checkpoint.load import faults
from kl_dist.checkpoint.saved import read
from kl_dist.checkpoint.seals import SAVED


def made(width: int, blocks: int, vocabulary: int) -> KLShampoo:
    """An optimizer after a step on made-up gradients."""
    named = [
        (f"matrix{i}", nn.Parameter(0.02 * torch.randn(shape))) for i, shape in enumerate(gpt_shapes(width, blocks))
    ]
    embedding = ("embedding", nn.Parameter(torch.randn(vocabulary, width)))
    optimizer = KLShampoo([*named, embedding], lr=1e-3, adamw_names=("embedding",))
    for _, parameter in [*named, embedding]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def without_sums(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it was before there were checksums."""
    entries = {
        name: {key: x for key, x in one.items() if not verify.is_sums(key)} for name, one in state["state"].items()
    }
    groups = [{key: x for key, x in group.items() if key != SAVED} for group in state["param_groups"]]
    return {**state, "state": entries, "param_groups": groups}


def seconds(
    work: Callable[[], Any],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
    before: Callable[[], Any] = lambda: None,
) -> float:
    """Median, by default of CPU seconds, with something done before each that is not counted."""
    found = []
    for _ in range(repeats):
        before()
        began = clock()
        work()
        found.append(clock() - began)
    return statistics.median(found)


def from_disk(work: Callable[[], Any], file: Path, repeats: int) -> float:
    """Median of wall seconds of work that reads the file, which is not in the page cache (Linux).

    Raises:
        RuntimeError: it was there all the same, as in a file system in memory.
    """

    def forget() -> None:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def fetched() -> int:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(counts["read_bytes"])

    began = fetched()
    found = seconds(work, repeats, time.perf_counter, forget)
    if fetched() - began < 0.99 * repeats * file.stat().st_size:
        raise RuntimeError(f"{file} did not come from a disk: give a folder on one by --folder")
    return found


def read_through(file: Path) -> None:
    memory = bytearray(1 << 24)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(memory):
            pass


def measure(args: argparse.Namespace) -> dict[str, Any]:
    optimizer, target = (made(args.width, args.blocks, args.vocabulary) for _ in range(2))
    held, rank = optimizer.parts.holdings, 0
    size = sum(one.memory.nbytes for one in held)
    making = seconds(lambda: sums.with_sums(held, 1, rank), args.repeats)
    state = kl_dist.full_state_dict(optimizer)
    saved = read(state, optimizer.param_groups)
    verifying = seconds(lambda: list(faults(held, saved)), args.repeats)
    largest = max((x for one in state["state"].values() for x in one.values()), key=lambda x: x.nbytes)
    raw = largest.numpy()
    crc = seconds(lambda: zlib.crc32(raw), args.repeats) * size / raw.nbytes
    verifying_by_wall = seconds(lambda: list(faults(held, saved)), args.repeats, time.perf_counter)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file, bare = Path(folder, "full.pt"), Path(folder, "bare.pt")
        torch.save(state, file)
        torch.save(without_sums(state), bare)
        full = [
            seconds(lambda path=path: kl_dist.load_full_state_dict(target, torch.load(path)), args.repeats)  # type: ignore[misc]
            for path in (file, bare)
        ]
        disk = from_disk(lambda: kl_dist.load_full_state_dict(target, torch.load(file)), file, args.repeats)
        reading = from_disk(lambda: read_through(file), file, args.repeats)
        file_size = file.stat().st_size
        dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=f"{folder}/dcp")

        def load(checked: bool) -> None:
            places = {"optimizer": target.state_dict() if checked else without_sums(target.state_dict())}
            dcp.load(places, checkpoint_id=f"{folder}/dcp")
            target.load_state_dict(places["optimizer"])

        divided = [seconds(lambda checked=checked: load(checked), args.repeats) for checked in (True, False)]  # type: ignore[misc]
    return {
        "state_bytes": size,
        "sums_seconds": making,
        "sums_bytes_per_second": size / making,
        "verify_seconds": verifying,
        "verify_share": verifying / full[0],
        "crc32_seconds": crc,
        "full_load_seconds": full[0],
        "full_load_without": full[1],
        "disk_verify_seconds": verifying_by_wall,
        "disk_verify_share": verifying_by_wall / disk,
        "disk_load_seconds": disk,
        "disk_bytes_per_second": file_size / reading,
        "dcp_load_seconds": divided[0],
        "dcp_load_without": divided[1] - making,  # state_dict() makes them there too
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "width": args.width,
        "blocks": args.blocks,
        "vocabulary": args.vocabulary,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints, on a disk")
    parser.add_argument("--out", type=Path, help="a file to which a line of JSON is added")
    args = parser.parse_args(argv)
    logging_off()
    found = measure(args)
    print(json.dumps(found, indent=1))
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(found) + "\n")


def logging_off() -> None:
    """Of what is loaded without checksums every load says so."""
    import logging

    logging.getLogger("kl_dist").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
