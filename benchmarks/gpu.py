"""The step on a GPU, over the matrices of GPT-2 at three sizes; timed with CUDA events.

One contender is on the device at a time: at 1.3B parameters the state of two would not fit beside each other. A GPU
lent to one job drifts little, so nothing is interleaved here. Several steps lie between two events, because the host
runs ahead of the device and a single step can be shorter than its launch.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.contenders import Contender
from benchmarks.timing import Runner

WIDTHS = {"gpt2-124m": (768, 12), "gpt2-350m": (1024, 24), "gpt2-1.3b": (2048, 24)}  # width, blocks


def gpt_shapes(width: int, blocks: int) -> list[tuple[int, ...]]:
    """The four matrices of each block of a GPT: queries, keys and values; attention's output; the MLP's two."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * blocks


def measure_on_gpu(
    contenders: Sequence[Contender], size: str, *, repeats: int, warmup: int, inner: int = 3
) -> tuple[list[Runner], dict[str, str]]:
    """Time each contender in turn; runners come back without their tensors, `state_ratio` taken before.

    `wall` holds seconds per step by the device's clock, `cpu` those of the host's process.

    Args:
        inner: steps of one kind between two events.

    Returns:
        Their runners, and the reason for those that failed, out of memory included.
    """
    finished: list[Runner] = []
    failed: dict[str, str] = {}
    for contender in contenders:
        try:
            finished.append(_measure_one(contender, gpt_shapes(*WIDTHS[size]), repeats, warmup, inner))
        except Exception as problem:  # torch.OutOfMemoryError among them
            failed[contender.name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
        gc.collect()
        torch.cuda.empty_cache()
    return finished, failed


def _measure_one(
    contender: Contender, shapes: Sequence[tuple[int, ...]], repeats: int, warmup: int, inner: int
) -> Runner:
    runner = Runner(contender, shapes, torch.device("cuda"))
    runner.warm_up(warmup)
    for _ in range(repeats):
        for kind in contender.kinds:
            _time_steps(runner, kind, inner)
    runner.release()
    return runner


def _time_steps(runner: Runner, kind: str, inner: int) -> None:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    runner.prepare(kind)
    torch.cuda.synchronize()
    cpu = time.process_time()
    began.record()
    with contextlib.redirect_stdout(sys.stderr):
        for _ in range(inner):
            runner.optimizer.step()
    ended.record()
    torch.cuda.synchronize()
    runner.samples[kind].wall.append(began.elapsed_time(ended) / 1e3 / inner)
    runner.samples[kind].cpu.append((time.process_time() - cpu) / inner)
