"""How fast a machine computes and communicates: presets by data sheet, and this CPU, measured on the spot."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kl_dist import KLShampoo
from kl_dist.planning import costs
from kl_dist.planning.links import links_of
from kl_dist.planning.matrices import Block
from kl_dist.step.engine import full_precision


@dataclass(frozen=True)
class Machine:
    """Rates of one rank, and of the links between ranks."""

    name: str
    flops: float  # of matrix products, per second
    refresh_flops: float  # of a refresh as kl_dist.planning.costs counts them, per second
    memory: float  # bytes per second, read and written
    within: float  # bytes per second that a rank sends to others of its node
    between: float  # and to those of other nodes
    latency: float  # seconds that an exchange takes beside its bytes
    host: float = 0.0  # seconds that a step takes whatever is computed; 0 where a device hides them
    per_byte: float = 0.0  # seconds that the host takes for each byte it sends, where it moves them itself
    cores: int | None = None  # ranks of a node that compute at a time; None: all of them

    def sharing(self, ranks: int) -> float:
        """How many times as long a rank computes where so many stand on its node."""
        return max(1.0, ranks / self.cores) if self.cores else 1.0


PRESETS = {
    "h100": Machine(
        "H100 SXM, half of what its data sheet says: TF32, HBM3, NVLink 4, 400 Gb/s a rank",
        flops=250e12,
        refresh_flops=25e12,
        memory=1.7e12,
        within=225e9,
        between=25e9,
        latency=20e-6,
    ),
}
"""[Note: presets] No H100 was at hand: products at half of 494 TFLOP/s, memory and links at half of their speed. Of a
refresh the rate is an H200's (docs/gpu.md): the 1.48 Tflop that are counted for GPT-2 124M's took it 62 ms."""

LARGEST, MOST = 1024, 32  # side and number of the matrices that this CPU is measured with
MOST_WORK = 8 * 512**3  # d^3 of all of them together; they are two at least, to take turns at T = 2
EVERY = 2  # T of the steps that refreshes are measured in
REPEATS = 5
SECONDS = 0.05  # of one repetition, about


def this_cpu(side: int, ranks: int = 1, matrices: int = 8, sharded: bool = False) -> Machine:
    """Rates of this CPU, one thread a rank, on `matrices` a rank of `side` x `side` in float32; takes 5 to 30 seconds.

    Products, and a step with nothing to compute, are timed alone; what a real step takes beside these counts as memory
    traffic, and what it takes more at T = 2 as refreshes. Links are measured by gloo between as many processes as there
    are `ranks`, four at most, by all-to-alls where parameters are `sharded`, as FSDP2's, else by all-gathers. What a
    step of theirs takes beside all this is the host's, and where no rank computes its exchanges are waited for.
    """
    side = min(side, LARGEST)
    matrices = min(matrices, MOST, max(EVERY, MOST_WORK // side**3))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        products = _products(side)
        alone, plain, refreshing = _step(4, matrices).cpu, _step(side, matrices).cpu, _step(side, matrices, EVERY).cpu
        computing = refreshing - alone
        links = _links(min(ranks, 4), side, matrices, computing, sharded) if ranks > 1 else Links(0.0, 1e9, alone, 0.0)
    finally:
        torch.set_num_threads(threads)
    block = Block(0, ((0, side), (0, side)), ("full", "full"))
    work = costs.Work(*(matrices * x for x in costs.matrix_work("kl_shampoo", "fresh", block, torch.float32, 0)))
    return Machine(
        f"this CPU, one thread of {_cores()}",
        products,
        work.refresh / EVERY / max(refreshing - plain, 1e-9),
        min(_most_memory(), work.moved / max(plain - alone - work.products / products, 1e-9)),
        links.bandwidth,
        links.bandwidth,
        links.latency,
        host=links.host,
        per_byte=links.per_byte,
        cores=_cores(),
    )


def _cores() -> int:
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1


def _seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call, the median of a few: what else runs on the machine does not count."""
    work()
    began = time.process_time()
    work()
    count = max(1, round(SECONDS / max(time.process_time() - began, 1e-9)))
    found = []
    for _ in range(REPEATS):
        began = time.process_time()
        for _ in range(count):
            work()
        found.append((time.process_time() - began) / count)
    return median(found)


def _products(side: int) -> float:
    a, b, out = (torch.randn(8, side, side) for _ in range(3))
    with full_precision(a.device):
        return 8 * 2 * side**3 / _seconds(lambda: torch.bmm(a, b, out=out))


def _most_memory() -> float:
    """Bytes per second of an addition, which nothing moves faster than."""
    x, y = torch.randn(1 << 22), torch.randn(1 << 22)
    return 3 * x.nbytes / _seconds(lambda: x.add_(y))


class Step(NamedTuple):
    """Of one step, on average."""

    cpu: float  # seconds
    wall: float  # seconds
    sent: int  # bytes
    exchanges: int  # of them, and one for each doubling of the ranks that agree


def _step(side: int, matrices: int, every: int = 1 << 30, sharded_on: DeviceMesh | None = None) -> Step:
    """A step with its share of the refreshes, which by default has none; a collective, where there are ranks."""
    some = torch.arange(float(side * side)).sin().view(side, side)  # the same on every rank
    if sharded_on is not None:
        some = distribute_tensor(some, sharded_on, [Shard(0)])
    parameters = [torch.nn.Parameter(some.clone()) for _ in range(matrices)]
    optimizer = KLShampoo(parameters, compare_every=1 << 30, precondition_frequency=every)
    cpu, wall = [], []
    for _ in range(4 * REPEATS if side <= 128 else REPEATS):
        spent, passed = 0.0, 0.0
        for _ in range(EVERY):
            for parameter in parameters:
                parameter.grad = some.clone()
            began, worked = time.perf_counter(), time.process_time()
            optimizer.step()
            spent += time.process_time() - worked
            passed += time.perf_counter() - began
        cpu.append(spent / EVERY)
        wall.append(passed / EVERY)
    plan, rank = optimizer.plan, dist.get_rank() if dist.is_initialized() else 0
    links = links_of(plan.buckets, plan.travelling(rank)[0], rank, plan.world_size)
    exchanges = links.exchanges + math.ceil(math.log2(plan.world_size))
    return Step(median(cpu), median(wall), links.within + links.between, exchanges)


# -- several processes -------------------------------------------------------------------------------------------------

SMALL, LARGE = 1 << 10, 8 << 20


class Links(NamedTuple):
    """What some processes found."""

    latency: float  # seconds that a step waits for an exchange, however small
    bandwidth: float  # bytes per second of a large one
    host: float  # CPU seconds of a step beside what it computes and sends
    per_byte: float  # CPU seconds of a rank for each byte it sends


def _links(ranks: int, side: int, matrices: int, computing: float, sharded: bool) -> Links:
    """Between so many ranks, each of which computes for so many CPU seconds in a step."""
    with TemporaryDirectory() as folder:
        mp.spawn(_exchange, (f"{folder}/store", ranks, side, matrices, sharded), nprocs=ranks)
        found = [tuple(map(float, Path(f"{folder}/store.{rank}").read_text().split())) for rank in range(ranks)]
    small, large, sending, cpu, wall, sent, exchanges = map(median, zip(*found, strict=True))
    bandwidth = (ranks - 1) * LARGE / max(large - small, 1e-9)
    per_byte = sending / ((ranks - 1) * LARGE)
    waited = wall - cpu * max(1.0, ranks / _cores()) - sent / bandwidth
    return Links(max(small, waited / exchanges), bandwidth, max(0.0, cpu - computing - sent * per_byte), per_byte)


def _exchange(rank: int, store: str, ranks: int, side: int, matrices: int, sharded: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    found, cpu = [], 0.0
    for nbytes in (SMALL, LARGE):
        mine, room = torch.zeros(ranks, nbytes // 4), torch.zeros(ranks, nbytes // 4)
        times, spent = [], []
        for _ in range(2 * REPEATS):
            dist.barrier()
            began, worked = time.perf_counter(), time.process_time()
            if sharded:
                dist.all_to_all_single(room, mine)
            else:
                dist.all_gather(list(room), mine[0])
            times.append(time.perf_counter() - began)
            spent.append(time.process_time() - worked)
        found.append(min(times))
        cpu = median(spent)
    mesh = init_device_mesh("cpu", (ranks,)) if sharded else None
    found += [cpu, *_step(side, ranks * matrices, EVERY, mesh)]  # of which each rank has its share
    Path(f"{store}.{rank}").write_text(" ".join(map(str, found)))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's caches of DTensors hold the group, and gloo's threads may abort what is taken apart
